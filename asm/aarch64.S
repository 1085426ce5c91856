/*
 * The stubs for arm64, ELF and Mach-O (arm64e): enter, exit, grow, leave.
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

#include "aarch64_managed.h"

        HIDDEN  SYM(cfi_stack_on_grow)  /* Rust's */

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

        ELF_NOTES
