/* Counts the ways to put n queens on an n by n board, one row a call. */
#include "export.h"
#include <stdint.h>

static int32_t place(uint32_t free, uint32_t left, uint32_t right, uint32_t all)
{
    int32_t found = 0;
    if (!free) return 1;
    for (uint32_t at = free & ~left & ~right & all; at; at &= at - 1) {
        uint32_t q = at & -at;
        found += place(free & ~q, (left | q) << 1, (right | q) >> 1, all);
    }
    return found;
}

EXPORT(queens) int32_t queens(int32_t n)
{
    uint32_t all;
    if (n < 1 || n > 31) return 0;
    all = (1u << n) - 1;
    return place(all, 0, 0, all);
}
