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

/*
 * u64 cfi_stack_key_print(u64 which): a fingerprint of this thread's key A (0), B (1) or generic key (2): the
 * signature of address 0 under an odd constant, which is no stack pointer's value. A leaf; clobbers x0, x16, x17.
 */
FUNC SYM(cfi_stack_key_print)
        .cfi_startproc
        hint    #34                     /* bti c */
        mov     x16, #0
        mov     x17, #0x4b01
        cbz     x0, 1f
        cmp     x0, #1
        b.eq    2f
        pacga   x0, x16, x17
        ret
1:      pacia   x16, x17
        mov     x0, x16
        ret
2:      pacib   x16, x17
        mov     x0, x16
        ret
        .cfi_endproc
END SYM(cfi_stack_key_print)

        ELF_NOTES
