/*
 * Hand-made managed functions for arm64: as in managed-x86_64.S; here with signed return addresses, keys A and B.
 */
#include "functions-aarch64.h"

        .macro CHECK bytes
        ldr     x9, [x0]
        mov     x10, sp
        cmp     x10, x9
        b.hs    8f
        stp     x0, x1, [sp]
        stp     x2, x3, [sp, #16]
        mov     x1, #0
        STUB    x9, 0
        blr     x9
        ldp     x0, x1, [sp]
        ldp     x2, x3, [sp, #16]
8:
        .endm

        .macro STUB reg, offset
        WORD    \reg, managed_stubs, \offset
        .endm

        .bss
        .balign 8
        .globl  managed_stubs           /* grow, exit, leave */
managed_stubs:
        .skip   24
        .text

        .macro RECURSE key
FUNC managed_recurse_\key
        PROLOGUE \key, 64
        CHECK
        sub     x9, x29, #32
        str     x9, [x29, #-24]
        lsl     x10, x1, #3
        add     x10, x10, #3
        str     x10, [x29, #-32]
        cbz     x1, 2f
        sub     x1, x1, #1
        bl      managed_recurse_\key
        .globl  managed_recurse_\key\()_site
managed_recurse_\key\()_site:
        b       3f
2:      mov     x1, x2
        mov     x2, x3
        mov     x3, x29
        mov     x4, #0
        STUB    x9, 8
        blr     x9
        .globl  managed_recurse_\key\()_exit_site
managed_recurse_\key\()_exit_site:
3:      ldr     x9, [x29, #-24]
        ldr     x9, [x9]
        add     x0, x0, x9
        EPILOGUE \key
        .cfi_endproc
END managed_recurse_\key
        .endm

/*
 * u64 managed_recurse_a(act x0, n x1, f x2, context x3), …_b: n calls deep, then f(context, frame, 0) on the native
 * stack; on the way back each frame adds the word that a pointer into itself leads to. frame_bytes = 64.
 * Slots that hold pointers into the stack at _site and _exit_site: fp-24.
 */
        RECURSE a
        RECURSE b

/* frame_bytes = 12288; see managed-x86_64.S */
FUNC managed_big_frame
        PROLOGUE a, 12288
        mov     x9, #1
        str     x9, [sp]
        mov     x0, #0
        EPILOGUE a
        .cfi_endproc
END managed_big_frame

/*
 * u64 managed_registers(act, unused, unused, u64 block[192]): as in managed-x86_64.S. Words 0-15 of block are x0-x15 (0 and 1
 * are not read), 16-79 q0-q31, 80-90 x18-x28; stored 96 words behind. frame_bytes = 128.
 */
FUNC managed_registers
        PROLOGUE a, 128
        str     x3, [sp]
        stp     x19, x20, [sp, #16]
        stp     x21, x22, [sp, #32]
        stp     x23, x24, [sp, #48]
        stp     x25, x26, [sp, #64]
        stp     x27, x28, [sp, #80]
        stp     d8, d9, [sp, #96]
        stp     x18, xzr, [sp, #112]
        /* d10-d15 are the caller's too: enter keeps them. */
        mov     x16, x3
        add     x17, x16, #128
        .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31
        ldr     q\n, [x17], #16
        .endr
        ldp     x18, x19, [x17]
        ldp     x20, x21, [x17, #16]
        ldp     x22, x23, [x17, #32]
        ldp     x24, x25, [x17, #48]
        ldp     x26, x27, [x17, #64]
        ldr     x28, [x17, #80]
        ldp     x2, x3, [x16, #16]
        ldp     x4, x5, [x16, #32]
        ldp     x6, x7, [x16, #48]
        ldp     x8, x9, [x16, #64]
        ldp     x10, x11, [x16, #80]
        ldp     x12, x13, [x16, #96]
        ldp     x14, x15, [x16, #112]
        mov     x1, #16384
        STUB    x16, 0
        blr     x16
        ldr     x16, [sp]
        add     x16, x16, #768
        stp     x0, x1, [x16]
        stp     x2, x3, [x16, #16]
        stp     x4, x5, [x16, #32]
        stp     x6, x7, [x16, #48]
        stp     x8, x9, [x16, #64]
        stp     x10, x11, [x16, #80]
        stp     x12, x13, [x16, #96]
        stp     x14, x15, [x16, #112]
        add     x17, x16, #128
        .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31
        str     q\n, [x17], #16
        .endr
        stp     x18, x19, [x17]
        stp     x20, x21, [x17, #16]
        stp     x22, x23, [x17, #32]
        stp     x24, x25, [x17, #48]
        stp     x26, x27, [x17, #64]
        str     x28, [x17, #80]
        ldp     x19, x20, [sp, #16]
        ldp     x21, x22, [sp, #32]
        ldp     x23, x24, [sp, #48]
        ldp     x25, x26, [sp, #64]
        ldp     x27, x28, [sp, #80]
        ldp     d8, d9, [sp, #96]
        ldr     x18, [sp, #112]
        mov     x0, #0
        EPILOGUE a
        .cfi_endproc
END managed_registers

/* managed_leave(act, n, code, unused): n calls deep, then leave(act, code). frame_bytes = 32. */
FUNC managed_leave
        PROLOGUE a, 32
        CHECK
        cbz     x1, 2f
        sub     x1, x1, #1
        bl      managed_leave
2:      mov     x1, x2
        STUB    x9, 16
        blr     x9
        brk     #0
        .cfi_endproc
END managed_leave

/* managed_spin(act, n, word, unused): loops until *word is not 0, then returns n + 1. frame_bytes = 16. */
FUNC managed_spin
        PROLOGUE a, 16
1:      yield
        ldr     x9, [x2]
        cbz     x9, 1b
        add     x0, x1, #1
        EPILOGUE a
        .cfi_endproc
END managed_spin

/* u64 managed_fault(act, n, address, kind): as in managed-x86_64.S. frame_bytes = 32. */
FUNC managed_fault
        PROLOGUE a, 32
        CHECK
        cbz     x1, 2f
        sub     x1, x1, #1
        bl      managed_fault
        b       4f
2:      cbnz    x3, 5f
        ldr     x0, [x2]
4:      EPILOGUE a
5:      udf     #0
        .cfi_endproc
END managed_fault

/* managed_edge(act, above, target, reserve): as in managed-x86_64.S. */
FUNC managed_edge
        PROLOGUE a, 16
        ldr     x9, [x0]
        sub     x9, x9, x3
        add     x9, x9, x1
        mov     sp, x9
        mov     x1, #0
        blr     x2
        brk     #0
        .cfi_endproc
END managed_edge

/* u64 managed_edge_spin(act, above, word, reserve): as in managed-x86_64.S. */
FUNC managed_edge_spin
        PROLOGUE a, 16
        ldr     x9, [x0]
        sub     x9, x9, x3
        add     x9, x9, x1
        mov     sp, x9
1:      yield
        ldr     x0, [x2]
        cbz     x0, 1b
        EPILOGUE a
        .cfi_endproc
END managed_edge_spin

        .section .note.gnu.property, "a", @note
        .balign 8
        .long   4, 16, 5
        .asciz  "GNU"
        .long   0xc0000000, 4, 7, 0
        .section .note.GNU-stack, "", @progbits
