/*
 * Hand-made managed functions for arm64 that the frame attacks need. All call managed_recurse_a or _b (managed-aarch64.S) and
 * pass it their own arguments: act x0, n x1, f x2, context x3.
 */
#include "functions-aarch64.h"

        .macro FRAME bytes
        stp     x29, x30, [sp, #-16]!
        .cfi_def_cfa_offset 16
        .cfi_offset x29, -16
        .cfi_offset x30, -8
        mov     x29, sp
        .cfi_def_cfa x29, 16
        sub     sp, sp, #\bytes
        .endm

        .macro NO_FRAME
        mov     sp, x29
        ldp     x29, x30, [sp], #16
        .cfi_def_cfa sp, 0
        .cfi_restore x29
        .cfi_restore x30
        .endm

/*
 * u64 managed_twice_a(act, n, f, context), …_b: recurse(act, 0, f, context), then recurse(act, n, f, context) from another
 * place at the same stack pointer. Returns how often control came back to the first place. frame_bytes = 48.
 */
        .macro TWICE key
FUNC managed_twice_\key
        .cfi_startproc
        .ifc \key, b
        .cfi_b_key_frame
        .endif
        paci\key\()sp
        .cfi_negate_ra_state
        FRAME   48
        stp     x0, x1, [sp]
        stp     x2, x3, [sp, #16]
        str     xzr, [sp, #32]
        mov     x1, #0
        bl      managed_recurse_\key
        .globl  managed_twice_\key\()_first
managed_twice_\key\()_first:
        ldr     x9, [sp, #32]
        add     x9, x9, #1
        str     x9, [sp, #32]
        ldp     x0, x1, [sp]
        ldp     x2, x3, [sp, #16]
        bl      managed_recurse_\key
        ldr     x0, [sp, #32]
        NO_FRAME
        auti\key\()sp
        .cfi_negate_ra_state
        ret
        .cfi_endproc
END managed_twice_\key
        .endm

        TWICE a
        TWICE b

/* u64 managed_plain(act, n, f, context): recurse, with a frame record whose return address is not signed. frame_bytes = 16. */
FUNC managed_plain
        .cfi_startproc
        hint    #34                     /* bti c */
        FRAME   16
        bl      managed_recurse_a
        NO_FRAME
        ret
        .cfi_endproc
END managed_plain

/*
 * u64 managed_salted(act, n, f, context): recurse, with a return address signed with key A under another modifier than the
 * stack pointer at entry: 32 more. Unwinders cannot pass it. frame_bytes = 16.
 */
FUNC managed_salted
        .cfi_startproc
        .cfi_undefined x30
        hint    #34                     /* bti c */
        add     x16, sp, #32
        mov     x17, x30
        hint    #8                      /* pacia1716 */
        mov     x30, x17
        stp     x29, x30, [sp, #-16]!
        mov     x29, sp
        sub     sp, sp, #16
        bl      managed_recurse_a
        mov     sp, x29
        ldp     x29, x30, [sp], #16
        add     x16, sp, #32
        mov     x17, x30
        hint    #12                     /* autia1716 */
        mov     x30, x17
        ret
        .cfi_endproc
END managed_salted

/* u64 attacked_guard(buffer x0, f x1, context x2): f(context) behind a _setjmp(buffer); returns 0, or 1 after a longjmp. Native. */
FUNC attacked_guard
        .cfi_startproc
        paciasp
        .cfi_negate_ra_state
        FRAME   16
        stp     x1, x2, [sp]
        bl      _setjmp
        cbnz    w0, 1f
        ldp     x1, x0, [sp]
        blr     x1
        mov     x0, #0
        b       2f
1:      mov     x0, #1
2:      NO_FRAME
        autiasp
        .cfi_negate_ra_state
        ret
        .cfi_endproc
END attacked_guard

        .section .note.gnu.property, "a", @note
        .balign 8
        .long   4, 16, 5
        .asciz  "GNU"
        .long   0xc0000000, 4, 7, 0
        .section .note.GNU-stack, "", @progbits
