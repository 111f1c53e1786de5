# shellcheck shell=bash
# Sourced by ./quickstart and ./test: installs what is missing, and only that.
#
#   setup_packages PACKAGE...    Debian packages (apt)
#   setup_python FILE            a virtual environment in .venv with the locked requirements of FILE

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '\033[1m%s\033[0m\n' "$*" >&2; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

[ "$(id -u)" = 0 ] || fail "this needs root: sudo $0"

setup_packages() {
    local missing=()
    local package
    for package in "$@"; do
        dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || missing+=("$package")
    done
    [ ${#missing[@]} = 0 ] && return
    say "installing ${missing[*]}"
    command -v apt-get >/dev/null || fail "no apt-get here: install ${missing[*]} by hand"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${missing[@]}" >/dev/null
}

setup_python() {
    local requirements=$1
    local stamp
    stamp="$(sha256sum "$requirements" pyproject.toml | sha256sum)"
    if [ -x .venv/bin/python ] && [ "$(cat .venv/installed-"$(basename "$requirements")" 2>/dev/null)" = "$stamp" ]; then
        return
    fi
    say "setting up Python packages in .venv"
    [ -x .venv/bin/python ] || python3 -m venv .venv
    .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "Python 3.11 or newer is needed"
    .venv/bin/python -m pip install -qq --disable-pip-version-check --require-hashes -r "$requirements"
    .venv/bin/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
    printf '%s\n' "$stamp" >.venv/installed-"$(basename "$requirements")"
}
