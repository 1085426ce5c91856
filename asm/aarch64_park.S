/*
 * The stubs for arm64 by which a suspended stack leaves its key domain and comes into another: park, with what a walk over parked frames
 * looks at.
 *
 * A thread's own keys sign what runs; one key that two threads share signs what is parked. Each word stays in its place: it is
 * authenticated under the one key and modifier and signed under the other, in one block, never raw in memory.
 *
 *            running                                   parked
 *   key      own: IA or IB; DA or DB                   shared: the same for all words; the data key of its letter for frame pointers
 *   modifier the CFA, zero, the CFA below a number;    PACGA(running modifier; the word's address + 1 for own key A, + 2 for B) + 1
 *            of a frame pointer its own address
 *
 * On the way back nothing but the plan says for which key and modifier a word is to be signed, and the plan lies in memory that anybody can write.
 * So both are under the signature that is authenticated first: the modifier of a parked word is a code of them, under the generic key, which
 * the two threads share too. It is odd and no running one is, so a parked word passes for no running one and the other way round, frames
 * with modifier zero included; and it has the word's place in it, so none passes for another.
 */

#include "aarch64_plan.h"

/* x7 */
#define WAY_KEY         3               /* FORM_A or FORM_B: the shared key */
#define WAY_BACK_BIT    2               /* from the shared key to the frame's own */

        .text

/*
 * What the stubs believe of the place, out of the sealed record: x13 how many bytes above x1 a word may lie. x3 the plan's end, x14 the
 * shared key. In: x0 record, x1 lowest address, x2 plan, x3 count, x7 way. Clobbers x8-x10, x15-x17, flags.
 */
        .macro LOAD_PLACE
        MODE    x15
        add     x3, x2, x3, lsl #4
        tbz     x15, #MODE_PAC_BIT, LOCAL(park_bounds)
        tbz     x15, #MODE_PACGA_BIT, LOCAL(park_bounds)
        LOAD_RECORD x0, x8, x13, x9, x10, x16, x17, x15
        cmp     x1, x8
        b.lo    LOCAL(park_bounds)
        tst     x1, #7
        b.ne    LOCAL(park_bounds)
        sub     x13, x13, #8
        subs    x13, x13, x1
        b.lo    LOCAL(park_bounds)
        and     x14, x7, #WAY_KEY
        sub     x16, x14, #FORM_A
        cmp     x16, #(FORM_B - FORM_A)
        b.hi    LOCAL(park_bounds)
        .endm

/* The next entry: x9 the word's address, bounded, x10 its form, x17 what was planned with. Clobbers x12, flags. */
        .macro NEXT_ENTRY
        ldp     x9, x17, [x2], #PLAN_SIZE
        and     x10, x9, #FORM_BITS
        sub     x9, x9, x10
        sub     x12, x9, x1
        cmp     x12, x13
        b.hi    LOCAL(park_past)
        .endm

/*
 * From what is planned to what is done: x10 the key to authenticate with and x11 the modifier, x8 the key to sign with and x12 the modifier. In:
 * x9 the word's address, x10 the frame's own key, x11 the running modifier, x14 the shared key, x7 way. Clobbers x0, flags.
 */
        .macro BOTH_ENDS
        sub     x12, x10, #FORM_A
        cmp     x12, #(FORM_B - FORM_A)
        b.hi    LOCAL(park_past)        /* unsigned, or no form at all: the entry was rewritten */
        orr     x12, x9, x10
        pacga   x12, x11, x12
        orr     x12, x12, #1
        mov     x8, x14
        tbz     x7, #WAY_BACK_BIT, LOCAL(away\@)
        mov     x8, x10
        mov     x10, x14
        mov     x0, x11
        mov     x11, x12
        mov     x12, x0
LOCAL(away\@):
        .endm

/* One exchange in the safe shape: nothing is loaded or stored between the aut and the pac, and what is signed is what was meant. */
        .macro EXCHANGE aut, pac, strip, next
        ldr     x16, [x9]
        \aut    x16, x11
        \strip  x17
        cmp     x16, x17
        b.ne    LOCAL(failed_\aut)
        \pac    x16, x12
        str     x16, [x9]
        b       \next
        .endm

/* The exchange of the two keys in x10 and x8; \kind is i for instruction keys, d for data keys. Then on to \next. */
        .macro EXCHANGE_BY_KEYS kind, next
        cmp     x10, #FORM_B
        b.eq    4f
        cmp     x8, #FORM_B
        b.eq    3f
        EXCHANGE aut\kind\()a, pac\kind\()a, xpac\kind, \next
3:      EXCHANGE aut\kind\()a, pac\kind\()b, xpac\kind, \next
4:      cmp     x8, #FORM_B
        b.eq    5f
        EXCHANGE aut\kind\()b, pac\kind\()a, xpac\kind, \next
5:      EXCHANGE aut\kind\()b, pac\kind\()b, xpac\kind, \next
        .endm

/*
 * u64 cfi_stack_park(const Record *record, usize low, const Rebinding *plan, usize count, const u64 *shadow,
 *                    const Detail *details, usize detail_count, u64 way)
 *
 * Exchanges the planned return addresses in their places: from their frames' own keys to the shared one, or back.
 *   in       x0 record of their segment, x1 lowest address of a word, x2 plan, x3 count; x4 shadow, or 0 where GCS is off: the CPU is asked whether it
 *            is; x5 details, one for each described entry in turn, x6 how many; x7 the shared key (1 A, 2 B), + 4 on the way back
 *   out      x0 0; or entries left * 2, plus 1 when the entry's place lies outside the segment or it says no key
 *   clobbers x0-x17, flags; a leaf: nothing on either stack
 *   signs    return addresses, shared key, modifier PACGA(running modifier; slot + own key) + 1: only what has just authenticated with the own
 *            key under the running modifier; on the way back with the own key under the running modifier, only what has just
 *            authenticated with the shared key under the code of just these two
 *   traps    FPAC: the aut itself (SIGILL, ILL_ILLOPN); else brk #0xc470 (A), #0xc471 (B); brk #0xc474 for a record
 *            whose seal does not hold
 *   costs    32 instructions for an entry that is not described, 37 on the way back; one more with a shadow stack
 */
FUNC SYM(cfi_stack_park)
        .cfi_startproc
        hint    #34                     /* bti c */
        LOAD_PLACE
        cbnz    x4, LOCAL(park_next)
        UNLESS_GCS LOCAL(park_next)
        b       LOCAL(park_bounds)
LOCAL(park_next):
        cmp     x2, x3
        b.eq    LOCAL(park_done)
        NEXT_ENTRY
        cbz     x4, 1f
        ldr     x17, [x4], #8
1:      add     x11, x9, #8             /* the CFA, unless it is described */
        cmp     x10, #FORM_DESCRIBED
        b.eq    LOCAL(park_described)
2:      BOTH_ENDS
        EXCHANGE_BY_KEYS i, LOCAL(park_next)

LOCAL(park_described):
        cbz     x6, LOCAL(park_past)
        sub     x6, x6, #1
        ldr     x10, [x5], #8
        add     x11, x11, x10, lsr #32
        lsr     x0, x10, #16
        ubfx    x12, x10, #8, #8
        and     x10, x10, #0xff
        cmp     x12, #RULE_CFA
        b.eq    2b
        cmp     x12, #RULE_BLENDED
        b.eq    6f
        cmp     x12, #RULE_ZERO
        b.ne    LOCAL(park_past)
        mov     x11, #0
        b       2b
6:      bfi     x11, x0, #48, #16
        b       2b

LOCAL(failed_autia):
        NOT_MEANT xpaci, BRK_IA, LOCAL(park_word)
LOCAL(failed_autib):
        NOT_MEANT xpaci, BRK_IB, LOCAL(park_word)

LOCAL(park_done):
        mov     x0, #0
        ret
LOCAL(park_past):
        sub     x2, x2, #PLAN_SIZE
LOCAL(park_bounds):
        sub     x0, x3, x2
        lsr     x0, x0, #3
        orr     x0, x0, #1
        ret
LOCAL(park_word):
        sub     x2, x2, #PLAN_SIZE
        sub     x0, x3, x2
        lsr     x0, x0, #3
        ret
        .cfi_endproc
END SYM(cfi_stack_park)

/*
 * u64 cfi_stack_park_pointers(const Record *record, usize low, const Rebinding *plan, usize count, u64 way)
 *
 * Exchanges the planned signed frame pointers, as park does return addresses.
 *   in       x0 record, x1 lowest address of a word, x2 plan, x3 count, x4 way
 *   out      as park
 *   clobbers x0, x2, x3, x7-x17, flags; a leaf: nothing on either stack
 *   signs    frame pointers, the data key of the shared key's letter, modifier PACGA(slot; slot + own key) + 1: only what has just
 *            authenticated with the own data key under slot; and back
 *   traps    FPAC: the aut itself; else brk #0xc472 (A), #0xc473 (B); brk #0xc474
 */
FUNC SYM(cfi_stack_park_pointers)
        .cfi_startproc
        hint    #34                     /* bti c */
        mov     x7, x4
        LOAD_PLACE
LOCAL(park_pointers_next):
        cmp     x2, x3
        b.eq    LOCAL(park_done)
        NEXT_ENTRY
        mov     x11, x9
        BOTH_ENDS
        EXCHANGE_BY_KEYS d, LOCAL(park_pointers_next)
LOCAL(failed_autda):
        NOT_MEANT xpacd, BRK_DA, LOCAL(park_word)
LOCAL(failed_autdb):
        NOT_MEANT xpacd, BRK_DB, LOCAL(park_word)
        .cfi_endproc
END SYM(cfi_stack_park_pointers)

/*
 * usize cfi_stack_authenticate_parked_a(u64 word, u64 modifier, usize place), …_b: the raw address of a parked word, for look-up. The
 * letter is the shared key's; modifier is the running one, place the word's address + 1 for own key A, + 2 for B. …_da, …_db: the
 * same for saved frame pointers. A failure ends the process here. Leaves; clobber x0, x1, x16, x17, flags.
 */
        .macro AUTHENTICATE_PARKED aut, strip, immediate
        .cfi_startproc
        hint    #34                     /* bti c */
        pacga   x1, x1, x2
        orr     x1, x1, #1
        AUTHENTICATE \aut, \strip, \immediate
        .cfi_endproc
        .endm

FUNC SYM(cfi_stack_authenticate_parked_a)
        AUTHENTICATE_PARKED autia, xpaci, BRK_IA
END SYM(cfi_stack_authenticate_parked_a)
FUNC SYM(cfi_stack_authenticate_parked_b)
        AUTHENTICATE_PARKED autib, xpaci, BRK_IB
END SYM(cfi_stack_authenticate_parked_b)
FUNC SYM(cfi_stack_authenticate_parked_da)
        AUTHENTICATE_PARKED autda, xpacd, BRK_DA
END SYM(cfi_stack_authenticate_parked_da)
FUNC SYM(cfi_stack_authenticate_parked_db)
        AUTHENTICATE_PARKED autdb, xpacd, BRK_DB
END SYM(cfi_stack_authenticate_parked_db)

        ELF_NOTES
