/*
 * Hand-made managed functions for x86-64: what an engine's code generator would emit, one idea each.
 * All follow the rules of cfi_stack::engine: frame record at rbp, rsp constant at every call, limit checked.
 */
#include "functions-x86_64.h"

        .bss
        .balign 8
        .globl  managed_stubs           /* grow, exit, leave */
managed_stubs:
        .skip   24
        .text

/*
 * u64 managed_recurse_a(act rdi, n rsi, f rdx, context rcx): n calls deep, then f(context, frame, 0) on the native
 * stack; on the way back each frame adds the word that a pointer into itself leads to. frame_bytes = 48.
 * Slots that hold pointers into the stack at managed_recurse_a_site and _exit_site: rbp-24.
 */
FUNC managed_recurse_a
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
        call    managed_recurse_a
        .globl  managed_recurse_a_site
managed_recurse_a_site:
        mov     -24(%rbp), %r10
        add     (%r10), %rax
        EPILOGUE
2:      mov     %rdx, %rsi
        mov     %rcx, %rdx
        mov     %rbp, %rcx
        xor     %r8d, %r8d
        call    *managed_stubs+8(%rip)
        .globl  managed_recurse_a_exit_site
managed_recurse_a_exit_site:
        mov     -24(%rbp), %r10
        add     (%r10), %rax
        EPILOGUE
3:      mov     %rsi, -8(%rbp)
        xor     %esi, %esi
        call    *managed_stubs(%rip)
        mov     -8(%rbp), %rsi
        jmp     1b
        .cfi_endproc
END managed_recurse_a

/*
 * u64 managed_big_frame(act, unused, unused, context): a frame of 12,288 bytes, written at its lowest address before
 * any check, as native code on a managed segment would. frame_bytes = 12288.
 */
FUNC managed_big_frame
        PROLOGUE
        sub     $12288, %rsp
        movq    $1, (%rsp)
        xor     %eax, %eax
        leave
        .cfi_def_cfa %rsp, 8
        ret
        .cfi_endproc
END managed_big_frame

/*
 * u64 managed_registers(act, unused, unused, u64 block[96]): loads every register that grow must keep from block, calls
 * grow(act, 16384), stores them 48 words behind: general ones in words 0-11, then rdi and rsi in 12 and 13; xmm0-15 from
 * word 16. Returns 0. frame_bytes = 64.
 */
FUNC managed_registers
        PROLOGUE
        sub     $64, %rsp
        mov     %rbx, (%rsp)
        mov     %r12, 8(%rsp)
        mov     %r13, 16(%rsp)
        mov     %r14, 24(%rsp)
        mov     %r15, 32(%rsp)
        mov     %rcx, 40(%rsp)
        mov     %rcx, %rax
        .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
        movups  (128 + \n * 16)(%rax), %xmm\n
        .endr
        mov     0(%rax), %rbx
        mov     8(%rax), %rcx
        mov     16(%rax), %rdx
        mov     24(%rax), %r8
        mov     32(%rax), %r9
        mov     40(%rax), %r10
        mov     48(%rax), %r11
        mov     56(%rax), %r12
        mov     64(%rax), %r13
        mov     72(%rax), %r14
        mov     80(%rax), %r15
        mov     88(%rax), %rax
        mov     $16384, %esi
        call    *managed_stubs(%rip)
        mov     %rax, 48(%rsp)
        mov     40(%rsp), %rax
        add     $384, %rax
        mov     %rbx, 0(%rax)
        mov     %rcx, 8(%rax)
        mov     %rdx, 16(%rax)
        mov     %r8, 24(%rax)
        mov     %r9, 32(%rax)
        mov     %r10, 40(%rax)
        mov     %r11, 48(%rax)
        mov     %r12, 56(%rax)
        mov     %r13, 64(%rax)
        mov     %r14, 72(%rax)
        mov     %r15, 80(%rax)
        mov     48(%rsp), %rcx
        mov     %rcx, 88(%rax)
        mov     %rdi, 96(%rax)
        mov     %rsi, 104(%rax)
        .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
        movups  %xmm\n, (128 + \n * 16)(%rax)
        .endr
        mov     (%rsp), %rbx
        mov     8(%rsp), %r12
        mov     16(%rsp), %r13
        mov     24(%rsp), %r14
        mov     32(%rsp), %r15
        xor     %eax, %eax
        leave
        .cfi_def_cfa %rsp, 8
        ret
        .cfi_endproc
END managed_registers

/*
 * managed_leave(act, n, code, context): n calls deep, then leave(act, code). frame_bytes = 16.
 */
FUNC managed_leave
        PROLOGUE
        sub     $16, %rsp
        cmp     (%rdi), %rsp
        jb      3f
1:      test    %rsi, %rsi
        jz      2f
        dec     %rsi
        call    managed_leave
2:      mov     %rdx, %rsi
        call    *managed_stubs+16(%rip)
        ud2
3:      mov     %rsi, -8(%rbp)
        xor     %esi, %esi
        call    *managed_stubs(%rip)
        mov     -8(%rbp), %rsi
        jmp     1b
        .cfi_endproc
END managed_leave

/* managed_spin(act, n, word, unused): loops until *word is not 0, then returns n + 1. frame_bytes = 16. */
FUNC managed_spin
        PROLOGUE
        sub     $16, %rsp
1:      pause
        cmpq    $0, (%rdx)
        je      1b
        lea     1(%rsi), %rax
        leave
        .cfi_def_cfa %rsp, 8
        ret
        .cfi_endproc
END managed_spin

/*
 * u64 managed_fault(act, n, address, kind): n calls deep, then a fault: kind 0 loads from address, 1 executes an undefined
 * instruction. Returns what it loaded. frame_bytes = 16.
 */
FUNC managed_fault
        PROLOGUE
        sub     $16, %rsp
        cmp     (%rdi), %rsp
        jb      3f
1:      test    %rsi, %rsi
        jz      2f
        dec     %rsi
        call    managed_fault
        jmp     4f
2:      test    %rcx, %rcx
        jnz     5f
        mov     (%rdx), %rax
4:      leave
        .cfi_remember_state
        .cfi_def_cfa %rsp, 8
        ret
        .cfi_restore_state
3:      mov     %rsi, -8(%rbp)
        xor     %esi, %esi
        call    *managed_stubs(%rip)
        mov     -8(%rbp), %rsi
        jmp     1b
5:      ud2
        .cfi_endproc
END managed_fault

/*
 * managed_edge(act, above, target, reserve): puts the stack pointer `above` bytes above the segment's base, which is the
 * limit word less the reserve, and calls target(act, 0). frame_bytes = 16, of no interest: target must not return.
 */
FUNC managed_edge
        PROLOGUE
        mov     (%rdi), %rax
        sub     %rcx, %rax
        add     %rsi, %rax
        mov     %rax, %rsp
        xor     %esi, %esi
        call    *%rdx
        ud2
        .cfi_endproc
END managed_edge

/*
 * u64 managed_edge_spin(act, above, word, reserve): puts the stack pointer there too and loops until *word is not 0.
 * Returns *word. frame_bytes = 16: it calls nothing.
 */
FUNC managed_edge_spin
        PROLOGUE
        mov     (%rdi), %rax
        sub     %rcx, %rax
        add     %rsi, %rax
        mov     %rax, %rsp
1:      pause
        mov     (%rdx), %rax
        test    %rax, %rax
        jz      1b
        leave
        .cfi_def_cfa %rsp, 8
        ret
        .cfi_endproc
END managed_edge_spin

        .section .note.gnu.property, "a", @note
        .balign 8
        .long   4, 16, 5
        .asciz  "GNU"
        .long   0xc0000002, 4, 3, 0
        .section .note.GNU-stack, "", @progbits
