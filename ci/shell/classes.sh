# Reads the table ci/classes. Sourced after places.sh.

# class_names: every class, in the table's order.
class_names() { awk '!/^#/ && NF {print $1}' "$CI/classes"; }

# load_class NAME: sets class, isa, machine, model, kernel_words, require, suite, seconds and pieces; "-" in the table means empty.
load_class() {
    local row
    row=$(awk -v name="$1" '!/^#/ && $1 == name' "$CI/classes")
    [ -n "$row" ] || die "there is no class '$1'; the classes are: $(class_names | paste -sd' ')"
    read -r class isa machine model kernel_words require suite seconds pieces <<<"$row"
    local field
    for field in model kernel_words require pieces; do
        if [ "${!field}" = - ]; then printf -v "$field" ''; fi
    done
}

# why_not_ready: prints in one line what keeps the loaded class from running here; nothing when it is ready.
why_not_ready() {
    local piece missing=()
    for piece in ${pieces//,/ }; do
        [ -e "$EMULATORS/$piece.stamp" ] || missing+=("$piece")
    done
    if [ ${#missing[@]} -gt 0 ]; then echo "not set up: ${missing[*]} (run: ci/emulators $(emulator_group))"; fi
    if [ "$machine" = native ] && [ "$(uname -sm)" != 'Linux x86_64' ]; then
        echo "this machine is $(uname -sm), not Linux x86_64"
    fi
}

# emulator_group: the word that makes ci/emulators set the loaded class up; nothing when it needs no setting up.
emulator_group() {
    case $isa:$machine in
        aarch64:*) echo arm64 ;;
        *:bochs) echo x86-cet ;;
        *:none) echo macho ;;
    esac
}

# host_group: the word that makes ci/emulators set up what the class host wants and this machine lacks; nothing when it lacks nothing
# or could not get it. Without root nothing is installed, and a machine that has what it needs is left alone.
host_group() {
    local command
    command -v apt-get >/dev/null && [ "$(uname -m)" = x86_64 ] && [ "$(id -u)" = 0 ] || return 0
    for command in cc g++ ld objdump readelf python3; do
        command -v "$command" >/dev/null || { echo host; return 0; }
    done
}

# can_set_up: whether ci/emulators can set anything up here: Debian's apt on x86-64, and root or every compiler there already.
can_set_up() {
    local piece
    command -v apt-get >/dev/null && [ "$(uname -m)" = x86_64 ] || return 1
    [ "$(id -u)" != 0 ] || return 0
    for piece in tools cross-tools; do
        (. "$CI/emulators.d/pieces/$piece"; whole) >/dev/null || return 1
    done
}

# program_of ISA NAME: where `ci/cargo ISA build --release` leaves a program.
program_of() {
    case $1 in
        x86_64) echo "$CACHE/target/x86_64/x86_64-unknown-linux-gnu/release/$2" ;;
        aarch64) echo "$CACHE/target/aarch64/aarch64-unknown-linux-gnu/release/$2" ;;
    esac
}
