/*
 * Hand-made managed functions for x86-64 that do what native code tells them, one thing after the other. They follow the rules of
 * cfi_stack::engine.
 */
#include "functions-x86_64.h"

        .bss
        .balign 8
        .globl  spans_stubs             /* grow, exit, leave, suspend, link, what link calls */
spans_stubs:
        .skip   48
        .text

/* acc = acc * 31 + rax, through the pointer to it. */
        .macro COMBINE
        mov     -40(%rbp), %r10
        imul    $31, (%r10), %r11
        add     %rax, %r11
        mov     %r11, (%r10)
        .endm

/*
 * u64 spans_small(act rdi, next rsi, context rdx, operand rcx): frame_bytes 96; spans_large: 880.
 *
 * Begins with acc = operand and asks next(context, frame, acc) on the native stack again and again what to do; the low three bits say what, the
 * rest is the operand n: 0 return acc; 1 and 2 call spans_small and spans_large with n; 3 suspend with n; 4 grow by n;
 * 5 leave with n; 7 call spans_small with n through link. What comes back from 1-3 and 7 is added to acc * 31. The first word of context is the activation. rbx and r12 hold the
 * operand all the time, and are compared with it. rbp-40 points to acc at rbp-32.
 */
        .macro SPANS name, bytes
FUNC \name
        PROLOGUE
        sub     $\bytes, %rsp
        cmp     (%rdi), %rsp
        jb      7f
1:      mov     %rbx, -48(%rbp)
        mov     %r12, -56(%rbp)
        .cfi_offset %rbx, -64
        .cfi_offset %r12, -72
        mov     %rsi, -16(%rbp)
        mov     %rdx, -24(%rbp)
        mov     %rcx, -32(%rbp)
        mov     %rcx, -64(%rbp)
        mov     %rcx, %rbx
        mov     %rcx, %r12
        not     %r12
        lea     -32(%rbp), %rax
        mov     %rax, -40(%rbp)
2:      mov     -64(%rbp), %r10
        cmp     %rbx, %r10
        jne     8f
        not     %r10
        cmp     %r12, %r10
        jne     8f
        mov     -24(%rbp), %rdx
        mov     (%rdx), %rdi
        mov     -16(%rbp), %rsi
        mov     %rbp, %rcx
        mov     -40(%rbp), %r10
        mov     (%r10), %r8
        call    *spans_stubs+8(%rip)
        .globl  \name\()_site_exit
\name\()_site_exit:
        mov     -24(%rbp), %rdx
        mov     (%rdx), %rdi
        mov     -16(%rbp), %rsi
        mov     %rax, %rcx
        shr     $3, %rcx
        and     $7, %eax
        cmp     $1, %eax
        jb      6f
        je      3f
        cmp     $3, %eax
        jb      4f
        je      5f
        cmp     $7, %eax
        je      10f
        mov     %rcx, %rsi
        cmp     $5, %eax
        je      9f
        call    *spans_stubs(%rip)
        .globl  \name\()_site_grow
\name\()_site_grow:
        jmp     2b
3:      call    spans_small
        .globl  \name\()_site_small
\name\()_site_small:
        COMBINE
        jmp     2b
4:      call    spans_large
        .globl  \name\()_site_large
\name\()_site_large:
        COMBINE
        jmp     2b
5:      mov     %rcx, %rsi
        call    *spans_stubs+24(%rip)
        .globl  \name\()_site_suspend
\name\()_site_suspend:
        COMBINE
        jmp     2b
10:     call    spans_link
        .globl  \name\()_site_link
\name\()_site_link:
        COMBINE
        jmp     2b
9:      call    *spans_stubs+16(%rip)
        ud2
8:      ud2
6:      mov     -40(%rbp), %r10
        mov     (%r10), %rax
        mov     -48(%rbp), %rbx
        mov     -56(%rbp), %r12
        leave
        .cfi_remember_state
        .cfi_def_cfa %rsp, 8
        .cfi_restore %rbx
        .cfi_restore %r12
        ret
        .cfi_restore_state
        .cfi_restore %rbx
        .cfi_restore %r12
7:      mov     %rsi, -16(%rbp)
        xor     %esi, %esi
        call    *spans_stubs(%rip)
        mov     -16(%rbp), %rsi
        jmp     1b
        .cfi_endproc
END \name
        .endm

/* Passes on everything, to the next segment. frame_bytes = 0. */
FUNC spans_link
        PROLOGUE
        mov     %rdi, %r10
        mov     spans_stubs+40(%rip), %r11
        call    *spans_stubs+32(%rip)
        EPILOGUE
        .cfi_endproc
END spans_link

        SPANS   spans_small, 96
        SPANS   spans_large, 880

        .section .note.gnu.property, "a", @note
        .balign 8
        .long   4, 16, 5
        .asciz  "GNU"
        .long   0xc0000002, 4, 3, 0
        .section .note.GNU-stack, "", @progbits
