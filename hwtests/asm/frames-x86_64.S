/*
 * Hand-made managed functions whose frames are not plain, for x86-64: one for each kind that a code generator makes.
 *
 * All are f(act rdi, n rsi, table rdx): they check the limit, put 8 n + 3 into a local, keep a pointer to it across
 * the call of table[n - 1] (none when n is 0), and add what it leads to to that call's result. Layouts: src/frames.rs.
 */
#include "functions-x86_64.h"

        .macro PADDED name
        FUNC    \name
        endbr64
        .endm
        .macro SITE name
        .globl  \name
\name:
        .endm

/* Calls grow(act, 0) when the stack pointer is below the limit. grow keeps every register. \site returns from it. */
        .macro CHECK site
        cmp     (%rdi), %rsp
        jae     9f
        mov     %rsi, %r10
        xor     %esi, %esi
        call    *managed_stubs(%rip)
SITE \site
        mov     %r10, %rsi
9:
        .endm

/* The local, at rbp - 32. Its address goes to \pointer. */
        .macro LOCAL pointer
        lea     3(, %rsi, 8), %rax
        mov     %rax, -32(%rbp)
        lea     -32(%rbp), \pointer
        .endm

/* table[n - 1](act, n - 1, table), or 0. \site returns from it. */
        .macro NEXT site
        xor     %eax, %eax
        test    %rsi, %rsi
        jz      9f
        dec     %rsi
        call    *(%rdx, %rsi, 8)
SITE \site
9:
        .endm

        .text

/* A plain frame that keeps the pointer in a slot. frame_bytes 32; slot -24. */
PADDED frames_plain
        push    %rbp
        mov     %rsp, %rbp
        sub     $32, %rsp
        CHECK   frames_plain_grow
        LOCAL   %r10
        mov     %r10, -24(%rbp)
        NEXT    frames_plain_site
        mov     -24(%rbp), %r10
        add     (%r10), %rax
        leave
        ret
END frames_plain

/* The record away from the return address, the pointer in rbx. frame_bytes 40, cfa_bytes 24; saves rbx at 8. */
PADDED frames_register
        push    %rbx
        push    %rbp
        mov     %rsp, %rbp
        sub     $40, %rsp
        CHECK   frames_register_grow
        LOCAL   %rbx
        NEXT    frames_register_site
        add     (%rbx), %rax
        mov     %rbp, %rsp
        pop     %rbp
        pop     %rbx
        ret
END frames_register

/* Pushes around its call. frame_bytes 48, 64 at the call; saves rbx at -8; slot -56. */
PADDED frames_pushes
        push    %rbp
        mov     %rsp, %rbp
        push    %rbx
        sub     $40, %rsp
        CHECK   frames_pushes_grow
        mov     $0x55, %ebx
        LOCAL   %r10
        push    %r10
        push    $0
        NEXT    frames_pushes_site
        pop     %r10
        pop     %r10
        add     (%r10), %rax
        mov     -8(%rbp), %rbx
        leave
        ret
END frames_pushes

/*
 * Passes 16 bytes of arguments, a pointer to its local among them, to a function that owns them, which passes them on by a tail call with
 * 32 bytes to one that calls and pops. frame_bytes 32.
 */
PADDED frames_arguments
        push    %rbp
        mov     %rsp, %rbp
        sub     $32, %rsp
        LOCAL   %r10
        push    %r10
        push    $7
        call    frames_owner
SITE frames_arguments_site
        leave
        ret
END frames_arguments

/* incoming 16, frame_bytes 32; slot 24: the pointer that it was passed. */
PADDED frames_owner
        push    %rbp
        mov     %rsp, %rbp
        sub     $32, %rsp
        CHECK   frames_owner_grow
        leave
        mov     (%rsp), %r11            /* the return address moves down, a stale copy stays */
        sub     $16, %rsp
        mov     %r11, (%rsp)
        jmp     frames_popper
END frames_owner

/* incoming 32, frame_bytes 32; slot 40. */
PADDED frames_popper
        push    %rbp
        mov     %rsp, %rbp
        sub     $32, %rsp
        CHECK   frames_popper_grow
        NEXT    frames_popper_site
        mov     40(%rbp), %r10
        add     (%r10), %rax
        leave
        ret     $32
END frames_popper

/* Of dynamic size: 48 bytes and up to 112 more. Slot -24. */
PADDED frames_dynamic
        push    %rbp
        mov     %rsp, %rbp
        sub     $48, %rsp
        mov     %rsi, %rax
        and     $7, %eax
        shl     $4, %eax
        sub     %rax, %rsp
        CHECK   frames_dynamic_grow
        LOCAL   %r10
        mov     %r10, -24(%rbp)
        NEXT    frames_dynamic_site
        mov     -24(%rbp), %r10
        add     (%r10), %rax
        leave
        ret
END frames_dynamic

        .section .note.gnu.property, "a", @note
        .balign 8
        .long   4, 16, 5
        .asciz  "GNU"
        .long   0xc0000002, 4, 3, 0
        .section .note.GNU-stack, "", @progbits
