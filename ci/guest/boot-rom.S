/*
 * The 64 KiB ROM that an emulated PC starts from: from the reset vector straight into long mode and to Linux's 64-bit entry.
 * The emulator has put into memory before: boot_params at 0x10000 and the address of the kernel's entry at 0x11000
 * (ci/guest/boot-params.py). The page tables lie in the ROM itself, accessed and dirty bits already set, and map 4 GiB one to one.
 */
	.set	ROM, 0xf0000
	.set	BOOT_PARAMS, 0x10000
	.set	KERNEL_ENTRY, 0x11000
	.set	CODE64, 0x10
	.set	DATA, 0x18

	.text
	.globl	_start
_start:
start_of_rom:
page_map_4:				/* present, writable, accessed, dirty: 0x63 */
	.quad	ROM + 0x1000 + 0x63
	.org	0x1000
page_pointers:
	.quad	ROM + 0x2000 + 0x63, ROM + 0x3000 + 0x63, ROM + 0x4000 + 0x63, ROM + 0x5000 + 0x63
	.org	0x2000
page_directories:			/* 2 MiB pages: 0x80 more */
	.set	page, 0
	.rept	2048
	.quad	(page << 21) + 0xe3
	.set	page, page + 1
	.endr

	.org	0x6000
descriptors:
	.quad	0, 0
	.quad	0x00af9b000000ffff	/* CODE64 */
	.quad	0x00cf93000000ffff	/* DATA */
descriptors_at:
	.word	descriptors_at - descriptors - 1
	.long	ROM + 0x6000

	.org	0x6100
	.code16
start_in_real_mode:
	cli
	cld
	lgdtl	%cs:(descriptors_at - start_of_rom)
	mov	$0x11, %eax		/* CR0: PE, ET */
	mov	%eax, %cr0
	mov	$0xa0, %eax		/* CR4: PAE, PGE */
	mov	%eax, %cr4
	mov	$ROM, %eax
	mov	%eax, %cr3
	mov	$0xc0000080, %ecx	/* EFER: LME, NXE */
	xor	%edx, %edx
	mov	$0x900, %eax
	wrmsr
	mov	$0x80000011, %eax	/* CR0: PG, ET, PE */
	mov	%eax, %cr0
	ljmpl	$CODE64, $(ROM + start_in_long_mode - start_of_rom)

	.code64
start_in_long_mode:
	mov	$DATA, %eax
	mov	%eax, %ds
	mov	%eax, %es
	mov	%eax, %ss
	mov	$0x18000, %esp
	mov	$BOOT_PARAMS, %esi
	mov	KERNEL_ENTRY, %rax
	jmp	*%rax

	.org	0xfff0
	.code16
	ljmp	$(ROM >> 4), $(start_in_real_mode - start_of_rom)
	.org	0x10000
