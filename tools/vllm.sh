#!/usr/bin/env bash
# Makes .venv-vllm, an environment with vLLM for CPUs that samples for RL stages (docs/engines.md), and
# prints how to name it to them.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source tools/setup.sh

install_vllm
printf 'export ERNIE_TRAIN_VLLM=%q\n' "$VLLM"
