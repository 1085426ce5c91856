/*
 * The stubs for arm64 by which managed code suspends its whole stack and native code continues it: suspend, resume, discard; and the
 * word that says where managed code waits, when its frames move.
 *
 * A suspended stack holds managed frames alone, from suspend's record to record.top. Its shadow stack has its token on top. control keeps
 * where the record lies, sealed like a link record, and the callee-saved registers; the oldest frame's saved x29 still names the entry
 * frame that is gone, until resume makes another, on this thread or on another one.
 */

#include "aarch64_managed.h"

        HIDDEN  SYM(cfi_stack_back_to_native)
        HIDDEN  SYM(cfi_stack_unwind)

        .text

/*
 * u64 suspend(Activation *act, u64 value)
 *
 * The stack's only entry returns value to native code; the next resume's value comes back here.
 *   in       x0 act, x1 value; called by managed code
 *   out      x0; clobbers what a C call may
 *   stack    managed: a frame record of 16 bytes stays; native: back in enter's frame, whose place must be sealed
 *   shadow   managed: a token on top stays; native: as enter found it
 *   signs    own x30, key IA (Mach-O: IB), modifier SP at entry; the frame record's address by a PACGA chain with the addresses of the
 *            words in control and of control, identity and generation
 *   traps    brk #0xc474
 *   fails    by the way of leave when entries are nested: the innermost enter returns, the outcome says why
 */
FUNC SYM(cfi_stack_suspend_managed)
        .cfi_startproc
        .cfi_signal_frame
#ifdef __APPLE__
        .cfi_b_key_frame
#endif
        FRAME_RECORD
        ldr     x9, [x0, #ACT_CONTROL]
        ldr     x11, [x9, #NATIVE_SP]
        VERIFY_NATIVE x11, x9, x10, x12
        ldr     x10, [x9, #NESTED]
        cbnz    x10, 1f
        add     x10, x9, #SAVED
        stp     x19, x20, [x10, #0]
        stp     x21, x22, [x10, #16]
        stp     x23, x24, [x10, #32]
        stp     x25, x26, [x10, #48]
        stp     x27, x28, [x10, #64]
        stp     d8, d9, [x10, #80]
        stp     d10, d11, [x10, #96]
        stp     d12, d13, [x10, #112]
        stp     d14, d15, [x10, #128]
        add     x14, x9, #SUSPENDED
        WRITE_LINK x14, x9, LOCAL(resumed), x10, x12
        mov     x10, #OUTCOME_SUSPENDED
        str     x10, [x9, #OUTCOME]
        .cfi_remember_state
        mov     x19, x9
        .cfi_undefined x19
        mov     x0, x1
        TO_ENTRY_FRAME x11
        b       SYM(cfi_stack_back_to_native)
        .cfi_restore_state
1:      mov     x19, x9
        .cfi_undefined x19
        mov     x10, #OUTCOME_NESTED
        str     x10, [x19, #OUTCOME]
        mov     x0, #0
        TO_ENTRY_FRAME x11
        b       SYM(cfi_stack_unwind)
        .cfi_endproc
END SYM(cfi_stack_suspend_managed)

/*
 * u64 cfi_stack_resume_managed(Control *control, u64 value, const Record *oldest)
 *
 * Continues a suspended stack: its suspend returns value. Returns what enter would.
 *   in       x0 control (suspended), x1 value, x2 record of the segment that the oldest managed frame lies in
 *   out      x0; clobbers what a C call may
 *   stack    native: a frame like enter's, which takes that one's place: the oldest managed frame, which must have saved the address of the
 *            one that is gone, saves its address now; managed: from suspend's record, believed only if the seal is for it
 *   shadow   native: a token on top while managed code runs; managed: token in
 *   signs    own x30 and the native SP as enter; suspend's x30 is authenticated
 *   traps    brk #0xc474 also when the oldest frame did not save what enter left
 */
FUNC SYM(cfi_stack_resume_managed)
        .cfi_startproc
        .cfi_signal_frame
#ifdef __APPLE__
        .cfi_b_key_frame
#endif
        ENTRY_PROLOGUE
        mov     x19, x0
        mov     x0, x1
        ldr     x1, [x19, #NATIVE_SP]   /* the entry frame that is gone */
        SEAL_NATIVE x19, x9, x10, x15
        LOAD_SEGMENT x19, x9, x10, x11, x12, x13, x14, x17, x15
        LOAD_RECORD x2, x10, x11, x3, x4, x14, x17, x15
        cmp     x12, x3
        ccmp    x13, x4, #0, eq
        b.ne    2f
        add     x9, x19, #SUSPENDED
        LOAD_LINK x9, x19, x12, x13, x14
        str     xzr, [x9, #LINK_RECORD]
        str     xzr, [x9, #LINK_SEAL]
        ldr     x13, [x11, #-16]
        cmp     x13, x1
        b.eq    1f
2:      brk     #BRK_GA
1:      str     x29, [x11, #-16]
        SHADOW_SWITCH x19, NATIVE_TOKEN, TOKEN, x9
        add     x9, x19, #SAVED
        ldp     x19, x20, [x9, #0]
        ldp     x21, x22, [x9, #16]
        ldp     x23, x24, [x9, #32]
        ldp     x25, x26, [x9, #48]
        ldp     x27, x28, [x9, #64]
        ldp     d8, d9, [x9, #80]
        ldp     d10, d11, [x9, #96]
        ldp     d12, d13, [x9, #112]
        ldp     d14, d15, [x9, #128]
        mov     x29, x12                /* from here on the callers are managed code's */
        .cfi_def_cfa x29, 16
        .cfi_offset x29, -16
        .cfi_offset x30, -8
        .irp    reg, x19, x20, x21, x22, x23, x24, x25, x26, x27, x28, d8, d9, d10, d11, d12, d13, d14, d15
        .cfi_restore \reg
        .endr
LOCAL(resumed):
        mov     sp, x29
        RECORD_RETURN
        .cfi_endproc
END SYM(cfi_stack_resume_managed)

/*
 * void cfi_stack_discard(Control *control)
 *
 * Gives a suspended stack's shadow stack back: pops it to where it was at the entry.
 *   in       x0 control (suspended)
 *   stack    native: enter's frame for as long; managed: not touched
 *   shadow   managed: popped by gcspopm as by leave, token left where enter found it; native: token in, token out
 *   signs    own x30 as enter
 */
FUNC SYM(cfi_stack_discard)
        .cfi_startproc
        .cfi_signal_frame
#ifdef __APPLE__
        .cfi_b_key_frame
#endif
        ENTRY_PROLOGUE
        mov     x19, x0
        mov     x0, #0
        SHADOW_SWITCH x19, NATIVE_TOKEN, TOKEN, x9
        b       SYM(cfi_stack_unwind)
        .cfi_endproc
END SYM(cfi_stack_discard)

/*
 * usize cfi_stack_move_link(Link *link, Control *control, const Record *source, const Record *destination)
 *
 * Says where managed code waits after its frames have moved by the distance of the two tops, which comes from the sealed records, in
 * registers.
 *   in       x0 link, x1 control, x2 source, x3 destination
 *   out      x0 the new place, or 0: no place in the source and the destination, or not this stack's; nothing was written
 *   clobbers x4-x17, flags; a leaf: nothing on either stack
 *   signs    the new place by the PACGA chain under which the old one has just been verified
 *   traps    brk #0xc474
 */
FUNC SYM(cfi_stack_move_link)
        .cfi_startproc
        hint    #34                     /* bti c */
        MODE    x15
        LOAD_RECORD x2, x4, x5, x6, x7, x16, x17, x15
        LOAD_RECORD x3, x8, x9, x10, x11, x16, x17, x15
        ldr     x12, [x1, #IDENTITY]
        ldr     x13, [x1, #GENERATION]
        cmp     x6, x10
        ccmp    x7, x11, #0, eq
        ccmp    x6, x12, #0, eq
        ccmp    x7, x13, #0, eq
        b.ne    2f
        ldr     x12, [x0, #LINK_RECORD]
        sub     x16, x5, #16
        cmp     x12, x4
        ccmp    x16, x12, #0, hs        /* else: lower */
        b.lo    2f
        sub     x9, x9, x5              /* delta */
        add     x13, x12, x9
        cmp     x13, x8
        b.lo    2f
        tbz     x15, #MODE_PACGA_BIT, 1f
        LINK_SEAL_OF x12, x0, x1, x14, x16
        ldr     x17, [x0, #LINK_SEAL]
        cmp     x14, x17
        b.ne    3f
        LINK_SEAL_OF x13, x0, x1, x14, x16
        str     x14, [x0, #LINK_SEAL]
1:      str     x13, [x0, #LINK_RECORD]
        mov     x0, x13
        ret
2:      mov     x0, #0
        ret
3:      brk     #BRK_GA
        .cfi_endproc
END SYM(cfi_stack_move_link)

        ELF_NOTES
