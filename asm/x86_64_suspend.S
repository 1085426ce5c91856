/*
 * The stubs for x86-64 by which managed code suspends its whole stack and native code continues it: suspend, resume, discard; and the
 * word that says where managed code waits, when its frames move.
 *
 * A suspended stack holds managed frames alone, from suspend's record to record.top. Its shadow stack has its token on top. control keeps
 * where the record lies and the callee-saved registers; the oldest frame's saved rbp still names the entry frame that is gone, until
 * resume makes another, on this thread or on another one.
 */

#include "x86_64_managed.h"

        .hidden cfi_stack_back_to_native
        .hidden cfi_stack_unwind

        .text

/*
 * u64 suspend(Activation *act, u64 value)
 *
 * The stack's only entry returns value to native code; the next resume's value comes back here.
 *   in       rdi act, rsi value; called by managed code
 *   out      rax; clobbers what a C call may
 *   stack    managed: a frame record, 16 bytes with the return address, stays; native: back in enter's frame
 *   shadow   managed: a token on top stays; native: as enter found it
 *   signs    nothing
 *   fails    by the way of leave when entries are nested: the innermost enter returns, the outcome says why
 */
FUNC cfi_stack_suspend_managed
        .cfi_startproc
        .cfi_signal_frame
        endbr64
        FRAME_RECORD
        mov     ACT_CONTROL(%rdi), %r11
        cmpq    $0, NESTED(%r11)
        jne     1f
        mov     %rbx, SAVED(%r11)
        mov     %r12, (SAVED + 8)(%r11)
        mov     %r13, (SAVED + 16)(%r11)
        mov     %r14, (SAVED + 24)(%r11)
        mov     %r15, (SAVED + 32)(%r11)
        mov     %rbp, (SUSPENDED + LINK_RECORD)(%r11)
        movq    $OUTCOME_SUSPENDED, OUTCOME(%r11)
        .cfi_remember_state
        mov     %r11, %r12
        .cfi_undefined %r12
        mov     %rsi, %rax
        TO_ENTRY_FRAME
        jmp     cfi_stack_back_to_native
        .cfi_restore_state
1:      mov     %r11, %r12
        .cfi_undefined %r12
        movq    $OUTCOME_NESTED, OUTCOME(%r12)
        xor     %eax, %eax
        TO_ENTRY_FRAME
        jmp     cfi_stack_unwind
        .cfi_endproc
END cfi_stack_suspend_managed

/*
 * u64 cfi_stack_resume_managed(Control *control, u64 value, const Record *oldest)
 *
 * Continues a suspended stack: its suspend returns value. Returns what enter would.
 *   in       rdi control (suspended), rsi value, rdx record of the segment that the oldest managed frame lies in
 *   out      rax; clobbers what a C call may
 *   stack    native: a frame like enter's, which takes that one's place: the oldest managed frame, which must have saved the address of the
 *            one that is gone, saves its address now; managed: from suspend's record
 *   shadow   native: a token on top while managed code runs; managed: token in
 *   signs    nothing; the return is checked by `ret` against the shadow stack
 *   traps    ud2 when the record cannot lie where control says, or the oldest frame did not save what enter left
 */
FUNC cfi_stack_resume_managed
        .cfi_startproc
        .cfi_signal_frame
        ENTRY_PROLOGUE
        mov     %rdi, %r11
        mov     %rsi, %rax
        lea     SUSPENDED(%r11), %r8
        LOAD_LINK r8, r11, r10, r9
        movq    $0, LINK_RECORD(%r8)
        mov     REC_TOP(%rdx), %r9
        mov     NATIVE_SP(%r11), %r8
        add     $ENTRY_FRAME, %r8
        cmp     %r8, -16(%r9)
        jne     1f
        mov     %rbp, -16(%r9)
        mov     %rsp, NATIVE_SP(%r11)
        SHADOW_SWITCH r11, NATIVE_TOKEN, TOKEN, r8, r9
        mov     SAVED(%r11), %rbx
        mov     (SAVED + 8)(%r11), %r12
        mov     (SAVED + 16)(%r11), %r13
        mov     (SAVED + 24)(%r11), %r14
        mov     (SAVED + 32)(%r11), %r15
        mov     %r10, %rbp              /* from here on the callers are managed code's */
        .cfi_remember_state
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
        .cfi_restore_state
1:      ud2
        .cfi_endproc
END cfi_stack_resume_managed

/*
 * void cfi_stack_discard(Control *control)
 *
 * Gives a suspended stack's shadow stack back: pops it to where it was at the entry.
 *   in       rdi control (suspended)
 *   stack    native: enter's frame for as long; managed: not touched
 *   shadow   managed: popped by incsspq as by leave, token left where enter found it; native: token in, token out
 *   signs    nothing
 */
FUNC cfi_stack_discard
        .cfi_startproc
        .cfi_signal_frame
        ENTRY_PROLOGUE
        mov     %rdi, %r12
        mov     %rsp, NATIVE_SP(%r12)
        SHADOW_SWITCH r12, NATIVE_TOKEN, TOKEN, r10, r11
        xor     %eax, %eax
        jmp     cfi_stack_unwind
        .cfi_endproc
END cfi_stack_discard

/*
 * usize cfi_stack_move_link(Link *link, Control *control, const Record *source, const Record *destination)
 *
 * Says where managed code waits after its frames have moved by the distance of the two tops.
 *   in       rdi link, rsi control, rdx source, rcx destination
 *   out      rax the new place, or 0: no place in the source and the destination, nothing was written
 *   clobbers r8 r9, flags; a leaf: nothing on either stack
 */
FUNC cfi_stack_move_link
        .cfi_startproc
        endbr64
        mov     LINK_RECORD(%rdi), %rax
        cmp     REC_BASE(%rdx), %rax
        jb      1f
        mov     REC_TOP(%rdx), %r8
        lea     -16(%r8), %r9
        cmp     %r9, %rax
        ja      1f
        sub     %r8, %rax
        add     REC_TOP(%rcx), %rax
        cmp     REC_BASE(%rcx), %rax
        jb      1f
        mov     %rax, LINK_RECORD(%rdi)
        ret
1:      xor     %eax, %eax
        ret
        .cfi_endproc
END cfi_stack_move_link

        ELF_NOTES
