/* What the stubs of managed stacks share on this ISA: the blocks that src/abi.rs declares, and the change of shadow stacks. */

#include "x86_64.h"

/* struct Control, src/abi.rs */
#define NATIVE_SP       0
#define NATIVE_TOKEN    8
#define TOKEN           16
#define SEGMENT         32
#define SHADOW_TOP      40
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
/* enter's frame, from its rbp */
#define ENTRY_FRAME     48
#define OUTCOME_LEFT    1

/* Changes the shadow stack from the one whose token will lie in \from(%\ctrl) to the one whose token lies in
   \to(%\ctrl). Nothing where shadow stacks are off. Clobbers \a, \b and flags. */
        .macro SHADOW_SWITCH ctrl, from, to, a, b
        xor     %\a, %\a
        rdsspq  %\a
        test    %\a, %\a
        jz      .Lshadow_off\@
        sub     $8, %\a                 /* where saveprevssp will leave the token */
        mov     %\a, \from(%\ctrl)
        mov     \to(%\ctrl), %\b
        rstorssp (%\b)
        saveprevssp
.Lshadow_off\@:
        .endm
