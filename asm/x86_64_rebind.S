/* The stubs for x86-64 that compare what moves and fill records. Leaves all; nothing is signed on this ISA. */

#include "x86_64_managed.h"

/* struct Rebinding, src/abi.rs; nothing is signed here, so every form is 0 */
#define PLAN_SLOT       0
#define PLAN_PC         8
#define PLAN_SIZE       16

        .text

/*
 * Entry 0 or 1 of the two that a turn of the loop looks at. r8 the plan's end, rcx what is left of it in 8-byte words, negative;
 * rdx the span's lowest address, rsi its place in the destination, rdi how far above rdx a slot may be. The operand is
 * what must lie there. Clobbers r10, r11.
 */
        .macro COMPARE entry, operand:vararg
        mov     PLAN_SLOT + \entry * PLAN_SIZE(%r8, %rcx, 8), %r10
        sub     %rdx, %r10
        cmp     %rdi, %r10
        ja      .Lrebind_bounds_\entry
        mov     (%rsi, %r10), %r11
        cmp     \operand, %r11
        jne     .Lrebind_word_\entry
        .endm

/*
 * u64 cfi_stack_rebind(const Record *source, const Record *destination, usize low, const Rebinding *plan,
 *                      usize count, const u64 *shadow)
 *
 * Takes the planned return addresses over. Nothing is signed on this ISA, and the records are not sealed: each word in the
 * destination must be the shadow stack's own where shadow is not null, else the one that was planned with; else it stops. It
 * writes nothing, so a rewritten record or entry leads no store astray.
 *   in       rdi source, rsi destination, rdx lowest address of the span, rcx plan, r8 count, r9 shadow, or 0 where
 *            shadow stacks are off: the CPU is asked whether they are
 *   out      rax 0; or entries left * 2, plus 1 when the entry's place lies outside the span
 *   clobbers rcx r8 r9 r10 r11 rdx rsi rdi, flags
 *   stack    a leaf: nothing on either
 *   costs    8 instructions an entry
 */
FUNC cfi_stack_rebind
        .cfi_startproc
        endbr64
        test    %r9, %r9
        jnz     6f
        xor     %r11d, %r11d
        rdsspq  %r11
        test    %r11, %r11
        jnz     5f
6:      cmp     REC_BASE(%rdi), %rdx
        jb      5f
        mov     REC_TOP(%rdi), %rdi
        mov     REC_TOP(%rsi), %rax
        mov     REC_BASE(%rsi), %rsi
        sub     %rdi, %rax              /* delta */
        sub     %rax, %rsi              /* lowest slot that the destination can take */
        cmp     %rsi, %rdx
        jb      5f
        lea     (%rdx, %rax), %rsi      /* the span's place there */
        sub     $8, %rdi                /* highest slot */
        sub     %rdx, %rdi
        jb      5f
        mov     %r8, %r10
        shl     $4, %r8
        add     %rcx, %r8               /* the plan's end */
        lea     (%r10, %r10), %rcx
        neg     %rcx
        jz      4f
        test    %r9, %r9
        jz      2f
        lea     (%r9, %r10, 8), %r9     /* the shadow entries' end: one word for two of the plan */
        test    $2, %cl
        jz      1f
        sub     $2, %rcx
        jmp     .Lrebind_odd_shadow
1:      COMPARE 0, (%r9, %rcx, 4)
.Lrebind_odd_shadow:
        COMPARE 1, 8(%r9, %rcx, 4)
        add     $4, %rcx
        jnz     1b
        jmp     4f
2:      test    $2, %cl
        jz      3f
        sub     $2, %rcx
        jmp     .Lrebind_odd_plan
3:      COMPARE 0, PLAN_PC(%r8, %rcx, 8)
.Lrebind_odd_plan:
        COMPARE 1, PLAN_PC + PLAN_SIZE(%r8, %rcx, 8)
        add     $4, %rcx
        jnz     3b
4:      xor     %eax, %eax
        ret
5:      lea     1(%r8, %r8), %rax
        ret
.Lrebind_bounds_0:
        mov     %rcx, %rax
        neg     %rax
        inc     %rax
        ret
.Lrebind_bounds_1:
        mov     %rcx, %rax
        not     %rax
        ret
.Lrebind_word_0:
        mov     %rcx, %rax
        neg     %rax
        ret
.Lrebind_word_1:
        mov     $-2, %rax
        sub     %rcx, %rax
        ret
        .cfi_endproc
END cfi_stack_rebind

/*
 * void cfi_stack_seal(Record *record, usize base, usize top, u64 identity, u64 generation)
 *
 * Fills the record. There is no generic authentication on this ISA: the seal is 0.
 *   in       rdi rsi rdx rcx r8; clobbers nothing; a leaf
 */
FUNC cfi_stack_seal
        .cfi_startproc
        endbr64
        mov     %rsi, REC_BASE(%rdi)
        mov     %rdx, REC_TOP(%rdi)
        mov     %rcx, REC_IDENTITY(%rdi)
        mov     %r8, REC_GENERATION(%rdi)
        movq    $0, REC_SEAL(%rdi)
        ret
        .cfi_endproc
END cfi_stack_seal

/*
 * void cfi_stack_reseal(Record *record, u64 generation)
 *
 * Changes the generation of a record.
 *   in       rdi rsi; clobbers nothing; a leaf
 */
FUNC cfi_stack_reseal
        .cfi_startproc
        endbr64
        mov     %rsi, REC_GENERATION(%rdi)
        ret
        .cfi_endproc
END cfi_stack_reseal

        ELF_NOTES
