/* Hand-made managed functions for x86-64 that are called, and call, across segments. They follow the rules of cfi_stack::engine. */
#include "functions-x86_64.h"

        .bss
        .balign 8
        .globl  link_test               /* act, call, link, block */
link_test:
        .skip   32
        .text

/* Passes on everything, across the edge. frame_bytes = 0. */
FUNC link_thunk
        PROLOGUE
        mov     link_test(%rip), %r10
        mov     link_test+8(%rip), %r11
        call    *link_test+16(%rip)
        EPILOGUE
        .cfi_endproc
END link_thunk

/*
 * u64 link_caller(act, pad, argument bytes, result bytes): `pad` bytes further down it calls link_thunk with all argument registers and
 * that many bytes of stack arguments out of the block; puts what comes back into the block. See selftest/link.rs for the block.
 * frame_bytes is dynamic: it never moves.
 */
FUNC link_caller
        PROLOGUE
        sub     $32, %rsp
        mov     %rdx, -8(%rbp)
        mov     %rcx, -16(%rbp)
        sub     %rsi, %rsp
        cmp     %rcx, %rdx
        cmovb   %rcx, %rdx
        add     $15, %rdx
        and     $-16, %rdx
        sub     %rdx, %rsp
        mov     link_test+24(%rip), %r10
        mov     -8(%rbp), %rcx
1:      sub     $8, %rcx
        jb      2f
        mov     4096(%r10, %rcx), %rax
        mov     %rax, (%rsp, %rcx)
        jmp     1b
2:      mov     0(%r10), %rdi
        mov     8(%r10), %rsi
        mov     16(%r10), %rdx
        mov     24(%r10), %rcx
        mov     32(%r10), %r8
        mov     40(%r10), %r9
        mov     48(%r10), %rax
        .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
        movups  (128 + \n * 16)(%r10), %xmm\n
        .endr
        call    link_thunk
        mov     link_test+24(%rip), %r10
        add     $3072, %r10
        mov     %rdi, 0(%r10)
        mov     %rsi, 8(%r10)
        mov     %rdx, 16(%r10)
        mov     %rcx, 24(%r10)
        mov     %r8, 32(%r10)
        mov     %r9, 40(%r10)
        mov     %rax, 48(%r10)
        .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
        movups  %xmm\n, (128 + \n * 16)(%r10)
        .endr
        add     $13312, %r10            /* to 16384 */
        mov     -16(%rbp), %rcx
1:      sub     $8, %rcx
        jb      2f
        mov     (%rsp, %rcx), %rax
        mov     %rax, (%r10, %rcx)
        jmp     1b
2:      xor     %eax, %eax
        EPILOGUE
        .cfi_endproc
END link_caller

/* Its callee: puts what it gets into the block, returns what the block says. Bytes 64 and 72 of the block: argument and result bytes. */
FUNC link_callee
        PROLOGUE
        mov     link_test+24(%rip), %r10
        add     $1024, %r10
        mov     %rdi, 0(%r10)
        mov     %rsi, 8(%r10)
        mov     %rdx, 16(%r10)
        mov     %rcx, 24(%r10)
        mov     %r8, 32(%r10)
        mov     %r9, 40(%r10)
        mov     %rax, 48(%r10)
        mov     %rsp, 64(%r10)
        .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
        movups  %xmm\n, (128 + \n * 16)(%r10)
        .endr
        mov     link_test+24(%rip), %r10
        mov     64(%r10), %rcx
1:      sub     $8, %rcx
        jb      2f
        mov     16(%rbp, %rcx), %rax
        mov     %rax, 8192(%r10, %rcx)
        jmp     1b
2:      mov     72(%r10), %rcx
3:      sub     $8, %rcx
        jb      4f
        mov     12288(%r10, %rcx), %rax
        mov     %rax, 16(%rbp, %rcx)
        jmp     3b
4:      add     $2048, %r10
        mov     0(%r10), %rdi
        mov     8(%r10), %rsi
        mov     16(%r10), %rdx
        mov     24(%r10), %rcx
        mov     32(%r10), %r8
        mov     40(%r10), %r9
        mov     48(%r10), %rax
        .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
        movups  (128 + \n * 16)(%r10), %xmm\n
        .endr
        EPILOGUE
        .cfi_endproc
END link_callee

/*
 * u64 link_recurse(act, n, f, context): as managed_recurse_a, but each call goes through link_thunk, to the callee that its call names.
 * frame_bytes = 48; slots that hold pointers into the stack at link_recurse_site and _exit_site: rbp-24.
 */
FUNC link_recurse
        PROLOGUE
        sub     $48, %rsp
        cmp     (%rdi), %rsp
        jb      3f
1:      lea     -32(%rbp), %rax
        mov     %rax, -24(%rbp)
        lea     3(,%rsi,8), %rax
        mov     %rax, -32(%rbp)
        test    %rsi, %rsi
        jz      2f
        dec     %rsi
        call    link_thunk
        .globl  link_recurse_site
link_recurse_site:
        mov     -24(%rbp), %r10
        add     (%r10), %rax
        EPILOGUE
2:      mov     %rdx, %rsi
        mov     %rcx, %rdx
        mov     %rbp, %rcx
        xor     %r8d, %r8d
        call    *managed_stubs+8(%rip)
        .globl  link_recurse_exit_site
link_recurse_exit_site:
        mov     -24(%rbp), %r10
        add     (%r10), %rax
        EPILOGUE
3:      mov     %rsi, -8(%rbp)
        xor     %esi, %esi
        call    *managed_stubs(%rip)
        mov     -8(%rbp), %rsi
        jmp     1b
        .cfi_endproc
END link_recurse

/*
 * u64 lift_recurse(act, n, f, context): as managed_recurse_a, but it takes its stack pointer back after each call.
 * frame_bytes = 48; slots that hold pointers into the stack at lift_recurse_site and _exit_site: rbp-24.
 */
FUNC lift_recurse
        PROLOGUE
        sub     $48, %rsp
        cmp     (%rdi), %rsp
        jb      3f
1:      lea     -32(%rbp), %rax
        mov     %rax, -24(%rbp)
        lea     3(,%rsi,8), %rax
        mov     %rax, -32(%rbp)
        test    %rsi, %rsi
        jz      2f
        dec     %rsi
        call    lift_recurse
        .globl  lift_recurse_site
lift_recurse_site:
        lea     -48(%rbp), %rsp
        mov     -24(%rbp), %r10
        add     (%r10), %rax
        EPILOGUE
2:      mov     %rdx, %rsi
        mov     %rcx, %rdx
        mov     %rbp, %rcx
        xor     %r8d, %r8d
        call    *managed_stubs+8(%rip)
        .globl  lift_recurse_exit_site
lift_recurse_exit_site:
        mov     -24(%rbp), %r10
        add     (%r10), %rax
        EPILOGUE
3:      mov     %rsi, -8(%rbp)
        xor     %esi, %esi
        call    *managed_stubs(%rip)
        mov     -8(%rbp), %rsi
        lea     -48(%rbp), %rsp
        jmp     1b
        .cfi_endproc
END lift_recurse

/* u64 lift_dive(act, n): n calls deep and back; returns n. Takes its stack pointer back. frame_bytes = 48. */
FUNC lift_dive
        PROLOGUE
        sub     $48, %rsp
        cmp     (%rdi), %rsp
        jb      3f
1:      xor     %eax, %eax
        test    %rsi, %rsi
        jz      2f
        dec     %rsi
        call    lift_dive
        lea     -48(%rbp), %rsp
        inc     %rax
2:      EPILOGUE
3:      mov     %rsi, -8(%rbp)
        xor     %esi, %esi
        call    *managed_stubs(%rip)
        mov     -8(%rbp), %rsi
        jmp     1b
        .cfi_endproc
END lift_dive

/*
 * u64 lift_wave(act, n, times, m): n calls deep, and there lift_dive(act, m) so many times; returns what those return, added up. Takes its
 * stack pointer back. frame_bytes = 48.
 */
FUNC lift_wave
        PROLOGUE
        sub     $48, %rsp
        mov     %rdi, -8(%rbp)
        mov     %rdx, -16(%rbp)
        mov     %rcx, -24(%rbp)
        movq    $0, -32(%rbp)
        cmp     (%rdi), %rsp
        jb      4f
1:      test    %rsi, %rsi
        jz      2f
        dec     %rsi
        call    lift_wave
        lea     -48(%rbp), %rsp
        EPILOGUE
2:      mov     -8(%rbp), %rdi
        mov     -24(%rbp), %rsi
        call    lift_dive
        lea     -48(%rbp), %rsp
        add     %rax, -32(%rbp)
        decq    -16(%rbp)
        jnz     2b
        mov     -32(%rbp), %rax
        EPILOGUE
4:      mov     %rsi, -40(%rbp)
        xor     %esi, %esi
        call    *managed_stubs(%rip)
        mov     -40(%rbp), %rsi
        mov     -16(%rbp), %rdx
        mov     -24(%rbp), %rcx
        jmp     1b
        .cfi_endproc
END lift_wave

/* u64 link_loop(act, n, target, unused): calls target(act, i) for i from n down to 1, adds up. frame_bytes = 32. */
FUNC link_loop
        PROLOGUE
        sub     $32, %rsp
        mov     %rdi, -8(%rbp)
        mov     %rsi, -16(%rbp)
        mov     %rdx, -24(%rbp)
        movq    $0, -32(%rbp)
1:      mov     -8(%rbp), %rdi
        mov     -16(%rbp), %rsi
        call    *-24(%rbp)
        add     %rax, -32(%rbp)
        decq    -16(%rbp)
        jnz     1b
        mov     -32(%rbp), %rax
        EPILOGUE
        .cfi_endproc
END link_loop

/*
 * Calls what the test's call names: where this is when 256 bytes are left above the limit, else across the edge. It has no frame of its own
 * in the first case: the callee takes its place. frame_bytes = 0.
 */
FUNC link_edge
        .cfi_startproc
        endbr64
        mov     link_test(%rip), %r10
        lea     -256(%rsp), %r11
        cmp     (%r10), %r11
        jb      link_thunk
        mov     link_test+8(%rip), %r11
        jmp     *(%r11)
        .cfi_endproc
END link_edge

/* u64 link_climb(act, n): n calls deep through link_edge, which must lead back here, and back; returns n. frame_bytes = 48. */
FUNC link_climb
        PROLOGUE
        sub     $48, %rsp
        xor     %eax, %eax
        test    %rsi, %rsi
        jz      1f
        dec     %rsi
        call    link_edge
        inc     %rax
1:      EPILOGUE
        .cfi_endproc
END link_climb

/* u64 link_nothing(act, n): n + 1. A leaf without a frame. */
FUNC link_nothing
        .cfi_startproc
        endbr64
        lea     1(%rsi), %rax
        ret
        .cfi_endproc
END link_nothing

        .section .note.gnu.property, "a", @note
        .balign 8
        .long   4, 16, 5
        .asciz  "GNU"
        .long   0xc0000002, 4, 3, 0
        .section .note.GNU-stack, "", @progbits
