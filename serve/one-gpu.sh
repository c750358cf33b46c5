#!/usr/bin/env bash
# Serve from one GPU: several vLLM engines side by side on it, and the server before them.
#   serve/one-gpu.sh --api-key-file api-keys --host 0.0.0.0
#   ENGINES=1 serve/one-gpu.sh --model runs/8b/model
# What is given is for `crystallm-kit serve`.
# ENGINES  one vLLM engine is one Python process, which a small model leaves no time to: the GPU waits for it. Several on
#          one GPU add up, until CPU cores run out. Default: half the cores, at most 8. A model of 1B and more: 1.
# VENV     vLLM's environment (vllm-environment.sh), default .venv-vllm
set -euo pipefail

cores="$(nproc)"
engines="$((cores / 2 < 1 ? 1 : cores / 2 > 8 ? 8 : cores / 2))"
exec "${VENV:-.venv-vllm}/bin/crystallm-kit" serve --engine vllm --engines "${ENGINES:-$engines}" "$@"
