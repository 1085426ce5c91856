/*
 * How much stack native code takes that is called on the stack that runs, on arm64: by paint.
 *
 *      | caller              |
 *      | frame record, saved | <- sp: what is measured begins here
 *      | frames of f         | \
 *      | lowest word touched | / used, in bytes
 *      | paint               |
 *      +---------------------+ <- low: sp less the bytes asked for, or the segment's base
 *
 * The paint of a word is its own address with bits of the upper half flipped, so that neither a pointer nor a word that was painted
 * elsewhere and copied passes for it. It is the same in every call: what an earlier call painted and nobody touched is not painted
 * again, and calls within calls see each other's marks. The call that paints over the lowest mark puts a mark back there.
 *
 * Nothing at or above sp is written but the stub's own frame; AAPCS64 (6.4.5) has no red zone. What Apple's leaf functions keep in theirs
 * counts as touched.
 */

#include "aarch64_managed.h"

/* struct Settings, src/fudge.rs */
#define FUDGE_WINDOW    0
#define FUDGE_EVERY     8
#define FUDGE_LEFT      16
#define PAINT           0xa6c7          /* bits 48-63 */

        HIDDEN  SYM(cfi_stack_fudge_settings)
        HIDDEN  SYM(cfi_stack_on_measured) /* Rust's */
        HIDDEN  SYM(cfi_stack_exit)

        .text

        .macro ADDRESS reg, symbol
#ifdef __APPLE__
        adrp    \reg, _\symbol@PAGE
        add     \reg, \reg, _\symbol@PAGEOFF
#else
        adrp    \reg, \symbol
        add     \reg, \reg, #:lo12:\symbol
#endif
        .endm

/* The lowest word from \low to sp that is not painted, in x10, sp if there is none; x9 the paint, x12 sp. Clobbers x11, x13, flags. */
        .macro LOWEST_TOUCHED low
        mov     x9, #PAINT << 48
        mov     x10, \low
        mov     x12, sp
1:      cmp     x10, x12
        b.hs    2f
        eor     x11, x10, x9
        ldr     x13, [x10]
        cmp     x13, x11
        b.ne    2f
        add     x10, x10, #8
        b       1b
2:
        .endm

/* Paints what is not painted from \low to sp; \from is the lowest word that was not. Clobbers x9-x13, flags. */
        .macro PAINT_BELOW low, from
        LOWEST_TOUCHED \low
        mov     \from, x10
3:      cmp     x10, x12
        b.hs    4f
        eor     x11, x10, x9
        str     x11, [x10], #8
        b       3b
4:
        .endm

/* Finds the lowest word touched since, in x10, sp if there is none; marks \from for a call around this one. sp is in x12 then.
   Clobbers x9-x13, flags. */
        .macro HIGH_WATER low, from
        LOWEST_TOUCHED \low
        cmp     \from, x10
        b.hs    3f
        str     xzr, [\from]
3:
        .endm

/* The stubs' frame: signs, saves x19-x23. */
        .macro FUDGE_FRAME
#ifdef __APPLE__
        .cfi_b_key_frame
#endif
        SIGN_LR
        .cfi_negate_ra_state
        stp     x29, x30, [sp, #-64]!
        .cfi_def_cfa_offset 64
        .cfi_offset x29, -64
        .cfi_offset x30, -56
        mov     x29, sp
        .cfi_def_cfa x29, 64
        stp     x19, x20, [sp, #16]
        stp     x21, x22, [sp, #32]
        str     x23, [sp, #48]
        .cfi_offset x19, -48
        .cfi_offset x20, -40
        .cfi_offset x21, -32
        .cfi_offset x22, -24
        .cfi_offset x23, -16
        .endm

        .macro FUDGE_RETURN
        ldp     x19, x20, [sp, #16]
        ldp     x21, x22, [sp, #32]
        ldr     x23, [sp, #48]
        ldp     x29, x30, [sp], #64
        .cfi_def_cfa sp, 0
        .irp    reg, x19, x20, x21, x22, x23, x29, x30
        .cfi_restore \reg
        .endr
        AUTHENTICATED_RETURN
        .endm

/*
 * u64 cfi_stack_measured(u64 (*f)(usize data), usize data, usize bytes, usize *used)
 *
 * Calls f(data) and says how many bytes below its stack pointer it has touched, if not more than bytes.
 *   in       x0 f, x1 data, x2 bytes (a multiple of 8; so many are writable below sp), x3 used
 *   out      x0 f's, *used; clobbers what a C call may
 *   stack    one frame of 64 bytes; paint below it, which f's frames lie over
 *   shadow   as any call
 *   signs    own x30, key IA (Mach-O: IB), modifier SP at entry
 */
FUNC SYM(cfi_stack_measured)
        .cfi_startproc
        FUDGE_FRAME
        mov     x19, x3
        mov     x12, sp
        sub     x21, x12, x2
        mov     x16, x0
        mov     x0, x1
        PAINT_BELOW x21, x22
        blr     x16
        HIGH_WATER x21, x22
        sub     x9, x12, x10
        str     x9, [x19]
        FUDGE_RETURN
        .cfi_endproc
END SYM(cfi_stack_measured)

/*
 * u64 fudge_call(Activation *act, u64 (*f)(u64, u64, u64), u64 a0, u64 a1, u64 a2)
 *
 * Managed code calls native code on the segment that it runs on: f(a0, a1, a2). Every so often, as the settings say, what f touches is
 * measured, and noted for the return address of this call.
 *   in       x0 act, x1 f, x2-x4 arguments
 *   out      x0; clobbers what a C call may
 *   stack    measured: one frame of 64 bytes, paint below it down to the segment's base at most, and behind the call of f the frame
 *            record of exit; native: as exit. Not measured: nothing, f is branched to
 *   shadow   as any call; behind the call of f as exit
 *   signs    measured: own x30, key IA (Mach-O: IB), modifier SP at entry. The segment's record is believed only if sealed
 */
FUNC SYM(cfi_stack_fudge_call)
        .cfi_startproc
        hint    #34                     /* bti c */
        ADDRESS x9, cfi_stack_fudge_settings
        ldr     x10, [x9, #FUDGE_WINDOW]
        cbz     x10, LOCAL(unmeasured)
        ldp     x11, x12, [x9, #FUDGE_EVERY]
        subs    x12, x12, #1
        csel    x13, x12, x11, gt
        str     x13, [x9, #FUDGE_LEFT]
        b.gt    LOCAL(unmeasured)
        ldr     x9, [x0, #ACT_CONTROL]
        cbz     x9, LOCAL(unmeasured)
        ldr     x9, [x9, #SEGMENT]
        MODE    x15
        LOAD_RECORD x9, x11, x12, x13, x14, x16, x17, x15
        mov     x13, sp
        cmp     x13, x12
        b.hi    LOCAL(unmeasured)       /* not on this segment */
        cmp     x13, x11
        b.lo    LOCAL(unmeasured)
        mov     x14, x30                /* the site, a name from here on */
        FUDGE_FRAME
        mov     x19, x0
        mov     x20, x14
        mov     x13, sp
        subs    x21, x13, x10
        csel    x21, x11, x21, lo
        cmp     x21, x11
        csel    x21, x11, x21, lo
        mov     x16, x1
        mov     x0, x2
        mov     x1, x3
        mov     x2, x4
        PAINT_BELOW x21, x22
        blr     x16
        mov     x23, x0
        HIGH_WATER x21, x22
        mov     x0, x19
        ADDRESS x1, cfi_stack_on_measured
        mov     x2, x20
        sub     x3, x12, x10            /* used */
        sub     x4, x12, x21            /* painted */
        bl      SYM(cfi_stack_exit)
        mov     x0, x23
        FUDGE_RETURN
LOCAL(unmeasured):
        mov     x16, x1
        mov     x0, x2
        mov     x1, x3
        mov     x2, x4
        br      x16
        .cfi_endproc
END SYM(cfi_stack_fudge_call)

        ELF_NOTES
