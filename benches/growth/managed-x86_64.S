/*
 * Managed functions for x86-64, as an engine's code generator would emit them: frame record at rbp, rsp constant at
 * every call, the limit in the first word of rdi. Their convention: rdi keeps the activation, rax returns, all else is free.
 */
        .macro FUNC name
        .globl  \name
        .balign 64
\name:
        endbr64
        push    %rbp
        mov     %rsp, %rbp
        .endm
        .macro END name
        .globl  \name\()_end
\name\()_end:
        .endm
        .macro CHECK checked
        .if     \checked
        cmp     (%rdi), %rsp
        jb      3f
        .endif
1:
        .endm
        /* The cold half of a check: keeps n in the frame while grow runs. */
        .macro GROW checked
        .if     \checked
3:      mov     %rsi, -8(%rbp)
        xor     %esi, %esi
        call    *bench_stubs(%rip)
        mov     -8(%rbp), %rsi
        jmp     1b
        .endif
        .endm

        .text

/* u64 bench_descend(act rdi, n rsi, f rdx, bytes rcx): n calls deep, there bottom unless f is 0; returns n.
   frame_bytes = 16: 32 bytes a frame. */
FUNC bench_descend
        sub     $16, %rsp
        CHECK   1
        test    %rsi, %rsi
        jz      2f
        dec     %rsi
        call    bench_descend
        inc     %rax
        leave
        ret
2:      xor     %eax, %eax
        test    %rdx, %rdx
        jz      4f
        call    bench_bottom
4:      leave
        ret
        GROW    1
END bench_descend

/* u64 bench_edge(act rdi, n rsi, calls rdx): calls the leaf from n frames down; returns calls, at least 1. frame_bytes = 16. */
FUNC bench_edge
        sub     $16, %rsp
        CHECK   1
        test    %rsi, %rsi
        jz      2f
        dec     %rsi
        call    bench_edge
        leave
        ret
2:      mov     %rdx, -8(%rbp)
        xor     %esi, %esi
        .balign 64
4:      call    bench_leaf_checked
        mov     %rax, %rsi
        cmp     %rsi, -8(%rbp)
        ja      4b
        leave
        ret
        GROW    1
END bench_edge

/* u64 bench_bottom(act rdi, unused, f rdx, bytes rcx): f() on the native stack, grow by bytes, f() again. Uses the
   reserve, unchecked. Returns 0. frame_bytes = 32. */
FUNC bench_bottom
        sub     $32, %rsp
        mov     %rdi, -8(%rbp)
        mov     %rdx, -16(%rbp)
        mov     %rcx, -24(%rbp)
        mov     %rdx, %rsi
        call    *bench_stubs+8(%rip)
        mov     -8(%rbp), %rdi
        mov     -24(%rbp), %rsi
        call    *bench_stubs(%rip)
        mov     -16(%rbp), %rsi
        call    *bench_stubs+8(%rip)
        xor     %eax, %eax
        leave
        ret
END bench_bottom

/* u64 bench_fib_…(act rdi, n rsi): the n-th Fibonacci number, the slow way. frame_bytes = 16. */
        .macro FIB name, checked
FUNC \name
        sub     $16, %rsp
        CHECK   \checked
        mov     %rsi, %rax
        cmp     $2, %rsi
        jb      2f
        mov     %rsi, -8(%rbp)
        dec     %rsi
        call    \name
        mov     %rax, -16(%rbp)
        mov     -8(%rbp), %rsi
        sub     $2, %rsi
        call    \name
        add     -16(%rbp), %rax
2:      leave
        ret
        GROW    \checked
END \name
        .endm
        FIB     bench_fib_checked, 1
        FIB     bench_fib_plain, 0

/* u64 bench_leaf_…(act rdi, n rsi): n + 1. frame_bytes = 16. */
        .macro LEAF name, checked
FUNC \name
        sub     $16, %rsp
        CHECK   \checked
        lea     1(%rsi), %rax
        leave
        ret
        GROW    \checked
END \name
        .endm
        LEAF    bench_leaf_checked, 1
        LEAF    bench_leaf_plain, 0

/* u64 bench_loop_…(act rdi, n rsi): n calls of the leaf. frame_bytes = 16. */
        .macro LOOP name, leaf
FUNC \name
        sub     $16, %rsp
        mov     %rsi, -8(%rbp)
        xor     %esi, %esi
        .balign 64
1:      call    \leaf
        mov     %rax, %rsi
        cmp     %rsi, -8(%rbp)
        ja      1b
        leave
        ret
END \name
        .endm
        LOOP    bench_loop_checked, bench_leaf_checked
        LOOP    bench_loop_plain, bench_leaf_plain
