//! The entry `cfi_start`: turns the shadow stack (x86 SHSTK, arm64 GCS) on where the kernel has one, locks it, and goes on to `_start`.
//!
//! A program gets it by depending on this crate, naming it once (`use cfi_start as _;`) and linking with
//! `-Wl,-e,cfi_start` (a `cargo::rustc-link-arg-bins` line of its build script). It must happen before any frame that
//! will return: a shadow stack turned on later does not know the return addresses already on the stack.
//!
//! A C library that does not know about shadow stacks keeps working with two exceptions, which such a program must
//! stay clear of: `longjmp` is not adapted, and static glibc's failing `dlsym` uses it. This crate defines a `dlsym`
//! that finds nothing for statically linked programs.

#![cfg_attr(not(target_os = "linux"), allow(unused))]

#[cfg(all(target_os = "linux", target_feature = "crt-static"))]
mod no_dlsym {
    use std::ffi::{c_char, c_void};

    /// Finds nothing: a static program has no dynamic symbols, and glibc's own search ends in a longjmp.
    #[unsafe(no_mangle)]
    extern "C" fn dlsym(_handle: *mut c_void, _name: *const c_char) -> *mut c_void {
        std::ptr::null_mut()
    }
}

#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
unsafe extern "C" {
    fn cfi_start();
}

/// Keeps the entry in the link although nothing calls it.
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
#[used]
static ENTRY: unsafe extern "C" fn() = cfi_start;
