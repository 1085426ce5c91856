# The machines that ci/on runs a program on. Sourced after places.sh and classes.sh, with a class loaded.
#
# $work/commands says what to run, as a sequence of strings that are each closed by a zero byte: A<word> for every word of a
# command, R at its end (the form that ci/guest/init.c reads). Each run_on_MACHINE runs the commands in turn and ends with
# the status of the first that failed, 0 if none did: its own, 128 + N when it died of signal N, 124 when its time was up, 99 when the machine itself failed.
# Where `each` is set, every command's status follows its output as a line "=== STATUS".
# `shipped` lists what --with named, `limit` the seconds. Where `count` is set, CFI_STACK_COUNTER tells the programs by what they count instructions.

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

# run_commands PREFIX…: runs the commands on this machine, each with PREFIX before it.
run_commands() {
    local word words=() status overall=0
    ulimit -c 0
    while IFS= read -r -d '' word <&4; do
        case $word in
            A*) words+=("${word#A}") ;;
            R)
                status=0
                within_limit "$@" "${words[@]}" || status=$?
                if [ -n "$each" ]; then echo "=== $status"; fi
                explain_status "${words[0]}" "$status"
                [ "$overall" != 0 ] || overall=$status
                words=()
                ;;
        esac
    done 4<"$work/commands"
    return "$overall"
}

run_on_native() { run_commands; }

run_on_user() {
    local counted=()
    if [ -n "$count" ]; then
        # A line of the log for each instruction, all as long.
        export CFI_STACK_COUNTER=trace:$work/trace
        counted=(-one-insn-per-tb -d exec,nochain -D "$work/trace")
    fi
    run_commands "$EMULATORS/qemu-user/qemu-aarch64" -cpu "$model" ${CFI_STACK_SEED:+-seed "$CFI_STACK_SEED"} ${counted[@]+"${counted[@]}"} \
        -L /usr/aarch64-linux-gnu
}

# count_by_clock: the virtual machine's clock counts instructions.
count_by_clock() {
    export CFI_STACK_COUNTER=clock CFI_STACK_ENV="${CFI_STACK_ENV:+$CFI_STACK_ENV,}CFI_STACK_COUNTER"
}

# explain_status PROGRAM STATUS: a word on stderr for an end that the program cannot have explained itself.
explain_status() {
    case $2 in
        "$TIME_IS_UP") say "$(basename "$1") did not end on $class within $limit s (CFI_STACK_TIMEOUT sets the limit)" ;;
        129 | 13[0-9] | 14[0-9] | 15[0-9])
            say "$(basename "$1") died of signal $(($2 - 128)) (SIG$(kill -l $(($2 - 128)))) on $class" ;;
    esac
}

# pack_guest INIT STRIP: writes $work/initrd: the first process, the commands, their programs and the files they name.
pack_guest() {
    local init=$1 strip=$2 word name path first=1
    local files=("/init=$init" "/command=$work/guest-commands")
    declare -A packed=()
    while IFS= read -r -d '' word; do
        name=${word#A}
        if [ "$word" = R ]; then first=1; continue; fi
        if [ -f "$name" ]; then
            path=$(realpath -s -- "$name")
            if [ -z "${packed[$path]:-}" ]; then
                packed[$path]=1
                if [ -n "$first" ] && "$strip" --strip-debug "$path" "$work/program-${#packed[@]}" 2>/dev/null; then
                    files+=("$path=$work/program-${#packed[@]}")
                else
                    files+=("$path=$path")
                fi
            fi
        fi
        first=
    done <"$work/commands"
    for name in ${shipped[@]+"${shipped[@]}"}; do files+=("$(realpath -s -- "$name")=$name"); done
    {
        printf 'D%s\0' "$PWD"
        printf 'VPWD=%s\0' "$PWD"
        for name in $(tr "," " " <<<"${CFI_STACK_ENV:-}"); do
            if [ -n "${!name+set}" ]; then printf 'V%s=%s\0' "$name" "${!name}"; fi
        done
        cat "$work/commands"
    } >"$work/guest-commands"
    mkdir -p "$work/empty"
    "$PYTHON" "$CI/guest/initramfs.py" "$work/initrd" "$PWD=$work/empty" "${files[@]}"
}

# read_guest: gives out the programs' output from the machine's on stdin.
read_guest() { "$PYTHON" "$CI/guest/records.py" "$work/log" "$work/finished" $each; }

# guest_verdict MACHINE-STATUS READER-STATUS: the status of the whole run, with a word on a machine that failed.
guest_verdict() {
    # A program may itself end with 99: only a machine that did not finish has failed.
    if [ -e "$work/finished" ]; then
        explain_status "$program" "$2"
        return "$2"
    fi
    if [ "$1" = "$TIME_IS_UP" ] || [ "$1" = 137 ]; then
        explain_status "$program" "$TIME_IS_UP"
        return "$TIME_IS_UP"
    fi
    say "the machine of $class failed (its own status: $1). The end of what it said:"
    tail -n 25 "$work/log" "$work"/machine.* 2>/dev/null | tr -d '\r' | sed 's/^/    /' >&2
    return "$MACHINE_FAILED"
}

run_on_system() {
    local status=(0 0) cpus=${CFI_STACK_CPUS:-2} counted=()
    if [ -n "$count" ]; then
        count_by_clock
        cpus=1 counted=(-icount "shift=0,sleep=off")
    fi
    pack_guest "$EMULATORS/arm64-guest/init" aarch64-linux-gnu-objcopy
    set +e
    within_limit "$EMULATORS/qemu-system/qemu-system-aarch64" -M virt -cpu "$model" -m 1024 -smp "$cpus" ${counted[@]+"${counted[@]}"} \
        ${CFI_STACK_SEED:+-seed "$CFI_STACK_SEED"} \
        -nographic -nodefaults -serial stdio -no-reboot -kernel "$EMULATORS/arm64-kernel/vmlinuz" -initrd "$work/initrd" \
        -append "console=ttyAMA0 quiet panic=-1 ${kernel_words//,/ } ${CFI_STACK_KERNEL:-}" </dev/null 2>"$work/machine.errors" | read_guest
    status=("${PIPESTATUS[@]}")
    set -e
    guest_verdict "${status[@]}"
}

run_on_bochs() {
    local status=(0 0) memory=256
    if [ -n "$count" ]; then count_by_clock; fi
    pack_guest "$EMULATORS/x86-guest/init" objcopy
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
