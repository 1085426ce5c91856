/* How a hand-made managed function begins and ends on x86-64. */

        .macro FUNC name
        .globl  \name
        .type   \name, @function
        .balign 16
\name:
        .endm
        .macro END name
        .globl  \name\()_end
\name\()_end:
        .size   \name, . - \name
        .endm

/* A landing pad, then the frame record. */
        .macro PROLOGUE
        .cfi_startproc
        endbr64
        push    %rbp
        .cfi_def_cfa_offset 16
        .cfi_offset %rbp, -16
        mov     %rsp, %rbp
        .cfi_def_cfa_register %rbp
        .endm

/* A return in the middle: what follows still has the frame. */
        .macro EPILOGUE
        leave
        .cfi_remember_state
        .cfi_def_cfa %rsp, 8
        ret
        .cfi_restore_state
        .endm
