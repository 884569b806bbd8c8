#!/usr/bin/env bash
# The tests, in the same .venv as the demo. Arguments go to pytest: `bash launch/test.sh tests/control -x`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

ensure_venv test
cd "$root"
exec "$python" -m pytest -q --durations=15 "$@"
