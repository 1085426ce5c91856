/* What the stubs of this ISA share: symbols on ELF and Mach-O, the mode word, whether GCS is on, why they trap. */

/* src/published.rs */
#define MODE_PAC_BIT    0
#define MODE_PACGA_BIT  1
#define MODE_SHADOW_BIT 2
#define MODE_FULL_SEAL_BIT 4
#define PUBLISHED_DIRECTORY 16
#define PUBLISHED_CHUNKS    24

/* brk immediates: authentication failed without FPAC; PACGA seal mismatch */
#define BRK_IA          0xc470
#define BRK_IB          0xc471
#define BRK_GA          0xc474

#ifdef __APPLE__
#define SYM(x)          _##x
#define LOCAL(x)        L##x
#define HIDDEN          .private_extern
#define SIGN_LR         pacibsp
#define AUTH_LR         autibsp
#define BRK_LR          BRK_IB
#else
#define SYM(x)          x
#define LOCAL(x)        .L##x
#define HIDDEN          .hidden
#define SIGN_LR         paciasp
#define AUTH_LR         autiasp
#define BRK_LR          BRK_IA
        .arch   armv8.5-a
#endif

        .macro FUNC name
        .globl  \name
        HIDDEN  \name
#ifdef __ELF__
        .type   \name, %function
#endif
        .p2align 4
\name:
        .endm

        .macro END name
#ifdef __ELF__
        .size   \name, . - \name
#endif
        .endm

/* The mode word: read-only memory. */
        .macro MODE reg
#ifdef __APPLE__
        adrp    \reg, _cfi_stack_published@PAGE
        ldr     \reg, [\reg, _cfi_stack_published@PAGEOFF]
#else
        adrp    \reg, cfi_stack_published
        ldr     \reg, [\reg, #:lo12:cfi_stack_published]
#endif
        .endm

/* Branches to \off unless GCS is on for this thread. Clobbers x16. */
        .macro UNLESS_GCS off
        mov     x16, #1
        hint    #40                     /* chkfeat x16: bit 0 is cleared when GCS is enabled */
        cbnz    x16, \off
        .endm

/* Where the frame of enter, and that of a stack which was switched away from, keep the callee-saved registers, from the CFA. */
        .macro CALLEE_SAVES
        .cfi_offset x19, -160
        .cfi_offset x20, -152
        .cfi_offset x21, -144
        .cfi_offset x22, -136
        .cfi_offset x23, -128
        .cfi_offset x24, -120
        .cfi_offset x25, -112
        .cfi_offset x26, -104
        .cfi_offset x27, -96
        .cfi_offset x28, -88
        .cfi_offset d8, -80
        .cfi_offset d9, -72
        .cfi_offset d10, -64
        .cfi_offset d11, -56
        .cfi_offset d12, -48
        .cfi_offset d13, -40
        .cfi_offset d14, -32
        .cfi_offset d15, -24
        .endm

/* The object has a landing pad at every indirect target, signs its return addresses and keeps a GCS true:
   BTI | PAC | GCS (AAELF64, "Program Property"). */
        .macro ELF_NOTES
#ifdef __ELF__
        .section .note.gnu.property, "a", @note
        .balign 8
        .long   4, 16, 5
        .asciz  "GNU"
        .long   0xc0000000, 4, 7, 0
        .section .note.GNU-stack, "", @progbits
#endif
        .endm
