/*
 * The stubs for arm64 that call across segments of one stack, and seal the second part of their records: as in x86_64_link.S.
 *
 * What is believed of a segment is sealed: its record says where it lies and whose it is, the record's second part which segment comes
 * before and which frame entered it. Both are verified in registers, and the new seal is made of the words that were verified.
 */

#include "aarch64_managed.h"
#include "link.h"

#define BRK_DB          0xc473

/* From link's x29. */
#define LINK_STACK      -16             /* control: the activation can be another one when the call returns */
#define LINK_CALL       -8
#define LINK_X9         -32
#define LINK_X11        -48
#define LINK_X13        -64
#define LINK_X15        -80
#define LINK_FRAME      80

        HIDDEN  SYM(cfi_stack_grow)

/* The seal of a record's second part, but for its last word: PACGA over the segment before, identity and generation, bound to the
   record's address + 8, where no record begins: the two seals never pass for one another. Clobbers \out, \a. */
        .macro LINK_CHAIN out, rec, previous, id, gen, a
        add     \a, \rec, #8
        pacga   \out, \previous, \a
        pacga   \out, \out, \id
        pacga   \out, \out, \gen
        .endm

/* The seal of what a record says of its shadow segment: PACGA over the token's place and the identity, bound to the record's address + 16. The
   generation is not in it: the shadow segment stays the segment's. Clobbers \out, \a. */
        .macro SHADOW_SEAL_OF out, rec, token, id, a
        add     \a, \rec, #16
        pacga   \out, \token, \a
        pacga   \out, \out, \id
        .endm

        .text

/*
 * link: calls call->callee on the next segment of the stack that runs. What it is for stands in x86_64_link.S.
 *
 *   in       x16 act, x17 call (read-only memory); all argument registers the callee's. The thunk's frame record lies at x29, with
 *            the stack arguments from x29 + 16 on
 *   out      what the callee returns, in x0-x15, x18 and vector registers
 *   clobbers x16, x17, flags, as any branch veneer does; before the callee runs nothing else, after it nothing else
 *   stack    this segment: a frame record and 80 bytes; the next one: from its top, less call->area
 *   shadow   balanced. Into a segment with a shadow segment: gcsss1 leaves its in-progress word at the bottom of that, and no token on the one
 *            that waits; on return gcsss2 makes that token, gcsss1 uses it up, and gcsss2 puts the further one's where it was
 *   signs    own x30, key IA (Mach-O: IB), modifier SP at entry; the second part of the next segment's record, by PACGA;
 *            while Rust maps a segment the address of call, key DB, modifier x29
 *   checks   SP lies in the segment that control names; the next one is that segment's, of the same stack and generation; on return
 *            that SP lies in the segment that was left and that it was entered from this very frame
 *   fails    without a next segment of call->total bytes: grow, whose Rust part maps one or leaves
 *   traps    brk #0xc474 for a record whose seals do not hold; brk #0xc473; gcsss1 where there is no token, gcsss2 where the call has not
 *            changed, the return where it did not change back
 */
FUNC SYM(cfi_stack_link)
        .cfi_startproc
        .cfi_signal_frame
#ifdef __APPLE__
        .cfi_b_key_frame
#endif
        FRAME_RECORD
        sub     sp, sp, #LINK_FRAME
        stp     x9, x10, [x29, #LINK_X9]
        ldr     x9, [x16, #ACT_CONTROL]
        stp     x11, x12, [x29, #LINK_X11]
        stp     x13, x14, [x29, #LINK_X13]
        str     x15, [x29, #LINK_X15]
        stp     x9, x17, [x29, #LINK_STACK]
LOCAL(link_again):                      /* x9 control, x17 call */
        ldr     x10, [x9, #SEGMENT]
        MODE    x15
        LOAD_RECORD x10, x11, x12, x13, x14, x16, x30, x15
        mov     x16, sp                 /* this frame lies there … */
        cmp     x16, x11
        b.lo    LOCAL(link_cold)
        cmp     x29, x12
        b.hs    LOCAL(link_cold)
        ldr     w11, [x17, #CALL_AREA]
        cbz     x11, 1f
        ldr     x16, [x29]              /* … and so do the stack arguments */
        cmp     x16, x29
        b.ls    LOCAL(link_cold)
        add     x16, x16, x11
        add     x16, x16, #16
        cmp     x16, x12
        b.hi    LOCAL(link_cold)
1:      ldr     x30, [x10, #REC_NEXT]
        cbz     x30, LOCAL(link_cold)
        ldr     x16, [x30, #REC_ROOM]
        ldr     w12, [x17, #CALL_TOTAL]
        cmp     x16, x12
        b.lo    LOCAL(link_cold)
        ldr     x16, [x30, #REC_PREVIOUS]
        cmp     x16, x10
        b.ne    LOCAL(link_cold)
        ldp     x11, x12, [x30, #REC_BASE]
        tbz     x15, #MODE_PACGA_BIT, 2f
        pacga   x16, x11, x30           /* a segment of the same stack and generation … */
        pacga   x16, x16, x12
        pacga   x16, x16, x13
        pacga   x16, x16, x14
        ldr     x11, [x30, #REC_SEAL]
        cmp     x16, x11
        b.ne    LOCAL(link_broken)
        LINK_CHAIN x16, x30, x10, x13, x14, x11
        ldr     x11, [x30, #REC_LINK_RECORD]
        pacga   x11, x16, x11
        ldr     x15, [x30, #REC_LINK_SEAL]
        cmp     x11, x15
        b.ne    LOCAL(link_broken)      /* … that comes behind this one: so nothing runs there */
        pacga   x16, x16, x29
        str     x16, [x30, #REC_LINK_SEAL]
2:      str     x29, [x30, #REC_LINK_RECORD]
        ldr     w11, [x17, #CALL_AREA]
        str     x11, [x30, #REC_AREA]   /* REC_SHADOWED, too */
        ldr     x16, [x30, #REC_SHADOW]
        cbnz    x16, LOCAL(link_shadow)
LOCAL(link_on):
        sub     x12, x12, x11
        ldr     x16, [x9, #ACTIVATION]
        ldr     x15, [x16, #ACT_LIMIT]
        str     x15, [x10, #REC_LIMIT]
        ldr     x15, [x30, #REC_LIMIT]
        str     x15, [x16, #ACT_LIMIT]
        str     x30, [x9, #SEGMENT]
        cbz     x11, 4f
        ldr     w11, [x17, #CALL_ARGUMENTS]
        ldr     x10, [x29]
        add     x10, x10, #16
3:      subs    x11, x11, #8
        b.lo    4f
        ldr     x9, [x10, x11]
        str     x9, [x12, x11]
        b       3b
4:      mov     sp, x12
        ldr     x17, [x17, #CALL_CALLEE]
        ldp     x9, x10, [x29, #LINK_X9]
        ldp     x11, x12, [x29, #LINK_X11]
        ldp     x13, x14, [x29, #LINK_X13]
        ldr     x15, [x29, #LINK_X15]
        blr     x17
        .globl  SYM(cfi_stack_link_return)
        HIDDEN  SYM(cfi_stack_link_return)
#ifdef __APPLE__
        .alt_entry SYM(cfi_stack_link_return)
#endif
SYM(cfi_stack_link_return):
        stp     x9, x10, [x29, #LINK_X9] /* x29 is not believed yet: what it leads to is memory that anybody can write */
        stp     x11, x12, [x29, #LINK_X11]
        stp     x13, x14, [x29, #LINK_X13]
        str     x15, [x29, #LINK_X15]
        ldr     x9, [x29, #LINK_STACK]
        ldr     x10, [x9, #SEGMENT]
5:      ldr     x16, [x10, #REC_LINK_RECORD]
        cmp     x16, x29
        b.eq    6f
        ldr     x10, [x10, #REC_PREVIOUS] /* frames were lifted and have returned: control names a younger segment */
        cbnz    x10, 5b
        b       LOCAL(link_broken)
6:      MODE    x15
        LOAD_RECORD x10, x11, x12, x13, x14, x16, x30, x15
        mov     x16, sp                 /* the callee's return has bound SP to its place */
        cmp     x16, x11
        b.lo    LOCAL(link_broken)
        cmp     x16, x12
        b.hi    LOCAL(link_broken)
        ldr     x30, [x10, #REC_PREVIOUS]
        tbz     x15, #MODE_PACGA_BIT, 7f
        LINK_CHAIN x16, x10, x30, x13, x14, x17
        pacga   x16, x16, x29
        ldr     x17, [x10, #REC_LINK_SEAL]
        cmp     x16, x17
        b.eq    8f
        b       LOCAL(link_broken)
7:      ldp     x16, x17, [x30, #REC_BASE]
        cmp     x29, x16
        b.lo    LOCAL(link_broken)
        cmp     x29, x17
        b.hs    LOCAL(link_broken)
8:      ldr     x11, [x10, #REC_AREA]   /* REC_SHADOWED, too */
        cbz     x11, 10f
        tbnz    x11, #32, LOCAL(link_shadow_back)
LOCAL(link_copy):
        sub     x12, x12, x11
        ldr     x16, [x29, #LINK_CALL]
        ldr     w11, [x16, #CALL_RESULTS]
        ldr     x16, [x29]
        add     x16, x16, #16
9:      subs    x11, x11, #8
        b.lo    10f
        ldr     x17, [x12, x11]
        str     x17, [x16, x11]
        b       9b
10:     str     x30, [x9, #SEGMENT]
        ldr     x17, [x30, #REC_LIMIT]
        ldr     x16, [x9, #ACTIVATION]
        str     x17, [x16, #ACT_LIMIT]
        ldp     x9, x10, [x29, #LINK_X9]
        ldp     x11, x12, [x29, #LINK_X11]
        ldp     x13, x14, [x29, #LINK_X13]
        ldr     x15, [x29, #LINK_X15]
        mov     sp, x29
        ldp     x29, x30, [sp], #16
        .cfi_remember_state
        .cfi_def_cfa sp, 0
        .cfi_restore x29
        .cfi_restore x30
        AUTHENTICATED_RETURN
        .cfi_restore_state

LOCAL(link_cold):                       /* x17 call; all else that matters lies in the frame */
        ldr     x16, [x29, #LINK_STACK]
        ldr     x16, [x16, #ACTIVATION]
        str     x17, [x16, #ACT_LINK]
        MODE    x15
        tbz     x15, #MODE_PAC_BIT, 11f
        pacdb   x17, x29                /* callee's address comes from where it points to */
11:     stp     x0, x1, [sp, #-32]!
        str     x17, [sp, #16]
        ldp     x9, x10, [x29, #LINK_X9]
        ldp     x11, x12, [x29, #LINK_X11]
        ldp     x13, x14, [x29, #LINK_X13]
        ldr     x15, [x29, #LINK_X15]
        mov     x0, x16
        mov     x1, #0
        bl      SYM(cfi_stack_grow)     /* the next segment is there when it returns; it keeps all registers */
        ldr     x17, [sp, #16]
        ldp     x0, x1, [sp], #32
        MODE    x16
        tbz     x16, #MODE_PAC_BIT, 12f
        autdb   x17, x29
        mov     x16, x17
        xpacd   x16
        cmp     x16, x17
        b.eq    12f
        brk     #BRK_DB
12:     ldr     x9, [x29, #LINK_STACK]
        b       LOCAL(link_again)

LOCAL(link_shadow):                     /* x16 the token's place, x30 the next record, x13 whose it is; x14, x15 are free */
        MODE    x15
        tbz     x15, #MODE_PACGA_BIT, 13f
        SHADOW_SEAL_OF x14, x30, x16, x13, x15
        ldr     x15, [x30, #REC_SHADOW_SEAL]
        cmp     x14, x15
        b.ne    LOCAL(link_broken)
13:     mov     w14, #1
        str     w14, [x30, #REC_SHADOWED]
        sys     #3, c7, c7, #2, x16     /* gcsss1 x16 */
        b       LOCAL(link_on)

LOCAL(link_shadow_back):                /* x11 the area and the bit above it */
        SHADOW_BACK x16
        mov     w11, w11
        b       LOCAL(link_copy)

LOCAL(link_broken):
        brk     #BRK_GA
        .cfi_endproc
END SYM(cfi_stack_link)

/* Loads two records of one stack and generation: identity in x6, generation in x7, the mode word in x15. Clobbers x3-x5, x8-x12. */
        .macro LOAD_PAIR one, other
        MODE    x15
        LOAD_RECORD \other, x4, x5, x8, x9, x10, x11, x15
        LOAD_RECORD \one, x4, x5, x6, x7, x10, x11, x15
        cmp     x6, x8
        ccmp    x7, x9, #0, eq
        b.eq    LOCAL(same\@)
        brk     #BRK_GA
LOCAL(same\@):
        .endm

/*
 * void cfi_stack_link_idle(Record *record, const Record *previous)
 *
 * Says that record's segment comes behind previous' and that nothing runs on it. Both seals must hold.
 *   in       x0 x1; clobbers x2-x12, x15, flags; a leaf
 *   traps    brk #0xc474
 */
FUNC SYM(cfi_stack_link_idle)
        .cfi_startproc
        hint    #34                     /* bti c */
        LOAD_PAIR x0, x1
        mov     x2, #0
LOCAL(link_seal):                       /* x0 record, x1 previous, x2 link_record, x6 x7 whose, x15 mode */
        stp     x1, x2, [x0, #REC_PREVIOUS]
        str     xzr, [x0, #REC_LINK_SEAL]
        tbz     x15, #MODE_PACGA_BIT, 1f
        LINK_CHAIN x3, x0, x1, x6, x7, x4
        pacga   x3, x3, x2
        str     x3, [x0, #REC_LINK_SEAL]
1:      ret
        .cfi_endproc
END SYM(cfi_stack_link_idle)

/*
 * void cfi_stack_link_lifted(Record *record, const Record *previous, usize fp)
 *
 * Says that record's segment comes behind previous' and that its oldest frame returns to the frame at fp there, by itself.
 * What is sealed is odd: it never passes for a frame of link's.
 *   in       x0 x1 x2; clobbers x2-x12, x15, flags; a leaf
 *   traps    brk #0xc474
 */
FUNC SYM(cfi_stack_link_lifted)
        .cfi_startproc
        hint    #34                     /* bti c */
        LOAD_PAIR x0, x1
        orr     x2, x2, #1
        b       LOCAL(link_seal)
        .cfi_endproc
END SYM(cfi_stack_link_lifted)

/*
 * void cfi_stack_link_moved(Record *record, const Record *source)
 *
 * Says of record's segment what source says of the one that its frames were moved from: what is sealed are the words that were verified.
 *   in       x0 x1; clobbers x1-x12, x15, flags; a leaf
 *   traps    brk #0xc474
 */
FUNC SYM(cfi_stack_link_moved)
        .cfi_startproc
        hint    #34                     /* bti c */
        LOAD_PAIR x0, x1
        mov     x12, x1
        ldp     x1, x2, [x12, #REC_PREVIOUS]
        ldr     x5, [x12, #REC_SHADOW]
        tbz     x15, #MODE_PACGA_BIT, 2f
        LINK_CHAIN x3, x12, x1, x6, x7, x4
        pacga   x3, x3, x2
        ldr     x4, [x12, #REC_LINK_SEAL]
        cmp     x3, x4
        b.ne    1f
        cbz     x5, LOCAL(link_seal)
        SHADOW_SEAL_OF x3, x12, x5, x6, x4
        ldr     x4, [x12, #REC_SHADOW_SEAL]
        cmp     x3, x4
        b.ne    1f
        SHADOW_SEAL_OF x3, x0, x5, x6, x4
        str     x3, [x0, #REC_SHADOW_SEAL]
2:      str     x5, [x0, #REC_SHADOW]
        b       LOCAL(link_seal)
1:      brk     #BRK_GA
        .cfi_endproc
END SYM(cfi_stack_link_moved)

/*
 * void cfi_stack_link_shadow(Record *record, usize token)
 *
 * Says that calls into record's segment begin on the shadow segment whose token lies at token. The record's seal must hold.
 *   in       x0 x1; clobbers x3-x9, x15, flags; a leaf
 *   traps    brk #0xc474
 */
FUNC SYM(cfi_stack_link_shadow)
        .cfi_startproc
        hint    #34                     /* bti c */
        MODE    x15
        LOAD_RECORD x0, x4, x5, x6, x7, x8, x9, x15
        stp     x1, xzr, [x0, #REC_SHADOW]
        tbz     x15, #MODE_PACGA_BIT, 1f
        SHADOW_SEAL_OF x3, x0, x1, x6, x4
        str     x3, [x0, #REC_SHADOW_SEAL]
1:      ret
        .cfi_endproc
END SYM(cfi_stack_link_shadow)

/*
 * void cfi_stack_link_part(Record *part, const Record *whole, usize top)
 *
 * Fills and seals the record of the lower part of whole's segment, from its base to top: out of registers, what was verified.
 *   in       x0 x1 x2; clobbers x3-x9, x15, flags; a leaf
 *   traps    brk #0xc474, also where top is not in the segment or not 16-byte aligned
 */
FUNC SYM(cfi_stack_link_part)
        .cfi_startproc
        hint    #34                     /* bti c */
        MODE    x15
        LOAD_RECORD x1, x4, x5, x6, x7, x8, x9, x15
        tst     x2, #15
        b.ne    1f
        cmp     x2, x4
        b.ls    1f
        cmp     x2, x5
        b.hi    1f
        stp     x4, x2, [x0, #REC_BASE]
        stp     x6, x7, [x0, #REC_IDENTITY]
        str     xzr, [x0, #REC_SEAL]
        tbz     x15, #MODE_PACGA_BIT, 2f
        pacga   x8, x4, x0
        pacga   x8, x8, x2
        pacga   x8, x8, x6
        pacga   x8, x8, x7
        str     x8, [x0, #REC_SEAL]
2:      ret
1:      brk     #BRK_GA
        .cfi_endproc
END SYM(cfi_stack_link_part)

        ELF_NOTES
