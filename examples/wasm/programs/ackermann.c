/* The Ackermann-Péter function, as it is defined. */
#include "export.h"
#include <stdint.h>

EXPORT(ackermann) int32_t ackermann(int32_t m, int32_t n)
{
    if (m == 0) return n + 1;
    if (n == 0) return ackermann(m - 1, 1);
    return ackermann(m - 1, ackermann(m, n - 1));
}
