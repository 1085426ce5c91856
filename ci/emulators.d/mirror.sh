# Fetching Debian packages of other suites without touching the system's apt state. Sourced by the pieces.
#
# A view is a private apt configuration that sees only the suites and architectures it names. Its mirror is the one
# that the system's own apt uses, read from apt itself, so any form of sources file will do.

MIRROR_STATE=$EMULATORS/apt
MIRROR_MAX_AGE_MINUTES=${CFI_STACK_LIST_MINUTES:-720}

# mirror_of KIND: address of the archive (KIND main) or of its security archive (KIND security).
mirror_of() {
    local found
    found=$(env -u APT_CONFIG apt-get --print-uris update 2>/dev/null |
        sed -n "s#^'\(.*\)/dists/\([^']*\)/InRelease'.*#\1 \2#p" |
        awk -v kind="$1" '
            { security = $2 ~ /-security/ }
            security == (kind == "security") { print $1; exit }')
    [ -n "$found" ] || {
        echo "apt on this system names no $1 archive of Debian; add one to /etc/apt/sources.list.d and run ci/emulators again" >&2
        return 1
    }
    printf '%s\n' "$found"
}

keyring() {
    local file
    for file in /usr/share/keyrings/debian-archive-keyring.{gpg,pgp}; do
        [ -e "$file" ] && { echo "$file"; return; }
    done
    echo "Debian's archive keyring is missing; install the package debian-archive-keyring" >&2
    return 1
}

# view NAME ARCHITECTURES ENTRY…: defines a view and brings its lists up to date. Afterwards `seen NAME COMMAND…` runs apt there.
#   ENTRY is TYPE:KIND:SUITE:ARCHITECTURES, for example deb:main:trixie-backports:arm64 or deb-src:main:trixie:
#   ARCHITECTURES of the view are names with a comma between them; the first is the native one.
view() {
    local name=$1 architectures=$2 entry type kind suite arch address options key
    shift 2
    local dir=$MIRROR_STATE/$name
    mkdir -p "$dir/lists/partial" "$dir/cache/archives/partial" "$dir/state"
    key=$(keyring) || return 1
    local main security
    main=$(mirror_of main) || return 1
    security=$(mirror_of security) || return 1
    local sources=()
    for entry in "$@"; do
        IFS=: read -r type kind suite arch <<<"$entry"
        address=$main
        [ "$kind" = security ] && address=$security
        options="signed-by=$key"
        [ -n "$arch" ] && options="arch=$arch $options"
        sources+=("$type [$options] $address $suite main")
    done
    (
        flock 9
        if [ -z "${MIRROR_REFRESH:-}" ] && [ "$(printf '%s\n' "${sources[@]}")" = "$(cat "$dir/sources.list" 2>/dev/null)" ] &&
            [ -n "$(find "$dir/fresh" -mmin "-$MIRROR_MAX_AGE_MINUTES" 2>/dev/null)" ]; then
            exit 0
        fi
        printf '%s\n' "${sources[@]}" >"$dir/sources.list"
        touch "$dir/status"
        cat >"$dir/apt.conf" <<CONF
Dir::State "$dir/state";
Dir::State::Lists "$dir/lists";
Dir::State::Status "${MIRROR_STATUS:-$dir/status}";
Dir::Cache "$dir/cache";
Dir::Etc::SourceList "$dir/sources.list";
Dir::Etc::SourceParts "/dev/null";
Dir::Etc::Preferences "/dev/null";
Dir::Etc::PreferencesParts "/dev/null";
APT::Architecture "${architectures%%,*}";
APT::Architectures { $(printf '"%s"; ' ${architectures//,/ }) };
APT::Sandbox::User "$(id -un)";
Acquire::Languages "none";
Acquire::Retries "3";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled "false";
Debug::NoLocking "1";
CONF
        seen "$name" apt-get -qq update && touch "$dir/fresh"
    ) 9>"$dir/lock"
}

# seen NAME COMMAND…: runs an apt command within a view.
seen() { APT_CONFIG=$MIRROR_STATE/$1/apt.conf "${@:2}"; }

# unpack DIRECTORY DEB…: extracts packages into a directory.
unpack() {
    local into=$1 deb
    shift
    mkdir -p "$into"
    for deb in "$@"; do dpkg-deb -x "$deb" "$into"; done
}
