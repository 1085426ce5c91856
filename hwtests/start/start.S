/*
 * cfi_start: the program's entry. Asks the kernel for a shadow stack, locks the decision, goes on to _start.
 * It never returns, and neither does _start, so no return address is older than the shadow stack.
 * A kernel or CPU without one answers with an error: the program then runs without.
 */
        .text
        .globl  cfi_start
        .balign 16
#if defined(__x86_64__)
        /* arch_prctl(ARCH_SHSTK_ENABLE, ARCH_SHSTK_SHSTK), then ARCH_SHSTK_LOCK of all features:
           Documentation/arch/x86/shstk.rst. In: rdx and rsp as the kernel passes them to _start. */
        .type   cfi_start, @function
cfi_start:
        .cfi_startproc
        .cfi_undefined %rip
        endbr64
        mov     %rdx, %r12
        mov     $158, %eax
        mov     $0x5001, %edi
        mov     $1, %esi
        syscall
        test    %rax, %rax
        jnz     1f
        mov     $158, %eax
        mov     $0x5003, %edi
        mov     $-1, %rsi
        syscall
1:      mov     %r12, %rdx
        xor     %ebp, %ebp
        jmp     _start
        .cfi_endproc
        .size   cfi_start, . - cfi_start
        .section .note.gnu.property, "a", @note
        .balign 8
        .long   4, 16, 5
        .asciz  "GNU"
        .long   0xc0000002, 4, 3, 0
#elif defined(__aarch64__)
        /* prctl(PR_SET_SHADOW_STACK_STATUS, PR_SHADOW_STACK_ENABLE), then PR_LOCK_SHADOW_STACK_STATUS of all:
           Documentation/arch/arm64/gcs.rst. In: x0 and sp as the kernel passes them to _start. */
        .arch   armv8.5-a
        .type   cfi_start, %function
cfi_start:
        .cfi_startproc
        .cfi_undefined x30
        hint    #34                     /* bti c */
        mov     x19, x0
        mov     x8, #167
        mov     x0, #75
        mov     x1, #1
        mov     x2, #0
        mov     x3, #0
        mov     x4, #0
        svc     #0
        cbnz    x0, 1f
        mov     x8, #167
        mov     x0, #76
        mov     x1, #-1
        mov     x2, #0
        mov     x3, #0
        mov     x4, #0
        svc     #0
1:      mov     x0, x19
        mov     x29, #0
        mov     x30, #0
        b       _start
        .cfi_endproc
        .size   cfi_start, . - cfi_start
        .section .note.gnu.property, "a", @note
        .balign 8
        .long   4, 16, 5
        .asciz  "GNU"
        .long   0xc0000000, 4, 7, 0
#endif
        .section .note.GNU-stack, "", @progbits
