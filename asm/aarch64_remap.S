/* The stub for arm64 that moves pages. */

#include "aarch64_managed.h"

#ifdef __linux__
#define SYS_MREMAP      216
/* MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP */
#define MOVE_PAGES      7

        .text

/*
 * usize cfi_stack_remap(const Record *source, const Record *destination, usize low, usize granule)
 *
 * Moves the pages from low, rounded down to the granule, to the source's top into the destination, to the same distance from its
 * top. The source stays mapped, without pages. Addresses come from the sealed records, once, and stay in registers: no other
 * range of memory is moved or replaced. Where something is defended and records are not sealed, nothing is moved so. Signs nothing.
 *   in       x0 source, x1 destination, x2 lowest address of the span, x3 granule: a power of two, at least a page
 *   out      x0 0; else nothing was moved: unsealed records beside PAC or GCS, records that are not of one stack, a range that leaves a
 *            segment, or the kernel refused
 *   clobbers x0-x17, flags; a leaf: nothing on either stack
 *   traps    brk #0xc474 for a record whose seal does not hold
 */
FUNC SYM(cfi_stack_remap)
        .cfi_startproc
        hint    #34                     /* bti c */
        MODE    x15
        tbnz    x15, #MODE_PACGA_BIT, 2f
        tbnz    x15, #MODE_PAC_BIT, 1f
        tbnz    x15, #MODE_SHADOW_BIT, 1f
2:      LOAD_RECORD x0, x8, x9, x10, x11, x16, x17, x15
        LOAD_RECORD x1, x12, x13, x14, x7, x16, x17, x15
        cmp     x10, x14                /* the same stack … */
        ccmp    x11, x7, #0, eq         /* … of the same generation */
        b.ne    1f
        neg     x3, x3
        and     x2, x2, x3
        cmp     x2, x8
        b.lo    1f
        subs    x1, x9, x2              /* bytes */
        b.ls    1f
        sub     x13, x13, x9            /* delta */
        add     x4, x2, x13
        cmp     x4, x12
        b.lo    1f
        mov     x0, x2
        mov     x2, x1
        mov     x3, #MOVE_PAGES
        mov     x8, #SYS_MREMAP
        svc     #0
        sub     x0, x0, x4              /* the new address */
        ret
1:      mov     x0, #1
        ret
        .cfi_endproc
END SYM(cfi_stack_remap)
#endif

        ELF_NOTES
