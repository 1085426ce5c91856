/* What the stubs of managed stacks share on this ISA: the blocks that src/abi.rs declares, and how they are believed. */

#include "aarch64.h"

/* struct Control, src/abi.rs */
#define NATIVE_SP       0
#define NATIVE_TOKEN    8
#define TOKEN           16
#define SEAL            24
#define SEGMENT         32
#define SHADOW_LEVEL    40
#define IDENTITY        48
#define GENERATION      56
#define OUTCOME         64
#define LINK            72
#define NESTED          80
#define ACTIVATION      88
#define SUSPENDED       96              /* a struct Link */
#define SAVED           128
/* struct Link, src/abi.rs */
#define LINK_RECORD     0
#define LINK_PC         8
#define LINK_CONTROL    16
#define LINK_SEAL       24
#define LINK_SIZE       32
/* struct Activation, src/abi.rs */
#define ACT_CONTROL     8
#define ACT_SCRATCH     16
/* struct Record, src/abi.rs */
#define REC_BASE        0
#define REC_TOP         8
#define REC_IDENTITY    16
#define REC_GENERATION  24
#define REC_SEAL        32
#define REC_PREVIOUS    40
#define REC_SHADOW      104
/* src/stack.rs */
#define OUTCOME_LEFT            1
#define OUTCOME_SUSPENDED       3
#define OUTCOME_NESTED          4

/* Authenticates x30 for the present SP and returns. The check is ours where the CPU does not fault by itself:
   `ret` never runs into a poisoned address. Clobbers x16, flags. */
        .macro AUTHENTICATED_RETURN
        AUTH_LR
        .cfi_negate_ra_state
        mov     x16, x30
        hint    #7                      /* xpaclri */
        cmp     x16, x30
        b.eq    LOCAL(return\@)
        brk     #BRK_LR
LOCAL(return\@):
        ret
        .endm

/* Traps unless \ctrl's seal says that \sp is the native stack pointer that enter left. Nothing without PACGA.
   Clobbers \a, \b, flags. */
        .macro VERIFY_NATIVE sp, ctrl, a, b
        MODE    \a
        tbz     \a, #MODE_PACGA_BIT, LOCAL(unsealed\@)
        pacga   \a, \sp, \ctrl
        ldr     \b, [\ctrl, #IDENTITY]
        pacga   \a, \a, \b
        ldr     \b, [\ctrl, #GENERATION]
        pacga   \a, \a, \b
        ldr     \b, [\ctrl, #SEAL]
        cmp     \a, \b
        b.eq    LOCAL(unsealed\@)
        brk     #BRK_GA
LOCAL(unsealed\@):
        .endm

/* Loads a segment record into registers and traps unless its seal holds for just these values at just this address.
   Clobbers \a, flags. \mode is the mode word. */
        .macro LOAD_RECORD rec, base, top, id, gen, a, b, mode
        ldp     \base, \top, [\rec, #REC_BASE]
        ldp     \id, \gen, [\rec, #REC_IDENTITY]
        tbz     \mode, #MODE_PACGA_BIT, LOCAL(plain\@)
        pacga   \a, \base, \rec
        pacga   \a, \a, \top
        pacga   \a, \a, \id
        pacga   \a, \a, \gen
        ldr     \b, [\rec, #REC_SEAL]
        cmp     \a, \b
        b.eq    LOCAL(plain\@)
        brk     #BRK_GA
LOCAL(plain\@):
        .endm

/* Changes the shadow stack from the one whose token will lie in \from(\ctrl) to the one whose token lies in
   \to(\ctrl). Nothing where GCS is off. Clobbers \a, x16. */
        .macro SHADOW_SWITCH ctrl, from, to, a
        UNLESS_GCS LOCAL(gcs_off\@)
        ldr     \a, [\ctrl, #\to]
        sys     #3, c7, c7, #2, \a      /* gcsss1 \a */
        sysl    \a, #3, c7, c7, #3      /* gcsss2 \a */
        str     \a, [\ctrl, #\from]
LOCAL(gcs_off\@):
        .endm

/* From a further shadow segment, with nothing on it, back to the one that its bottom names: the in-progress word is used up, the token that it
   makes there too, and the further one has its own again. Faults where the pointer is not at such a word. Clobbers \a. */
        .macro SHADOW_BACK a
        sysl    \a, #3, c7, c7, #3      /* gcsss2 \a */
        sys     #3, c7, c7, #2, \a      /* gcsss1 \a */
        sysl    \a, #3, c7, c7, #3      /* gcsss2 \a */
        .endm

/* A landing pad that signs x30; the stub's own frame record on the stack that runs, and its CFI. */
        .macro FRAME_RECORD
        SIGN_LR
        .cfi_negate_ra_state
        stp     x29, x30, [sp, #-16]!
        .cfi_def_cfa_offset 16
        .cfi_offset x29, -16
        .cfi_offset x30, -8
        mov     x29, sp
        .cfi_def_cfa x29, 16
        .endm

/* The end of a frame that FRAME_RECORD began, sp at its record. Clobbers x16, flags. */
        .macro RECORD_RETURN
        ldp     x29, x30, [sp], #16
        .cfi_def_cfa sp, 0
        .cfi_restore x29
        .cfi_restore x30
        AUTHENTICATED_RETURN
        .endm

/* The frame of enter, resume and discard, and its CFI: the frame record, x19-x28, d8-d15. */
        .macro ENTRY_PROLOGUE
        SIGN_LR                         /* a landing pad, too */
        .cfi_negate_ra_state
        stp     x29, x30, [sp, #-176]!
        .cfi_def_cfa_offset 176
        .cfi_offset x29, -176
        .cfi_offset x30, -168
        mov     x29, sp
        .cfi_def_cfa x29, 176
        stp     x19, x20, [sp, #16]
        stp     x21, x22, [sp, #32]
        stp     x23, x24, [sp, #48]
        stp     x25, x26, [sp, #64]
        stp     x27, x28, [sp, #80]
        stp     d8, d9, [sp, #96]
        stp     d10, d11, [sp, #112]
        stp     d12, d13, [sp, #128]
        stp     d14, d15, [sp, #144]
        CALLEE_SAVES
        .endm

/* Says in \ctrl that the entry frame is at x29, and seals it. Clobbers \a, \b; \mode becomes the mode word. */
        .macro SEAL_NATIVE ctrl, a, b, mode
        str     x29, [\ctrl, #NATIVE_SP]
        MODE    \mode
        tbz     \mode, #MODE_PACGA_BIT, LOCAL(native\@)
        pacga   \a, x29, \ctrl
        ldr     \b, [\ctrl, #IDENTITY]
        pacga   \a, \a, \b
        ldr     \b, [\ctrl, #GENERATION]
        pacga   \a, \a, \b
        str     \a, [\ctrl, #SEAL]
LOCAL(native\@):
        .endm

/* Loads control's segment record and traps unless its seal holds and it is this stack's of this generation. \mode is the mode word.
   Clobbers the rest, flags. */
        .macro LOAD_SEGMENT ctrl, rec, base, top, id, gen, a, b, mode
        ldr     \rec, [\ctrl, #SEGMENT]
        LOAD_RECORD \rec, \base, \top, \id, \gen, \a, \b, \mode
        ldr     \a, [\ctrl, #IDENTITY]
        ldr     \b, [\ctrl, #GENERATION]
        cmp     \id, \a
        ccmp    \gen, \b, #0, eq
        b.eq    LOCAL(segment\@)
        brk     #BRK_GA                 /* another stack's segment */
LOCAL(segment\@):
        .endm

/* \seal becomes the seal of a link record at \link that says \rec. Clobbers \a. */
        .macro LINK_SEAL_OF rec, link, ctrl, seal, a
        pacga   \seal, \rec, \link
        pacga   \seal, \seal, \ctrl
        ldr     \a, [\ctrl, #IDENTITY]
        pacga   \seal, \seal, \a
        ldr     \a, [\ctrl, #GENERATION]
        pacga   \seal, \seal, \a
        .endm

/* Fills the link record at \link: managed code waits at x29; \back is a label in the stub. Clobbers \a, \b. */
        .macro WRITE_LINK link, ctrl, back, a, b
        adr     \a, \back
        stp     x29, \a, [\link, #LINK_RECORD]
        MODE    \a
        tbz     \a, #MODE_PACGA_BIT, LOCAL(unlinked\@)
        LINK_SEAL_OF x29, \link, \ctrl, \a, \b
        b       LOCAL(linked\@)
LOCAL(unlinked\@):
        mov     \a, xzr
LOCAL(linked\@):
        stp     \ctrl, \a, [\link, #LINK_CONTROL]
        .endm

/* Loads where managed code waits into \rec and traps unless its seal holds; without PACGA unless a frame record can lie there in the
   present segment or one before: lifted frames return without a word to control. Clobbers \a, \b, flags. */
        .macro LOAD_LINK link, ctrl, rec, a, b
        ldr     \rec, [\link, #LINK_RECORD]
        MODE    \a
        tbz     \a, #MODE_PACGA_BIT, LOCAL(unsealed\@)
        LINK_SEAL_OF \rec, \link, \ctrl, \a, \b
        ldr     \b, [\link, #LINK_SEAL]
        cmp     \a, \b
        b.eq    LOCAL(linked\@)
        brk     #BRK_GA
LOCAL(unsealed\@):
        tst     \rec, #15
        b.ne    LOCAL(astray\@)
        ldr     \a, [\ctrl, #SEGMENT]
LOCAL(look\@):
        ldr     \b, [\a, #REC_BASE]
        cmp     \rec, \b
        b.lo    LOCAL(before\@)
        ldr     \b, [\a, #REC_TOP]
        cmp     \rec, \b
        b.lo    LOCAL(linked\@)
LOCAL(before\@):
        ldr     \a, [\a, #REC_PREVIOUS]
        cbnz    \a, LOCAL(look\@)
LOCAL(astray\@):
        brk     #BRK_GA
LOCAL(linked\@):
        .endm

/* CFA = *x29 + 16: DW_OP_breg29 0, DW_OP_deref, DW_OP_plus_uconst 16. */
        .macro CFA_BY_LINK
        .cfi_escape 0x0f, 5, 0x8d, 0, 0x06, 0x23, 16
        .endm

/* To the entry frame at \fp, which is verified: sp and x29, the CFI of its frame. \signed: the frame that is left has not signed x30. */
        .macro TO_ENTRY_FRAME fp, signed=0
        mov     x29, \fp
        .if     \signed
        .cfi_negate_ra_state
        .endif
        .cfi_def_cfa x29, 176
        .cfi_offset x29, -176
        .cfi_offset x30, -168
        CALLEE_SAVES
        mov     sp, \fp
        .endm

        HIDDEN  SYM(cfi_stack_published) /* Rust's: never another module's of the same name */

        HIDDEN  SYM(cfi_stack_no_unwind) /* Rust's: ends the process */

/* Behind .cfi_startproc: no unwinder passes this frame, backtraces do. */
        .macro NO_UNWIND
#ifdef __APPLE__
        .cfi_personality 0x9b, SYM(cfi_stack_no_unwind) /* pc-relative, indirect, 4 bytes */
#else
        .cfi_personality 0x1b, SYM(cfi_stack_no_unwind) /* pc-relative, 4 bytes */
#endif
        .endm
