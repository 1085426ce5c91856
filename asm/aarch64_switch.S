/*
 * The stubs that switch between pooled stacks, for arm64, ELF and Mach-O: prepare, first, resume, suspend, switch_to, throw, cancel.
 *
 * A word of caution, besides the one in aarch64.S. What a suspended stack left in memory may have been rewritten since:
 *  - pc, sp, fp, identity and generation are sealed by a PACGA chain from registers when it is left, and checked in registers
 *    when it is resumed, before the first of them is used. The chain begins with the address of the context, so that a context holds at
 *    one place only. The generation grows with each save and each use, and the seal is erased by its use. PACGA yields 32 bits: it is
 *    chained, and compared as a whole.
 *  - A bit of the mode word, in read-only memory, asks for x19-x28 and d8-d15 too.
 *  - With a GCS the read-only directory says which data area and which shadow area a slot has, and the pc must be the one that
 *    the GCS has.
 *
 * Callers are asm blocks of src/switch.rs: `bl stub; bti j`. The stubs end in `br`, so that one stack's return is not
 * predicted from another's call.
 *
 * A suspended stack and its slot. Every saved frame is alike, the resumer's too:
 *
 *      data area                            slot                         GCS
 *      +---------------------+ top          +----------------+           +--------------------+ shadow_top
 *      | address in `first`  |              | own.sp         |---+       | base_return        | pushed by first's call
 *   B  | record of resumer   | the link     | own.seal       |   |       | ...                |
 *      | frames              |              | own.token      |---|-----+ | pc                 | pushed by the call of suspend
 *      | fpcr                |              | own.generation |   |     +>| token              |
 *      | d8 .. d15           |              | resumer ...    |   |       +--------------------+
 *      | x19 .. x28          |              +----------------+   |
 *      | pc                  |                                   |
 *   R  | fp                  | the record  <---------------------+
 *      +---------------------+
 *
 *  state        own                    resumer          link at B          GCS
 *  ready        frame of first, sealed -                0                  token on top, empty
 *               with entry and data
 *  running      -, no seal             who waits        its record         in use; a token lies on the resumer's
 *  suspended    frame as above         -, no seal       stale              token below the pc
 *  done         -, no seal             -, no seal       stale              token on top, empty
 *
 * The chain of frame records runs through B to the resumer's R, so both kinds of unwinders reach main.
 */

#include "aarch64_context.h"

        .text

/*
 * void cfi_stack_prepare(Slot *slot, void *entry, usize data)
 *
 * Makes a stack that runs entry(arg, data, slot) when it is first resumed.
 *   in       x0 slot, with nothing on its stack; x1 entry; x2 data
 *   clobbers x3-x9 x12 x15-x17
 *   stack    a leaf; writes the base record and a saved frame below the top of the slot's data area; where contexts are sealed the
 *            directory says where that is: none is sealed for another's stack
 *   shadow   none; the slot's is empty with its token on top
 *   signs    the slot's own context, with entry, data and slot, by a PACGA chain, from registers
 */
FUNC SYM(cfi_stack_prepare)
        .cfi_startproc
        hint    #34                     /* bti c */
        MODE    x15
        ldr     x3, [x0, #TOP]
        tbz     x15, #MODE_PACGA_BIT, 3f
        BIND    x0
        mov     x3, x5
3:      sub     x3, x3, #BASE_RECORD
        adr     x4, LOCAL(base_return)
        stp     xzr, x4, [x3]
        sub     x9, x3, #FRAME
        adr     x17, LOCAL(first)
        stp     x3, x17, [x9]
        stp     x1, x2, [x9, #F_X19]
        str     x0, [x9, #F_X19+16]
        mrs     x4, fpcr
        str     x4, [x9, #F_FPCR]
        str     x9, [x0, #OWN + SP]
        ldr     x4, [x0, #SLOT_SHADOW_TOP]
        cbz     x4, 1f
        sub     x4, x4, #8
1:      str     x4, [x0, #OWN + CTX_TOKEN]
        tbz     x15, #MODE_PACGA_BIT, 2f
        ldr     x5, [x0, #OWN + GENERATION]
        add     x5, x5, #1
        str     x5, [x0, #OWN + GENERATION]
        ldr     x6, [x0, #IDENTITY]
        CHAIN   x0, x9, x17, x3, x6, x5
        pacga   x16, x1, x16
        pacga   x16, x2, x16
        pacga   x16, x0, x16
        str     x16, [x0, #OWN + SEAL]
2:      ret
        .cfi_endproc
END SYM(cfi_stack_prepare)

/*
 * first: the oldest frame of every pooled stack. Not called: a resume's frame leads to it.
 *   in       x0 arg, x19 entry, x20 data, x21 slot; x29 and sp at the base record
 *   stack    calls entry on its own stack; when it returns, goes to the resumer with its result and x1 = 1
 *   shadow   own: empty with the token on top again; the resumer's: token in, the pc of its call popped
 *   signs    nothing; the resumer's seal is checked
 *   unwinds  to the frame that the link names: the resumer's, whichever it is now
 */
FUNC SYM(cfi_stack_first)
        .cfi_startproc
        .cfi_signal_frame
        .cfi_escape 0x0f, 6, 0x8d, 0, 0x06, 0x23, 0xb0, 0x01    /* CFA: breg29 (x29) + 0, deref, plus_uconst 176 */
        .cfi_offset x29, -FRAME
        .cfi_offset x30, 8-FRAME
        CALLEE_SAVES
LOCAL(first):
        hint    #38                     /* bti jc */
        mov     x1, x20
        mov     x2, x21
        blr     x19
LOCAL(base_return):
        mov     x2, x0
        mov     x3, x21
        MODE    x15
        VERIFY_CONTEXT x3, RESUMER, 0
        UNLESS_SHADOW 1f
        BIND    x3
        sub     x5, x5, #BASE_RECORD
        mov     x16, sp
        cmp     x16, x5                 /* the stack that ends is the slot's */
        b.ne    LOCAL(unbound)
        mrs     x16, S3_3_C2_C5_1       /* gcspr_el0: nothing is left on its GCS */
        cmp     x16, x7
        b.ne    LOCAL(unbound)
        CHANGE_SHADOW x3, OWN
        POP_SHADOW_PC
1:      ldr     x4, [x9, #F_FPCR]
        mov     sp, x9
        .cfi_def_cfa sp, FRAME
        mov     x29, x11
        mrs     x5, fpcr
        cmp     x4, x5
        b.eq    2f
        msr     fpcr, x4
2:      mov     x0, x2
        mov     x1, #1
        DROP_FRAME
        br      x17
        .cfi_endproc
END SYM(cfi_stack_first)

/*
 * {usize, u64} cfi_stack_resume(Slot *last, Slot *first, usize arg)
 *
 * First entry, or continuation of a suspended stack; of a chain of stacks, first having resumed the next and so on to last. Saves the
 * caller as first's resumer and runs last.
 *   in       x0 last, x1 first (the same for one stack), x2 arg
 *   out      x0 what the stack passes on, x1 0; or what its entry returned, x1 1
 *   clobbers what a C call may; FPCR is kept
 *   stack    caller's: a saved frame; last's: its saved frame popped
 *   shadow   caller's: the pc and a token on it; last's: token in, its pc popped
 *   signs    first's resumer context; last's own seal is checked and erased
 *   traps    brk #0xc474
 */
FUNC SYM(cfi_stack_resume)
        SAVE_FRAME
        LINK    x1
        mov     x3, sp
        SEAL_CONTEXT x1, RESUMER, x3, x30, x29
        VERIFY_CONTEXT x0, OWN, 1
        UNLESS_SHADOW 1f
        BIND    x0
        WITHIN
        NEVER_RAN
        CHANGE_SHADOW x1, RESUMER
        cbz     x7, 1f
        POP_SHADOW_PC
1:      CHANGE_STACK
        mov     x0, x2
        mov     x1, #0
        DROP_FRAME
        br      x17
        .cfi_endproc
END SYM(cfi_stack_resume)

/* cfi_stack_resume: FPCR is kept here too. */
FUNC SYM(cfi_stack_resume_without_fp_control)
        .cfi_startproc
        hint    #34                     /* bti c */
        b       SYM(cfi_stack_resume)
        .cfi_endproc
END SYM(cfi_stack_resume_without_fp_control)

/*
 * {usize, u64} cfi_stack_suspend(Slot *last, Slot *first, usize arg)
 *
 * Suspends the stack that runs, last's, and with it the chain from first to it; goes to first's resumer, to which it passes arg.
 *   in       x0 last, x1 first, x2 arg; called on last's stack
 *   out      x0 what the next resume passes, x1 0
 *   clobbers what a C call may; FPCR is kept
 *   stack    last's: a saved frame; the resumer's: its saved frame popped
 *   shadow   last's: the pc and a token on it; the resumer's: token in, its pc popped
 *   signs    last's own context; the resumer's seal is checked and erased
 *   traps    brk #0xc474
 */
FUNC SYM(cfi_stack_suspend)
        SAVE_FRAME
        mov     x3, sp
        SEAL_CONTEXT x0, OWN, x3, x30, x29
        VERIFY_CONTEXT x1, RESUMER, 0
        UNLESS_SHADOW 1f
        CHANGE_SHADOW x0, OWN
        POP_SHADOW_PC
1:      CHANGE_STACK
        mov     x0, x2
        mov     x1, #0
        DROP_FRAME
        br      x17
        .cfi_endproc
END SYM(cfi_stack_suspend)

/* cfi_stack_suspend: FPCR is kept here too. */
FUNC SYM(cfi_stack_suspend_without_fp_control)
        .cfi_startproc
        hint    #34                     /* bti c */
        b       SYM(cfi_stack_suspend)
        .cfi_endproc
END SYM(cfi_stack_suspend_without_fp_control)

/*
 * {usize, u64} cfi_stack_switch_to(Slot *from, Slot *to, usize arg)
 *
 * Symmetric: from, which runs, is suspended; to runs in its stead, for the same resumer.
 *   in       x0 from, x1 to (not the same), x2 arg; called on from's stack
 *   out      x0 what the next resume of from passes, x1 0
 *   clobbers what a C call may; FPCR is kept
 *   stack    from's: a saved frame; to's: its saved frame popped
 *   shadow   from's: the pc and a token on it; to's: token in, its pc popped
 *   signs    from's own context; the resumer's, whose seal is checked and erased, for its place in to
 *   traps    brk #0xc474
 */
FUNC SYM(cfi_stack_switch_to)
        SAVE_FRAME
        mov     x3, sp
        SEAL_CONTEXT x0, OWN, x3, x30, x29
        VERIFY_CONTEXT x0, RESUMER, 0
        SEAL_CONTEXT x1, RESUMER, x9, x17, x11
        str     x10, [x1, #RESUMER + CTX_TOKEN]
        ldr     x4, [x1, #TOP]
        str     x9, [x4, #-BASE_RECORD]
        VERIFY_CONTEXT x1, OWN, 1
        UNLESS_SHADOW 1f
        BIND    x1
        WITHIN
        NEVER_RAN
        CHANGE_SHADOW x0, OWN
        cbz     x7, 1f
        POP_SHADOW_PC
1:      CHANGE_STACK
        mov     x0, x2
        mov     x1, #0
        DROP_FRAME
        br      x17
        .cfi_endproc
END SYM(cfi_stack_switch_to)

/*
 * {usize, u64} cfi_stack_throw(Slot *last, Slot *first, usize arg, usize (*f)(usize))
 *
 * Resumes a suspended stack, or a chain, by calling f(arg) on it, as if what suspended it had called f instead. f may return (then
 * what suspended it returns f's value) or unwind.
 *   in       x0 last, x1 first, x2 arg, x3 f; last has run before
 *   out      as resume
 *   stack    as resume; the saved pc is f's return address
 *   shadow   as resume; the pc stays
 *   signs    as resume
 */
FUNC SYM(cfi_stack_throw)
        SAVE_FRAME
        LINK    x1
        mov     x14, x3
        mov     x3, sp
        SEAL_CONTEXT x1, RESUMER, x3, x30, x29
        VERIFY_CONTEXT x0, OWN, 0
        UNLESS_SHADOW 1f
        BIND    x0
        WITHIN
        add     x16, x10, #8
        cmp     x16, x7
        b.eq    LOCAL(unbound)          /* it never ran: there is nothing to return to */
        CHANGE_SHADOW x1, RESUMER
1:      CHANGE_STACK
        mov     x0, x2
        mov     x30, x17
        DROP_FRAME
        mov     x16, x14
        br      x16
        .cfi_endproc
END SYM(cfi_stack_throw)

/* x16: the chain over x0 entry and x1 data at x2 place. It begins with an odd number, as no context's does. */
        .macro CHAIN_ENTRY
        orr     x16, x2, #1
        pacga   x16, x0, x16
        pacga   x16, x1, x16
        .endm

/*
 * u64 cfi_stack_seal_entry(usize entry, usize data, usize place)
 *
 * What cfi_stack_call_entry will ask for: 32 bits, in the upper half; 0 without generic authentication.
 *   in       x0-x2; clobbers x9 x16; a leaf
 */
FUNC SYM(cfi_stack_seal_entry)
        .cfi_startproc
        hint    #34                     /* bti c */
        MODE    x9
        mov     x16, #0
        tbz     x9, #MODE_PACGA_BIT, 1f
        CHAIN_ENTRY
1:      mov     x0, x16
        ret
        .cfi_endproc
END SYM(cfi_stack_seal_entry)

/*
 * usize cfi_stack_call_entry(usize entry, usize data, usize place, u64 seal, u64 *values, usize count)
 *
 * Calls entry(data, values, count) if entry and data are what was sealed at that place.
 *   in       x0-x5; clobbers what a C call may
 *   stack    a tail call: not touched
 *   signs    nothing; the seal is checked in registers, from which entry is called
 *   traps    brk #0xc474
 */
FUNC SYM(cfi_stack_call_entry)
        .cfi_startproc
        hint    #34                     /* bti c */
        MODE    x9
        tbz     x9, #MODE_PACGA_BIT, 1f
        CHAIN_ENTRY
        cmp     x16, x3
        b.eq    1f
        brk     #BRK_GA
1:      mov     x16, x0
        mov     x0, x1
        mov     x1, x4
        mov     x2, x5
        br      x16
        .cfi_endproc
END SYM(cfi_stack_call_entry)

/*
 * void cfi_stack_cancel(Slot *slot)
 *
 * Drops the frames of a suspended or not started stack; nothing of them runs.
 *   in       x0 slot
 *   clobbers what a C call may
 *   stack    caller's: a saved frame, popped again; the slot's: not touched
 *   shadow   the slot's is entered, popped to its end and left with its token on top; the caller's: token out and in
 *   signs    nothing; the own seal is checked and erased
 */
FUNC SYM(cfi_stack_cancel)
        SAVE_FRAME
        VERIFY_CONTEXT x0, OWN, 1
        mov     x17, x30
        UNLESS_SHADOW 3f
        BIND    x0
        WITHIN
        add     x16, x10, #8
        cmp     x16, x7
        b.eq    3f                      /* empty */
        sys     #3, c7, c7, #2, x10     /* gcsss1 x10 */
        sysl    x11, #3, c7, c7, #3     /* gcsss2 x11: the caller's token */
        mrs     x9, S3_3_C2_C5_1        /* gcspr_el0 */
1:      cmp     x9, x7
        b.hs    2f
        sysl    x16, #3, c7, c7, #1     /* gcspopm x16 */
        add     x9, x9, #8
        b       1b
2:      mov     x10, x11
        CHANGE_SHADOW x0, OWN
3:      LOAD_CALLEE_SAVED sp
        add     sp, sp, #FRAME
        .cfi_def_cfa_offset 0
        .irp    reg, x19, x20, x21, x22, x23, x24, x25, x26, x27, x28, x29, x30, d8, d9, d10, d11, d12, d13, d14, d15
        .cfi_restore \reg
        .endr
        ret                             /* x30 never left its register */
        .cfi_endproc
END SYM(cfi_stack_cancel)

/* The slot in question is x0, or x1 or x3. */
        .cfi_startproc
        .cfi_signal_frame
        .cfi_def_cfa_offset FRAME
        .cfi_offset x29, -FRAME
        .cfi_offset x30, 8-FRAME
        CALLEE_SAVES
LOCAL(unbound):
        bl      SYM(cfi_stack_unbound)
        brk     #BRK_GA
        .cfi_endproc

        ELF_NOTES
