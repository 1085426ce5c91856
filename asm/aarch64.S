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
 * The frame chain runs across the stacks: managed code's oldest frame saves enter's x29; native code that exit or grow calls saves the
 * address of a link record on the native stack, which leads to the stub's frame record. So CFAs follow from x29, or from *x29 while it is a
 * link record's address, and debuggers walk through to main. The stubs are marked as signal frames because gdb otherwise takes a chain that
 * does not go upwards for a corrupt stack. When frames move while native code runs, the link record's first word is what changes on the
 * native stack, and the stub takes the managed stack pointer from there, if the seal is for it.
 *
 * Entries nest: native code that exit called enters the stack again, with a frame further down the native stack; its managed frames begin
 * below exit's record. control is about the innermost entry; what the outer ones need is kept by Rust (src/stack/nested.rs).
 *
 *      thread's own stack                          managed segment
 *      | ...              |                        +-------------------+ record.top
 *      | d8 .. d15        |                        | entry_return, signed by the oldest managed frame
 *      | x19 .. x28       |                        | x29 of enter      | its frame record
 *      | x30, signed      |                        | ...               |
 *  x29 | x29 of Rust      | <--------------------- |                   |
 *      +------------------+ control.native_sp      +-------------------+
 *      | seal             |                        | x30, signed       |
 *      | control          |                        | caller's x29      | frame record of exit, grow or suspend
 *      | address in stub  |                 .----> +-------------------+ managed sp
 *  x29 | record's address | control.link ---'
 *      +------------------+ link record
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
 *   stack    native: one frame of 176 bytes, kept until entry returns; managed: from record.top or, when
 *            control has a link record, from the frame record that it names. SP comes back by itself: x29, believed only if
 *            the seal in control (x19) is for it
 *   shadow   native: a token on top while managed code runs; managed: token in, token out at the same place
 *   signs    own x30, key IA (Mach-O: IB), modifier SP at entry; the native SP by a PACGA chain with control's
 *            address, identity and generation
 */
FUNC SYM(cfi_stack_enter)
        .cfi_startproc
        .cfi_signal_frame
        NO_UNWIND
#ifdef __APPLE__
        .cfi_b_key_frame
#endif
        ENTRY_PROLOGUE
        mov     x19, x0
        SEAL_NATIVE x19, x9, x10, x15
        LOAD_SEGMENT x19, x9, x10, x11, x12, x13, x14, x17, x15
        ldr     x9, [x19, #LINK]
        cbz     x9, 2f
        LOAD_LINK x9, x19, x11, x12, x13
        str     xzr, [x19, #LINK]
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
        .globl  SYM(cfi_stack_back_to_native)
        HIDDEN  SYM(cfi_stack_back_to_native)
#ifdef __APPLE__
        .alt_entry SYM(cfi_stack_back_to_native)
#endif
SYM(cfi_stack_back_to_native):          /* x19 control, x29 verified, x0 result, managed shadow stack */
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

/* To the innermost entry's frame, verified: sp and x29, x19 control, x0 the code. In: x0 act, x1 code. Clobbers x9-x11, flags. */
        .macro LEAVE
        .cfi_undefined x19
        ldr     x19, [x0, #ACT_CONTROL]
        mov     x0, x1
        mov     x9, #OUTCOME_LEFT
        str     x9, [x19, #OUTCOME]
        ldr     x11, [x19, #NATIVE_SP]
        VERIFY_NATIVE x11, x19, x9, x10
        TO_ENTRY_FRAME x11, 1
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
        LEAVE
        b       SYM(cfi_stack_unwind)
        .cfi_endproc
END SYM(cfi_stack_leave_from_signal)

/*
 * leave(Activation *act, u64 code) -> !
 *
 * Pops both stacks to the innermost entry's frame; that enter returns code.
 *   in       x0 act, x1 code; called by managed code
 *   stack    native: back in enter's frame, found in control and believed only if sealed; managed: abandoned
 *   shadow   managed: popped by gcspopm to where it was at that entry, over all shadow segments between, whose tokens are put back; token left
 *            there; native: as enter found it
 *   signs    nothing; enter's return authenticates
 *   traps    past the end of the shadow stack when the level is not on it
 */
FUNC SYM(cfi_stack_leave)
        .cfi_startproc
        .cfi_signal_frame
#ifdef __APPLE__
        .cfi_b_key_frame
#endif
        hint    #34                     /* bti c */
        LEAVE
        .globl  SYM(cfi_stack_unwind)
        HIDDEN  SYM(cfi_stack_unwind)
#ifdef __APPLE__
        .alt_entry SYM(cfi_stack_unwind)
#endif
SYM(cfi_stack_unwind):                  /* x19 control, x29 and sp enter's, x0 result, managed shadow stack */
        UNLESS_GCS SYM(cfi_stack_back_to_native)
        ldr     x10, [x19, #SHADOW_LEVEL]
1:      mrs     x9, S3_3_C2_C5_1        /* gcspr_el0 */
2:      cmp     x9, x10
        b.eq    SYM(cfi_stack_back_to_native)
        ldr     x11, [x9]               /* a return address is even */
        tbnz    x11, #0, 3f
        sysl    x11, #3, c7, c7, #1     /* gcspopm x11 */
        add     x9, x9, #8
        b       2b
3:      SHADOW_BACK x9
        b       1b
        .cfi_endproc
END SYM(cfi_stack_leave)

/*
 * u64 exit(Activation *act, u64 (*f)(u64, u64, u64), u64 a0, u64 a1, u64 a2)
 *
 * Managed code calls native code: f(a0, a1, a2) on the thread's own stacks. While f runs, the frames may move.
 *   in       x0 act, x1 f, x2-x4 arguments
 *   out      x0; clobbers what a C call may
 *   stack    managed: a frame record of 16 bytes; native: a link record of 32 bytes below the innermost entry's frame, whose place must be
 *            sealed. The managed sp comes back from the link record, not from f's x29: sealed, and in the present segment
 *   shadow   managed: a token on top while f runs; native: token in, token out
 *   signs    own x30, key IA (Mach-O: IB), modifier SP at entry; the frame record's address by a PACGA chain with the link record's and
 *            control's addresses, identity and generation
 *   traps    brk #0xc474
 */
FUNC SYM(cfi_stack_exit)
        .cfi_startproc
        .cfi_signal_frame
        NO_UNWIND
#ifdef __APPLE__
        .cfi_b_key_frame
#endif
        FRAME_RECORD
        ldr     x9, [x0, #ACT_CONTROL]
        ldr     x11, [x9, #NATIVE_SP]
        VERIFY_NATIVE x11, x9, x10, x12
        SHADOW_SWITCH x9, TOKEN, NATIVE_TOKEN, x10
        sub     x11, x11, #LINK_SIZE
        mov     sp, x11
        WRITE_LINK x11, x9, 1f, x10, x12
        str     x11, [x9, #LINK]
        mov     x29, sp
        CFA_BY_LINK
        mov     x16, x1
        mov     x0, x2
        mov     x1, x3
        mov     x2, x4
        blr     x16
1:      mov     x11, sp
        ldr     x9, [x11, #LINK_CONTROL]
        LOAD_LINK x11, x9, x12, x10, x13
        str     xzr, [x9, #LINK]
        SHADOW_SWITCH x9, NATIVE_TOKEN, TOKEN, x10
        mov     sp, x12
        RECORD_RETURN
        .cfi_endproc
END SYM(cfi_stack_exit)

/*
 * grow(Activation *act, usize bytes)
 *
 * Makes room below managed code's stack pointer: saves everything on the native stack, lets Rust move the frames,
 * comes back on the segment where they lie now.
 *   in       x0 act, x1 bytes
 *   out      x0-x15, x18 and q0-q31 as they were, and x19-x28 but for pointers into the stack that the code map finds there; x16, x17 and
 *            flags clobbered, as by any branch veneer; vector state above 128 bits is not kept
 *   stack    managed: a frame record of 16 bytes; native: a link record as exit's and 736 bytes
 *   shadow   as exit
 *   signs    as exit; rebind re-signs x30 like every other
 *   traps    as exit
 *   fails    by the way of leave: enter returns, the outcome was set by Rust
 */
#define GROW_X          512
#define GROW_X18        640
#define GROW_SAVES      656             /* x19 .. x28: the order of Register::NAMES */
#define GROW_SIZE       736
FUNC SYM(cfi_stack_grow)
        .cfi_startproc
        .cfi_signal_frame
#ifdef __APPLE__
        .cfi_b_key_frame
#endif
        FRAME_RECORD
        str     x15, [x0, #ACT_SCRATCH]
        ldr     x16, [x0, #ACT_CONTROL]
        ldr     x17, [x16, #NATIVE_SP]
        VERIFY_NATIVE x17, x16, x15, x30
        sub     x17, x17, #LINK_SIZE
        mov     sp, x17
        WRITE_LINK x17, x16, 1f, x15, x30
        str     x17, [x16, #LINK]
        mov     x29, sp
        CFA_BY_LINK
        ldr     x15, [x0, #ACT_SCRATCH]
        sub     sp, sp, #GROW_SIZE
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
        stp     x19, x20, [x17, #144]
        stp     x21, x22, [x17, #160]
        stp     x23, x24, [x17, #176]
        stp     x25, x26, [x17, #192]
        stp     x27, x28, [x17, #208]
        mov     x0, x16
        SHADOW_SWITCH x0, TOKEN, NATIVE_TOKEN, x9
        add     x2, sp, #GROW_SAVES
        bl      SYM(cfi_stack_on_grow)  /* (control, bytes, callee-saved registers) -> 1, or 0 when there is no room */
1:      add     x11, sp, #GROW_SIZE
        ldr     x17, [x11, #LINK_CONTROL]
        LOAD_LINK x11, x17, x30, x9, x10
        str     xzr, [x17, #LINK]
        SHADOW_SWITCH x17, NATIVE_TOKEN, TOKEN, x9
        cbz     x0, 2f
        mov     x29, x30
        .cfi_remember_state
        .cfi_def_cfa x29, 16
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
        ldp     x19, x20, [x17, #144]
        ldp     x21, x22, [x17, #160]
        ldp     x23, x24, [x17, #176]
        ldp     x25, x26, [x17, #192]
        ldp     x27, x28, [x17, #208]
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
        RECORD_RETURN
        .cfi_restore_state
2:      mov     x19, x17
        .cfi_undefined x19
        ldr     x11, [x19, #NATIVE_SP]
        VERIFY_NATIVE x11, x19, x9, x10
        TO_ENTRY_FRAME x11
        b       SYM(cfi_stack_unwind)
        .cfi_endproc
END SYM(cfi_stack_grow)

        ELF_NOTES
