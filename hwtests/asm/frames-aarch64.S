/*
 * Hand-made managed functions whose frames are not plain, for arm64: as in frames-x86_64.S, f(act x0, n x1, table x2), and
 * with keys, modifiers and frame pointers as code generators sign them. Layouts: src/frames.rs.
 */
#include "functions-aarch64.h"

        .macro PADDED name
        FUNC    \name
        bti     c
        .endm
        .macro SITE name
        .globl  \name
\name:
        .endm

        .macro CHECK site
        ldr     x9, [x0]
        mov     x10, sp
        cmp     x10, x9
        b.hs    9f
        mov     x11, x1
        mov     x1, #0
        adrp    x9, managed_stubs
        ldr     x9, [x9, #:lo12:managed_stubs]
        blr     x9
SITE \site
        mov     x1, x11
9:
        .endm

        .macro LOCAL pointer
        lsl     x10, x1, #3
        add     x10, x10, #3
        str     x10, [x29, #-32]
        sub     \pointer, x29, #32
        .endm

        .macro NEXT site
        mov     x9, #0
        cbz     x1, 8f
        sub     x1, x1, #1
        ldr     x9, [x2, x1, lsl #3]
        blr     x9
SITE \site
        b       9f
8:      mov     x0, #0
9:
        .endm

        .macro COUNT pointer
        ldr     x9, [\pointer]
        add     x0, x0, x9
        .endm

        .text

/* A plain frame, key A. frame_bytes 32; slot -24. */
PADDED frames_plain
        paciasp
        stp     x29, x30, [sp, #-16]!
        mov     x29, sp
        sub     sp, sp, #32
        CHECK   frames_plain_grow
        LOCAL   x10
        str     x10, [x29, #-24]
        NEXT    frames_plain_site
        ldr     x10, [x29, #-24]
        COUNT   x10
        mov     sp, x29
        ldp     x29, x30, [sp], #16
        autiasp
        ret
END frames_plain

/* The record in the middle, the pointer in x19. frame_bytes 32, cfa_bytes 32; saves x19 at 24. */
PADDED frames_register
        paciasp
        sub     sp, sp, #64
        stp     x29, x30, [sp, #32]
        add     x29, sp, #32
        str     x19, [x29, #24]
        CHECK   frames_register_grow
        LOCAL   x19
        NEXT    frames_register_site
        COUNT   x19
        ldr     x19, [x29, #24]
        ldp     x29, x30, [sp, #32]
        add     sp, sp, #64
        autiasp
        ret
END frames_register

/* Pushes around its call, key B. frame_bytes 48, 64 at the call; saves x19 at -8; slot -64. */
PADDED frames_pushes
        pacibsp
        stp     x29, x30, [sp, #-16]!
        mov     x29, sp
        sub     sp, sp, #48
        str     x19, [x29, #-8]
        CHECK   frames_pushes_grow
        mov     x19, #0x55
        LOCAL   x10
        stp     x10, xzr, [sp, #-16]!
        NEXT    frames_pushes_site
        ldp     x10, x9, [sp], #16
        COUNT   x10
        ldr     x19, [x29, #-8]
        mov     sp, x29
        ldp     x29, x30, [sp], #16
        autibsp
        ret
END frames_pushes

/* Passes 16 bytes of arguments to a function that owns them; signs with modifier zero. frame_bytes 32. */
PADDED frames_arguments
        paciaz
        stp     x29, x30, [sp, #-16]!
        mov     x29, sp
        sub     sp, sp, #32
        LOCAL   x10
        mov     x9, #7
        stp     x9, x10, [sp, #-16]!
        bl      frames_owner
SITE frames_arguments_site
        mov     sp, x29
        ldp     x29, x30, [sp], #16
        autiaz
        ret
END frames_arguments

/* incoming 16, frame_bytes 32; slot 24: the pointer that it was passed. Goes on by a tail call with 32 bytes of arguments. */
PADDED frames_owner
        paciasp
        stp     x29, x30, [sp, #-16]!
        mov     x29, sp
        sub     sp, sp, #32
        CHECK   frames_owner_grow
        mov     sp, x29
        ldp     x29, x30, [sp], #16
        autiasp
        stp     xzr, xzr, [sp, #-16]!
        b       frames_popper
END frames_owner

/* incoming 32, frame_bytes 32; slot 40. Its modifier is the CFA blended with 0xabcd. */
PADDED frames_popper
        mov     x16, sp
        movk    x16, #0xabcd, lsl #48
        mov     x17, x30
        pacia1716
        mov     x30, x17
        stp     x29, x30, [sp, #-16]!
        mov     x29, sp
        sub     sp, sp, #32
        CHECK   frames_popper_grow
        NEXT    frames_popper_site
        ldr     x10, [x29, #40]
        COUNT   x10
        mov     sp, x29
        ldp     x29, x17, [sp], #16
        mov     x16, sp
        movk    x16, #0xabcd, lsl #48
        autia1716
        mov     x30, x17
        add     sp, sp, #32
        ret
END frames_popper

/* Of dynamic size: 48 bytes and up to 112 more. Slot -24. */
PADDED frames_dynamic
        paciasp
        stp     x29, x30, [sp, #-16]!
        mov     x29, sp
        sub     sp, sp, #48
        and     x9, x1, #7
        sub     sp, sp, x9, lsl #4
        CHECK   frames_dynamic_grow
        LOCAL   x10
        str     x10, [x29, #-24]
        NEXT    frames_dynamic_site
        ldr     x10, [x29, #-24]
        COUNT   x10
        mov     sp, x29
        ldp     x29, x30, [sp], #16
        autiasp
        ret
END frames_dynamic

/* Signs the frame pointer that it saves, by a data key. Not for CPUs without PAC. frame_bytes 32; slot -24. */
        .macro SIGNED_FP name, key
PADDED \name
        paciasp
        sub     x16, sp, #16
        mov     x17, x29
        pacd\key x17, x16
        stp     x17, x30, [sp, #-16]!
        mov     x29, sp
        sub     sp, sp, #32
        CHECK   \name\()_grow
        LOCAL   x10
        str     x10, [x29, #-24]
        NEXT    \name\()_site
        ldr     x10, [x29, #-24]
        COUNT   x10
        mov     sp, x29
        mov     x16, sp
        ldp     x17, x30, [sp], #16
        autd\key x17, x16
        mov     x29, x17
        autiasp
        ret
END \name
        .endm
        SIGNED_FP frames_signed_a, a
        SIGNED_FP frames_signed_b, b

        .section .note.gnu.property, "a", @note
        .balign 8
        .long   4, 16, 5
        .asciz  "GNU"
        .long   0xc0000000, 4, 7, 0
        .section .note.GNU-stack, "", @progbits
