/*
 * Recursion under gcc: on split stacks (-fsplit-stack -DSPLIT), or on one mapping of its final size.
 *
 *   PROGRAM descent DEPTH     prints "first NS" and "repeated NS": down to DEPTH frames of 32 bytes and back, on a new stack
 *   PROGRAM edge DEPTHS       prints "plain NS" and "worst NS": a call of a leaf from the best and from the worst of the depths 1..DEPTHS
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <ucontext.h>

#ifdef SPLIT
/* libgcc, generic-morestack.c */
extern void *__splitstack_makecontext(size_t size, void *context[10], size_t *usable);
extern void __splitstack_getcontext(void *context[10]);
extern void __splitstack_setcontext(void *context[10]);
extern void __splitstack_block_signals_context(void *context[10], int *wanted, int *before);
static void *inside[10], *outside[10];
#endif

static ucontext_t here, there;
static int edges;
static long depths;
static double found[2];

/* The system call itself on split stacks: a call of code that splits none would begin a segment of 1 MiB, and there would be no edge. */
static inline double now(void)
{
    struct timespec t;
#if defined SPLIT && defined __x86_64__
    long result = SYS_clock_gettime;
    __asm__ volatile("syscall" : "+a"(result) : "D"(CLOCK_MONOTONIC), "S"(&t) : "rcx", "r11", "memory");
#else
    clock_gettime(CLOCK_MONOTONIC, &t);
#endif
    return t.tv_sec * 1e9 + t.tv_nsec;
}

/* 32 bytes a frame: the return address, 8 of `kept`, 16 that keep the stack aligned. */
__attribute__((noipa)) static long descend(long n)
{
    volatile long kept = n;
    if (n == 0)
        return 0;
    long below = descend(n - 1);
    __asm__ volatile("" : "+r"(below)); /* no loop instead of the recursion */
    (void)kept;
    return below + 1;
}

__attribute__((noipa)) static long leaf(long n)
{
    volatile long kept = n;
    return kept + 1;
}

/* Calls the leaf `calls` times from n frames down. */
__attribute__((noipa)) static long edge(long n, long calls)
{
    volatile long kept = n;
    long done = 0;
    if (kept != 0)
        done = edge(n - 1, calls);
    else
        while (done < calls)
            done = leaf(done);
    __asm__ volatile("" : "+r"(done));
    return done;
}

static double least(long n, long calls, int rounds)
{
    double least = 1e18;
    while (rounds-- > 0) {
        double begin = now();
        edge(n, calls);
        double took = now() - begin;
        if (took < least)
            least = took;
    }
    return least;
}

/* One call of the leaf, n frames down. */
static double crossing(long n, long calls, int rounds)
{
    return (least(n, calls + 1, rounds) - least(n, 1, rounds)) / calls;
}

static void body(void)
{
    if (edges) {
        const long calls = 2000;
        double plain = 1e18, worst = 0;
        long where = 1;
        for (long n = 1; n <= depths; n++) {
            double each = crossing(n, calls, 5);
            if (each < plain)
                plain = each;
            if (each > worst)
                worst = each, where = n;
        }
        worst = crossing(where, calls, 51); /* a moment that another program took is not there each time */
        found[0] = plain, found[1] = worst;
    } else {
        double begin = now();
        descend(depths);
        double middle = now();
        descend(depths);
        double end = now();
        found[0] = middle - begin, found[1] = end - middle;
    }
}

int main(int count, char **words)
{
    if (count != 3 || (depths = atol(words[2])) <= 0 || ((edges = !strcmp(words[1], "edge")) == 0 && strcmp(words[1], "descent"))) {
        fprintf(stderr, "usage: %s descent DEPTH | edge DEPTHS\n", words[0]);
        return 2;
    }
    size_t size = depths * 32 + (1 << 20);
    getcontext(&there);
#ifdef SPLIT
    /* No system calls that block signals around each new segment: what its users do, too. */
    int off = 0;
    size_t usable;
    there.uc_stack.ss_sp = __splitstack_makecontext(4096, inside, &usable);
    there.uc_stack.ss_size = usable;
    __splitstack_block_signals_context(inside, &off, NULL);
    __splitstack_getcontext(outside);
#else
    there.uc_stack.ss_sp = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    there.uc_stack.ss_size = size;
    if (there.uc_stack.ss_sp == MAP_FAILED)
        return 1;
#endif
    there.uc_link = &here;
    makecontext(&there, body, 0);
#ifdef SPLIT
    __splitstack_setcontext(inside);
#endif
    swapcontext(&here, &there);
#ifdef SPLIT
    __splitstack_setcontext(outside);
#endif
    printf(edges ? "plain %f\nworst %f\n" : "first %f\nrepeated %f\n", found[0], found[1]);
    return 0;
}
