/*
 * Managed functions for arm64: as in managed-x86_64.S, with return addresses signed by key A. Their convention: x0 carries
 * the activation in and the result out.
 */
        .macro FUNC name
        .globl  \name
        .balign 64
\name:
        hint    #25                     /* paciasp */
        stp     x29, x30, [sp, #-16]!
        mov     x29, sp
        .endm
        .macro RETURN
        mov     sp, x29
        ldp     x29, x30, [sp], #16
        hint    #29                     /* autiasp */
        ret
        .endm
        .macro END name
        .globl  \name\()_end
\name\()_end:
        .endm
        .macro STUB reg, offset
        adrp    \reg, bench_stubs
        add     \reg, \reg, :lo12:bench_stubs
        ldr     \reg, [\reg, #\offset]
        .endm
        .macro CHECK checked
        .if     \checked
        ldr     x9, [x0]
        mov     x10, sp
        cmp     x10, x9
        b.lo    3f
        .endif
1:
        .endm
        /* The cold half of a check: keeps n in the frame while grow runs. */
        .macro GROW checked
        .if     \checked
3:      str     x1, [x29, #-8]
        mov     x1, #0
        STUB    x9, 0
        blr     x9
        ldr     x1, [x29, #-8]
        b       1b
        .endif
        .endm

        .text

/* frame_bytes = 16 */
FUNC bench_descend
        sub     sp, sp, #16
        CHECK   1
        cbz     x1, 2f
        sub     x1, x1, #1
        bl      bench_descend
        add     x0, x0, #1
        RETURN
2:      cbz     x2, 4f
        bl      bench_bottom
4:      mov     x0, #0
        RETURN
        GROW    1
END bench_descend

/* Calls the leaf from x1 frames down, x2 times. frame_bytes = 16 */
FUNC bench_edge
        sub     sp, sp, #16
        CHECK   1
        cbz     x1, 2f
        sub     x1, x1, #1
        bl      bench_edge
        RETURN
2:      str     x2, [x29, #-8]
        mov     x1, #0
        .balign 64
4:      bl      bench_leaf_checked
        ldr     x9, [x29, #-8]
        cmp     x1, x9
        b.lo    4b
        mov     x0, x1
        RETURN
        GROW    1
END bench_edge

/* frame_bytes = 32 */
FUNC bench_bottom
        sub     sp, sp, #32
        stp     x0, x2, [sp]
        str     x3, [sp, #16]
        mov     x1, x2
        STUB    x9, 8
        blr     x9
        ldr     x0, [sp]
        ldr     x1, [sp, #16]
        STUB    x9, 0
        blr     x9
        ldp     x0, x1, [sp]
        STUB    x9, 8
        blr     x9
        RETURN
END bench_bottom

/* frame_bytes = 32 */
        .macro FIB name, checked
FUNC \name
        sub     sp, sp, #32
        CHECK   \checked
        cmp     x1, #2
        b.lo    2f
        stp     x0, x1, [x29, #-16]
        sub     x1, x1, #1
        bl      \name
        str     x0, [x29, #-24]
        ldp     x0, x1, [x29, #-16]
        sub     x1, x1, #2
        bl      \name
        ldr     x1, [x29, #-24]
        add     x1, x1, x0
2:      mov     x0, x1
        RETURN
        GROW    \checked
END \name
        .endm
        FIB     bench_fib_checked, 1
        FIB     bench_fib_plain, 0

/* frame_bytes = 16 */
        .macro LEAF name, checked
FUNC \name
        sub     sp, sp, #16
        CHECK   \checked
        add     x1, x1, #1
        RETURN
        GROW    \checked
END \name
        .endm
        LEAF    bench_leaf_checked, 1
        LEAF    bench_leaf_plain, 0

/* The leaf leaves x0 alone and returns in x1. frame_bytes = 16 */
        .macro LOOP name, leaf
FUNC \name
        sub     sp, sp, #16
        str     x1, [x29, #-8]
        mov     x1, #0
        .balign 64
1:      bl      \leaf
        ldr     x9, [x29, #-8]
        cmp     x1, x9
        b.lo    1b
        mov     x0, x1
        RETURN
END \name
        .endm
        LOOP    bench_loop_checked, bench_leaf_checked
        LOOP    bench_loop_plain, bench_leaf_plain
