/* What this thread is asked on x86-64: its shadow-stack pointer. */

#include "x86_64.h"

        .text

/* usize cfi_stack_shadow_pointer(void): SSP in the caller, 0 where shadow stacks are off. A leaf; clobbers rax, flags. */
FUNC cfi_stack_shadow_pointer
        .cfi_startproc
        endbr64
        xor     %eax, %eax
        rdsspq  %rax
        test    %rax, %rax
        jz      1f
        add     $8, %rax                /* this stub's own return address */
1:      ret
        .cfi_endproc
END cfi_stack_shadow_pointer

        ELF_NOTES
