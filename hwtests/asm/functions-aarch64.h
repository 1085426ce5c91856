/* How a hand-made managed function begins and ends on arm64. */

        .arch   armv8.5-a

        .macro FUNC name
        .globl  \name
        .type   \name, %function
        .balign 16
\name:
        .endm
        .macro END name
        .globl  \name\()_end
\name\()_end:
        .size   \name, . - \name
        .endm

/* Signs x30 with \key, a or b, and makes a frame of \bytes under the frame record. */
        .macro PROLOGUE key, bytes
        .cfi_startproc
        .ifc \key, b
        .cfi_b_key_frame
        .endif
        paci\key\()sp
        .cfi_negate_ra_state
        stp     x29, x30, [sp, #-16]!
        .cfi_def_cfa_offset 16
        .cfi_offset x29, -16
        .cfi_offset x30, -8
        mov     x29, sp
        .cfi_def_cfa x29, 16
        .if     \bytes
        sub     sp, sp, #\bytes
        .endif
        .endm

/* A return in the middle: what follows still has the frame. */
        .macro EPILOGUE key
        mov     sp, x29
        ldp     x29, x30, [sp], #16
        .cfi_remember_state
        .cfi_def_cfa sp, 0
        .cfi_restore x29
        .cfi_restore x30
        auti\key\()sp
        .cfi_negate_ra_state
        ret
        .cfi_restore_state
        .endm

/* Loads the word at \name + \offset. */
        .macro WORD reg, name, offset
        adrp    \reg, \name
        add     \reg, \reg, #:lo12:\name
        ldr     \reg, [\reg, #\offset]
        .endm
