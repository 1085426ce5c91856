/* What the switch stubs of this ISA share: how a context is saved, sealed, believed and left. The drawing is in x86_64_switch.S. */

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
