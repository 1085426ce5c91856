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

# why_not_ready: prints what keeps the loaded class from running here, one reason a line; nothing when it is ready.
why_not_ready() {
    if [ "$isa" = x86_64 ] && [ "$machine" = native ] && [ "$(uname -sm)" != 'Linux x86_64' ]; then
        echo "this machine is $(uname -sm), not Linux x86_64"
    fi
    local piece
    for piece in ${pieces//,/ }; do
        [ -e "$EMULATORS/$piece.stamp" ] || echo "$piece is not set up (run: ci/emulators $(group_of_piece "$piece"))"
    done
}

# group_of_piece PIECE: the word that makes ci/emulators set it up.
group_of_piece() {
    case $1 in
        bochs | x86-kernel | x86-guest | tools) echo x86-cet ;;
        clang | rust-src) echo macho ;;
        *) echo arm64 ;;
    esac
}

# program_of ISA NAME: where `ci/cargo ISA build --release` leaves a program.
program_of() {
    case $1 in
        x86_64) echo "$CACHE/target/x86_64/x86_64-unknown-linux-gnu/release/$2" ;;
        aarch64) echo "$CACHE/target/aarch64/aarch64-unknown-linux-gnu/release/$2" ;;
    esac
}
