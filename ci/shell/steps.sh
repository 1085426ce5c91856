# The steps of ci/test. Sourced after places.sh and classes.sh; each step runs with its class loaded, in the root of the checkout,
# writes what happens to its stdout and fails when something in it failed.

# steps_of_class: the steps of the loaded class, in order.
steps_of_class() {
    case $class in
        host) echo fmt clippy audit lib doc engine battery scale suite suite-relocate checklist bench count debuggers asan fuzz ;;
        arm-fpac) echo clippy audit lib battery suite suite-relocate suite-key-b checklist count debuggers ;;
        arm-pac) echo lib battery suite suite-relocate suite-key-b ;;
        macho-arm64e) echo assemble check ;;
        x86-cet) echo lib battery scale suite suite-relocate checklist count ;;
        arm-vm-gcs) echo lib battery scale suite suite-relocate checklist ;;
        arm-gcs) echo lib battery count ;;
        *) echo lib battery $([ "$suite" = none ] || echo suite suite-relocate) ;;
    esac
}

# seconds_of_step STEP: after how long it is ended. That is many times what it takes: a step that hangs must not hold up the rest for ever.
seconds_of_step() {
    case $1 in
        fmt | assemble) echo 600 ;;
        fuzz) echo $((1800 + ${CFI_STACK_FUZZ_SECONDS:-60})) ;;
        *) echo "${CFI_STACK_STEP_SECONDS:-3600}" ;;
    esac
}

# builds_of_step STEP: "ISA CARGO-ARGUMENTS" of what the step will want built.
builds_of_step() {
    case $1 in
        lib) echo "$isa test --no-run -p cfi-stack --lib --tests --all-features" ;;
        battery | audit) echo "$isa build --release -p cfi-hwtests" ;;
        suite | suite-* | checklist) echo "$isa build --release -p wasm" ;;
        scale) echo "$isa build --release -p cfi-scale" ;;
        count) echo "$isa build --release -p cfi-growth" ;;
        engine) echo "$isa test --no-run --release -p wasm" ;;
        bench) echo "$isa bench --no-run --workspace" ;;
    esac
}

step_lib() {
    local programs
    programs=$("$CI/cargo" "$isa" test --no-run -p cfi-stack --lib --tests --all-features --message-format=json |
        sed -n 's/.*"reason":"compiler-artifact".*"executable":"\([^"]*\)".*/\1/p')
    [ -n "$programs" ] || { echo "cargo built no test program"; return 1; }
    # The properties run thousands of cases each; an emulated kernel gets fewer.
    case $machine in
        system) export QUICKCHECK_TESTS="${QUICKCHECK_TESTS:-500}" ;;
        bochs) export QUICKCHECK_TESTS="${QUICKCHECK_TESTS:-200}" ;;
    esac
    # Tests that count in hundred thousands take fewer where each instruction is emulated.
    if [ "$machine" != native ]; then export CFI_STACK_EMULATED=1; fi
    CFI_STACK_ENV=QUICKCHECK_TESTS,RUST_BACKTRACE,CFI_STACK_EMULATED "$CI/on" --script <(echo "$programs") "$class"
}

step_doc() {
    "$CI/cargo" "$isa" test --doc -p cfi-stack --all-features || return
    local source name failed=0 passed=0
    # An example whose head shows how it is run says there what it prints.
    for source in $(grep -l '^//! \$ cargo run --example' examples/*.rs); do
        name=$(basename "$source" .rs)
        if diff <(sed -n '/^\/\/! \$ cargo run/,/^\/\/! ```$/s/^\/\/! //p' "$source" | sed '1d;$d') \
            <("$CI/cargo" "$isa" run -q -p cfi-stack --example "$name"); then
            passed=$((passed + 1))
        else
            echo "example $name does not print what its head says"
            failed=$((failed + 1))
        fi
    done
    echo "$passed passed, $failed failed, 0 skipped"
    [ "$failed" = 0 ]
}

step_engine() { "$CI/cargo" "$isa" test --release -p wasm; }

step_battery() { "$CI/battery" "$class"; }

# What a suspended stack takes at most, in bytes, and that mappings do not grow with stacks (benches/scale).
step_scale() {
    "$CI/cargo" "$isa" build --quiet --release -p cfi-scale
    local scale
    scale=$(program_of "$isa" scale)
    if [ "$machine" = native ]; then
        "$CI/on" "$class" "$scale" --stacks 1000000 --at-most 4500 --vmas-at-most 256
        "$CI/on" "$class" "$scale" --stacks 1000000 --class small --at-most 1347 --vmas-at-most 256
    else
        "$CI/on" "$class" "$scale" --stacks fit --at-most 8600 --vmas-at-most 256
    fi
}

# run_suite OPTIONS…: everything that is chosen must run and pass: nothing is skipped in any class.
run_suite() {
    "$CI/cargo" "$isa" build --quiet --release -p wasm
    local chosen=() output last
    [ "$suite" = all ] || chosen=(--only "$suite")
    output=$(mktemp)
    "$CI/on" "$class" "$(program_of "$isa" wasm)" suite --stack 4096 ${chosen[@]+"${chosen[@]}"} "$@" | tee "$output"
    last=$(tail -n 1 "$output" | tr -d '\r')
    rm "$output"
    [[ $last =~ ^[1-9][0-9]*\ passed,\ 0\ failed,\ 0\ skipped$ ]] || { echo "the suite's last line must say that some passed and none was skipped; it says: $last"; return 1; }
}

step_suite() { run_suite; }
step_suite_relocate() { run_suite --relocate always; }
step_suite_key_b() { run_suite --key b; }

# What must survive when an engine's stacks grow, and again with every check moving the whole stack. Emulated CPUs take each so-manieth
# depth and offset; the lines say how many of how many.
step_checklist() {
    "$CI/cargo" "$isa" build --quiet --release -p wasm
    local every=1 wasm output
    case $machine in
        user | system) every=8 ;;
        bochs) every=32 ;;
    esac
    wasm=$(program_of "$isa" wasm)
    output=$(mktemp)
    "$CI/on" --script <(echo "$wasm checklist --every $every"; echo "$wasm checklist --every $every --relocate always") "$class" |
        tr -d '\r' | tee "$output"
    [ "$(grep -c '^[1-9][0-9]* passed, 0 failed, 0 skipped$' "$output")" = 2 ] || { echo "both runs must end with what passed, and nothing else"; return 1; }
    rm "$output"
}

# component SUBCOMMAND NAME: makes rustup install a part of Rust that `cargo SUBCOMMAND` needs and that is missing.
component() {
    local added=
    cargo "$1" --version >/dev/null 2>&1 || {
        if command -v rustup >/dev/null && rustup component add "$2"; then added=1; fi
        cargo "$1" --version >/dev/null 2>&1 || {
            echo "there is no cargo $1 here: ${added:+rustup has just added $2 and it does not run; }install $2 (rustup component add $2), or the package of that name that belongs to this Rust"
            return 1
        }
    }
}

step_fmt() {
    component fmt rustfmt
    cargo fmt --all --check
    cargo fmt --manifest-path fuzz/Cargo.toml --check
}

step_clippy() {
    if [ "$class" = host ]; then
        component clippy clippy
        "$CI/cargo" "$isa" clippy --workspace --all-targets --all-features -- -D warnings
    else
        "$CI/cargo" "$isa" clippy -p cfi-stack --all-targets --all-features -- -D warnings
    fi
}

step_audit() { "$CI/audit" "$isa"; }

step_debuggers() { "$CI/debuggers" "$class"; }

# AddressSanitizer says nothing of what is right, and names both errors that the example makes on a coroutine's stack. Without the
# feature it takes what is right for wrong: else nothing would have been shown.
step_asan() {
    local asan=$CACHE/target/asan program said=$(mktemp) passed=0 failed=0 what feature wanted status
    # Nightly's switch of a stable compiler; the flag must not reach build scripts, hence --target.
    export RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address CARGO_TARGET_DIR=$asan ASAN_OPTIONS=detect_stack_use_after_return=1
    while read -r feature what wanted; do
        cargo build --quiet --release --target x86_64-unknown-linux-gnu --target-dir "$asan/$feature" -p cfi-stack --example sanitized </dev/null \
            $([ "$feature" = without ] || echo --features asan)
        program=$asan/$feature/x86_64-unknown-linux-gnu/release/examples/sanitized
        status=0
        timeout 60 "$program" "$what" >"$said" 2>&1 </dev/null || status=$?
        if [ "$wanted" = nothing ]; then
            [ "$status" = 0 ] && [ ! -s "$said" ] && status=right
        else
            [ "$status" != 0 ] && grep -q "$wanted" "$said" && status=right
        fi
        if [ "$status" = right ]; then
            passed=$((passed + 1))
            echo "$feature the feature, $what: $wanted, as it must be"
        else
            failed=$((failed + 1))
            echo "$feature the feature, $what: not '$wanted', but status $status and:"
            head -n 40 "$said"
        fi
    done <<'CASES'
with right nothing
with overflow ERROR: AddressSanitizer: stack-buffer-overflow
with returned ERROR: AddressSanitizer: stack-use-after-return
without right False positive error reports may follow
CASES
    rm "$said"
    echo "$passed passed, $failed failed, 0 skipped"
    [ "$failed" = 0 ]
}

# The seconds are those of all targets together.
step_fuzz() { "$CI/fuzz" $((${CFI_STACK_FUZZ_SECONDS:-60} / $(ls fuzz/fuzz_targets | wc -l))); }

# What re-binding takes for a frame (the whole stub, in instructions) and sealing for a word: exact counts.
step_count() {
    "$CI/cargo" "$isa" build --quiet --release -p cfi-growth
    local most=8
    [ "$isa" = x86_64 ] || most=16
    "$CI/on" --count "$class" "$(program_of "$isa" growth)" --count --frames 10,100 --at-most "$most"
    case $class in arm-fpac | arm-gcs) benches/switching/sealing "$class" ;; esac
}

step_bench() { "$CI/cargo" "$isa" bench --no-run --workspace; }

# The assembly as arm64e objects, and what must be in them: the signing instructions themselves, not their hint forms' absence.
step_assemble() {
    local source object clang=$EMULATORS/clang/wrap
    for source in asm/aarch64.S asm/aarch64_rebind.S asm/aarch64_cpu.S; do
        object=$(mktemp)
        "$clang/clang" -target arm64e-apple-macos14 -Wall -Werror -c -I asm -o "$object" "$source"
        "$clang/llvm-readobj" --file-headers "$object" | grep -q 'CpuSubType: CPU_SUBTYPE_ARM64E' || { echo "$source: the object is not arm64e"; return 1; }
        "$clang/llvm-objdump" -d "$object" | grep -c 'pacib' >/dev/null || { echo "$source: nothing in the object signs"; return 1; }
        rm "$object"
        echo "$source assembles for Mach-O arm64e"
    done
}

step_check() { "$CI/cargo" arm64e-apple build -p cfi-stack; }

# count_results LOG STATUS: "passed failed skipped" from what the test programs said of themselves. A step without such words counts
# as one; a step that failed without naming a failure counts one failure.
count_results() {
    awk -v status="$2" '
        /^test result: / {
            for (i = 2; i <= NF; i++) {
                if ($i ~ /^passed/) p += $(i - 1)
                if ($i ~ /^failed/) f += $(i - 1)
                if ($i ~ /^ignored/) s += $(i - 1)
            }
            any = 1
        }
        /^[0-9]+ passed, [0-9]+ failed, [0-9]+ skipped$/ { p += $1; f += $3; s += $5; any = 1 }
        END {
            if (!any && status == 0) p = 1
            if (status != 0 && f == 0) f = 1
            print p + 0, f + 0, s + 0
        }' "$1"
}
