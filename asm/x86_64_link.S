/*
 * The stubs for x86-64 that call across segments of one stack, and fill the second part of their records.
 *
 * A further segment is entered by a call and left by the return of that call. So both stacks stay balanced: the shadow stack gets one more
 * return address, which is popped by the return that belongs to it. The frame chain runs across: the callee's oldest frame saves link's rbp.
 *
 *      segment                                     the next one
 *      | stack arguments  |  16(thunk's rbp)       +-------------------+ record.top
 *      | return address   |                        | area: arguments,  | copied; results come back in it
 *      | rbp              |  the thunk's frame     +-------------------+ CFA of the callee
 *      | ...              |                        | link_return       | pushed by link's call
 *      | return to thunk  |                        | rbp of link       | frame record of the oldest managed frame
 *  rbp | rbp of the thunk | <--------------------- | ...               |
 *      | control, call    |                        +-------------------+
 *      +------------------+
 *
 * Where the shadow stack runs short the next segment comes with a shadow segment of its own (src/shadow.rs), which the call changes to, and
 * which its return leaves. rstorssp writes where it came from over the token; what saveprevssp does behind it elsewhere is left to the
 * return. So no token stands on the shadow segment that waits, and the way back lies where nobody writes.
 *
 *      shadow segment                              the next one
 *      | ...              |                        +-------------------+ end of the mapping
 *      | return to thunk  | <--------------------- | previous SSP + 3  | record.shadow: the token while nothing runs here
 *      +------------------+ SSP at link's call     +-------------------+ SSP at the call
 *                                                  | link_return       |
 *                                                  | ...               |
 */

#include "x86_64_managed.h"
#include "link.h"

/* From link's rbp. */
#define LINK_STACK      -8              /* control: the activation can be another one when the call returns */
#define LINK_CALL       -16
#define LINK_RAX        -24
#define LINK_RCX        -32
#define LINK_RDX        -40
#define LINK_FRAME      48

        .hidden cfi_stack_grow
        .hidden cfi_stack_unlinked      /* Rust's */

        .text

/*
 * link: calls call->callee on the next segment of the stack that runs.
 *
 * Called by a thunk that was called as the callee is: with the same arguments, its own frame record at rbp. What the callee finds
 * on the stack are the call->arguments bytes from 16(%rbp) on; what it has left in the first call->results bytes of
 * its own argument area is found there afterwards.
 *   in       r10 act, r11 call (read-only memory); rsp 16-byte aligned before the call; all argument registers the callee's
 *   out      what the callee returns, in whichever registers
 *   clobbers r10, r11, flags; before the callee runs nothing else, after it nothing else
 *   stack    this segment: a frame record and 48 bytes; the next one: from its top, less call->area
 *   shadow   balanced. Into a segment with a shadow segment: left with a previous-SSP word at the bottom of that, no token on the one that
 *            waits; on return saveprevssp makes that token, rstorssp uses it up, and saveprevssp puts the further one's where it was
 *   signs    nothing
 *   checks   rsp lies in the segment that control names, and the next one is that segment's; on return that this frame is the one that the next
 *            segment was entered from and lies in the segment before. What the return goes by is the shadow stack
 *   traps    rstorssp where record.shadow names no token; saveprevssp where the call has not changed; the return where it did not change back
 *   fails    without a next segment of call->total bytes: grow, whose Rust part maps one or leaves; on return: the process ends
 */
FUNC cfi_stack_link
        .cfi_startproc
        .cfi_signal_frame
        endbr64
        FRAME_RECORD
        sub     $LINK_FRAME, %rsp
        mov     ACT_CONTROL(%r10), %r10
        mov     %r11, LINK_CALL(%rbp)
        mov     %r10, LINK_STACK(%rbp)
        mov     %rax, LINK_RAX(%rbp)
        mov     %rcx, LINK_RCX(%rbp)
        mov     %rdx, LINK_RDX(%rbp)
.Llink_again:                           /* r10 control, r11 call */
        mov     %r10, %rax
        mov     SEGMENT(%rax), %rcx     /* where this frame lies … */
        cmp     REC_BASE(%rcx), %rsp
        jb      .Llink_cold
        cmp     REC_TOP(%rcx), %rbp
        jae     .Llink_cold
        mov     REC_NEXT(%rcx), %r10    /* … and what comes behind it */
        test    %r10, %r10
        jz      .Llink_cold
        cmp     %rcx, REC_PREVIOUS(%r10)
        jne     .Llink_cold
        mov     CALL_TOTAL(%r11), %edx
        cmp     %rdx, REC_ROOM(%r10)
        jb      .Llink_cold
        mov     CALL_AREA(%r11), %edx
        test    %edx, %edx
        jnz     .Llink_arguments
.Llink_enter:                           /* rax control, rcx and r10 the two records, rdx the area, r11 call */
        mov     %rbp, REC_LINK_RECORD(%r10)
        mov     %rdx, REC_AREA(%r10)    /* REC_SHADOWED, too */
        cmpq    $0, REC_SHADOW(%r10)
        jne     .Llink_shadow
.Llink_on:
        mov     %r10, SEGMENT(%rax)
        mov     REC_TOP(%r10), %rsp
        sub     %rdx, %rsp
        mov     ACTIVATION(%rax), %rax
        mov     ACT_LIMIT(%rax), %rdx
        mov     %rdx, REC_LIMIT(%rcx)
        mov     REC_LIMIT(%r10), %rdx
        mov     %rdx, ACT_LIMIT(%rax)
        mov     LINK_RAX(%rbp), %rax
        mov     LINK_RCX(%rbp), %rcx
        mov     LINK_RDX(%rbp), %rdx
        call    *CALL_CALLEE(%r11)
        .globl  cfi_stack_link_return
        .hidden cfi_stack_link_return
cfi_stack_link_return:
        mov     LINK_STACK(%rbp), %r10
        mov     SEGMENT(%r10), %r10     /* the segment that was left */
        cmp     %rbp, REC_LINK_RECORD(%r10)
        jne     .Llink_lifted
.Llink_back:
        mov     REC_PREVIOUS(%r10), %r11
        cmp     REC_BASE(%r11), %rbp
        jb      .Llink_broken
        cmp     REC_TOP(%r11), %rbp
        jae     .Llink_broken
        cmpq    $0, REC_AREA(%r10)      /* REC_SHADOWED, too */
        jne     .Llink_results
.Llink_leave:                           /* r11 the record of this frame's segment */
        mov     LINK_STACK(%rbp), %r10
        mov     %r11, SEGMENT(%r10)
        mov     REC_LIMIT(%r11), %r11
        mov     ACTIVATION(%r10), %r10
        mov     %r11, ACT_LIMIT(%r10)
        mov     %rbp, %rsp
        pop     %rbp
        .cfi_remember_state
        .cfi_def_cfa %rsp, 8
        .cfi_restore %rbp
        ret
        .cfi_restore_state

.Llink_arguments:                       /* rdx the area: it must lie in this segment; then the next one's copy is made */
        push    %r10
        mov     (%rbp), %r10
        cmp     %rbp, %r10
        jbe     .Llink_outside
        lea     16(%r10, %rdx), %r10
        cmp     REC_TOP(%rcx), %r10
        ja      .Llink_outside
        pop     %r10
        push    %rax
        push    %rcx
        push    %rdx
        push    %rsi
        mov     REC_TOP(%r10), %rcx
        sub     %rdx, %rcx
        mov     (%rbp), %rsi
        mov     CALL_ARGUMENTS(%r11), %edx
1:      sub     $8, %rdx
        jb      2f
        mov     16(%rsi, %rdx), %rax
        mov     %rax, (%rcx, %rdx)
        jmp     1b
2:      pop     %rsi
        pop     %rdx
        pop     %rcx
        pop     %rax
        jmp     .Llink_enter

.Llink_shadow:                          /* r10 the record of a segment with a shadow segment; it keeps all registers */
        push    %rdx
        mov     REC_SHADOW(%r10), %rdx
        movl    $1, REC_SHADOWED(%r10)
        rstorssp (%rdx)
        pop     %rdx
        jmp     .Llink_on

.Llink_results:                         /* r10 the record of the segment that was left, r11 that of this frame's */
        mov     REC_TOP(%r10), %rsp
        cmpl    $0, REC_SHADOWED(%r10)
        mov     REC_AREA(%r10), %r10d
        jne     .Llink_shadow_back
.Llink_copy:                            /* r10 the area, which lies below rsp */
        sub     %r10, %rsp
        push    %rax
        push    %rcx
        push    %rdx
        mov     LINK_CALL(%rbp), %rax
        mov     CALL_RESULTS(%rax), %ecx
        mov     (%rbp), %rdx
1:      sub     $8, %rcx
        jb      2f
        mov     24(%rsp, %rcx), %rax
        mov     %rax, 16(%rdx, %rcx)
        jmp     1b
2:      pop     %rdx
        pop     %rcx
        pop     %rax
        jmp     .Llink_leave

.Llink_shadow_back:
        sub     %r10, %rsp
        push    %rax
        SHADOW_BACK rax
        pop     %rax
        add     %r10, %rsp
        jmp     .Llink_copy

.Llink_lifted:                          /* frames were lifted and have returned: the segment that control names is a younger one */
        mov     REC_PREVIOUS(%r10), %r10
        test    %r10, %r10
        jz      .Llink_broken
        cmp     %rbp, REC_LINK_RECORD(%r10)
        jne     .Llink_lifted
        jmp     .Llink_back

.Llink_outside:
        pop     %r10
.Llink_cold:                            /* all that matters lies in the frame */
        mov     LINK_STACK(%rbp), %r10
        mov     ACTIVATION(%r10), %r10
        mov     %r11, ACT_LINK(%r10)
        mov     LINK_RAX(%rbp), %rax
        mov     LINK_RCX(%rbp), %rcx
        mov     LINK_RDX(%rbp), %rdx
        push    %rdi
        push    %rsi
        mov     %r10, %rdi
        xor     %esi, %esi
        call    cfi_stack_grow          /* the next segment is there when it returns; it keeps all registers */
        pop     %rsi
        pop     %rdi
        mov     LINK_STACK(%rbp), %r10
        jmp     .Llink_again

.Llink_broken:
        and     $-16, %rsp
        mov     %rbp, %rdi
        call    cfi_stack_unlinked
        ud2
        .cfi_endproc
END cfi_stack_link

/*
 * void cfi_stack_link_idle(Record *record, const Record *previous)
 *
 * Says that record's segment comes behind previous' and that nothing runs on it.
 *   in       rdi rsi; clobbers nothing; a leaf
 */
FUNC cfi_stack_link_idle
        .cfi_startproc
        endbr64
        mov     %rsi, REC_PREVIOUS(%rdi)
        movq    $0, REC_LINK_RECORD(%rdi)
        movq    $0, REC_LINK_SEAL(%rdi)
        ret
        .cfi_endproc
END cfi_stack_link_idle

/*
 * void cfi_stack_link_lifted(Record *record, const Record *previous, usize fp)
 *
 * Says that record's segment comes behind previous' and that its oldest frame returns to the frame at fp there, by itself.
 *   in       rdi rsi rdx; clobbers rdx, flags; a leaf
 */
FUNC cfi_stack_link_lifted
        .cfi_startproc
        endbr64
        or      $1, %rdx                /* no frame of link's lies there */
        mov     %rsi, REC_PREVIOUS(%rdi)
        mov     %rdx, REC_LINK_RECORD(%rdi)
        movq    $0, REC_LINK_SEAL(%rdi)
        ret
        .cfi_endproc
END cfi_stack_link_lifted

/*
 * void cfi_stack_link_moved(Record *record, const Record *source)
 *
 * Says of record's segment what source says of the one that its frames were moved from.
 *   in       rdi rsi; clobbers rdx; a leaf
 */
FUNC cfi_stack_link_moved
        .cfi_startproc
        endbr64
        mov     REC_PREVIOUS(%rsi), %rdx
        mov     %rdx, REC_PREVIOUS(%rdi)
        mov     REC_LINK_RECORD(%rsi), %rdx
        mov     %rdx, REC_LINK_RECORD(%rdi)
        movq    $0, REC_LINK_SEAL(%rdi)
        mov     REC_SHADOW(%rsi), %rdx
        mov     %rdx, REC_SHADOW(%rdi)
        movq    $0, REC_SHADOW_SEAL(%rdi)
        ret
        .cfi_endproc
END cfi_stack_link_moved

/*
 * void cfi_stack_link_shadow(Record *record, usize token)
 *
 * Says that calls into record's segment begin on the shadow segment whose token lies at token.
 *   in       rdi rsi; clobbers nothing; a leaf
 */
FUNC cfi_stack_link_shadow
        .cfi_startproc
        endbr64
        mov     %rsi, REC_SHADOW(%rdi)
        movq    $0, REC_SHADOW_SEAL(%rdi)
        ret
        .cfi_endproc
END cfi_stack_link_shadow

/*
 * void cfi_stack_link_part(Record *part, const Record *whole, usize top)
 *
 * Fills the record of the lower part of whole's segment, from its base to top.
 *   in       rdi rsi rdx; clobbers rax, flags; a leaf
 *   traps    ud2 where top is not in the segment
 */
FUNC cfi_stack_link_part
        .cfi_startproc
        endbr64
        mov     REC_BASE(%rsi), %rax
        cmp     %rax, %rdx
        jbe     1f
        cmp     REC_TOP(%rsi), %rdx
        ja      1f
        mov     %rax, REC_BASE(%rdi)
        mov     %rdx, REC_TOP(%rdi)
        mov     REC_IDENTITY(%rsi), %rax
        mov     %rax, REC_IDENTITY(%rdi)
        mov     REC_GENERATION(%rsi), %rax
        mov     %rax, REC_GENERATION(%rdi)
        movq    $0, REC_SEAL(%rdi)
        ret
1:      ud2
        .cfi_endproc
END cfi_stack_link_part

        ELF_NOTES
