/*
 * The stubs for arm64, ELF and Mach-O (arm64e): enter, exit, grow, leave, rebind, authenticate, seal.
 *
 * A word of caution. Every instruction here runs between two stacks, and under GCS between two shadow stacks.
 *  - Both stacks change together. `gcsss1` validates the token on the shadow stack that is entered and consumes it,
 *    `gcsss2` leaves one on the other and says where (Arm ARM D11, "Guarded Control Stack switching"; Linux
 *    Documentation/arch/arm64/gcs.rst). `chkfeat` decides, no word in memory. gas 2.40 lacks the mnemonics: `sys`.
 *  - A return address is never replaced. It is authenticated for its old place and signed for its new one in one
 *    block, in x16 and x17, with no spill and no call between: rebind. The check behind `aut` is ours and compares
 *    with `xpaci`; a CPU with FEAT_FPAC faults at the `aut` itself.
 *  - What decides lies in registers, in sealed records, or in the read-only page `cfi_stack_published`.
 *
 * The frame chain runs across the stacks: managed code's oldest frame saves enter's x29, native code called by exit
 * saves exit's. So CFAs follow from x29, on whichever stack, and debuggers walk through to main. The stubs are marked
 * as signal frames because gdb otherwise takes a chain that does not go upwards for a corrupt stack.
 *
 *      thread's own stack                          managed segment
 *      | ...              |                        +-------------------+ record.top
 *      | d8 .. d15        |                        | entry_return, signed by the oldest managed frame
 *      | x19 .. x28       |                        | x29 of enter      | its frame record
 *      | x30, signed      |                        | ...               |
 *  x29 | x29 of Rust      | <--------------------- | frame record      | of exit or grow, x30 signed
 *      +------------------+ control.native_sp      +-------------------+
 */

/* struct Control, src/stack.rs */
#define NATIVE_SP       0
#define NATIVE_TOKEN    8
#define TOKEN           16
#define SEAL            24
#define SEGMENT         32
#define SHADOW_TOP      40
#define IDENTITY        48
#define GENERATION      56
#define OUTCOME         64
/* struct Activation, src/engine.rs */
#define ACT_CONTROL     8
#define ACT_SCRATCH     16
/* struct Record, src/segment.rs */
#define REC_BASE        0
#define REC_TOP         8
#define REC_IDENTITY    16
#define REC_GENERATION  24
#define REC_SEAL        32
/* struct Rebinding, src/plan.rs: slot, pc, signing */
#define PLAN_SIGNING    16
#define PLAN_SIZE       24
#define OUTCOME_LEFT    1

#include "aarch64.h"

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
        HIDDEN  SYM(cfi_stack_on_grow)

        .text

/*
 * u64 cfi_stack_enter(Control *control, void *entry, u64 a0, u64 a1, u64 a2, u64 a3)
 *
 * Calls entry(a0, a1, a2, a3) on the managed segment and returns what it returns.
 *   in       x0 control (idle), x1 entry, x2-x5 arguments
 *   out      x0
 *   clobbers what a C call may
 *   stack    native: one frame of 176 bytes, kept until entry returns; managed: from record.top. SP comes back by
 *            itself: x29, believed only if the seal in control (x19) is for it
 *   shadow   native: a token on top while managed code runs; managed: token in, token out at the same place
 *   signs    own x30, key IA (Mach-O: IB), modifier SP at entry; the native SP by a PACGA chain with control's
 *            address, identity and generation
 */
FUNC SYM(cfi_stack_enter)
        .cfi_startproc
        .cfi_signal_frame
#ifdef __APPLE__
        .cfi_b_key_frame
#endif
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
        mov     x19, x0
        str     x29, [x19, #NATIVE_SP]
        MODE    x15
        tbz     x15, #MODE_PACGA_BIT, 1f
        pacga   x9, x29, x19
        ldr     x10, [x19, #IDENTITY]
        pacga   x9, x9, x10
        ldr     x10, [x19, #GENERATION]
        pacga   x9, x9, x10
        str     x9, [x19, #SEAL]
1:      ldr     x9, [x19, #SEGMENT]
        LOAD_RECORD x9, x10, x11, x12, x13, x14, x17, x15
        ldr     x14, [x19, #IDENTITY]
        ldr     x17, [x19, #GENERATION]
        cmp     x12, x14
        ccmp    x13, x17, #0, eq
        b.eq    2f
        brk     #BRK_GA                 /* another stack's segment */
2:      SHADOW_SWITCH x19, NATIVE_TOKEN, TOKEN, x9
        mov     sp, x11
        mov     x16, x1
        mov     x0, x2
        mov     x1, x3
        mov     x2, x4
        mov     x3, x5
        blr     x16
        .globl  SYM(cfi_stack_entry_return)
        HIDDEN  SYM(cfi_stack_entry_return)
#ifdef __APPLE__
        .alt_entry SYM(cfi_stack_entry_return)
#endif
SYM(cfi_stack_entry_return):
        VERIFY_NATIVE x29, x19, x9, x10
LOCAL(back_to_native):                  /* x19 control, x29 verified, x0 result, managed shadow stack */
        mov     sp, x29
        SHADOW_SWITCH x19, TOKEN, NATIVE_TOKEN, x9
        ldp     d8, d9, [sp, #96]
        ldp     d10, d11, [sp, #112]
        ldp     d12, d13, [sp, #128]
        ldp     d14, d15, [sp, #144]
        ldp     x19, x20, [sp, #16]
        ldp     x21, x22, [sp, #32]
        ldp     x23, x24, [sp, #48]
        ldp     x25, x26, [sp, #64]
        ldp     x27, x28, [sp, #80]
        ldp     x29, x30, [sp], #176
        .cfi_def_cfa sp, 0
        .irp    reg, x19, x20, x21, x22, x23, x24, x25, x26, x27, x28, x29, x30, d8, d9, d10, d11, d12, d13, d14, d15
        .cfi_restore \reg
        .endr
        AUTHENTICATED_RETURN
        .cfi_endproc
END SYM(cfi_stack_enter)

/* To enter's frame: sp and x29, verified, x19 control, x0 the code. In: x0 act, x1 code. Clobbers x9-x11, flags. */
        .macro TO_ENTRY_FRAME
        .cfi_undefined x19
        ldr     x19, [x0, #ACT_CONTROL]
        mov     x0, x1
        mov     x9, #OUTCOME_LEFT
        str     x9, [x19, #OUTCOME]
        ldr     x11, [x19, #NATIVE_SP]
        VERIFY_NATIVE x11, x19, x9, x10
        mov     x29, x11
        .cfi_def_cfa x29, 176
        .cfi_negate_ra_state
        .cfi_offset x29, -176
        .cfi_offset x30, -168
        CALLEE_SAVES
        mov     sp, x11
        .endm

/*
 * leave_from_signal(Activation *act, u64 code) -> !
 *
 * leave for a rewritten signal context: jumped to, not called. x30 is whatever managed code had in it, signed or not, so unwinders
 * end here until enter's frame is found, instead of taking it for a return address.
 *   in       x0 act, x1 code
 *   the rest as leave
 */
FUNC SYM(cfi_stack_leave_from_signal)
        .cfi_startproc
        .cfi_signal_frame
#ifdef __APPLE__
        .cfi_b_key_frame
#endif
        .cfi_undefined x30
        hint    #34                     /* bti c */
        TO_ENTRY_FRAME
        b       LOCAL(unwind)
        .cfi_endproc
END SYM(cfi_stack_leave_from_signal)

/*
 * leave(Activation *act, u64 code) -> !
 *
 * Pops both stacks to the entry frame; enter returns code.
 *   in       x0 act, x1 code; called by managed code
 *   stack    native: back in enter's frame, found in control and believed only if sealed; managed: abandoned
 *   shadow   managed: popped to its top by gcspopm, token left there; native: as enter found it
 *   signs    nothing; enter's return authenticates
 */
FUNC SYM(cfi_stack_leave)
        .cfi_startproc
        .cfi_signal_frame
#ifdef __APPLE__
        .cfi_b_key_frame
#endif
        hint    #34                     /* bti c */
        TO_ENTRY_FRAME
LOCAL(unwind):                          /* x19 control, x29 and sp enter's, x0 result, managed shadow stack */
        UNLESS_GCS LOCAL(back_to_native)
        ldr     x10, [x19, #SHADOW_TOP]
        mrs     x9, S3_3_C2_C5_1        /* gcspr_el0 */
1:      cmp     x9, x10
        b.hs    LOCAL(back_to_native)
        sysl    x11, #3, c7, c7, #1     /* gcspopm x11 */
        add     x9, x9, #8
        b       1b
        .cfi_endproc
END SYM(cfi_stack_leave)

/*
 * u64 exit(Activation *act, u64 (*f)(u64, u64, u64), u64 a0, u64 a1, u64 a2)
 *
 * Managed code calls native code: f(a0, a1, a2) on the thread's own stacks.
 *   in       x0 act, x1 f, x2-x4 arguments
 *   out      x0; clobbers what a C call may
 *   stack    managed: a frame record of 16 bytes; native: below enter's frame, whose place must be sealed
 *   shadow   managed: a token on top while f runs; native: token in, token out
 *   signs    own x30, key IA (Mach-O: IB), modifier SP at entry
 */
FUNC SYM(cfi_stack_exit)
        .cfi_startproc
        .cfi_signal_frame
#ifdef __APPLE__
        .cfi_b_key_frame
#endif
        SIGN_LR
        .cfi_negate_ra_state
        stp     x29, x30, [sp, #-16]!
        .cfi_def_cfa_offset 16
        .cfi_offset x29, -16
        .cfi_offset x30, -8
        mov     x29, sp
        .cfi_def_cfa x29, 16
        ldr     x9, [x0, #ACT_CONTROL]
        ldr     x11, [x9, #NATIVE_SP]
        VERIFY_NATIVE x11, x9, x10, x12
        SHADOW_SWITCH x9, TOKEN, NATIVE_TOKEN, x10
        mov     sp, x11
        stp     x9, xzr, [sp, #-16]!
        mov     x16, x1
        mov     x0, x2
        mov     x1, x3
        mov     x2, x4
        blr     x16
        ldr     x9, [sp]
        SHADOW_SWITCH x9, NATIVE_TOKEN, TOKEN, x10
        mov     sp, x29
        ldp     x29, x30, [sp], #16
        .cfi_def_cfa sp, 0
        .cfi_restore x29
        .cfi_restore x30
        AUTHENTICATED_RETURN
        .cfi_endproc
END SYM(cfi_stack_exit)

/*
 * grow(Activation *act, usize bytes)
 *
 * Makes room below managed code's stack pointer: saves everything on the native stack, lets Rust move the frames,
 * comes back on the segment where they lie now.
 *   in       x0 act, x1 bytes
 *   out      x0-x15, x18 and q0-q31 as they were; x16, x17 and flags clobbered, as by any branch veneer; vector
 *            state above 128 bits is not kept
 *   stack    managed: a frame record of 16 bytes; native: 656 bytes below enter's frame, whose place must be sealed
 *   shadow   as exit
 *   signs    own x30, key IA (Mach-O: IB), modifier SP at entry; rebind re-signs it like every other
 *   fails    by the way of leave: enter returns, the outcome was set by Rust
 */
#define GROW_X          512
#define GROW_X18        640
#define GROW_CTRL       648
#define GROW_SIZE       656
FUNC SYM(cfi_stack_grow)
        .cfi_startproc
        .cfi_signal_frame
#ifdef __APPLE__
        .cfi_b_key_frame
#endif
        SIGN_LR
        .cfi_negate_ra_state
        stp     x29, x30, [sp, #-16]!
        .cfi_def_cfa_offset 16
        .cfi_offset x29, -16
        .cfi_offset x30, -8
        mov     x29, sp
        .cfi_def_cfa x29, 16
        str     x15, [x0, #ACT_SCRATCH]
        ldr     x16, [x0, #ACT_CONTROL]
        ldr     x17, [x16, #NATIVE_SP]
        VERIFY_NATIVE x17, x16, x15, x30
        ldr     x15, [x0, #ACT_SCRATCH]
        sub     x17, x17, #GROW_SIZE
        mov     sp, x17
        stp     q0, q1, [sp, #0]
        stp     q2, q3, [sp, #32]
        stp     q4, q5, [sp, #64]
        stp     q6, q7, [sp, #96]
        stp     q8, q9, [sp, #128]
        stp     q10, q11, [sp, #160]
        stp     q12, q13, [sp, #192]
        stp     q14, q15, [sp, #224]
        stp     q16, q17, [sp, #256]
        stp     q18, q19, [sp, #288]
        stp     q20, q21, [sp, #320]
        stp     q22, q23, [sp, #352]
        stp     q24, q25, [sp, #384]
        stp     q26, q27, [sp, #416]
        stp     q28, q29, [sp, #448]
        stp     q30, q31, [sp, #480]
        add     x17, sp, #GROW_X
        stp     x0, x1, [x17, #0]
        stp     x2, x3, [x17, #16]
        stp     x4, x5, [x17, #32]
        stp     x6, x7, [x17, #48]
        stp     x8, x9, [x17, #64]
        stp     x10, x11, [x17, #80]
        stp     x12, x13, [x17, #96]
        stp     x14, x15, [x17, #112]
        stp     x18, x16, [x17, #128]
        mov     x0, x16
        SHADOW_SWITCH x0, TOKEN, NATIVE_TOKEN, x9
        mov     x2, x1
        mov     x1, x29
        bl      SYM(cfi_stack_on_grow)  /* (control, frame record, bytes) -> its new address, or 0 */
        ldr     x17, [sp, #GROW_CTRL]
        SHADOW_SWITCH x17, NATIVE_TOKEN, TOKEN, x9
        cbz     x0, 1f
        mov     x29, x0
        add     x17, sp, #GROW_X
        ldp     x0, x1, [x17, #0]
        ldp     x2, x3, [x17, #16]
        ldp     x4, x5, [x17, #32]
        ldp     x6, x7, [x17, #48]
        ldp     x8, x9, [x17, #64]
        ldp     x10, x11, [x17, #80]
        ldp     x12, x13, [x17, #96]
        ldp     x14, x15, [x17, #112]
#ifndef __APPLE__
        ldr     x18, [x17, #128]
#endif
        ldp     q0, q1, [sp, #0]
        ldp     q2, q3, [sp, #32]
        ldp     q4, q5, [sp, #64]
        ldp     q6, q7, [sp, #96]
        ldp     q8, q9, [sp, #128]
        ldp     q10, q11, [sp, #160]
        ldp     q12, q13, [sp, #192]
        ldp     q14, q15, [sp, #224]
        ldp     q16, q17, [sp, #256]
        ldp     q18, q19, [sp, #288]
        ldp     q20, q21, [sp, #320]
        ldp     q22, q23, [sp, #352]
        ldp     q24, q25, [sp, #384]
        ldp     q26, q27, [sp, #416]
        ldp     q28, q29, [sp, #448]
        ldp     q30, q31, [sp, #480]
        mov     sp, x29
        ldp     x29, x30, [sp], #16
        .cfi_remember_state
        .cfi_def_cfa sp, 0
        .cfi_restore x29
        .cfi_restore x30
        AUTHENTICATED_RETURN
        .cfi_restore_state
1:      mov     x19, x17
        .cfi_undefined x19
        ldr     x11, [x19, #NATIVE_SP]
        VERIFY_NATIVE x11, x19, x9, x10
        mov     x29, x11
        .cfi_def_cfa x29, 176
        .cfi_offset x29, -176
        .cfi_offset x30, -168
        CALLEE_SAVES
        mov     sp, x11
        b       LOCAL(unwind)
        .cfi_endproc
END SYM(cfi_stack_grow)

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

/* usize cfi_stack_shadow_pointer(void): GCSPR_EL0, 0 where GCS is off. A leaf; clobbers x0, x16. */
FUNC SYM(cfi_stack_shadow_pointer)
        .cfi_startproc
        hint    #34                     /* bti c */
        mov     x0, #0
        UNLESS_GCS LOCAL(no_gcs)
        mrs     x0, S3_3_C2_C5_1        /* gcspr_el0 */
        add     x0, x0, #8              /* this stub's own return address */
LOCAL(no_gcs):
        ret
        .cfi_endproc
END SYM(cfi_stack_shadow_pointer)

/* u64 cfi_stack_pac_field(void): the bits that a signature may take in a code address. A leaf; needs FEAT_PAuth. */
FUNC SYM(cfi_stack_pac_field)
        .cfi_startproc
        hint    #34                     /* bti c */
        mov     x16, #-1
        and     x16, x16, #~(1 << 55)   /* a user address: bit 55 clear */
        mov     x0, x16
        xpaci   x0
        eor     x0, x0, x16
        ret
        .cfi_endproc
END SYM(cfi_stack_pac_field)

#ifdef __ELF__
/* u64 cfi_stack_id_isar1(void), …_isar2: ID registers, which the kernel lets user code read (HWCAP_CPUID). */
FUNC SYM(cfi_stack_id_isar1)
        .cfi_startproc
        hint    #34                     /* bti c */
        mrs     x0, S3_0_C0_C6_1        /* id_aa64isar1_el1 */
        ret
        .cfi_endproc
END SYM(cfi_stack_id_isar1)
FUNC SYM(cfi_stack_id_isar2)
        .cfi_startproc
        hint    #34                     /* bti c */
        mrs     x0, S3_0_C0_C6_2        /* id_aa64isar2_el1 */
        ret
        .cfi_endproc
END SYM(cfi_stack_id_isar2)
#endif

/*
 * u64 cfi_stack_key_print(u64 which): a fingerprint of this thread's key A (0), B (1) or generic key (2): the
 * signature of address 0 under an odd constant, which is no stack pointer's value. A leaf; clobbers x0, x16, x17.
 */
FUNC SYM(cfi_stack_key_print)
        .cfi_startproc
        hint    #34                     /* bti c */
        mov     x16, #0
        mov     x17, #0x4b01
        cbz     x0, 1f
        cmp     x0, #1
        b.eq    2f
        pacga   x0, x16, x17
        ret
1:      pacia   x16, x17
        mov     x0, x16
        ret
2:      pacib   x16, x17
        mov     x0, x16
        ret
        .cfi_endproc
END SYM(cfi_stack_key_print)

        ELF_NOTES
