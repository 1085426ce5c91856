/* What this thread and this CPU are asked on arm64: shadow-stack pointer, signature bits, ID registers, keys. */

#include "aarch64.h"

        .text

/* usize cfi_stack_shadow_pointer(void): GCSPR_EL0, 0 where GCS is off. A leaf; clobbers x0, x16. */
FUNC SYM(cfi_stack_shadow_pointer)
        .cfi_startproc
        hint    #34                     /* bti c */
        mov     x0, #0
        UNLESS_GCS LOCAL(no_gcs)
        mrs     x0, S3_3_C2_C5_1        /* gcspr_el0 */
        add     x0, x0, #8              /* this stub's own return address */
LOCAL(no_gcs):
        ret
        .cfi_endproc
END SYM(cfi_stack_shadow_pointer)

/* u64 cfi_stack_pac_field(void): the bits that a signature may take in a code address. A leaf; needs FEAT_PAuth. */
FUNC SYM(cfi_stack_pac_field)
        .cfi_startproc
        hint    #34                     /* bti c */
        mov     x16, #-1
        and     x16, x16, #~(1 << 55)   /* a user address: bit 55 clear */
        mov     x0, x16
        xpaci   x0
        eor     x0, x0, x16
        ret
        .cfi_endproc
END SYM(cfi_stack_pac_field)

#ifdef __ELF__
/* u64 cfi_stack_id_isar1(void), …_isar2: ID registers, which the kernel lets user code read (HWCAP_CPUID). */
FUNC SYM(cfi_stack_id_isar1)
        .cfi_startproc
        hint    #34                     /* bti c */
        mrs     x0, S3_0_C0_C6_1        /* id_aa64isar1_el1 */
        ret
        .cfi_endproc
END SYM(cfi_stack_id_isar1)
FUNC SYM(cfi_stack_id_isar2)
        .cfi_startproc
        hint    #34                     /* bti c */
        mrs     x0, S3_0_C0_C6_2        /* id_aa64isar2_el1 */
        ret
        .cfi_endproc
END SYM(cfi_stack_id_isar2)
#endif

/* Four signatures of addresses in page zero, 16 bits of x0 for each. Where the key is turned off nothing is signed: 0. */
        .macro PRINT pac
        .irp    address, 0, 16, 32, 48
        mov     x16, #\address
        \pac    x16, x17
        lsr     x16, x16, #48
        orr     x0, x16, x0, lsl #16
        .endr
        ret
        .endm

/*
 * u64 cfi_stack_key_print(u64 which): a fingerprint of this thread's key IA (0), IB (1), DA (2), DB (3) or of the generic
 * key (4): what it makes of small constants, which are no addresses, under an odd constant, which is no stack pointer's
 * value. A leaf; clobbers x0, x16, x17, flags.
 */
FUNC SYM(cfi_stack_key_print)
        .cfi_startproc
        hint    #34                     /* bti c */
        mov     x17, #0x4b01
        cmp     x0, #2
        b.eq    3f
        b.hi    4f
        cbnz    x0, 2f
        PRINT   pacia
2:      mov     x0, #0
        PRINT   pacib
3:      mov     x0, #0
        PRINT   pacda
4:      cmp     x0, #3
        mov     x0, #0
        b.ne    5f
        PRINT   pacdb
5:      pacga   x0, x0, x17
        ret
        .cfi_endproc
END SYM(cfi_stack_key_print)

        ELF_NOTES
