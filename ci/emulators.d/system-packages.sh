# A piece made of packages that the system itself must have. Sourced by such a piece after it has set `wanted` (commands)
# and `packages`. Installing needs root; when the commands are there already nothing is installed and nobody need be root.

whole() {
    local command
    for command in "${wanted[@]}"; do command -v "$command" >/dev/null || { echo "no $command"; return 1; }; done
}

fill() {
    whole && return
    if [ "$(id -u)" != 0 ]; then
        echo "these packages are missing and only root can install them: apt-get install ${packages[*]}"
        return 1
    fi
    export DEBIAN_FRONTEND=noninteractive
    local patience=(-o DPkg::Lock::Timeout=300)
    (
        flock 9
        apt-get "${patience[@]}" -qq update
        apt-get "${patience[@]}" -qq -y --no-install-recommends install "${packages[@]}"
    ) 9>"$EMULATORS/system-packages.lock"
}
