/*
 * Hand-made managed functions for arm64: as in spans-x86_64.S; spans_small signs with key A, spans_large with key B.
 */
#include "functions-aarch64.h"

        .bss
        .balign 8
        .globl  spans_stubs             /* grow, exit, leave, suspend, link, what link calls */
spans_stubs:
        .skip   48
        .text

        .macro STUB reg, offset
        WORD    \reg, spans_stubs, \offset
        .endm

/* acc = acc * 31 + x0, through the pointer to it. */
        .macro COMBINE
        ldr     x9, [x29, #-40]
        ldr     x10, [x9]
        mov     x11, #31
        madd    x10, x10, x11, x0
        str     x10, [x9]
        .endm

/*
 * u64 spans_small(act x0, next x1, context x2, operand x3), spans_large: as in spans-x86_64.S. x19 and d8 hold the operand. x29-40 points to
 * acc at x29-32.
 */
        .macro SPANS name, bytes, key
FUNC \name
        PROLOGUE \key, \bytes
        ldr     x9, [x0]
        mov     x10, sp
        cmp     x10, x9
        b.hs    1f
        mov     x9, x1
        str     x9, [x29, #-16]
        mov     x1, #0
        STUB    x9, 0
        blr     x9
        ldr     x1, [x29, #-16]
1:      str     x19, [x29, #-48]
        str     d8, [x29, #-56]
        .cfi_offset x19, -64
        .cfi_offset d8, -72
        str     x1, [x29, #-16]
        str     x2, [x29, #-24]
        str     x3, [x29, #-32]
        str     x3, [x29, #-64]
        mov     x19, x3
        fmov    d8, x3
        sub     x9, x29, #32
        str     x9, [x29, #-40]
2:      ldr     x9, [x29, #-64]
        cmp     x9, x19
        b.ne    8f
        fmov    x10, d8
        cmp     x9, x10
        b.ne    8f
        ldr     x2, [x29, #-24]
        ldr     x0, [x2]
        ldr     x1, [x29, #-16]
        mov     x3, x29
        ldr     x9, [x29, #-40]
        ldr     x4, [x9]
        STUB    x9, 8
        blr     x9
        .globl  \name\()_site_exit
\name\()_site_exit:
        lsr     x3, x0, #3
        and     x9, x0, #7
        ldr     x2, [x29, #-24]
        ldr     x0, [x2]
        ldr     x1, [x29, #-16]
        cbz     x9, 6f
        cmp     x9, #2
        b.lo    3f
        b.eq    4f
        cmp     x9, #7
        b.eq    10f
        mov     x1, x3
        cmp     x9, #4
        b.lo    5f
        b.hi    9f
        STUB    x9, 0
        blr     x9
        .globl  \name\()_site_grow
\name\()_site_grow:
        b       2b
3:      ldr     x1, [x29, #-16]
        bl      spans_small
        .globl  \name\()_site_small
\name\()_site_small:
        COMBINE
        b       2b
4:      ldr     x1, [x29, #-16]
        bl      spans_large
        .globl  \name\()_site_large
\name\()_site_large:
        COMBINE
        b       2b
5:      STUB    x9, 24
        blr     x9
        .globl  \name\()_site_suspend
\name\()_site_suspend:
        COMBINE
        b       2b
10:     bl      spans_link
        .globl  \name\()_site_link
\name\()_site_link:
        COMBINE
        b       2b
9:      STUB    x9, 16
        blr     x9
8:      brk     #0
6:      ldr     x9, [x29, #-40]
        ldr     x0, [x9]
        ldr     x19, [x29, #-48]
        ldr     d8, [x29, #-56]
        mov     sp, x29
        ldp     x29, x30, [sp], #16
        .cfi_def_cfa sp, 0
        .cfi_restore x29
        .cfi_restore x30
        .cfi_restore x19
        .cfi_restore d8
        auti\key\()sp
        .cfi_negate_ra_state
        ret
        .cfi_endproc
END \name
        .endm

/* Passes on everything, to the next segment. frame_bytes = 0. */
FUNC spans_link
        PROLOGUE a, 0
        mov     x16, x0
        STUB    x17, 40
        STUB    x30, 32
        blr     x30
        EPILOGUE a
        .cfi_endproc
END spans_link

        SPANS   spans_small, 96, a
        SPANS   spans_large, 880, b

        .section .note.gnu.property, "a", @note
        .balign 8
        .long   4, 16, 5
        .asciz  "GNU"
        .long   0xc0000000, 4, 7, 0
        .section .note.GNU-stack, "", @progbits
