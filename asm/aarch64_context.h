/* What the switch stubs of this ISA share: how a context is saved, sealed, believed and left. The drawing is in aarch64_switch.S. */

#include "aarch64.h"

/* struct Slot, src/abi.rs */
#define OWN             0
#define RESUMER         32
#define IDENTITY        64
#define TOP             80
#define SLOT_SHADOW_TOP 88
#define CHUNK           96
/* struct Context */
#define SP              0
#define SEAL            8
#define CTX_TOKEN       16
#define GENERATION      24
/* struct Chunk, src/directory.rs */
#define CHUNK_SLOTS     0
#define CHUNK_DATA      16
#define CHUNK_SHADOW    32
#define CHUNK_DATA_SHIFT 48
#define CHUNK_SHADOW_SHIFT 49
#define CHUNK_IDENTITY  56
/* a saved frame */
#define F_X19           16
#define F_D8            96
#define F_FPCR          160
#define FRAME           176
/* below top: the link, and the pc that belongs to it */
#define BASE_RECORD     16

        HIDDEN  SYM(cfi_stack_published)
        HIDDEN  SYM(cfi_stack_unbound)

/* The registers of the caller onto its stack, as every saved frame has them. x15: the mode word. Clobbers x16. */
        .macro SAVE_FRAME
        .cfi_startproc
        .cfi_signal_frame
        hint    #34                     /* bti c */
        stp     x29, x30, [sp, #-FRAME]!
        .cfi_def_cfa_offset FRAME
        .cfi_offset x29, -FRAME
        .cfi_offset x30, 8-FRAME
        stp     x19, x20, [sp, #F_X19]
        stp     x21, x22, [sp, #F_X19+16]
        stp     x23, x24, [sp, #F_X19+32]
        stp     x25, x26, [sp, #F_X19+48]
        stp     x27, x28, [sp, #F_X19+64]
        stp     d8, d9, [sp, #F_D8]
        stp     d10, d11, [sp, #F_D8+16]
        stp     d12, d13, [sp, #F_D8+32]
        stp     d14, d15, [sp, #F_D8+48]
        CALLEE_SAVES
        mrs     x16, fpcr
        str     x16, [sp, #F_FPCR]
        MODE    x15
        .endm

/* The callee-saved registers of the saved frame at \base. */
        .macro LOAD_CALLEE_SAVED base
        ldp     x19, x20, [\base, #F_X19]
        ldp     x21, x22, [\base, #F_X19+16]
        ldp     x23, x24, [\base, #F_X19+32]
        ldp     x25, x26, [\base, #F_X19+48]
        ldp     x27, x28, [\base, #F_X19+64]
        ldp     d8, d9, [\base, #F_D8]
        ldp     d10, d11, [\base, #F_D8+16]
        ldp     d12, d13, [\base, #F_D8+32]
        ldp     d14, d15, [\base, #F_D8+48]
        .endm

/* x16: the chain goes on over x19-x28 and d8-d15. Clobbers \a. */
        .macro CHAIN_CALLEE_SAVED a
        .irp    reg, x19, x20, x21, x22, x23, x24, x25, x26, x27, x28
        pacga   x16, \reg, x16
        .endr
        .irp    reg, d8, d9, d10, d11, d12, d13, d14, d15
        fmov    \a, \reg
        pacga   x16, \a, x16
        .endr
        .endm

/* x16: the chain over sp, pc, fp, identity and generation for the context at \context. */
        .macro CHAIN context, sp, pc, fp, identity, generation
        pacga   x16, \sp, \context
        pacga   x16, \pc, x16
        pacga   x16, \fp, x16
        pacga   x16, \identity, x16
        pacga   x16, \generation, x16
        .endm

/* Fills the \context of \slot with sp, pc and fp in registers, counts its generation, seals it. x15 is the mode word; callee-saved
   registers are those that belong to it. Clobbers x4-x6 x16. */
        .macro SEAL_CONTEXT slot, context, sp, pc, fp
        add     x4, \slot, #\context
        str     \sp, [x4, #SP]
        tbz     x15, #MODE_PACGA_BIT, LOCAL(sealed\@)
        ldr     x5, [x4, #GENERATION]
        add     x5, x5, #1
        str     x5, [x4, #GENERATION]
        ldr     x6, [\slot, #IDENTITY]
        CHAIN   x4, \sp, \pc, \fp, x6, x5
        tbz     x15, #MODE_FULL_SEAL_BIT, LOCAL(short\@)
        CHAIN_CALLEE_SAVED x5
LOCAL(short\@):
        str     x16, [x4, #SEAL]
LOCAL(sealed\@):
        .endm

/* x9 sp, x11 fp, x17 pc, x10 token and the callee-saved registers of \slot's \context; traps unless its seal holds for just
   these. Erases it and counts the generation on, so that who puts the seal back needs the generation too. x15 is the mode word.
   With \fresh the stack may be one that never ran. Clobbers x4-x8 x16, flags. */
        .macro VERIFY_CONTEXT slot, context, fresh
        add     x4, \slot, #\context
        ldr     x9, [x4, #SP]
        ldr     x10, [x4, #CTX_TOKEN]
        ldp     x11, x17, [x9]
        LOAD_CALLEE_SAVED x9
        tbz     x15, #MODE_PACGA_BIT, LOCAL(verified\@)
        ldr     x5, [x4, #GENERATION]
        ldr     x6, [\slot, #IDENTITY]
        add     x7, x4, #SEAL
        swp     xzr, x7, [x7]           /* of two threads one gets the seal */
        CHAIN   x4, x9, x17, x11, x6, x5
        .if \fresh
        adr     x8, LOCAL(first)
        cmp     x17, x8
        b.eq    LOCAL(fresh\@)
        .endif
        tbz     x15, #MODE_FULL_SEAL_BIT, LOCAL(short\@)
        CHAIN_CALLEE_SAVED x8
        .if \fresh
        b       LOCAL(short\@)
LOCAL(fresh\@):                         /* entry, data, slot */
        pacga   x16, x19, x16
        pacga   x16, x20, x16
        pacga   x16, x21, x16
        .endif
LOCAL(short\@):
        cmp     x16, x7
        b.eq    LOCAL(holds\@)
        brk     #BRK_GA
LOCAL(holds\@):
        add     x5, x5, #1
        str     x5, [x4, #GENERATION]
LOCAL(verified\@):
        .endm

/* What the directory says of \slot: x4 lowest and x5 end of its data area, x6 lowest and x7 end of its GCS area. A slot that is not in
   the directory, or that has another identity than its place: unbound. Clobbers x8 x12 x16, flags. */
        .macro BIND slot
#ifdef __APPLE__
        adrp    x8, _cfi_stack_published@PAGE
        add     x8, x8, _cfi_stack_published@PAGEOFF
#else
        adrp    x8, cfi_stack_published
        add     x8, x8, #:lo12:cfi_stack_published
#endif
        ldr     w16, [\slot, #CHUNK]
        ldr     x12, [x8, #PUBLISHED_CHUNKS]
        cmp     x16, x12
        b.hs    LOCAL(unbound)
        ldr     x8, [x8, #PUBLISHED_DIRECTORY]
        add     x8, x8, x16, lsl #6
        ldp     x12, x16, [x8, #CHUNK_SLOTS]
        sub     x12, \slot, x12
        cmp     x12, x16
        b.hs    LOCAL(unbound)
        tst     x12, #127
        b.ne    LOCAL(unbound)
        lsr     x12, x12, #7
        ldrb    w16, [x8, #CHUNK_DATA_SHIFT]
        lsl     x4, x12, x16
        ldp     x5, x6, [x8, #CHUNK_DATA]
        add     x4, x4, x5
        add     x5, x4, x6
        ldrb    w16, [x8, #CHUNK_SHADOW_SHIFT]
        lsl     x6, x12, x16
        ldp     x7, x16, [x8, #CHUNK_SHADOW]
        add     x6, x6, x7
        add     x7, x6, x16
        ldr     x16, [x8, #CHUNK_IDENTITY]
        add     x12, x12, x16
        ldr     x16, [\slot, #IDENTITY]
        cmp     x12, x16
        b.ne    LOCAL(unbound)
        .endm

/* x9 and x10, an sp and a token, lie in the areas of BIND. Clobbers x16, flags. */
        .macro WITHIN
        cmp     x9, x4
        b.lo    LOCAL(unbound)
        add     x16, x9, #FRAME + BASE_RECORD
        cmp     x16, x5
        b.hi    LOCAL(unbound)
        cmp     x10, x6
        b.lo    LOCAL(unbound)
        cmp     x10, x7
        b.hs    LOCAL(unbound)
        .endm

/* x7: 0 where the token at x10 says that nothing is on the GCS which ends at x7. Then the stack never ran, and x17 must be `first`: any
   other pc would return from an empty GCS. Clobbers x16, flags. */
        .macro NEVER_RAN
        add     x16, x10, #8
        subs    x7, x16, x7
        adr     x16, LOCAL(first)
        ccmp    x17, x16, #4, eq        /* nothing on it: is it first? else: equal */
        b.ne    LOCAL(unbound)
        .endm

/* Branches to \off where this thread has no GCS. A process that never had one is spared the question. Clobbers x16. */
        .macro UNLESS_SHADOW off
        tbz     x15, #MODE_SHADOW_BIT, \off
        UNLESS_GCS \off
        .endm

/* To the GCS whose token lies at x10; the address of the one left behind goes to \context of \slot. Clobbers x16. */
        .macro CHANGE_SHADOW slot, context
        sys     #3, c7, c7, #2, x10     /* gcsss1 x10 */
        sysl    x16, #3, c7, c7, #3     /* gcsss2 x16 */
        str     x16, [\slot, #\context + CTX_TOKEN]
        .endm

/* Pops the GCS, which must say x17. Clobbers x16, flags. */
        .macro POP_SHADOW_PC
        sysl    x16, #3, c7, c7, #1     /* gcspopm x16 */
        cmp     x16, x17
        b.eq    LOCAL(agrees\@)
        brk     #BRK_GA
LOCAL(agrees\@):
        .endm

/* To the stack whose sp and fp are in x9 and x11; its callee-saved registers are loaded already. Loading FPCR is slow and it seldom
   differs. Clobbers x4 x5 flags. */
        .macro CHANGE_STACK
        ldr     x4, [x9, #F_FPCR]
        mov     sp, x9
        mov     x29, x11
        mrs     x5, fpcr
        cmp     x4, x5
        b.eq    LOCAL(same_fpcr\@)
        msr     fpcr, x4
LOCAL(same_fpcr\@):
        .endm

/* Pops the saved frame; x17 is its pc, and the way on. */
        .macro DROP_FRAME
        add     sp, sp, #FRAME
        .cfi_def_cfa_offset 0
        .irp    reg, x19, x20, x21, x22, x23, x24, x25, x26, x27, x28, x29, d8, d9, d10, d11, d12, d13, d14, d15
        .cfi_restore \reg
        .endr
        .cfi_register x30, x17
        .endm

/* Writes the link of \slot: the record of the frame at sp. Clobbers x4 x16. */
        .macro LINK slot
        ldr     x4, [\slot, #TOP]
        mov     x16, sp
        str     x16, [x4, #-BASE_RECORD]
        .endm
