#!/usr/bin/env bash
# The main job on a fresh machine: installs blitzjax into .venv, serves a real model and scales it out under a burst.
# Arguments go to the demo; see `bash launch/demo.sh --help`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

ensure_venv
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m launch.demo "$@"
