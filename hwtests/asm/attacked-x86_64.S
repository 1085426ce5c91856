/*
 * Hand-made managed functions for x86-64 that the frame attacks need. Both call managed_recurse_a (managed-x86_64.S) and pass it
 * their own arguments: act rdi, n rsi, f rdx, context rcx.
 */
#include "functions-x86_64.h"

        .macro FRAME bytes
        endbr64
        push    %rbp
        .cfi_def_cfa_offset 16
        .cfi_offset %rbp, -16
        mov     %rsp, %rbp
        .cfi_def_cfa_register %rbp
        sub     $\bytes, %rsp
        .endm

/*
 * u64 managed_twice_a(act, n, f, context): recurse(act, 0, f, context), then recurse(act, n, f, context) from another place at
 * the same stack pointer. Returns how often control came back to the first place. frame_bytes = 48.
 */
FUNC managed_twice_a
        .cfi_startproc
        FRAME   48
        mov     %rdi, (%rsp)
        mov     %rsi, 8(%rsp)
        mov     %rdx, 16(%rsp)
        mov     %rcx, 24(%rsp)
        movq    $0, 32(%rsp)
        xor     %esi, %esi
        call    managed_recurse_a
        .globl  managed_twice_a_first
managed_twice_a_first:
        incq    32(%rsp)
        mov     (%rsp), %rdi
        mov     8(%rsp), %rsi
        mov     16(%rsp), %rdx
        mov     24(%rsp), %rcx
        call    managed_recurse_a
        mov     32(%rsp), %rax
        leave
        .cfi_def_cfa %rsp, 8
        ret
        .cfi_endproc
END managed_twice_a

/* u64 managed_plain(act, n, f, context): recurse. frame_bytes = 16. */
FUNC managed_plain
        .cfi_startproc
        FRAME   16
        call    managed_recurse_a
        leave
        .cfi_def_cfa %rsp, 8
        ret
        .cfi_endproc
END managed_plain

/* u64 attacked_guard(buffer rdi, f rsi, context rdx): f(context) behind a _setjmp(buffer); returns 0, or 1 after a longjmp. Native. */
FUNC attacked_guard
        .cfi_startproc
        FRAME   16
        mov     %rsi, (%rsp)
        mov     %rdx, 8(%rsp)
        call    _setjmp
        test    %eax, %eax
        jnz     1f
        mov     8(%rsp), %rdi
        call    *(%rsp)
        xor     %eax, %eax
        jmp     2f
1:      mov     $1, %eax
2:      leave
        .cfi_def_cfa %rsp, 8
        ret
        .cfi_endproc
END attacked_guard

        .section .note.gnu.property, "a", @note
        .balign 8
        .long   4, 16, 5
        .asciz  "GNU"
        .long   0xc0000002, 4, 3, 0
        .section .note.GNU-stack, "", @progbits
