/*
 * The stubs for x86-64 Linux: enter, exit, grow, leave.
 *
 * A word of caution. Every instruction here runs between two stacks, and under SHSTK between two shadow stacks.
 *  - Both stacks change together. A shadow stack is entered by `rstorssp` at the token that was left on it, and
 *    `saveprevssp`, right behind it because it faults when CF is set, leaves a token on the one that was left
 *    (Intel SDM vol. 1, ch. 17.2; vol. 2, RSTORSSP, SAVEPREVSSP). Tokens are conserved, none is minted. The
 *    previous-SSP word that RSTORSSP writes lies below SSP when a stub ends, and the next call overwrites it.
 *  - `rdsspq` leaves its operand alone where shadow stacks are off: that, and no word in memory, decides.
 *  - A return address is never written. New ones come from `call`; dropped ones are popped from both stacks.
 *  - No `call` has displacement 0: that one would not be pushed on the shadow stack.
 *
 * The frame chain runs across the stacks: managed code's oldest frame saves enter's rbp; native code that exit or grow calls saves the
 * address of a link record on the native stack, which leads to the stub's frame record. So the CFA of every stub is rbp + 16, or *rbp + 16
 * while rbp is a link record's address, and debuggers walk through to main. The stubs are marked as signal frames because gdb otherwise takes
 * a chain that does not go upwards for a corrupt stack. When frames move while native code runs, the link record's first word is what
 * changes on the native stack, and the stub takes the managed stack pointer from there.
 *
 * Entries nest: native code that exit called enters the stack again, with a frame further down the native stack; its managed frames begin
 * below exit's record. control is about the innermost entry; what the outer ones need is kept by Rust (src/stack/nested.rs).
 *
 *      thread's own stack                          managed segment
 *      | ...              |                        +-------------------+ record.top
 *      | return to Rust   |                        | entry_return      | pushed by enter's call
 *  rbp | rbp of Rust      | <--------------------- | rbp of enter      | frame record of the oldest managed frame
 *      | rbx r12 .. r15   |                        | ...               |
 *      | control          |  control.native_sp     |                   |
 *      +------------------+                        +-------------------+
 *      | 0                |                        | return address    |
 *      | control          |                        | caller's rbp      | frame record of exit, grow or suspend
 *      | address in stub  |                 .----> +-------------------+ managed rsp
 *  rbp | record's address | control.link ---'
 *      +------------------+ link record
 */

#include "x86_64_managed.h"

        .hidden cfi_stack_on_grow       /* Rust's: never another module's of the same name */

        .text

/*
 * u64 cfi_stack_enter(Control *control, void *entry, u64 a0, u64 a1, u64 a2, u64 a3)
 *
 * Calls entry(a0, a1, a2, a3) on the managed segment and returns what it returns.
 *   in       rdi control (idle), rsi entry, rdx rcx r8 r9 arguments
 *   out      rax
 *   clobbers what a C call may
 *   stack    native: one frame, kept until entry returns; managed: from record.top or, when control has a link record, from the frame
 *            record that it names; SP comes back by itself (rbp)
 *   shadow   native: a token on top while managed code runs; managed: token in, token out at the same place
 *   signs    nothing
 */
FUNC cfi_stack_enter
        .cfi_startproc
        .cfi_signal_frame
        NO_UNWIND
        ENTRY_PROLOGUE
        mov     %rdi, %r12
        mov     %rsi, %rax
        mov     %rdx, %rdi
        mov     %rcx, %rsi
        mov     %r8, %rdx
        mov     %r9, %rcx
        mov     %rsp, NATIVE_SP(%r12)
        SHADOW_SWITCH r12, NATIVE_TOKEN, TOKEN, r10, r11
        mov     LINK(%r12), %r11
        test    %r11, %r11
        jz      1f
        LOAD_LINK r11, r12, r10, r8
        movq    $0, LINK(%r12)
        jmp     2f
1:      mov     SEGMENT(%r12), %r11
        mov     REC_TOP(%r11), %r10
2:      mov     %r10, %rsp
        call    *%rax
        .globl  cfi_stack_entry_return
        .hidden cfi_stack_entry_return
cfi_stack_entry_return:
        lea     -ENTRY_FRAME(%rbp), %rsp
        mov     (%rsp), %r12
        .globl  cfi_stack_back_to_native
        .hidden cfi_stack_back_to_native
cfi_stack_back_to_native:               /* r12 control, rsp and rbp enter's, rax result, managed shadow stack */
        SHADOW_SWITCH r12, TOKEN, NATIVE_TOKEN, r10, r11
        mov     -8(%rbp), %rbx
        mov     -16(%rbp), %r12
        mov     -24(%rbp), %r13
        mov     -32(%rbp), %r14
        mov     -40(%rbp), %r15
        .cfi_restore %rbx
        .cfi_restore %r12
        .cfi_restore %r13
        .cfi_restore %r14
        .cfi_restore %r15
        mov     %rbp, %rsp
        pop     %rbp
        .cfi_def_cfa %rsp, 8
        .cfi_restore %rbp
        ret
        .cfi_endproc
END cfi_stack_enter

/* r12 control, rax the code, then to the entry frame. In: rdi act, rsi code. */
        .macro LEAVE
        mov     ACT_CONTROL(%rdi), %r12
        mov     %rsi, %rax
        movq    $OUTCOME_LEFT, OUTCOME(%r12)
        TO_ENTRY_FRAME
        .endm

/*
 * leave_from_signal(Activation *act, u64 code) -> !
 *
 * leave for a rewritten signal context: jumped to, not called. No return address lies at rsp, so unwinders end here until enter's
 * frame is found, instead of taking what lies there for one.
 *   in       rdi act, rsi code
 *   the rest as leave
 */
FUNC cfi_stack_leave_from_signal
        .cfi_startproc
        .cfi_signal_frame
        .cfi_undefined %rip
        endbr64
        .cfi_undefined %r12
        LEAVE
        jmp     cfi_stack_unwind
        .cfi_endproc
END cfi_stack_leave_from_signal

/*
 * leave(Activation *act, u64 code) -> !
 *
 * Pops both stacks to the innermost entry's frame; that enter returns code.
 *   in       rdi act, rsi code; called by managed code
 *   stack    native: back in enter's frame; managed: abandoned up to where that entry began
 *   shadow   managed: popped by incsspq to where it was at that entry, over all shadow segments between, whose tokens are put back; token left
 *            there; native: as enter found it
 *   traps    saveprevssp where no further shadow segment ends
 *   signs    nothing
 */
FUNC cfi_stack_leave
        .cfi_startproc
        .cfi_signal_frame
        endbr64
        .cfi_undefined %r12
        LEAVE
        .globl  cfi_stack_unwind
        .hidden cfi_stack_unwind
cfi_stack_unwind:                       /* r12 control, rsp and rbp enter's, rax result, managed shadow stack */
        xor     %r10d, %r10d
        rdsspq  %r10
        test    %r10, %r10
        jz      cfi_stack_back_to_native
        mov     SEGMENT(%r12), %rcx
1:      mov     REC_SHADOW(%rcx), %rdx
        mov     SHADOW_LEVEL(%r12), %r11
        sub     %r10, %r11
        test    %rdx, %rdx
        jz      2f
        sub     %r10, %rdx
        cmp     %rdx, %r11
        jb      3f                      /* the level is on this shadow segment */
        POP_SHADOW rdx, r10
        SHADOW_BACK r10
        rdsspq  %r10
        mov     SHADOW_LEVEL(%r12), %r11
        sub     %r10, %r11
2:      mov     REC_PREVIOUS(%rcx), %rcx
        test    %rcx, %rcx
        jnz     1b
3:      POP_SHADOW r11, r10
        jmp     cfi_stack_back_to_native
        .cfi_endproc
END cfi_stack_leave

/*
 * u64 exit(Activation *act, u64 (*f)(u64, u64, u64), u64 a0, u64 a1, u64 a2)
 *
 * Managed code calls native code: f(a0, a1, a2) on the thread's own stacks. While f runs, the frames may move.
 *   in       rdi act, rsi f, rdx rcx r8 arguments
 *   out      rax; clobbers what a C call may
 *   stack    managed: a frame record, 16 bytes with the return address; native: a link record of 32 bytes below the innermost entry's
 *            frame. The managed rsp comes back from the link record, not from f's rbp, and must lie in the present segment
 *   shadow   managed: a token on top while f runs; native: token in, token out
 *   signs    nothing
 *   traps    ud2 when the link record names no place in the segment
 */
FUNC cfi_stack_exit
        .cfi_startproc
        .cfi_signal_frame
        NO_UNWIND
        endbr64
        FRAME_RECORD
        mov     ACT_CONTROL(%rdi), %r11
        SHADOW_SWITCH r11, TOKEN, NATIVE_TOKEN, r9, r10
        LINK_TO_NATIVE r11, 1f, r9
        mov     %rsi, %rax
        mov     %rdx, %rdi
        mov     %rcx, %rsi
        mov     %r8, %rdx
        call    *%rax
1:      mov     LINK_CONTROL(%rsp), %r11
        movq    $0, LINK(%r11)
        SHADOW_SWITCH r11, NATIVE_TOKEN, TOKEN, r9, r10
        LOAD_LINK rsp, r11, r10, r9
        mov     %r10, %rsp
        pop     %rbp
        .cfi_def_cfa %rsp, 8
        .cfi_restore %rbp
        ret
        .cfi_endproc
END cfi_stack_exit

/*
 * grow(Activation *act, usize bytes)
 *
 * Makes room below managed code's stack pointer: saves everything on the native stack, lets Rust move the frames,
 * comes back on the segment where they lie now.
 *   in       rdi act, rsi bytes
 *   out      all general registers and xmm0-15 as they were, but for pointers into the stack that the code map finds in rbx, r12-r15;
 *            flags clobbered; vector state above 128 bits is not kept, as in any C call
 *   stack    managed: a frame record, 16 bytes with the return address; native: a link record as exit's and 384 bytes
 *   shadow   as exit
 *   signs    nothing; the moved return address is checked by `ret` against the shadow stack
 *   traps    as exit
 *   fails    by the way of leave: enter returns, the outcome was set by Rust
 */
#define GROW_SAVES      336             /* rbx, r12, r13, r14, r15: the order of Register::NAMES */
#define GROW_CTRL       328
#define GROW_RAX        320
#define GROW_RCX        312
#define GROW_RDX        304
#define GROW_RSI        296
#define GROW_RDI        288
#define GROW_R8         280
#define GROW_R9         272
#define GROW_R10        264
#define GROW_R11        256
#define GROW_SIZE       384
FUNC cfi_stack_grow
        .cfi_startproc
        .cfi_signal_frame
        endbr64
        FRAME_RECORD
        mov     %r11, ACT_SCRATCH(%rdi) /* nothing more goes on the managed segment */
        mov     ACT_CONTROL(%rdi), %r11
        mov     NATIVE_SP(%r11), %rsp
        sub     $(LINK_SIZE + GROW_SIZE), %rsp
        mov     %rax, GROW_RAX(%rsp)
        mov     %rcx, GROW_RCX(%rsp)
        mov     %rdx, GROW_RDX(%rsp)
        mov     %rsi, GROW_RSI(%rsp)
        mov     %rdi, GROW_RDI(%rsp)
        mov     %r8, GROW_R8(%rsp)
        mov     %r9, GROW_R9(%rsp)
        mov     %r10, GROW_R10(%rsp)
        mov     ACT_SCRATCH(%rdi), %rax
        mov     %rax, GROW_R11(%rsp)
        mov     %r11, GROW_CTRL(%rsp)
        mov     %rbx, GROW_SAVES(%rsp)
        mov     %r12, (GROW_SAVES + 8)(%rsp)
        mov     %r13, (GROW_SAVES + 16)(%rsp)
        mov     %r14, (GROW_SAVES + 24)(%rsp)
        mov     %r15, (GROW_SAVES + 32)(%rsp)
        .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
        movaps  %xmm\n, (\n * 16)(%rsp)
        .endr
        lea     1f(%rip), %rax
        mov     %rbp, (GROW_SIZE + LINK_RECORD)(%rsp)
        mov     %rax, (GROW_SIZE + LINK_PC)(%rsp)
        mov     %r11, (GROW_SIZE + LINK_CONTROL)(%rsp)
        movq    $0, (GROW_SIZE + LINK_SEAL)(%rsp)
        lea     GROW_SIZE(%rsp), %rbp
        CFA_BY_LINK
        mov     %rbp, LINK(%r11)
        SHADOW_SWITCH r11, TOKEN, NATIVE_TOKEN, r9, r10
        lea     GROW_SAVES(%rsp), %rdx
        mov     %r11, %rdi
        call    cfi_stack_on_grow       /* (control, bytes, callee-saved registers) -> 1, or 0 when there is no room */
1:      mov     GROW_CTRL(%rsp), %r11
        movq    $0, LINK(%r11)
        SHADOW_SWITCH r11, NATIVE_TOKEN, TOKEN, r9, r10
        test    %rax, %rax
        jz      2f
        .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
        movaps  (\n * 16)(%rsp), %xmm\n
        .endr
        lea     GROW_SIZE(%rsp), %rcx
        LOAD_LINK rcx, r11, rdx, rax
        mov     %rdx, %rbp
        .cfi_remember_state
        .cfi_def_cfa %rbp, 16
        mov     GROW_RAX(%rsp), %rax
        mov     GROW_RCX(%rsp), %rcx
        mov     GROW_RDX(%rsp), %rdx
        mov     GROW_RSI(%rsp), %rsi
        mov     GROW_RDI(%rsp), %rdi
        mov     GROW_R8(%rsp), %r8
        mov     GROW_R9(%rsp), %r9
        mov     GROW_R10(%rsp), %r10
        mov     GROW_R11(%rsp), %r11
        mov     GROW_SAVES(%rsp), %rbx
        mov     (GROW_SAVES + 8)(%rsp), %r12
        mov     (GROW_SAVES + 16)(%rsp), %r13
        mov     (GROW_SAVES + 24)(%rsp), %r14
        mov     (GROW_SAVES + 32)(%rsp), %r15
        mov     %rbp, %rsp
        pop     %rbp
        .cfi_def_cfa %rsp, 8
        .cfi_restore %rbp
        ret
        .cfi_restore_state
2:      mov     %r11, %r12
        .cfi_undefined %r12
        TO_ENTRY_FRAME
        jmp     cfi_stack_unwind
        .cfi_endproc
END cfi_stack_grow

        ELF_NOTES
