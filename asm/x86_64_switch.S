/*
 * The stubs that switch between pooled stacks, for x86-64 Linux: prepare, first, resume, suspend, switch_to, throw, cancel.
 *
 * A word of caution, besides the one in x86_64.S. What a suspended stack left in memory may have been rewritten since:
 *  - With a shadow stack the pc is taken from it. Every call of these stubs pushed it there; the copy on the data stack is for
 *    debuggers and for CPUs without. A stack that never ran has an empty shadow stack, and then the pc is `first`.
 *  - Slot, stack pointer and token must belong together: the read-only directory says which data area and which shadow area
 *    a slot has. All three are in registers by then; nothing is written and neither stack changed before the check is done.
 *  - The generation stands in the context and in the saved frame. They are counted together and must agree.
 * Without a shadow stack nothing can be believed and nothing is checked: the process has no control-flow integrity to lose.
 *
 * Callers are asm blocks of src/switch.rs: `call stub; endbr64`. The stubs end in `jmp`, so that one stack's return is
 * not predicted from another's call, and the word behind the call is a landing pad.
 *
 * A suspended stack and its slot. Every saved frame is alike, the resumer's too:
 *
 *      data area                               slot                          shadow stack
 *      +------------------------+ top          +----------------+            +------------------+ shadow_top
 *      | address in `first`     |              | own.sp         |-----+      | base_return      | pushed by first's call
 *   B  | record of the resumer  | the link     | own.token      |--+  |      | ...              |
 *      | frames                 |              | own.generation |  |  |      | pc               | pushed by the call of suspend
 *      | pc                     |              | resumer ...    |  +--|----> | token            |
 *   R  | rbp                    | the record   +----------------+     |      +------------------+
 *      | rbx r12 r13 r14 r15    |                                     |
 *      | generation             |                                     |
 *      | mxcsr, x87 control     | <-----------------------------------+
 *      +------------------------+
 *
 *  state        own              resumer          link at B          shadow stack
 *  ready        frame of first   -                0                  token on top, empty
 *  running      -                who waits        its record         in use; a token lies on the resumer's
 *  suspended    frame as above   -                stale              token below the pc
 *  done         -                -                stale              token on top, empty
 *
 * The chain of frame records runs through B to the resumer's R, so both kinds of unwinders reach main.
 */

#include "x86_64_context.h"

        .text

        .macro RESUME fp
        SAVE_FRAME \fp
        .cfi_remember_state
        UNLESS_SHADOW 1f
        cmp     %rdi, %rsi
        je      2f
        BIND    %rsi                    /* of the stack that gets the link */
        mov     %r9, %r11
        BIND    %rdi
        jmp     3f
2:      BIND    %rdi
        mov     %r9, %r11
3:      VERIFY_OWN %rdi
        SAVE_CONTEXT %rsi, RESUMER
        lea     F_RBP(%rsp), %rax
        mov     %rax, -BASE_RECORD(%r11)
        .if \fp
        movzwl  F_X87(%rsp), %r9d
        .endif
        CHANGE_SHADOW
        mov     %r14, %rsp
        mov     %rdx, %r10
        lea     8(%r15), %rax
        cmp     %r13, %rax
        je      4f                      /* nothing on the shadow stack: it never ran */
        POP_SHADOW_PC
        mov     %r10, %rax
        LOAD_FRAME \fp
        TO_SHADOW_PC
        .cfi_restore_state
        .cfi_remember_state
4:      mov     %r10, %rax
        LOAD_FRAME \fp
        add     $8, %rsp
        .cfi_def_cfa_offset 0
        jmp     .Lfirst
        .cfi_restore_state
1:      mov     TOP(%rsi), %rax
        lea     F_RBP(%rsp), %rcx
        mov     %rcx, -BASE_RECORD(%rax)
        mov     %rsp, RESUMER + SP(%rsi)
        mov     %rdx, %rax
        mov     OWN + SP(%rdi), %rsp
        LOAD_FRAME \fp
        TO_SAVED_PC
        .cfi_endproc
        .endm

        .macro SUSPEND fp
        SAVE_FRAME \fp
        .cfi_remember_state
        UNLESS_SHADOW 1f
        VERIFY_RESUMER %rsi
        SAVE_CONTEXT %rdi, OWN
        CHANGE_SHADOW
        mov     %r14, %rsp
        mov     %rdx, %r10
        POP_SHADOW_PC
        mov     %r10, %rax
        LOAD_FRAME \fp
        TO_SHADOW_PC
        .cfi_restore_state
1:      mov     %rsp, OWN + SP(%rdi)
        mov     %rdx, %rax
        mov     RESUMER + SP(%rsi), %rsp
        LOAD_FRAME \fp
        TO_SAVED_PC
        .cfi_endproc
        .endm

/*
 * void cfi_stack_prepare(Slot *slot, void *entry, usize data)
 *
 * Makes a stack that runs entry(arg, data, slot) when it is first resumed.
 *   in       rdi slot, with nothing on its stack; rsi entry; rdx data
 *   clobbers rax rcx r8-r11
 *   stack    a leaf; writes the base record and a saved frame below the top of the slot's data area; with a shadow stack the
 *            directory says where that is: nothing is written to another's
 *   shadow   none; the slot's is empty with its token on top
 *   signs    nothing
 */
FUNC cfi_stack_prepare
        .cfi_startproc
        endbr64
        UNLESS_SHADOW 2f
        BIND    %rdi, %r8, %r9, %r8, %r11
        mov     %r9, %rax
        jmp     3f
2:      mov     TOP(%rdi), %rax
3:      movq    $0, -BASE_RECORD(%rax)
        lea     cfi_stack_base_return(%rip), %rcx
        mov     %rcx, 8 - BASE_RECORD(%rax)
        sub     $BASE_RECORD, %rax
        lea     .Lfirst(%rip), %rcx
        mov     %rcx, F_PC - FRAME(%rax)
        mov     %rax, F_RBP - FRAME(%rax)
        mov     %rsi, F_RBX - FRAME(%rax)
        mov     %rdx, F_R12 - FRAME(%rax)
        mov     %rdi, F_R13 - FRAME(%rax)
        sub     $FRAME, %rax
        stmxcsr F_MXCSR(%rax)
        fnstcw  F_X87(%rax)
        mov     OWN + GENERATION(%rdi), %rcx
        inc     %rcx
        mov     %rcx, OWN + GENERATION(%rdi)
        mov     %rcx, F_GENERATION(%rax)
        mov     %rax, OWN + SP(%rdi)
        mov     SLOT_SHADOW_TOP(%rdi), %rcx
        test    %rcx, %rcx
        jz      1f
        sub     $8, %rcx
1:      mov     %rcx, OWN + CTX_TOKEN(%rdi)
        ret
        .cfi_endproc
END cfi_stack_prepare

/*
 * first: the oldest frame of every pooled stack. Not called: a resume's frame leads to it.
 *   in       rax arg, rbx entry, r12 data, r13 slot; rbp and rsp at the base record
 *   stack    calls entry on its own stack; when it returns, goes to the resumer with its result and edx = 1
 *   shadow   own: empty with the token on top again; the resumer's: token in, the pc of its call popped
 *   signs    nothing
 *   unwinds  to the frame that the link names: the resumer's, whichever it is now
 */
FUNC cfi_stack_first
        .cfi_startproc
        .cfi_signal_frame
        .cfi_escape 0x0f, 5, 0x76, 0, 0x06, 0x23, 16    /* CFA: breg6 (rbp) + 0, deref, plus_uconst 16 */
        .cfi_offset %rip, -8
        .cfi_offset %rbp, -16
        .cfi_offset %rbx, -24
        .cfi_offset %r12, -32
        .cfi_offset %r13, -40
        .cfi_offset %r14, -48
        .cfi_offset %r15, -56
.Lfirst:
        endbr64
        mov     %rax, %rdi
        mov     %r12, %rsi
        mov     %r13, %rdx
        call    *%rbx
        .globl  cfi_stack_base_return
        .hidden cfi_stack_base_return
cfi_stack_base_return:
        mov     %rax, %rdx
        mov     %r13, %rdi
        stmxcsr -8(%rsp)
        fnstcw  -16(%rsp)
        mov     -8(%rsp), %r8d
        movzwl  -16(%rsp), %r9d
        .cfi_remember_state
        UNLESS_SHADOW 1f
        BIND    %rdi
        sub     $BASE_RECORD, %r9
        cmp     %r9, %rsp               /* the stack that ends is the slot's */
        jne     .Lunbound
        rdsspq  %rax
        cmp     %rax, %r13              /* nothing is left on its shadow stack */
        jne     .Lunbound
        VERIFY_RESUMER %rdi
        sub     $8, %rax
        mov     %rax, OWN + CTX_TOKEN(%rdi)
        movq    $0, OWN + SP(%rdi)      /* no frame: whoever resumes it is told */
        movzwl  -16(%rsp), %r9d
        CHANGE_SHADOW
        POP_SHADOW_PC
        mov     %r14, %rsp
        .cfi_def_cfa %rsp, FRAME
        mov     %rdx, %rax
        LOAD_FRAME 2
        add     $8, %rsp
        .cfi_def_cfa_offset 0
        .cfi_register %rip, %rcx
        mov     $1, %edx
        jmp     *%rcx
        .cfi_restore_state
1:      mov     RESUMER + SP(%rdi), %rsp
        .cfi_def_cfa %rsp, FRAME
        mov     %rdx, %rax
        LOAD_FRAME 2
        pop     %rcx
        .cfi_def_cfa_offset 0
        .cfi_register %rip, %rcx
        mov     $1, %edx
        jmp     *%rcx
        .cfi_endproc
END cfi_stack_first

/*
 * {usize, u64} cfi_stack_resume(Slot *last, Slot *first, usize arg)
 *
 * First entry, or continuation of a suspended stack; of a chain of stacks, first having resumed the next and so on to last. Saves the
 * caller as first's resumer and runs last.
 *   in       rdi last, rsi first (the same for one stack), rdx arg
 *   out      rax what the stack passes on, rdx 0; or what its entry returned, rdx 1
 *   clobbers what a C call may; MXCSR and the x87 control word are kept
 *   stack    caller's: a saved frame; last's: its saved frame popped
 *   shadow   caller's: the pc and a token on it; last's: token in, its pc popped
 *   signs    nothing; slot, sp, token and generation are checked against the directory
 */
FUNC cfi_stack_resume
        RESUME  1
END cfi_stack_resume

/* cfi_stack_resume for code that never changes MXCSR and the x87 control word: they are neither saved nor loaded. Its saved frames are not
   those of the stub with them: a stack is switched by the one kind or by the other. */
FUNC cfi_stack_resume_without_fp_control
        RESUME  0
END cfi_stack_resume_without_fp_control

/*
 * {usize, u64} cfi_stack_suspend(Slot *last, Slot *first, usize arg)
 *
 * Suspends the stack that runs, last's, and with it the chain from first to it; goes to first's resumer, to which it passes arg.
 *   in       rdi last, rsi first, rdx arg; called on last's stack
 *   out      rax what the next resume passes, rdx 0
 *   clobbers what a C call may; MXCSR and the x87 control word are kept
 *   stack    last's: a saved frame; the resumer's: its saved frame popped
 *   shadow   last's: the pc and a token on it; the resumer's: token in, its pc popped
 *   signs    nothing; the resumer's generation is checked
 */
FUNC cfi_stack_suspend
        SUSPEND 1
END cfi_stack_suspend

/* cfi_stack_suspend for code that never changes MXCSR and the x87 control word. */
FUNC cfi_stack_suspend_without_fp_control
        SUSPEND 0
END cfi_stack_suspend_without_fp_control

/*
 * {usize, u64} cfi_stack_switch_to(Slot *from, Slot *to, usize arg)
 *
 * Symmetric: from, which runs, is suspended; to runs in its stead, for the same resumer.
 *   in       rdi from, rsi to (not the same), rdx arg; called on from's stack
 *   out      rax what the next resume of from passes, rdx 0
 *   clobbers what a C call may; MXCSR and the x87 control word are kept
 *   stack    from's: a saved frame; to's: its saved frame popped
 *   shadow   from's: the pc and a token on it; to's: token in, its pc popped
 *   signs    nothing; as resume, and the resumer's generation is checked before its context becomes to's
 */
FUNC cfi_stack_switch_to
        SAVE_FRAME 1
        .cfi_remember_state
        UNLESS_SHADOW 1f
        VERIFY_RESUMER %rdi
        mov     %r14, %r11
        mov     %r15, %r8
        BIND    %rsi
        VERIFY_OWN %rsi
        SAVE_CONTEXT %rdi, OWN
        mov     RESUMER + GENERATION(%rsi), %rax
        inc     %rax
        mov     %rax, RESUMER + GENERATION(%rsi)
        mov     %rax, F_GENERATION(%r11)
        mov     %r11, RESUMER + SP(%rsi)
        mov     %r8, RESUMER + CTX_TOKEN(%rsi)
        mov     F_MXCSR(%rsp), %r8d
        lea     F_RBP(%r11), %rax
        mov     %rax, -BASE_RECORD(%r9)
        movzwl  F_X87(%rsp), %r9d
        CHANGE_SHADOW
        mov     %r14, %rsp
        mov     %rdx, %r10
        lea     8(%r15), %rax
        cmp     %r13, %rax
        je      4f
        POP_SHADOW_PC
        mov     %r10, %rax
        LOAD_FRAME 1
        TO_SHADOW_PC
        .cfi_restore_state
        .cfi_remember_state
4:      mov     %r10, %rax
        LOAD_FRAME 1
        add     $8, %rsp
        .cfi_def_cfa_offset 0
        jmp     .Lfirst
        .cfi_restore_state
1:      mov     RESUMER + SP(%rdi), %rcx
        mov     %rcx, RESUMER + SP(%rsi)
        mov     TOP(%rsi), %rax
        lea     F_RBP(%rcx), %rcx
        mov     %rcx, -BASE_RECORD(%rax)
        mov     %rsp, OWN + SP(%rdi)
        mov     %rdx, %rax
        mov     OWN + SP(%rsi), %rsp
        LOAD_FRAME 1
        TO_SAVED_PC
        .cfi_endproc
END cfi_stack_switch_to

/*
 * {usize, u64} cfi_stack_throw(Slot *last, Slot *first, usize arg, usize (*f)(usize))
 *
 * Resumes a suspended stack, or a chain, by calling f(arg) on it, as if what suspended it had called f instead. f may return (then
 * what suspended it returns f's value) or unwind.
 *   in       rdi last, rsi first, rdx arg, rcx f; last has run before
 *   out      as resume
 *   stack    as resume; the saved pc stays, as f's return address
 *   shadow   as resume; the pc stays
 *   signs    nothing; as resume
 */
FUNC cfi_stack_throw
        SAVE_FRAME 1
        .cfi_remember_state
        mov     %rcx, %r11
        UNLESS_SHADOW 1f
        mov     %rcx, %r8
        cmp     %rdi, %rsi
        je      2f
        BIND    %rsi
        mov     %r9, %r11
        BIND    %rdi
        jmp     3f
2:      BIND    %rdi
        mov     %r9, %r11
3:      VERIFY_OWN %rdi
        lea     8(%r15), %rax
        cmp     %r13, %rax
        je      .Lunbound               /* it never ran: there is nothing to return to */
        SAVE_CONTEXT %rsi, RESUMER
        lea     F_RBP(%rsp), %rax
        mov     %rax, -BASE_RECORD(%r11)
        mov     %r8, %r11
        mov     F_MXCSR(%rsp), %r8d
        movzwl  F_X87(%rsp), %r9d
        CHANGE_SHADOW
        mov     %r14, %rsp
        rdsspq  %rax
        mov     (%rax), %rcx
        mov     %rcx, F_PC(%rsp)        /* f returns to what the shadow stack says */
        mov     %rdx, %rdi
        LOAD_FRAME 1
        jmp     *%r11
        .cfi_restore_state
1:      mov     TOP(%rsi), %rax
        lea     F_RBP(%rsp), %rcx
        mov     %rcx, -BASE_RECORD(%rax)
        mov     %rsp, RESUMER + SP(%rsi)
        mov     OWN + SP(%rdi), %rsp
        mov     %rdx, %rdi
        LOAD_FRAME 1
        jmp     *%r11
        .cfi_endproc
END cfi_stack_throw

/*
 * void cfi_stack_cancel(Slot *slot)
 *
 * Drops the frames of a suspended or not started stack; nothing of them runs.
 *   in       rdi slot
 *   clobbers what a C call may
 *   stack    caller's: a saved frame, popped again; the slot's: not touched
 *   shadow   the slot's is entered, popped to its end and left with its token on top; the caller's: token out and in
 *   signs    nothing; as resume
 */
FUNC cfi_stack_cancel
        SAVE_FRAME 1
        .cfi_remember_state
        UNLESS_SHADOW 1f
        BIND    %rdi
        VERIFY_OWN %rdi
        lea     8(%r15), %rax
        cmp     %r13, %rax
        je      1f                      /* empty */
        rdsspq  %r11
        sub     $8, %r11                /* where the caller's token will be */
        CHANGE_SHADOW
        rdsspq  %rax
        mov     %r13, %rcx
        sub     %rax, %rcx
        shr     $3, %rcx                /* entries to pop: at least the pc */
        mov     $255, %eax              /* the most that one incsspq pops */
2:      cmp     %rax, %rcx
        jbe     3f
        incsspq %rax
        sub     %rax, %rcx
        jmp     2b
3:      incsspq %rcx
        mov     %r11, %r15
        CHANGE_SHADOW
        lea     -8(%r13), %rax
        mov     %rax, OWN + CTX_TOKEN(%rdi)
1:      incq    OWN + GENERATION(%rdi)
        movq    $0, OWN + SP(%rdi)
        movzwl  F_X87(%rsp), %r9d
        LOAD_FRAME 1
        ret
        .cfi_restore_state
.Lunbound:                              /* the slot in question is rdi or rsi */
        and     $-16, %rsp
        .cfi_adjust_cfa_offset 8
        call    cfi_stack_unbound
        ud2
        .cfi_endproc
END cfi_stack_cancel

        ELF_NOTES
