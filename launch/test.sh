#!/usr/bin/env bash
# The tests, in the same .venv as the demo. Arguments go to pytest: `bash launch/test.sh tests/control -x`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

ensure_venv test
cd "$root"
tests=("$python" -m pytest -q --durations=15)
if [ $# -gt 0 ]; then
    exec "${tests[@]}" "$@"
fi

# All of them: those that compute in one process run beside those that start processes and often wait, and give way.
computing=(tests/control tests/engine tests/models tests/sim)
said=$(mktemp)
trap 'kill "$beside" 2>/dev/null || true; rm -f "$said"' EXIT
nice -n 10 "${tests[@]}" "${computing[@]}" >"$said" 2>&1 &
beside=$!
failed=0
"${tests[@]}" tests "${computing[@]/#/--ignore=}" || failed=$?
wait "$beside" || failed=$?
cat "$said"
exit "$failed"
