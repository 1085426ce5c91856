/*
 * The stubs for arm64 that authenticate, re-sign and seal. Leaves all: nothing of theirs lies on a stack, and what they
 * check and sign stays in registers.
 */

#include "aarch64_plan.h"

/* In x15, above the bits of the mode word: the words lie at their new places already, under their old modifiers. */
#define IN_PLACE_BIT    62

        .text

/*
 * What rebind believes of the span, out of the sealed records: x8 the source's base, x14 delta, x13 how many words above x2 a slot
 * may be; x4 the plan's end. In: x0 source, x1 destination, x2 the span's lowest address, x3 plan, x4 count. x15 the mode word.
 * Clobbers x0, x9-x12, x16, x17, flags.
 */
        .macro LOAD_SPAN
        add     x4, x3, x4, lsl #4
        LOAD_RECORD x0, x8, x13, x9, x10, x16, x17, x15
        LOAD_RECORD x1, x11, x14, x12, x0, x16, x17, x15
        cmp     x9, x12                 /* the same stack … */
        ccmp    x10, x0, #0, eq         /* … of the same generation */
        b.ne    LOCAL(rebind_bounds)
        sub     x14, x14, x13           /* delta */
        sub     x11, x11, x14           /* lowest slot that the destination can take */
        cmp     x2, x8
        ccmp    x2, x11, #0, hs
        b.lo    LOCAL(rebind_bounds)
        tst     x2, #7
        b.ne    LOCAL(rebind_bounds)
        sub     x13, x13, #8            /* highest slot */
        subs    x13, x13, x2
        b.lo    LOCAL(rebind_bounds)
        lsr     x13, x13, #3
        .endm

/*
 * One entry in its key's own loop. x10 = x2 + form, x8 = delta − form, x11 = −form or, in place, x8. The form counts as alignment: where the entry's is another, or
 * its slot is misaligned, the rotation brings what is left of it to the top, and the one comparison of bounds fails.
 *
 * x17, what the word must authenticate to, is stripped: equal to it, x16 is a canonical address and the one that was planned
 * with. So one comparison finds a word that does not authenticate and one that is not meant. Nothing is loaded or stored between
 * the aut and the pac.
 */
        .macro PLAIN aut, pac, form, shadow
        .if \shadow
        ldr     x9, [x3], #PLAN_SIZE
        .else
        ldp     x9, x17, [x3], #PLAN_SIZE
        .endif
        sub     x12, x9, x10
        ror     x12, x12, #3
        cmp     x12, x13
        b.hi    LOCAL(rebind_other)
        .if \shadow
        ldr     x17, [x5], #8
        .endif
        add     x12, x9, #(8 - \form)   /* the CFA: the modifier at the old place */
        ldr     x16, [x9, x11]
        \aut    x16, x12
        xpaci   x17
        cmp     x16, x17
        b.ne    LOCAL(failed_\aut)
        add     x12, x12, x14
        \pac    x16, x12
        str     x16, [x9, x8]
        .endm

/* The loops of a key, and where its failures end. x3 is not the end. */
        .macro LOOPS aut, pac, form, immediate
        add     x10, x2, #\form
        sub     x8, x14, #\form
        mov     x11, #-\form
        tbz     x15, #IN_PLACE_BIT, LOCAL(from\@)
        mov     x11, x8
LOCAL(from\@):
        cbnz    x5, LOCAL(shadowed\@)
LOCAL(plain\@):
        PLAIN   \aut, \pac, \form, 0
        cmp     x3, x4
        b.ne    LOCAL(plain\@)
        b       LOCAL(rebind_done)
LOCAL(shadowed\@):
        sub     x12, x4, x3
        tbnz    x12, #4, LOCAL(odd\@)
LOCAL(pair\@):
        PLAIN   \aut, \pac, \form, 1
LOCAL(odd\@):
        PLAIN   \aut, \pac, \form, 1
        cmp     x3, x4
        b.ne    LOCAL(pair\@)
        b       LOCAL(rebind_done)
LOCAL(failed_\aut):
        NOT_MEANT xpaci, \immediate, LOCAL(rebind_word)
        .endm

/*
 * u64 cfi_stack_rebind(const Record *source, const Record *destination, usize low, const Rebinding *plan,
 *                      usize count, const u64 *shadow, const Detail *details, usize detail_count)
 *
 * Re-binds the planned return addresses: each is authenticated at its old place, must be the planned one, or the shadow
 * stack's where there is one, is signed for its new place and stored there. Delta comes from the sealed records, in registers.
 *   in       x0 source, x1 destination, x2 lowest address of the span, x3 plan, x4 count, x5 shadow, or 0 where GCS is
 *            off: the CPU is asked whether it is; x6 details, one for each described entry in turn, x7 how many
 *   out      x0 0; or entries left * 2, plus 1 when the entry's place lies outside the span
 *   clobbers x0-x17, flags; a leaf: nothing on either stack
 *   signs    return addresses, key as planned, modifier slot + 8 + delta, or as described: old modifier + delta, zero, or old
 *            CFA + delta below the number; only what has just authenticated with the same key under the old modifier
 *   traps    FPAC: the aut itself (SIGILL, ILL_ILLOPN); else brk #0xc470 (A), #0xc471 (B); brk #0xc474 for a record
 *            whose seal does not hold
 *   costs    16 instructions for an entry that is not described
 */
FUNC SYM(cfi_stack_rebind)
        .cfi_startproc
        hint    #34                     /* bti c */
        MODE    x15
LOCAL(rebind_begin):
        cbnz    x5, 1f
        UNLESS_GCS 1f
        add     x4, x3, x4, lsl #4
        b       LOCAL(rebind_bounds)
1:      LOAD_SPAN
        cmp     x3, x4
        b.eq    LOCAL(rebind_done)
        tbz     x15, #MODE_PAC_BIT, LOCAL(rebind_unsigned)
LOCAL(rebind_next):
        ldp     x9, x17, [x3]
        and     x10, x9, #FORM_BITS
        sub     x9, x9, x10
        sub     x12, x9, x2
        cmp     x12, x13, lsl #3
        b.hi    LOCAL(rebind_bounds)
        cmp     x10, #FORM_A
        b.eq    LOCAL(rebind_a)
        cmp     x10, #FORM_B
        b.eq    LOCAL(rebind_b)
        cmp     x10, #FORM_DESCRIBED
        b.eq    LOCAL(rebind_described)
        b       LOCAL(rebind_bounds)    /* unsigned, or no signing at all: the entry was rewritten */
LOCAL(rebind_a):
        LOOPS   autia, pacia, FORM_A, BRK_IA
LOCAL(rebind_b):
        LOOPS   autib, pacib, FORM_B, BRK_IB

LOCAL(rebind_described):                /* x9 slot, x17 planned pc */
        cbz     x7, LOCAL(rebind_bounds)
        sub     x7, x7, #1
        ldr     x11, [x6], #8
        add     x3, x3, #PLAN_SIZE
        cbz     x5, 1f
        ldr     x17, [x5], #8
1:      add     x12, x9, #8
        add     x12, x12, x11, lsr #32  /* the CFA at the old place … */
        add     x10, x12, x14           /* … and at the new one */
        add     x1, x9, x14
        tbz     x15, #IN_PLACE_BIT, 6f
        mov     x9, x1
6:      lsr     x0, x11, #16
        ubfx    x8, x11, #8, #8
        and     x11, x11, #0xff
        cmp     x8, #RULE_CFA
        b.eq    3f
        cmp     x8, #RULE_BLENDED
        b.eq    2f
        cmp     x8, #RULE_ZERO
        b.ne    LOCAL(rebind_past)
        mov     x12, #0
        mov     x10, #0
        b       3f
2:      bfi     x12, x0, #48, #16
        bfi     x10, x0, #48, #16
3:      cmp     x11, #FORM_B
        b.eq    4f
        cmp     x11, #FORM_A
        b.ne    LOCAL(rebind_past)
        ldr     x16, [x9]
        autia   x16, x12
        xpaci   x17
        cmp     x16, x17
        b.ne    LOCAL(failed_autia)
        pacia   x16, x10
        str     x16, [x1]
        b       5f
4:      ldr     x16, [x9]
        autib   x16, x12
        xpaci   x17
        cmp     x16, x17
        b.ne    LOCAL(failed_autib)
        pacib   x16, x10
        str     x16, [x1]
5:      cmp     x3, x4
        b.ne    LOCAL(rebind_next)
        b       LOCAL(rebind_done)

LOCAL(rebind_unsigned):                 /* as it was planned and copied, never signed, nothing written */
        ldp     x9, x17, [x3], #PLAN_SIZE
        sub     x12, x9, x2
        ror     x12, x12, #3
        cmp     x12, x13
        b.hi    LOCAL(rebind_past)
        cbz     x5, 1f
        ldr     x17, [x5], #8
1:      ldr     x16, [x9, x14]
        cmp     x16, x17
        b.ne    LOCAL(rebind_word)
        cmp     x3, x4
        b.ne    LOCAL(rebind_unsigned)
LOCAL(rebind_done):
        mov     x0, #0
        ret
LOCAL(rebind_other):
        sub     x3, x3, #PLAN_SIZE
        b       LOCAL(rebind_next)
LOCAL(rebind_past):
        sub     x3, x3, #PLAN_SIZE
LOCAL(rebind_bounds):
        sub     x0, x4, x3
        lsr     x0, x0, #3
        orr     x0, x0, #1
        ret
LOCAL(rebind_word):
        sub     x3, x3, #PLAN_SIZE
        sub     x0, x4, x3
        lsr     x0, x0, #3
        ret
        .cfi_endproc
END SYM(cfi_stack_rebind)

/* One signed frame pointer: x9 its address and modifier, x11 those at the new place, x6 the source's size. What leads into the
   source leads to the same place in the destination afterwards. */
        .macro POINTER aut, pac, immediate
        ldr     x16, [x12]
        \aut    x16, x9
        xpacd   x17
        cmp     x16, x17
        b.ne    LOCAL(failed_\aut)
        sub     x12, x16, x8
        cmp     x12, x6
        csel    x12, x14, xzr, lo
        add     x16, x16, x12
        \pac    x16, x11
        str     x16, [x11]
        .endm

/*
 * u64 cfi_stack_rebind_pointers(const Record *source, const Record *destination, usize low, const Rebinding *plan,
 *                               usize count)
 *
 * Re-binds the planned signed frame pointers, as rebind does return addresses: what leads into the source is moved by delta.
 *   in       x0 source, x1 destination, x2 lowest address of the span, x3 plan, x4 count
 *   out      as rebind
 *   clobbers x0-x17, flags; a leaf: nothing on either stack
 *   signs    frame pointers, data key as planned, modifier slot + delta; only what has just authenticated with the same key
 *            under slot, or that plus delta when it points into the source
 *   traps    FPAC: the aut itself; else brk #0xc472 (A), #0xc473 (B); brk #0xc474
 */
FUNC SYM(cfi_stack_rebind_pointers)
        .cfi_startproc
        hint    #34                     /* bti c */
        MODE    x15
LOCAL(rebind_pointers_begin):
        LOAD_SPAN
        cmp     x3, x4
        b.eq    LOCAL(rebind_done)
        tbz     x15, #MODE_PAC_BIT, LOCAL(rebind_bounds)
        add     x6, x2, x13, lsl #3
        sub     x6, x6, x8
        add     x6, x6, #8              /* bytes from the source's base to its top */
1:      ldp     x9, x17, [x3], #PLAN_SIZE
        and     x10, x9, #FORM_BITS
        sub     x9, x9, x10
        sub     x12, x9, x2
        cmp     x12, x13, lsl #3
        b.hi    LOCAL(rebind_past)
        add     x11, x9, x14
        mov     x12, x9
        tbz     x15, #IN_PLACE_BIT, 4f
        mov     x12, x11
4:      cmp     x10, #FORM_B
        b.eq    2f
        cmp     x10, #FORM_A
        b.ne    LOCAL(rebind_past)
        POINTER autda, pacda, BRK_DA
        b       3f
2:      POINTER autdb, pacdb, BRK_DB
3:      cmp     x3, x4
        b.ne    1b
        b       LOCAL(rebind_done)
LOCAL(failed_autda):
        NOT_MEANT xpacd, BRK_DA, LOCAL(rebind_word)
LOCAL(failed_autdb):
        NOT_MEANT xpacd, BRK_DB, LOCAL(rebind_word)
        .cfi_endproc
END SYM(cfi_stack_rebind_pointers)

/*
 * As cfi_stack_rebind and cfi_stack_rebind_pointers, for a span whose pages were moved: each word lies at its new place, and is
 * authenticated there under the modifier of the old.
 */
FUNC SYM(cfi_stack_rebind_in_place)
        .cfi_startproc
        hint    #34                     /* bti c */
        MODE    x15
        orr     x15, x15, #(1 << IN_PLACE_BIT)
        b       LOCAL(rebind_begin)
        .cfi_endproc
END SYM(cfi_stack_rebind_in_place)
FUNC SYM(cfi_stack_rebind_pointers_in_place)
        .cfi_startproc
        hint    #34                     /* bti c */
        MODE    x15
        orr     x15, x15, #(1 << IN_PLACE_BIT)
        b       LOCAL(rebind_pointers_begin)
        .cfi_endproc
END SYM(cfi_stack_rebind_pointers_in_place)

/*
 * usize cfi_stack_authenticate_a(u64 word, u64 modifier), …_b: the raw address, for look-up; …_da, …_db: the same for saved
 * frame pointers. A failure ends the process here. Leaves; clobber x0, x16, x17, flags.
 */
        .macro LOOK aut, strip, immediate
        .cfi_startproc
        hint    #34                     /* bti c */
        AUTHENTICATE \aut, \strip, \immediate
        .cfi_endproc
        .endm

FUNC SYM(cfi_stack_authenticate_a)
        LOOK    autia, xpaci, BRK_IA
END SYM(cfi_stack_authenticate_a)
FUNC SYM(cfi_stack_authenticate_b)
        LOOK    autib, xpaci, BRK_IB
END SYM(cfi_stack_authenticate_b)
FUNC SYM(cfi_stack_authenticate_da)
        LOOK    autda, xpacd, BRK_DA
END SYM(cfi_stack_authenticate_da)
FUNC SYM(cfi_stack_authenticate_db)
        LOOK    autdb, xpacd, BRK_DB
END SYM(cfi_stack_authenticate_db)

/*
 * void cfi_stack_seal(Record *record, usize base, usize top, u64 identity, u64 generation)
 *
 * Fills the record and seals it, from registers: a PACGA chain over the four words, bound to the record's address.
 *   in       x0-x4; clobbers x9; a leaf
 */
FUNC SYM(cfi_stack_seal)
        .cfi_startproc
        hint    #34                     /* bti c */
        stp     x1, x2, [x0, #REC_BASE]
        stp     x3, x4, [x0, #REC_IDENTITY]
        MODE    x9
        tbz     x9, #MODE_PACGA_BIT, 1f
        pacga   x9, x1, x0
        pacga   x9, x9, x2
        pacga   x9, x9, x3
        pacga   x9, x9, x4
        str     x9, [x0, #REC_SEAL]
        ret
1:      str     xzr, [x0, #REC_SEAL]
        ret
        .cfi_endproc
END SYM(cfi_stack_seal)

/*
 * void cfi_stack_reseal(Record *record, u64 generation)
 *
 * Changes the generation of a record whose present seal holds: what is sealed anew are the words that were
 * verified, out of registers.
 *   in       x0 record, x1 generation; clobbers x2-x9, flags; a leaf
 *   traps    brk #0xc474
 */
FUNC SYM(cfi_stack_reseal)
        .cfi_startproc
        hint    #34                     /* bti c */
        MODE    x9
        LOAD_RECORD x0, x2, x3, x4, x5, x6, x7, x9
        str     x1, [x0, #REC_GENERATION]
        tbz     x9, #MODE_PACGA_BIT, 1f
        pacga   x6, x2, x0
        pacga   x6, x6, x3
        pacga   x6, x6, x4
        pacga   x6, x6, x1
        str     x6, [x0, #REC_SEAL]
1:      ret
        .cfi_endproc
END SYM(cfi_stack_reseal)

        ELF_NOTES
