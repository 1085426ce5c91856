/* What the stubs of managed stacks share on this ISA: the blocks that src/abi.rs declares, and how they are believed. */

#include "aarch64.h"

/* struct Control, src/abi.rs */
#define NATIVE_SP       0
#define NATIVE_TOKEN    8
#define TOKEN           16
#define SEAL            24
#define SEGMENT         32
#define SHADOW_TOP      40
#define IDENTITY        48
#define GENERATION      56
#define OUTCOME         64
/* struct Activation, src/abi.rs */
#define ACT_CONTROL     8
#define ACT_SCRATCH     16
/* struct Record, src/abi.rs */
#define REC_BASE        0
#define REC_TOP         8
#define REC_IDENTITY    16
#define REC_GENERATION  24
#define REC_SEAL        32
#define OUTCOME_LEFT    1


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

        HIDDEN  SYM(cfi_stack_published) /* Rust's: never another module's of the same name */
