/* The stub for x86-64 that moves pages. */

#include "x86_64_managed.h"

#ifdef __linux__
#define SYS_MREMAP      25
/* MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP */
#define MOVE_PAGES      7

        .hidden cfi_stack_published     /* Rust's */

        .text

/*
 * usize cfi_stack_remap(const Record *source, const Record *destination, usize low, usize granule)
 *
 * Moves the pages from low, rounded down to the granule, to the source's top into the destination, to the same distance from its
 * top. The source stays mapped, without pages. Addresses come from the records, once, and stay in registers. Records are not
 * sealed on this ISA, and a rewritten one would put other pages in the place of read-only ones: with shadow stacks, where something
 * is defended, nothing is moved so.
 *   in       rdi source, rsi destination, rdx lowest address of the span, rcx granule: a power of two, at least a page
 *   out      rax 0; else nothing was moved: there are shadow stacks, the range leaves a segment, or the kernel refused
 *   clobbers rcx rdx rsi rdi r8-r11, flags
 *   stack    a leaf: nothing on either
 */
FUNC cfi_stack_remap
        .cfi_startproc
        endbr64
        testb   $MODE_SHADOW, cfi_stack_published(%rip)
        jnz     1f
        neg     %rcx
        and     %rcx, %rdx
        cmp     REC_BASE(%rdi), %rdx
        jb      1f
        mov     REC_TOP(%rdi), %r9
        mov     REC_TOP(%rsi), %r8
        sub     %r9, %r8                /* delta */
        sub     %rdx, %r9               /* bytes */
        jbe     1f
        add     %rdx, %r8
        cmp     REC_BASE(%rsi), %r8
        jb      1f
        mov     %rdx, %rdi
        mov     %r9, %rsi
        mov     %r9, %rdx
        mov     $MOVE_PAGES, %r10d
        mov     $SYS_MREMAP, %eax
        syscall
        sub     %r8, %rax               /* the new address */
        ret
1:      mov     $1, %eax
        ret
        .cfi_endproc
END cfi_stack_remap
#endif

        ELF_NOTES
