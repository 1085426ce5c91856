# The machines that ci/on runs a program on. Sourced after places.sh and classes.sh, with a class loaded.
#
# Each run_on_MACHINE takes the program and its arguments, and ends with the program's exit status, 128 + N when it died of
# signal N, 124 when its time was up, 99 when the machine itself failed. `shipped` lists what --with named, `limit` the seconds.

MACHINE_FAILED=99
TIME_IS_UP=124

# within_limit COMMAND…: runs a command for at most $limit seconds; ends it together with this script.
# The shell's own word about a death by signal is kept off the output.
within_limit() {
    local job status=0
    exec 3>&2 2>/dev/null
    timeout --kill-after=10 "$limit" "$@" <&0 2>&3 3>&- &
    job=$!
    trap 'kill -TERM $job' INT TERM HUP
    wait "$job" || status=$?
    trap - INT TERM HUP
    exec 2>&3 3>&-
    return "$status"
}

run_on_native() {
    ulimit -c 0
    within_limit "$@"
}

run_on_user() {
    ulimit -c 0
    within_limit "$EMULATORS/qemu-user/qemu-aarch64" -cpu "$model" ${CFI_STACK_SEED:+-seed "$CFI_STACK_SEED"} \
        -L /usr/aarch64-linux-gnu "$@"
}

# pack_guest INIT STRIP PROGRAM ARGUMENTS…: writes $work/initrd: the first process, the program, the files it needs, its command.
pack_guest() {
    local init=$1 strip=$2 program argument name
    shift 2
    program=$(realpath -s "$1")
    shift
    local files=("/init=$init")
    "$strip" --strip-debug "$program" "$work/program" 2>/dev/null || cp "$program" "$work/program"
    chmod 755 "$work/program"
    files+=("$program=$work/program")
    for argument in "$@"; do
        if [ -f "$argument" ]; then files+=("$(realpath -s -- "$argument")=$argument"); fi
    done
    for name in ${shipped[@]+"${shipped[@]}"}; do files+=("$(realpath -s -- "$name")=$name"); done
    {
        printf 'D%s\0' "$PWD"
        printf 'VPWD=%s\0' "$PWD"
        for name in $(tr "," " " <<<"${CFI_STACK_ENV:-}"); do
            if [ -n "${!name+set}" ]; then printf 'V%s=%s\0' "$name" "${!name}"; fi
        done
        printf 'A%s\0' "$program" "$@"
        printf 'R\0'
    } >"$work/command"
    mkdir -p "$work/here"
    files+=("/command=$work/command" "$PWD=$work/here")
    "$PYTHON" "$CI/guest/initramfs.py" "$work/initrd" "${files[@]}"
}

# read_guest: gives out the program's output from the machine's on stdin.
read_guest() { "$PYTHON" "$CI/guest/records.py" "$work/log" "$work/finished"; }

# guest_verdict MACHINE-STATUS READER-STATUS: the status of the whole run, with a word on a machine that failed.
guest_verdict() {
    if [ "$2" != "$MACHINE_FAILED" ]; then return "$2"; fi
    if [ "$1" = "$TIME_IS_UP" ] || [ "$1" = 137 ]; then return "$TIME_IS_UP"; fi
    # A program may itself end with 99: then the machine has said its last word too.
    if [ -e "$work/finished" ]; then return "$2"; fi
    say "the machine of $class failed (its own status: $1). The end of what it said:"
    tail -n 25 "$work/log" "$work"/machine.* 2>/dev/null | tr -d '\r' | sed 's/^/    /' >&2
    return "$MACHINE_FAILED"
}

run_on_system() {
    local status=(0 0)
    pack_guest "$EMULATORS/arm64-guest/init" aarch64-linux-gnu-objcopy "$@"
    set +e
    within_limit "$EMULATORS/qemu-system/qemu-system-aarch64" -M virt -cpu "$model" -m 1024 -smp "${CFI_STACK_CPUS:-2}" \
        ${CFI_STACK_SEED:+-seed "$CFI_STACK_SEED"} \
        -nographic -nodefaults -serial stdio -no-reboot -kernel "$EMULATORS/arm64-kernel/vmlinuz" -initrd "$work/initrd" \
        -append "console=ttyAMA0 quiet panic=-1 ${kernel_words//,/ } ${CFI_STACK_KERNEL:-}" </dev/null 2>"$work/machine.errors" | read_guest
    status=("${PIPESTATUS[@]}")
    set -e
    guest_verdict "${status[@]}"
}

run_on_bochs() {
    local status=(0 0) memory=256
    pack_guest "$EMULATORS/x86-guest/init" objcopy "$@"
    "$PYTHON" "$CI/guest/boot-params.py" "$work/boot-params" "$EMULATORS/x86-kernel/entry" "$work/initrd" "$memory" \
        "console=ttyS0,115200 quiet panic=-1 nokaslr acpi=off pci=off mitigations=off tsc=reliable tsc_early_khz=200000 cryptomgr.notests initcall_blacklist=load_system_certificate_list ${kernel_words//,/ } ${CFI_STACK_KERNEL:-}"
    # The clock of the guest counts instructions: ips and tsc_early_khz belong together.
    cat >"$work/bochsrc" <<CONF
cpu: model=$model, count=1, ips=200000000, reset_on_triple_fault=0, ignore_bad_msrs=1
memory: guest=$memory, host=$memory, block_size=8192
romimage: file=$EMULATORS/x86-guest/rom.bin
vgaromimage: file=$EMULATORS/x86-guest/video.bin
vga: extension=none
display_library: nogui
clock: sync=none, time0=1700000000
com1: enabled=1, mode=file, dev=$work/machine.console
port_e9_hack: enabled=1
log: $work/machine.log
panic: action=fatal
error: action=ignore
info: action=ignore
debug: action=ignore
speaker: enabled=0, mode=none
floppya: image=none
ata0: enabled=0
pci: enabled=0
optramimage1: file=$work/boot-params, address=0x10000
optramimage2: file=$EMULATORS/x86-kernel/kernel.img, address=0x1000000
optramimage3: file=$work/initrd, address=0x6000000
CONF
    set +e
    (cd "$work" && within_limit "$EMULATORS/bochs/bochs" -q -f bochsrc </dev/null 2>machine.errors) | read_guest
    status=("${PIPESTATUS[@]}")
    set -e
    guest_verdict "${status[@]}"
}
