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

# Debian's own python is asked for first: a version manager's shim in front of it costs a quarter of a second at every call.
PYTHON=/usr/bin/python3
[ -x "$PYTHON" ] || PYTHON=python3
