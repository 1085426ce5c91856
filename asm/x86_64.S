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
 * The frame chain runs across the stacks: managed code's oldest frame saves enter's rbp, native code called by exit
 * saves exit's. So the CFA of every stub is rbp + 16, on whichever stack, and debuggers walk through to main. They are
 * marked as signal frames because gdb otherwise takes a chain that does not go upwards for a corrupt stack.
 *
 *      thread's own stack                          managed segment
 *      | ...              |                        +-------------------+ record.top
 *      | return to Rust   |                        | entry_return      | pushed by enter's call
 *  rbp | rbp of Rust      | <--------------------- | rbp of enter      | frame record of the oldest managed frame
 *      | rbx r12 .. r15   |                        | ...               |
 *      | control          |  control.native_sp     | frame record      | of exit or grow
 *      +------------------+                        +-------------------+
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
 *   stack    native: one frame, kept until entry returns; managed: from record.top; SP comes back by itself (rbp)
 *   shadow   native: a token on top while managed code runs; managed: token in, token out at the same place
 *   signs    nothing
 */
FUNC cfi_stack_enter
        .cfi_startproc
        .cfi_signal_frame
        endbr64
        push    %rbp
        .cfi_def_cfa_offset 16
        .cfi_offset %rbp, -16
        mov     %rsp, %rbp
        .cfi_def_cfa_register %rbp
        push    %rbx
        push    %r12
        push    %r13
        push    %r14
        push    %r15
        push    %rdi                    /* control; rsp is 16-byte aligned here */
        .cfi_offset %rbx, -24
        .cfi_offset %r12, -32
        .cfi_offset %r13, -40
        .cfi_offset %r14, -48
        .cfi_offset %r15, -56
        mov     %rdi, %r12
        mov     %rsi, %rax
        mov     %rdx, %rdi
        mov     %rcx, %rsi
        mov     %r8, %rdx
        mov     %r9, %rcx
        mov     %rsp, NATIVE_SP(%r12)
        SHADOW_SWITCH r12, NATIVE_TOKEN, TOKEN, r10, r11
        mov     SEGMENT(%r12), %r11
        mov     REC_TOP(%r11), %rsp
        call    *%rax
        .globl  cfi_stack_entry_return
        .hidden cfi_stack_entry_return
cfi_stack_entry_return:
        lea     -ENTRY_FRAME(%rbp), %rsp
        mov     (%rsp), %r12
.Lback_to_native:
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

/* To enter's frame: rsp and rbp, r12 control, rax the code. In: rdi act, rsi code. Clobbers r11. */
        .macro TO_ENTRY_FRAME
        .cfi_undefined %r12
        mov     ACT_CONTROL(%rdi), %r12
        mov     %rsi, %rax
        movq    $OUTCOME_LEFT, OUTCOME(%r12)
        mov     NATIVE_SP(%r12), %r11
        lea     ENTRY_FRAME(%r11), %rbp
        .cfi_def_cfa %rbp, 16
        .cfi_offset %rip, -8
        .cfi_offset %rbp, -16
        .cfi_offset %rbx, -24
        .cfi_offset %r12, -32
        .cfi_offset %r13, -40
        .cfi_offset %r14, -48
        .cfi_offset %r15, -56
        mov     %r11, %rsp
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
        TO_ENTRY_FRAME
        jmp     .Lunwind
        .cfi_endproc
END cfi_stack_leave_from_signal

/*
 * leave(Activation *act, u64 code) -> !
 *
 * Pops both stacks to the entry frame; enter returns code.
 *   in       rdi act, rsi code; called by managed code
 *   stack    native: back in enter's frame; managed: abandoned up to record.top
 *   shadow   managed: popped to its top by incsspq, token left there; native: as enter found it
 *   signs    nothing
 */
FUNC cfi_stack_leave
        .cfi_startproc
        .cfi_signal_frame
        endbr64
        TO_ENTRY_FRAME
.Lunwind:                               /* r12 control, rsp and rbp enter's, rax result, managed shadow stack */
        xor     %r10d, %r10d
        rdsspq  %r10
        test    %r10, %r10
        jz      .Lback_to_native
        mov     SHADOW_TOP(%r12), %r11
        sub     %r10, %r11
        shr     $3, %r11                /* entries to pop */
        mov     $255, %r10d             /* the most that one incsspq pops */
1:      cmp     %r10, %r11
        jb      2f
        incsspq %r10
        sub     %r10, %r11
        jmp     1b
2:      test    %r11, %r11
        jz      .Lback_to_native        /* incsspq reads the top entry even when it pops none */
        incsspq %r11
        jmp     .Lback_to_native
        .cfi_endproc
END cfi_stack_leave

/*
 * u64 exit(Activation *act, u64 (*f)(u64, u64, u64), u64 a0, u64 a1, u64 a2)
 *
 * Managed code calls native code: f(a0, a1, a2) on the thread's own stacks.
 *   in       rdi act, rsi f, rdx rcx r8 arguments
 *   out      rax; clobbers what a C call may
 *   stack    managed: a frame record, 16 bytes with the return address; native: below enter's frame
 *   shadow   managed: a token on top while f runs; native: token in, token out
 *   signs    nothing
 */
FUNC cfi_stack_exit
        .cfi_startproc
        .cfi_signal_frame
        endbr64
        push    %rbp
        .cfi_def_cfa_offset 16
        .cfi_offset %rbp, -16
        mov     %rsp, %rbp
        .cfi_def_cfa_register %rbp
        mov     ACT_CONTROL(%rdi), %r11
        SHADOW_SWITCH r11, TOKEN, NATIVE_TOKEN, r9, r10
        mov     NATIVE_SP(%r11), %rsp
        push    %r11
        push    %r11                    /* twice: keeps rsp 16-byte aligned */
        mov     %rsi, %rax
        mov     %rdx, %rdi
        mov     %rcx, %rsi
        mov     %r8, %rdx
        call    *%rax
        mov     (%rsp), %r11
        SHADOW_SWITCH r11, NATIVE_TOKEN, TOKEN, r9, r10
        mov     %rbp, %rsp
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
 *   out      all general registers and xmm0-15 as they were; flags clobbered; vector state above 128 bits is
 *            not kept, as in any C call
 *   stack    managed: a frame record, 16 bytes with the return address; native: 336 bytes below enter's frame
 *   shadow   as exit
 *   signs    nothing; the moved return address is checked by `ret` against the shadow stack
 *   fails    by the way of leave: enter returns, the outcome was set by Rust
 */
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
#define GROW_SIZE       336
FUNC cfi_stack_grow
        .cfi_startproc
        .cfi_signal_frame
        endbr64
        push    %rbp
        .cfi_def_cfa_offset 16
        .cfi_offset %rbp, -16
        mov     %rsp, %rbp
        .cfi_def_cfa_register %rbp
        mov     %r11, ACT_SCRATCH(%rdi) /* nothing more goes on the managed segment */
        mov     ACT_CONTROL(%rdi), %r11
        mov     NATIVE_SP(%r11), %rsp
        sub     $GROW_SIZE, %rsp
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
        .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
        movaps  %xmm\n, (\n * 16)(%rsp)
        .endr
        SHADOW_SWITCH r11, TOKEN, NATIVE_TOKEN, r9, r10
        mov     %rsi, %rdx
        mov     %rbp, %rsi
        mov     %r11, %rdi
        call    cfi_stack_on_grow       /* (control, frame record, bytes) -> its new address, or 0 */
        mov     GROW_CTRL(%rsp), %r11
        SHADOW_SWITCH r11, NATIVE_TOKEN, TOKEN, r9, r10
        test    %rax, %rax
        jz      1f
        mov     %rax, %rbp
        .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
        movaps  (\n * 16)(%rsp), %xmm\n
        .endr
        mov     GROW_RAX(%rsp), %rax
        mov     GROW_RCX(%rsp), %rcx
        mov     GROW_RDX(%rsp), %rdx
        mov     GROW_RSI(%rsp), %rsi
        mov     GROW_RDI(%rsp), %rdi
        mov     GROW_R8(%rsp), %r8
        mov     GROW_R9(%rsp), %r9
        mov     GROW_R10(%rsp), %r10
        mov     GROW_R11(%rsp), %r11
        mov     %rbp, %rsp
        pop     %rbp
        .cfi_remember_state
        .cfi_def_cfa %rsp, 8
        .cfi_restore %rbp
        ret
        .cfi_restore_state
1:      mov     %r11, %r12
        .cfi_undefined %r12
        mov     NATIVE_SP(%r12), %r11
        lea     ENTRY_FRAME(%r11), %rbp
        .cfi_offset %rbx, -24
        .cfi_offset %r12, -32
        .cfi_offset %r13, -40
        .cfi_offset %r14, -48
        .cfi_offset %r15, -56
        mov     %r11, %rsp
        jmp     .Lunwind
        .cfi_endproc
END cfi_stack_grow

        ELF_NOTES
