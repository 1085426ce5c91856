/*
 * The stubs for arm64 that authenticate, re-sign and seal. Leaves all: nothing of theirs lies on a stack, and what they
 * check and sign stays in registers.
 */

#include "aarch64_managed.h"

/* struct Rebinding, src/abi.rs: slot, pc, signing */
#define PLAN_SIGNING    16
#define PLAN_SIZE       24

        .text

/*
 * One entry of rebind for one key. x9 slot, x10 planned pc, x12 old modifier, x7 delta, x5 shadow or 0.
 * The shape of `ldr, aut, mov, xpaci, cmp, b.eq, brk, …, pac, str` is the one that gadget scanners know.
 */
        .macro REBIND aut, pac, immediate
        ldr     x16, [x9]
        \aut    x16, x12
        mov     x17, x16
        xpaci   x17
        cmp     x16, x17
        b.eq    LOCAL(authentic\@)
        brk     #\immediate
LOCAL(authentic\@):
        cmp     x16, x10
        b.ne    LOCAL(rebind_word)
        cbz     x5, LOCAL(bound\@)
        ldr     x17, [x5], #8
        cmp     x16, x17
        b.ne    LOCAL(rebind_word)
LOCAL(bound\@):
        add     x12, x12, x7
        \pac    x16, x12
        str     x16, [x9, x7]
        .endm

/*
 * u64 cfi_stack_rebind(const Record *source, const Record *destination, usize low, const Rebinding *plan,
 *                      usize count, const u64 *shadow)
 *
 * Re-binds the planned return addresses: each is authenticated at its old place, must be the planned one, is signed
 * for its new place and stored there. Delta comes from the sealed records, in registers.
 *   in       x0 source, x1 destination, x2 lowest address of the span, x3 plan, x4 count, x5 shadow, or 0 where GCS is
 *            off: the CPU is asked whether it is
 *   out      x0 0; or entries left * 2, plus 1 when the entry's place lies outside the span
 *   clobbers x0-x17, flags; a leaf: nothing on either stack
 *   signs    return addresses, key as planned, modifier slot + 8 + delta; only what has just authenticated with the
 *            same key under slot + 8
 *   traps    FPAC: the aut itself (SIGILL, ILL_ILLOPN); else brk #0xc470 (A), #0xc471 (B); brk #0xc474 for a record
 *            whose seal does not hold
 */
FUNC SYM(cfi_stack_rebind)
        .cfi_startproc
        hint    #34                     /* bti c */
        cbnz    x5, 6f
        UNLESS_GCS 6f
        b       LOCAL(rebind_bounds)
6:      MODE    x15
        LOAD_RECORD x0, x8, x6, x9, x10, x16, x17, x15
        LOAD_RECORD x1, x11, x7, x12, x13, x16, x17, x15
        cmp     x9, x12                 /* the same stack … */
        ccmp    x10, x13, #0, eq        /* … of the same generation */
        b.ne    LOCAL(rebind_bounds)
        sub     x7, x7, x6              /* delta */
        sub     x6, x6, #8              /* highest slot */
        cmp     x2, x8
        b.lo    LOCAL(rebind_bounds)
        sub     x11, x11, x7            /* lowest slot that the destination can take */
        cmp     x2, x11
        b.lo    LOCAL(rebind_bounds)
        cbz     x4, LOCAL(rebind_done)
1:      ldp     x9, x10, [x3]
        ldr     x11, [x3, #PLAN_SIGNING]
        cmp     x9, x2
        b.lo    LOCAL(rebind_bounds)
        cmp     x9, x6
        b.hi    LOCAL(rebind_bounds)
        tst     x9, #7
        b.ne    LOCAL(rebind_bounds)
        add     x12, x9, #8             /* the CFA: the modifier at the old place */
        tbz     x15, #MODE_PAC_BIT, 4f
        cmp     x11, #1
        b.eq    2f
        cmp     x11, #2
        b.eq    3f
        b       LOCAL(rebind_bounds)    /* unsigned, or no signing at all: the entry was rewritten */
2:      REBIND  autia, pacia, BRK_IA
        b       5f
3:      REBIND  autib, pacib, BRK_IB
        b       5f
4:      ldr     x16, [x9]               /* unsigned: as it was planned and copied, never signed, nothing written */
        cmp     x16, x10
        b.ne    LOCAL(rebind_word)
        ldr     x17, [x9, x7]
        cmp     x16, x17
        b.ne    LOCAL(rebind_word)
        cbz     x5, 5f
        ldr     x17, [x5], #8
        cmp     x16, x17
        b.ne    LOCAL(rebind_word)
5:      add     x3, x3, #PLAN_SIZE
        subs    x4, x4, #1
        b.ne    1b
LOCAL(rebind_done):
        mov     x0, #0
        ret
LOCAL(rebind_bounds):
        lsl     x0, x4, #1
        orr     x0, x0, #1
        ret
LOCAL(rebind_word):
        lsl     x0, x4, #1
        ret
        .cfi_endproc
END SYM(cfi_stack_rebind)

/*
 * usize cfi_stack_authenticate_a(u64 word, u64 modifier), …_b: the raw address, for look-up. A failure ends the
 * process here. Leaves; clobber x0, x16, x17, flags.
 */
        .macro AUTHENTICATE aut, immediate
        .cfi_startproc
        hint    #34                     /* bti c */
        mov     x16, x0
        \aut    x16, x1
        mov     x17, x16
        xpaci   x17
        cmp     x16, x17
        b.eq    LOCAL(authentic\@)
        brk     #\immediate
LOCAL(authentic\@):
        mov     x0, x16
        ret
        .cfi_endproc
        .endm

FUNC SYM(cfi_stack_authenticate_a)
        AUTHENTICATE autia, BRK_IA
END SYM(cfi_stack_authenticate_a)
FUNC SYM(cfi_stack_authenticate_b)
        AUTHENTICATE autib, BRK_IB
END SYM(cfi_stack_authenticate_b)

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
