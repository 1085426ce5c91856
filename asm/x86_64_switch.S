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

#include "x86_64.h"

/* struct Slot, src/abi.rs */
#define OWN             0
#define RESUMER         32
#define IDENTITY        64
#define TOP             80
#define SLOT_SHADOW_TOP 88
#define CHUNK           96
/* struct Context */
#define SP              0
#define CTX_TOKEN       16
#define GENERATION      24
/* the published page, src/published.rs */
#define PUBLISHED_DIRECTORY 16
#define PUBLISHED_CHUNKS    24
/* struct Chunk, src/directory.rs */
#define CHUNK_SLOTS     0
#define CHUNK_SLOTS_BYTES 8
#define CHUNK_DATA      16
#define CHUNK_DATA_SPAN 24
#define CHUNK_SHADOW    32
#define CHUNK_SHADOW_SPAN 40
#define CHUNK_SHIFTS    48
#define CHUNK_IDENTITY  56
#define MXCSR_STATUS    0x3f
/* a saved frame */
#define F_MXCSR         0
#define F_X87           4
#define F_GENERATION    8
#define F_R13           32
#define F_R12           40
#define F_RBX           48
#define F_RBP           56
#define F_PC            64
#define FRAME           72
/* below top: the link, and the pc that belongs to it */
#define BASE_RECORD     16

        .hidden cfi_stack_published
        .hidden cfi_stack_unbound

        .text

/* The registers of the caller onto its stack, as every saved frame has them. With \fp the control words in force are also in
   r8d and r9d. Without, an x87 control word of 0 says that there are none: bit 6 of a real one is always set (Intel SDM vol. 1,
   "x87 FPU Control Word": reserved, reads 1). */
        .macro SAVE_FRAME fp
        .cfi_startproc
        .cfi_signal_frame
        endbr64
        push    %rbp
        .cfi_def_cfa_offset 16
        .cfi_offset %rbp, -16
        push    %rbx
        .cfi_def_cfa_offset 24
        .cfi_offset %rbx, -24
        push    %r12
        .cfi_def_cfa_offset 32
        .cfi_offset %r12, -32
        push    %r13
        .cfi_def_cfa_offset 40
        .cfi_offset %r13, -40
        push    %r14
        .cfi_def_cfa_offset 48
        .cfi_offset %r14, -48
        push    %r15
        .cfi_def_cfa_offset 56
        .cfi_offset %r15, -56
        sub     $16, %rsp
        .cfi_def_cfa_offset FRAME
        .if \fp
        stmxcsr F_MXCSR(%rsp)
        fnstcw  F_X87(%rsp)
        mov     F_MXCSR(%rsp), %r8d
        movzwl  F_X87(%rsp), %r9d
        .else
        movw    $0, F_X87(%rsp)
        .endif
        .endm

/* The registers of the frame at rsp, except its pc, which is left at rsp. Loading a control word is slow and it seldom differs. Of MXCSR only
   the control bits are kept over a call (x86-64 psABI, "Registers"); its status flags differ often. With \fp = 2 the
   frame may have none. Clobbers r8 r9. */
        .macro LOAD_FRAME fp
        .if \fp
        .if \fp > 1
        cmpw    $0, F_X87(%rsp)
        je      .Lsame_x87\@
        .endif
        xor     F_MXCSR(%rsp), %r8d
        test    $~MXCSR_STATUS, %r8d
        jz      .Lsame_mxcsr\@
        ldmxcsr F_MXCSR(%rsp)
.Lsame_mxcsr\@:
        cmp     F_X87(%rsp), %r9w
        je      .Lsame_x87\@
        fldcw   F_X87(%rsp)
.Lsame_x87\@:
        .endif
        add     $16, %rsp
        .cfi_def_cfa_offset 56
        pop     %r15
        .cfi_def_cfa_offset 48
        .cfi_restore %r15
        pop     %r14
        .cfi_def_cfa_offset 40
        .cfi_restore %r14
        pop     %r13
        .cfi_def_cfa_offset 32
        .cfi_restore %r13
        pop     %r12
        .cfi_def_cfa_offset 24
        .cfi_restore %r12
        pop     %rbx
        .cfi_def_cfa_offset 16
        .cfi_restore %rbx
        pop     %rbp
        .cfi_def_cfa_offset 8
        .cfi_restore %rbp
        .endm

/* Branches to \plain where this thread has no shadow stack. A process that never had one is spared the question. Clobbers rax. */
        .macro UNLESS_SHADOW plain
        testb   $MODE_SHADOW, cfi_stack_published(%rip)
        jz      \plain
        xor     %eax, %eax
        rdsspq  %rax
        test    %rax, %rax
        jz      \plain
        .endm

/* What the directory says of \slot: \low lowest and \top end of its data area, \shadow lowest and \shadow_top end of its shadow area. A slot
   that is not in the directory, or that has another identity than its place: unbound. Clobbers rax rcx r10. rbp stays what profilers take
   it for. */
        .macro BIND slot, low=%rbx, top=%r9, shadow=%r12, shadow_top=%r13
        mov     CHUNK(\slot), %eax
        cmp     cfi_stack_published + PUBLISHED_CHUNKS(%rip), %rax
        jae     .Lunbound
        shl     $6, %rax
        add     cfi_stack_published + PUBLISHED_DIRECTORY(%rip), %rax
        mov     \slot, %r10
        sub     CHUNK_SLOTS(%rax), %r10
        cmp     CHUNK_SLOTS_BYTES(%rax), %r10
        jae     .Lunbound
        test    $127, %r10b
        jnz     .Lunbound
        shr     $7, %r10
        movzwl  CHUNK_SHIFTS(%rax), %ecx
        mov     %r10, \low
        shl     %cl, \low
        add     CHUNK_DATA(%rax), \low
        mov     CHUNK_DATA_SPAN(%rax), \top
        add     \low, \top
        mov     %ch, %cl
        mov     %r10, \shadow
        shl     %cl, \shadow
        add     CHUNK_SHADOW(%rax), \shadow
        mov     CHUNK_SHADOW_SPAN(%rax), \shadow_top
        add     \shadow, \shadow_top
        add     CHUNK_IDENTITY(%rax), %r10
        cmp     IDENTITY(\slot), %r10
        jne     .Lunbound
        .endm

/* r14 and r15: sp and token of \slot's own context, which must lie in its areas, with the frame and the generation that was
   counted with it. After BIND. Clobbers rax. */
        .macro VERIFY_OWN slot
        mov     OWN + SP(\slot), %r14
        mov     OWN + CTX_TOKEN(\slot), %r15
        cmp     %rbx, %r14
        jb      .Lunbound
        lea     FRAME + BASE_RECORD(%r14), %rax
        cmp     %r9, %rax
        ja      .Lunbound
        cmp     %r12, %r15
        jb      .Lunbound
        lea     8(%r15), %rax
        cmp     %r13, %rax
        ja      .Lunbound
        mov     F_GENERATION(%r14), %rax
        cmp     OWN + GENERATION(\slot), %rax
        jne     .Lunbound
        .endm

/* The same for \slot's resumer, of which no directory knows: what its frame says must be what was counted. */
        .macro VERIFY_RESUMER slot
        mov     RESUMER + SP(\slot), %r14
        mov     RESUMER + CTX_TOKEN(\slot), %r15
        mov     F_GENERATION(%r14), %rax
        cmp     RESUMER + GENERATION(\slot), %rax
        jne     .Lunbound
        .endm

/* Saves the caller, whose frame lies at rsp, in \context of \slot. Clobbers rax. */
        .macro SAVE_CONTEXT slot, context
        mov     \context + GENERATION(\slot), %rax
        inc     %rax
        mov     %rax, \context + GENERATION(\slot)
        mov     %rax, F_GENERATION(%rsp)
        rdsspq  %rax
        sub     $8, %rax                /* where saveprevssp will leave the token */
        mov     %rax, \context + CTX_TOKEN(\slot)
        mov     %rsp, \context + SP(\slot)
        .endm

/* To the shadow stack whose token lies at r15; the one that is left gets its token. */
        .macro CHANGE_SHADOW
        rstorssp (%r15)
        saveprevssp
        .endm

/* rcx: the pc that the shadow stack has, popped from it. Clobbers rax. */
        .macro POP_SHADOW_PC
        rdsspq  %rax
        mov     (%rax), %rcx
        mov     $1, %eax
        incsspq %rax
        .endm

/* Ends a stub: what is passed in rax, its kind in edx (0: passed by a switch). */
        .macro TO_SAVED_PC
        pop     %rcx
        .cfi_def_cfa_offset 0
        .cfi_register %rip, %rcx
        xor     %edx, %edx
        jmp     *%rcx
        .endm
        .macro TO_SHADOW_PC
        add     $8, %rsp
        .cfi_def_cfa_offset 0
        .cfi_register %rip, %rcx
        xor     %edx, %edx
        jmp     *%rcx
        .endm

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
