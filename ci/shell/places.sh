# Where things are, and how a script here speaks to its user. Sourced, never run.
# Sets ROOT (the checkout), CI (its ci/ folder) and CACHE (everything built or fetched, outside the checkout).

CI=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
ROOT=$(dirname "$CI")
CACHE=${CFI_STACK_CACHE:-${HOME:?HOME is not set; set it or CFI_STACK_CACHE}/.cache/cfi-stack}
EMULATORS=$CACHE/emulators
PROGRAM_NAME=ci/$(basename "$0")

# say WORDS…: one line for the user, on stderr, so that stdout stays the program's own.
say() { printf '%s: %s\n' "$PROGRAM_NAME" "$*" >&2; }

# die WORDS…: says what went wrong and what to do, and ends with status 1.
die() { say "$*"; exit 1; }

# usage FILE: prints the header comment of a script, which is its help.
usage() { sed -n '2,/^[^#]/{s/^# \{0,1\}//p;}' "$1"; }

# hold_builds: keeps other checkouts out of the shared build folders until this script and what it started have ended, and waits while
# another checkout is in them. Runs of one checkout go side by side: each holds the lock shared. Scripts called from one that
# holds it hold it too. Without flock(1) nothing is locked.
hold_builds() {
    local lock=$CACHE/target/lock told=
    [ "${CFI_STACK_LOCKED:-}" != "$lock" ] && command -v flock >/dev/null || return 0
    mkdir -p "$CACHE/target"
    exec 7>>"$lock"
    # The entry lock lies around the look at who is in and the change of it.
    until (
        flock 6
        if flock --nonblock --exclusive 7; then
            echo "$ROOT" >"$lock.holder"
        elif [ "$(cat "$lock.holder" 2>/dev/null)" != "$ROOT" ]; then
            exit 1
        fi
        flock --shared 7
    ) 6>>"$lock.entry"; do
        if [ -z "$told" ]; then say "waiting for $(cat "$lock.holder" 2>/dev/null || echo another checkout), which is building in $CACHE/target"; told=1; fi
        sleep 1
    done
    export CFI_STACK_LOCKED=$lock
}

# Debian's own python is asked for first: a version manager's shim in front of it costs a quarter of a second at every call.
PYTHON=/usr/bin/python3
[ -x "$PYTHON" ] || PYTHON=python3
