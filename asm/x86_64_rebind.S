/* The stubs for x86-64 that compare what moves and fill records. Leaves all; nothing is signed on this ISA. */

#include "x86_64_managed.h"

/* struct Rebinding, src/abi.rs */
#define PLAN_SLOT       0
#define PLAN_PC         8
#define PLAN_SIZE       24

        .text

/*
 * u64 cfi_stack_rebind(const Record *source, const Record *destination, usize low, const Rebinding *plan,
 *                      usize count, const u64 *shadow)
 *
 * Takes the planned return addresses over. Nothing is signed on this ISA, and the records are not sealed: each word must be
 * the one that was planned with and, where shadow is not null, the shadow stack's own, and must lie in the
 * destination already; else it stops. It writes nothing, so a rewritten record leads no store astray.
 *   in       rdi source, rsi destination, rdx lowest address of the span, rcx plan, r8 count, r9 shadow, or 0 where
 *            shadow stacks are off: the CPU is asked whether they are
 *   out      rax 0; or entries left * 2, plus 1 when the entry's place lies outside the span
 *   clobbers rcx r8 r9 r10 r11 rdx rsi rdi, flags
 *   stack    a leaf: nothing on either
 */
FUNC cfi_stack_rebind
        .cfi_startproc
        endbr64
        test    %r9, %r9
        jnz     6f
        xor     %r11d, %r11d
        rdsspq  %r11
        test    %r11, %r11
        jnz     3f
6:      cmp     REC_BASE(%rdi), %rdx
        jb      3f
        mov     REC_TOP(%rdi), %rdi
        mov     REC_TOP(%rsi), %rax
        mov     REC_BASE(%rsi), %rsi
        sub     %rdi, %rax              /* delta */
        sub     $8, %rdi                /* highest slot */
        sub     %rax, %rsi              /* lowest slot that the destination can take */
        cmp     %rsi, %rdx
        jb      3f
        test    %r8, %r8
        jz      2f
1:      mov     PLAN_SLOT(%rcx), %r10
        cmp     %rdx, %r10
        jb      3f
        cmp     %rdi, %r10
        ja      3f
        mov     (%r10), %r11
        cmp     PLAN_PC(%rcx), %r11
        jne     4f
        test    %r9, %r9
        jz      5f
        cmp     (%r9), %r11
        jne     4f
        add     $8, %r9
5:      cmp     (%r10, %rax), %r11
        jne     4f
        add     $PLAN_SIZE, %rcx
        dec     %r8
        jnz     1b
2:      xor     %eax, %eax
        ret
3:      lea     1(%r8, %r8), %rax
        ret
4:      lea     (%r8, %r8), %rax
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
