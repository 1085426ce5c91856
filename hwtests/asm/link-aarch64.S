/* Hand-made managed functions for arm64 that are called, and call, across segments: as in link-x86_64.S. */
#include "functions-aarch64.h"

        .bss
        .balign 8
        .globl  link_test               /* act, call, link, block */
link_test:
        .skip   32
        .text

/* frame_bytes = 0 */
FUNC link_thunk
        PROLOGUE a, 0
        WORD    x30, link_test, 16
        WORD    x16, link_test, 0
        WORD    x17, link_test, 8
        blr     x30
        EPILOGUE a
        .cfi_endproc
END link_thunk

        .macro VECTORS op, base
        .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31
        \op     q\n, [\base, #(128 + \n * 16)]
        .endr
        .endm
        .macro GENERAL op, base
        \op     x0, x1, [\base, #0]
        \op     x2, x3, [\base, #16]
        \op     x4, x5, [\base, #32]
        \op     x6, x7, [\base, #48]
        \op     x8, x9, [\base, #80]
        \op     x10, x11, [\base, #96]
        .endm

/* u64 link_caller(act, pad, argument bytes, result bytes); frame_bytes is dynamic */
FUNC link_caller
        PROLOGUE a, 96
        stp     x2, x3, [x29, #-16]
        stp     d8, d9, [x29, #-32]
        stp     d10, d11, [x29, #-48]
        stp     d12, d13, [x29, #-64]
        stp     d14, d15, [x29, #-80]
        sub     sp, sp, x1
        cmp     x2, x3
        csel    x9, x3, x2, lo
        add     x9, x9, #15
        and     x9, x9, #-16
        sub     sp, sp, x9
        WORD    x16, link_test, 24
        mov     x10, sp
        add     x11, x16, #4096
1:      subs    x2, x2, #8
        b.lo    2f
        ldr     x9, [x11, x2]
        str     x9, [x10, x2]
        b       1b
2:      VECTORS ldr, x16
        GENERAL ldp, x16
        ldp     x12, x13, [x16, #112]
        bl      link_thunk
        WORD    x16, link_test, 24
        add     x16, x16, #3072
        VECTORS str, x16
        GENERAL stp, x16
        stp     x12, x13, [x16, #112]
        WORD    x16, link_test, 24
        add     x16, x16, #16384
        ldr     x2, [x29, #-8]
        mov     x10, sp
1:      subs    x2, x2, #8
        b.lo    2f
        ldr     x9, [x10, x2]
        str     x9, [x16, x2]
        b       1b
2:      ldp     d8, d9, [x29, #-32]
        ldp     d10, d11, [x29, #-48]
        ldp     d12, d13, [x29, #-64]
        ldp     d14, d15, [x29, #-80]
        mov     x0, #0
        EPILOGUE a
        .cfi_endproc
END link_caller

FUNC link_callee
        PROLOGUE a, 0
        WORD    x16, link_test, 24
        add     x16, x16, #1024
        VECTORS str, x16
        GENERAL stp, x16
        stp     x12, x13, [x16, #112]
        mov     x9, sp
        str     x9, [x16, #64]
        WORD    x16, link_test, 24
        ldp     x2, x3, [x16, #64]
        add     x10, x29, #16
        add     x11, x16, #8192
1:      subs    x2, x2, #8
        b.lo    2f
        ldr     x9, [x10, x2]
        str     x9, [x11, x2]
        b       1b
2:      add     x11, x16, #12288
3:      subs    x3, x3, #8
        b.lo    4f
        ldr     x9, [x11, x3]
        str     x9, [x10, x3]
        b       3b
4:      add     x16, x16, #2048
        VECTORS ldr, x16
        GENERAL ldp, x16
        ldp     x12, x13, [x16, #112]
        EPILOGUE a
        .cfi_endproc
END link_callee

/* frame_bytes = 64; slots at link_recurse_site and _exit_site: fp-24 */
FUNC link_recurse
        PROLOGUE a, 64
        ldr     x9, [x0]
        mov     x10, sp
        cmp     x10, x9
        b.hs    1f
        stp     x0, x1, [sp]
        stp     x2, x3, [sp, #16]
        mov     x1, #0
        WORD    x9, managed_stubs, 0
        blr     x9
        ldp     x0, x1, [sp]
        ldp     x2, x3, [sp, #16]
1:      sub     x9, x29, #32
        str     x9, [x29, #-24]
        lsl     x10, x1, #3
        add     x10, x10, #3
        str     x10, [x29, #-32]
        cbz     x1, 2f
        sub     x1, x1, #1
        bl      link_thunk
        .globl  link_recurse_site
link_recurse_site:
        b       3f
2:      mov     x1, x2
        mov     x2, x3
        mov     x3, x29
        mov     x4, #0
        WORD    x9, managed_stubs, 8
        blr     x9
        .globl  link_recurse_exit_site
link_recurse_exit_site:
3:      ldr     x9, [x29, #-24]
        ldr     x9, [x9]
        add     x0, x0, x9
        EPILOGUE a
        .cfi_endproc
END link_recurse

        .macro CHECK
        ldr     x9, [x0]
        mov     x10, sp
        cmp     x10, x9
        b.hs    8f
        stp     x0, x1, [sp]
        stp     x2, x3, [sp, #16]
        mov     x1, #0
        WORD    x9, managed_stubs, 0
        blr     x9
        ldp     x0, x1, [sp]
        ldp     x2, x3, [sp, #16]
8:
        .endm

/* frame_bytes = 64; slots at lift_recurse_site and _exit_site: fp-24 */
FUNC lift_recurse
        PROLOGUE a, 64
        CHECK
        sub     x9, x29, #32
        str     x9, [x29, #-24]
        lsl     x10, x1, #3
        add     x10, x10, #3
        str     x10, [x29, #-32]
        cbz     x1, 2f
        sub     x1, x1, #1
        bl      lift_recurse
        .globl  lift_recurse_site
lift_recurse_site:
        sub     sp, x29, #64
        b       3f
2:      mov     x1, x2
        mov     x2, x3
        mov     x3, x29
        mov     x4, #0
        WORD    x9, managed_stubs, 8
        blr     x9
        .globl  lift_recurse_exit_site
lift_recurse_exit_site:
3:      ldr     x9, [x29, #-24]
        ldr     x9, [x9]
        add     x0, x0, x9
        EPILOGUE a
        .cfi_endproc
END lift_recurse

/* frame_bytes = 48 */
FUNC lift_dive
        PROLOGUE a, 48
        CHECK
        mov     x2, #0
        cbz     x1, 2f
        sub     x1, x1, #1
        bl      lift_dive
        sub     sp, x29, #48
        add     x2, x0, #1
2:      mov     x0, x2
        EPILOGUE a
        .cfi_endproc
END lift_dive

/* frame_bytes = 80 */
FUNC lift_wave
        PROLOGUE a, 80
        CHECK
        stp     x0, x3, [x29, #-16]
        stp     x2, xzr, [x29, #-32]
        cbz     x1, 2f
        sub     x1, x1, #1
        bl      lift_wave
        sub     sp, x29, #80
        EPILOGUE a
2:      ldp     x0, x1, [x29, #-16]
        bl      lift_dive
        sub     sp, x29, #80
        ldp     x2, x9, [x29, #-32]
        add     x9, x9, x0
        subs    x2, x2, #1
        stp     x2, x9, [x29, #-32]
        b.ne    2b
        mov     x0, x9
        EPILOGUE a
        .cfi_endproc
END lift_wave

/* frame_bytes = 32 */
FUNC link_loop
        PROLOGUE a, 32
        stp     x0, x1, [x29, #-16]
        stp     x2, xzr, [x29, #-32]
1:      ldp     x0, x1, [x29, #-16]
        ldr     x9, [x29, #-32]
        blr     x9
        ldr     x9, [x29, #-24]
        add     x9, x9, x0
        str     x9, [x29, #-24]
        ldr     x9, [x29, #-8]
        subs    x9, x9, #1
        str     x9, [x29, #-8]
        b.ne    1b
        ldr     x0, [x29, #-24]
        EPILOGUE a
        .cfi_endproc
END link_loop

/* frame_bytes = 0 */
FUNC link_edge
        .cfi_startproc
        hint    #34                     /* bti c */
        WORD    x16, link_test, 0
        ldr     x16, [x16]
        sub     x17, sp, #256
        cmp     x17, x16
        b.lo    link_thunk
        WORD    x17, link_test, 8
        ldr     x17, [x17]
        br      x17
        .cfi_endproc
END link_edge

/* frame_bytes = 48 */
FUNC link_climb
        PROLOGUE a, 48
        mov     x9, #0
        cbz     x1, 1f
        sub     x1, x1, #1
        bl      link_edge
        add     x9, x0, #1
1:      mov     x0, x9
        EPILOGUE a
        .cfi_endproc
END link_climb

FUNC link_nothing
        .cfi_startproc
        hint    #34                     /* bti c */
        add     x0, x1, #1
        ret
        .cfi_endproc
END link_nothing

        .section .note.gnu.property, "a", @note
        .balign 8
        .long   4, 16, 5
        .asciz  "GNU"
        .long   0xc0000000, 4, 7, 0
        .section .note.GNU-stack, "", @progbits
