/* Driver: the Lua interpreter, with nothing but its core and setmetatable. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include "lua/lua.h"
#include "export.h"

static const char script[] =
    "local setmetatable = ...\n"
    /* Peano's numbers: zero is {}, and {n} follows n. Each + below calls itself
     * through the interpreter's C code, as does each ==. */
    "local peano = {}\n"
    "local function succ(n) return setmetatable({n}, peano) end\n"
    "peano.__add = function(a, b)\n"
    "  if a[1] then return succ(a[1] + b) end\n"
    "  return b\n"
    "end\n"
    "peano.__eq = function(a, b)\n"
    "  if a[1] and b[1] then return a[1] == b[1] end\n"
    "  return not a[1] and not b[1]\n"
    "end\n"
    "local function from(k)\n"
    "  local n = setmetatable({}, peano)\n"
    "  for i = 1, k do n = succ(n) end\n"
    "  return n\n"
    "end\n"
    "local function count(n)\n"
    "  local k = 0\n"
    "  while n[1] do n, k = n[1], k + 1 end\n"
    "  return k\n"
    "end\n"
    "local function add(k)\n"
    "  local a, b = from(k), from(3)\n"
    "  local sum = a + b\n"
    "  if sum == from(k + 3) and not (sum == a) then return count(sum) end\n"
    "  return 0\n"
    "end\n"
    "local function queens(n)\n"
    "  local col, up, down = {}, {}, {}\n"
    "  local function place(row)\n"
    "    if row > n then return 1 end\n"
    "    local found = 0\n"
    "    for c = 1, n do\n"
    "      if not (col[c] or up[row + c] or down[row - c]) then\n"
    "        col[c], up[row + c], down[row - c] = true, true, true\n"
    "        found = found + place(row + 1)\n"
    "        col[c], up[row + c], down[row - c] = nil, nil, nil\n"
    "      end\n"
    "    end\n"
    "    return found\n"
    "  end\n"
    "  return place(1)\n"
    "end\n"
    "return add, queens\n";

struct chunk { const char *text; size_t len; };

static const char *read_chunk(lua_State *L, void *ud, size_t *len)
{
    struct chunk *c = ud;
    (void)L;
    *len = c->len;
    c->len = 0;
    return c->text;
}

static void *alloc(void *ud, void *at, size_t old, size_t size)
{
    (void)ud, (void)old;
    if (size) return realloc(at, size);
    free(at);
    return NULL;
}

static int set_metatable(lua_State *L)
{
    lua_settop(L, 2);
    lua_setmetatable(L, 1);
    return 1;
}

/* Runs a chunk with setmetatable as its argument, leaving `results` values. */
static void run(lua_State *L, const char *text, size_t len, int results)
{
    struct chunk c = {text, len};
    if (lua_load(L, read_chunk, &c, "=chunk", "t") != LUA_OK) __builtin_trap();
    lua_pushcfunction(L, set_metatable);
    lua_call(L, 1, results);
}

static int32_t call(int which, int32_t arg)
{
    lua_State *L = lua_newstate(alloc, NULL);
    int32_t r;
    run(L, script, sizeof script - 1, 2);
    lua_settop(L, which);
    lua_pushinteger(L, arg);
    lua_call(L, 1, 1);
    r = (int32_t)lua_tointegerx(L, -1, NULL);
    lua_close(L);
    return r;
}

/* k + 3, added and compared in Peano's numbers. */
EXPORT(peano) int32_t peano(int32_t k) { return call(1, k); }

/* The ways to put n queens on an n by n board. */
EXPORT(queens) int32_t queens(int32_t n) { return call(2, n); }

/* What the compiler and the interpreter make of 1+(1+(1+(...))), `depth` pairs
 * of parentheses: depth + 1. */
EXPORT(parens) int32_t parens(int32_t depth)
{
    lua_State *L = lua_newstate(alloc, NULL);
    size_t n = (size_t)depth, len = 0;
    char *text = malloc(16 + 4 * n);
    int32_t r;
    memcpy(text, "return 1", 8), len = 8;
    for (size_t i = 0; i < n; i++) memcpy(text + len, "+(1", 3), len += 3;
    memset(text + len, ')', n), len += n;
    run(L, text, len, 1);
    r = (int32_t)lua_tointegerx(L, -1, NULL);
    free(text);
    lua_close(L);
    return r;
}
