//! Makes `cfi_start` the entry and finds boost.context, twice: Debian's library, and its assembly without FP control.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    println!("cargo::rustc-link-arg-bins=-Wl,-e,cfi_start");
    println!("cargo::rustc-check-cfg=cfg(boost, boost_without_fp)");
    println!("cargo::rerun-if-changed=build.rs");
    if let Some(library) = debian_library() {
        println!("cargo::rerun-if-changed={}", library.display());
        rename_symbols(&library);
        println!("cargo::rustc-cfg=boost");
    }
    if let Some(sources) = sources() {
        let assembly = |name: &str| sources.join(format!("{name}_x86_64_sysv_elf_gas.S"));
        // boost's own macro for it. The crate `context` links the same files with FP control, so that the names must differ.
        cc::Build::new()
            .files([assembly("jump"), assembly("make")])
            .define("BOOST_USE_TSX", None)
            .define("jump_fcontext", "boost_without_fp_jump")
            .define("make_fcontext", "boost_without_fp_make")
            .compile("boost_without_fp");
        println!("cargo::rustc-cfg=boost_without_fp");
    }
}

/// Debian's static library (libboost-context-dev), when it is there and is for the target.
fn debian_library() -> Option<PathBuf> {
    let path = Path::new("/usr/lib/x86_64-linux-gnu/libboost_context.a");
    (native() && path.exists()).then(|| path.to_owned())
}

/// Debian's objects as they are, under names that clash with nothing.
fn rename_symbols(library: &Path) {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    let status = Command::new("objcopy")
        .args(["--redefine-sym", "jump_fcontext=boost_jump", "--redefine-sym", "make_fcontext=boost_make"])
        .arg(library)
        .arg(out.join("libboost_debian.a"))
        .status();
    assert!(status.is_ok_and(|status| status.success()), "objcopy (binutils) cannot read {}", library.display());
    println!("cargo::rustc-link-search=native={}", out.display());
    println!("cargo::rustc-link-lib=static=boost_debian");
}

/// The assembly of boost.context: no Debian package has it, the crate `context` carries it unchanged.
fn sources() -> Option<PathBuf> {
    if !native() {
        return None;
    }
    let cargo = env::var_os("CARGO")?;
    let words = ["metadata", "--offline", "--format-version=1", "--filter-platform=x86_64-unknown-linux-gnu"];
    let output = Command::new(cargo).args(words).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    // The manifests of all packages, of which one is wanted: not worth a parser of JSON.
    let manifests = text.split("\"manifest_path\":\"").skip(1).filter_map(|rest| rest.split('"').next());
    let folders = manifests.filter_map(|manifest| Path::new(manifest).parent());
    folders.map(|folder| folder.join("src/asm")).find(|folder| folder.join("jump_x86_64_sysv_elf_gas.S").exists())
}

fn native() -> bool {
    let is = |name: &str, value: &str| env::var(name).is_ok_and(|found| found == value);
    is("CARGO_CFG_TARGET_ARCH", "x86_64") && is("CARGO_CFG_TARGET_OS", "linux")
}
