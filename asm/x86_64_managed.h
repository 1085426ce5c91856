/* What the stubs of managed stacks share on this ISA: the blocks that src/abi.rs declares, and the change of shadow stacks. */

#include "x86_64.h"

/* struct Control, src/abi.rs */
#define NATIVE_SP       0
#define NATIVE_TOKEN    8
#define TOKEN           16
#define SEGMENT         32
#define SHADOW_LEVEL    40
#define GENERATION      56
#define OUTCOME         64
#define LINK            72
#define NESTED          80
#define ACTIVATION      88
#define SUSPENDED       96              /* a struct Link */
#define SAVED           128
/* struct Link, src/abi.rs */
#define LINK_RECORD     0
#define LINK_PC         8
#define LINK_CONTROL    16
#define LINK_SEAL       24
#define LINK_SIZE       32
/* struct Activation, src/abi.rs */
#define ACT_CONTROL     8
#define ACT_SCRATCH     16
/* struct Record, src/abi.rs */
#define REC_BASE        0
#define REC_TOP         8
#define REC_IDENTITY    16
#define REC_GENERATION  24
#define REC_SEAL        32
#define REC_PREVIOUS    40
#define REC_SHADOW      104
/* enter's frame, from its rbp */
#define ENTRY_FRAME     48
/* src/stack.rs */
#define OUTCOME_LEFT            1
#define OUTCOME_SUSPENDED       3
#define OUTCOME_NESTED          4

/* The stub's own frame record on the stack that runs, and its CFI. */
        .macro FRAME_RECORD
        push    %rbp
        .cfi_def_cfa_offset 16
        .cfi_offset %rbp, -16
        mov     %rsp, %rbp
        .cfi_def_cfa_register %rbp
        .endm

/* Changes the shadow stack from the one whose token will lie in \from(%\ctrl) to the one whose token lies in
   \to(%\ctrl). Nothing where shadow stacks are off. Clobbers \a, \b and flags. */
        .macro SHADOW_SWITCH ctrl, from, to, a, b
        xor     %\a, %\a
        rdsspq  %\a
        test    %\a, %\a
        jz      .Lshadow_off\@
        sub     $8, %\a                 /* where saveprevssp will leave the token */
        mov     %\a, \from(%\ctrl)
        mov     \to(%\ctrl), %\b
        rstorssp (%\b)
        saveprevssp
.Lshadow_off\@:
        .endm

/* From a further shadow segment, with nothing on it, back to the one that its bottom names: the previous-SSP word is used up, the token that it
   makes there too, and the further one has its own again. Faults where SSP is not at such a word. Clobbers \a and flags. */
        .macro SHADOW_BACK a
        xor     %\a, %\a
        rdsspq  %\a
        mov     (%\a), %\a              /* previous SSP + 3 */
        sub     $11, %\a                /* where saveprevssp will leave the token; CF is clear unless the word is no address */
        saveprevssp
        rstorssp (%\a)
        saveprevssp
        .endm

/* Pops \bytes of the shadow stack. Clobbers it, \a and flags. */
        .macro POP_SHADOW bytes, a
        shr     $3, %\bytes             /* entries */
        mov     $255, %\a               /* the most that one incsspq pops */
.Lpop\@:
        cmp     %\a, %\bytes
        jb      .Llast\@
        incsspq %\a
        sub     %\a, %\bytes
        jmp     .Lpop\@
.Llast\@:
        test    %\bytes, %\bytes
        jz      .Lpopped\@               /* incsspq reads the top entry even when it pops none */
        incsspq %\bytes
.Lpopped\@:
        .endm

/* The frame of enter, resume and discard, and its CFI: rbp, then rbx, r12-r15 and control, which comes in rdi. */
        .macro ENTRY_PROLOGUE
        endbr64
        FRAME_RECORD
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
        .endm

/* To the innermost entry's frame: rsp and rbp. In: r12 control, whose register may hold anything of the caller's. Clobbers r11. */
        .macro TO_ENTRY_FRAME
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

/* From managed code to the native stack: rsp and rbp at a new link record, which says where managed code waits. In: rbp the stub's
   frame record, \ctrl control, \back a label behind the call. From the last instruction on the CFA follows from the link record: a
   move of the frames changes it there. Clobbers \a. */
        .macro LINK_TO_NATIVE ctrl, back, a
        mov     NATIVE_SP(%\ctrl), %rsp
        push    $0
        push    %\ctrl
        lea     \back(%rip), %\a
        push    %\a
        push    %rbp
        mov     %rsp, LINK(%\ctrl)
        mov     %rsp, %rbp
        CFA_BY_LINK
        .endm

/* CFA = *rbp + 16: DW_OP_breg6 0, DW_OP_deref, DW_OP_plus_uconst 16. */
        .macro CFA_BY_LINK
        .cfi_escape 0x0f, 5, 0x76, 0, 0x06, 0x23, 16
        .endm

/* Loads where managed code waits into \rec and stops unless a frame record can lie there in the present segment or one before: lifted
   frames return without a word to control. In: \link address of the link record, \ctrl control. Clobbers \a, flags. */
        .macro LOAD_LINK link, ctrl, rec, a
        mov     LINK_RECORD(%\link), %\rec
        test    $15, %\rec
        jnz     .Lno_link\@
        mov     SEGMENT(%\ctrl), %\a
.Llook\@:
        cmp     REC_BASE(%\a), %\rec
        jb      .Llook_before\@
        cmp     REC_TOP(%\a), %\rec
        jb      .Llinked\@
.Llook_before\@:
        mov     REC_PREVIOUS(%\a), %\a
        test    %\a, %\a
        jnz     .Llook\@
.Lno_link\@:
        ud2
.Llinked\@:
        .endm

        .hidden cfi_stack_no_unwind     /* Rust's: ends the process */

/* Behind .cfi_startproc: no unwinder passes this frame, backtraces do. */
        .macro NO_UNWIND
        .cfi_personality 0x1b, cfi_stack_no_unwind      /* pc-relative, 4 bytes */
        .endm
