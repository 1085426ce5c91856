/* What the stubs that take a plan share on arm64: its blocks, as src/abi.rs declares them, and how a word is found out that is not the one meant. */

#include "aarch64_managed.h"

/* struct Rebinding: place (address | form), what the word authenticates to */
#define PLAN_SIZE       16
#define FORM_BITS       7
#define FORM_A          1
#define FORM_B          2
#define FORM_DESCRIBED  3
/* struct Detail */
#define RULE_CFA        0
#define RULE_ZERO       1
#define RULE_BLENDED    2

/* brk immediates, besides those of aarch64.h */
#define BRK_DA          0xc472
#define BRK_DB          0xc473

/* x16 is not what was meant. One that did not authenticate is not canonical; else it goes to \word. */
        .macro NOT_MEANT strip, immediate, word
        mov     x17, x16
        \strip  x17
        cmp     x16, x17
        b.eq    \word
        brk     #\immediate
        .endm

/* The raw address of the word in x0 under the modifier in x1; a failure ends the process here. */
        .macro AUTHENTICATE aut, strip, immediate
        mov     x16, x0
        \aut    x16, x1
        mov     x17, x16
        \strip  x17
        cmp     x16, x17
        b.eq    LOCAL(authentic\@)
        brk     #\immediate
LOCAL(authentic\@):
        mov     x0, x16
        ret
        .endm
