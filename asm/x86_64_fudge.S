/*
 * How much stack native code takes that is called on the stack that runs, on x86-64: by paint.
 *
 *      | caller              |
 *      | return address      |
 *      | saved registers     | <- sp: what is measured begins here
 *      | return address of f | \
 *      | frames of f         |  } used, in bytes; 8 of them are the call's own
 *      | lowest word touched | /
 *      | paint               |
 *      +---------------------+ <- low: sp less the bytes asked for, or the segment's base
 *
 * The paint of a word is its own address with bits of the upper half flipped, so that neither a pointer nor a word that was painted
 * elsewhere and copied passes for it. It is the same in every call: what an earlier call painted and nobody touched is not painted
 * again, and calls within calls see each other's marks. The call that paints over the lowest mark puts a mark back there.
 *
 * Nothing at or above sp is written but the stub's own frame. A caller has no red zone below its sp at a call (System V ABI x86-64,
 * 3.2.2: the 128 bytes are for leaf functions alone), and what f keeps in its own counts as touched.
 */

#include "x86_64_managed.h"

/* struct Settings, src/fudge.rs */
#define FUDGE_WINDOW    0
#define FUDGE_EVERY     8
#define FUDGE_LEFT      16
#define PAINT           0xa6c7000000000000

        .hidden cfi_stack_fudge_settings
        .hidden cfi_stack_on_measured   /* Rust's */
        .hidden cfi_stack_exit

        .text

/* The lowest word from \low to rsp that is not painted, in r11, rsp if there is none; r10 the paint. Clobbers r9, flags. */
        .macro LOWEST_TOUCHED low
        movabs  $PAINT, %r10
        mov     \low, %r11
1:      cmp     %rsp, %r11
        jae     2f
        mov     %r11, %r9
        xor     %r10, %r9
        cmp     %r9, (%r11)
        jne     2f
        add     $8, %r11
        jmp     1b
2:
        .endm

/* Paints what is not painted from \low to rsp; \from is the lowest word that was not. Clobbers r9-r11, flags. */
        .macro PAINT_BELOW low, from
        LOWEST_TOUCHED \low
        mov     %r11, \from
3:      cmp     %rsp, %r11
        jae     4f
        mov     %r11, %r9
        xor     %r10, %r9
        mov     %r9, (%r11)
        add     $8, %r11
        jmp     3b
4:
        .endm

/* Finds the lowest word touched since, in r11, rsp if there is none; marks \from for a call around this one. Clobbers r9, r10, flags. */
        .macro HIGH_WATER low, from
        LOWEST_TOUCHED \low
        cmp     %r11, \from
        jae     3f
        movq    $0, (\from)
3:
        .endm

/* The stubs' frame: saves rbx, r12-r14, and leaves rsp 16-byte aligned. */
        .macro FUDGE_FRAME
        FRAME_RECORD
        push    %rbx
        push    %r12
        push    %r13
        push    %r14
        .cfi_offset %rbx, -24
        .cfi_offset %r12, -32
        .cfi_offset %r13, -40
        .cfi_offset %r14, -48
        .endm

        .macro FUDGE_RETURN
        pop     %r14
        pop     %r13
        pop     %r12
        pop     %rbx
        pop     %rbp
        .cfi_def_cfa %rsp, 8
        .cfi_restore %rbx
        .cfi_restore %r12
        .cfi_restore %r13
        .cfi_restore %r14
        .cfi_restore %rbp
        ret
        .endm

/*
 * u64 cfi_stack_measured(u64 (*f)(usize data), usize data, usize bytes, usize *used)
 *
 * Calls f(data) and says how many bytes below its stack pointer it has touched, if not more than bytes.
 *   in       rdi f, rsi data, rdx bytes (a multiple of 8; so many are writable below rsp), rcx used
 *   out      rax f's, *used; clobbers what a C call may
 *   stack    one frame of 48 bytes with the return address; paint below it, which f's frames lie over
 *   shadow   as any call
 *   signs    nothing
 */
FUNC cfi_stack_measured
        .cfi_startproc
        endbr64
        FUDGE_FRAME
        mov     %rcx, %r13
        mov     %rdi, %rax
        mov     %rsi, %rdi
        mov     %rsp, %rbx
        sub     %rdx, %rbx
        PAINT_BELOW %rbx, %r12
        call    *%rax
        HIGH_WATER %rbx, %r12
        mov     %rsp, %rcx
        sub     %r11, %rcx
        mov     %rcx, (%r13)
        FUDGE_RETURN
        .cfi_endproc
END cfi_stack_measured

/*
 * u64 fudge_call(Activation *act, u64 (*f)(u64, u64, u64), u64 a0, u64 a1, u64 a2)
 *
 * Managed code calls native code on the segment that it runs on: f(a0, a1, a2). Every so often, as the settings say, what f touches is
 * measured, and noted for the return address of this call.
 *   in       rdi act, rsi f, rdx rcx r8 arguments
 *   out      rax; clobbers what a C call may
 *   stack    measured: one frame of 48 bytes with the return address, paint below it down to the segment's base at most, and behind the
 *            call of f the frame record of exit; native: as exit. Not measured: nothing, f is jumped to
 *   shadow   as any call; behind the call of f as exit
 *   signs    nothing
 */
FUNC cfi_stack_fudge_call
        .cfi_startproc
        endbr64
        mov     cfi_stack_fudge_settings+FUDGE_WINDOW(%rip), %r11
        test    %r11, %r11
        jz      .Lunmeasured
        decq    cfi_stack_fudge_settings+FUDGE_LEFT(%rip)
        jg      .Lunmeasured
        mov     cfi_stack_fudge_settings+FUDGE_EVERY(%rip), %r10
        mov     %r10, cfi_stack_fudge_settings+FUDGE_LEFT(%rip)
        mov     ACT_CONTROL(%rdi), %r10
        test    %r10, %r10
        jz      .Lunmeasured
        mov     SEGMENT(%r10), %r10
        cmp     REC_TOP(%r10), %rsp
        ja      .Lunmeasured            /* not on this segment */
        mov     REC_BASE(%r10), %r10
        cmp     %r10, %rsp
        jb      .Lunmeasured
        FUDGE_FRAME
        mov     %rdi, %r13
        mov     %rsp, %rbx
        sub     %r11, %rbx
        cmp     %r10, %rbx
        cmovb   %r10, %rbx
        PAINT_BELOW %rbx, %r12
        mov     %rsi, %rax
        mov     %rdx, %rdi
        mov     %rcx, %rsi
        mov     %r8, %rdx
        call    *%rax
        mov     %rax, %r14
        HIGH_WATER %rbx, %r12
        mov     %r13, %rdi
        lea     cfi_stack_on_measured(%rip), %rsi
        mov     8(%rbp), %rdx           /* site */
        mov     %rsp, %rcx
        sub     %r11, %rcx              /* used */
        mov     %rsp, %r8
        sub     %rbx, %r8               /* painted */
        call    cfi_stack_exit
        mov     %r14, %rax
        FUDGE_RETURN
.Lunmeasured:
        mov     %rsi, %rax
        mov     %rdx, %rdi
        mov     %rcx, %rsi
        mov     %r8, %rdx
        jmp     *%rax
        .cfi_endproc
END cfi_stack_fudge_call

        ELF_NOTES
