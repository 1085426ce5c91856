/* What the stubs of this ISA share: how a function begins and ends, and what the object says of itself. */

/* The mode word's bit for shadow stacks, src/published.rs */
#define MODE_SHADOW     4

        .macro FUNC name
        .globl  \name
        .hidden \name
        .type   \name, @function
        .balign 16
\name:
        .endm

        .macro END name
        .size   \name, . - \name
        .endm

/* The object has a landing pad at every indirect target and keeps shadow stacks true: IBT | SHSTK
   (x86-64 psABI, "Program Property"). */
        .macro ELF_NOTES
        .section .note.gnu.property, "a", @note
        .balign 8
        .long   4, 16, 5
        .asciz  "GNU"
        .long   0xc0000002, 4, 3, 0
        .section .note.GNU-stack, "", @progbits
        .endm
