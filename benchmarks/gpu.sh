#!/usr/bin/env bash
# All measures of benchmarks/gpu.py on the GPU of this machine; arguments are passed on.
# Ends within ten minutes, whatever happens, and needs no network: packages that are missing are taken from a folder of
# wheels, if POTSTILL_WHEELS names one, into a folder that is gone afterwards.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python3 ] && export PATH="$PWD/.venv/bin:$PATH"
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
if [ -n "${POTSTILL_WHEELS:-}" ]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  python3 -m pip install --quiet --no-index --no-deps --target "$site" "$POTSTILL_WHEELS"/*.whl
  export PYTHONPATH="$PYTHONPATH:$site"
fi
python3 - <<'END'
import importlib.util
import sys

needed = (
    "torch", "torchvision", "timm", "numpy", "PIL", "safetensors",
    "pydantic", "pydantic_core", "annotated_types", "typing_inspection",  # pydantic and what it takes along
)
missing = [name for name in needed if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"missing here: {', '.join(missing)}; install them, or name a folder of their wheels in POTSTILL_WHEELS")
END
timeout --kill-after=8 590 python3 -m benchmarks.gpu "$@"
