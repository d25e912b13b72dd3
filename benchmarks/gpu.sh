#!/usr/bin/env bash
# All measures of benchmarks/gpu.py on the GPU of this machine; arguments are passed on.
# Ends within ten minutes, whatever happens.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] && export PATH="$PWD/.venv/bin:$PATH"
python -c 'import potstill' 2>/dev/null || export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
exec timeout 590 python benchmarks/gpu.py "$@"
