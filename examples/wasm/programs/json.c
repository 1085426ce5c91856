/* Driver: cJSON on the Natural Earth countries, as they are and nested deeply. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "cjson/cJSON.h"
#include "export.h"

static const char countries[] = {
#include "countries.inc"
    0};

static uint32_t fnv1a(const char *s)
{
    uint32_t h = 2166136261u;
    for (; *s; s++) h = (h ^ (unsigned char)*s) * 16777619u;
    return h;
}

/* The hash of the document printed from a duplicate; 0 if the duplicate differs.
 * Takes the document. */
static uint32_t exercise(cJSON *doc)
{
    uint32_t h = 0;
    cJSON *dup = cJSON_Duplicate(doc, 1);
    char *text = cJSON_PrintUnformatted(dup);
    if (text && cJSON_Compare(doc, dup, 1)) h = fnv1a(text);
    cJSON_free(text);
    cJSON_Delete(dup);
    cJSON_Delete(doc);
    return h;
}

/* The whole document: 177 countries and the arcs of their borders, 8 levels deep. */
EXPORT(parse) int32_t parse(void)
{
    cJSON *doc = cJSON_Parse(countries);
    return doc ? (int32_t)exercise(doc) : 0;
}

/* The next string, in document order; NULL at the end. */
static const cJSON *next_string(const cJSON **stack, int *sp)
{
    while (*sp > 0) {
        const cJSON *at = stack[--*sp];
        if (at->next) stack[(*sp)++] = at->next;
        if (cJSON_IsString(at)) return at;
        if (at->child) stack[(*sp)++] = at->child;
    }
    return NULL;
}

/* The countries' kinds, ids and names as a list of `depth` pairs, [v0,[v1,[v2,...]]]:
 * parsed, duplicated, compared, printed and deleted: each pair is one more level
 * of each recursion. */
EXPORT(nest) int32_t nest(int32_t depth)
{
    const cJSON *stack[64];
    int sp = 0, levels = 0;
    size_t len = 0, cap = 0;
    char *text = NULL;
    cJSON *doc = cJSON_ParseWithOpts(strstr(countries, "[{"), NULL, 0), *deep;
    const cJSON *v;
    uint32_t h;

    if (!doc || depth < 1) return 0;
    for (int32_t i = 0; i < depth; i++) {
        if (!(v = next_string(stack, &sp))) {
            stack[sp++] = doc;
            v = next_string(stack, &sp);
        }
        size_t n = strlen(v->valuestring);
        if (len + n + 5 + (size_t)depth > cap) {
            cap = 2 * (len + n + 5 + (size_t)depth);
            text = realloc(text, cap);
        }
        if (i) text[len++] = ',';
        text[len++] = '[';
        text[len++] = '"'; /* no string here holds a character to escape */
        memcpy(text + len, v->valuestring, n);
        len += n;
        text[len++] = '"';
    }
    memset(text + len, ']', (size_t)depth);
    text[len + (size_t)depth] = 0;
    cJSON_Delete(doc);

    h = fnv1a(text);
    deep = cJSON_Parse(text);
    free(text);
    for (v = deep; v && v->child; v = v->child->next) levels++;
    if (levels != depth || exercise(deep) != h) return 0;
    return (int32_t)h;
}
