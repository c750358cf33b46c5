#!/usr/bin/env bash
# Serve from all GPUs of one machine.
#   serve/several-gpus.sh --model runs/8b/model --api-key-file api-keys
#   LAYOUT=tensor serve/several-gpus.sh --model runs/70b/merged
# What is given is for `crystallm-kit serve`.
# LAYOUT  engines  (default) PER_GPU engines on each GPU, each with a copy of the model; the server spreads requests over
#                  them, and restarts one that dies while the others go on
#         data     the same by vLLM's own data parallel: one vLLM, a copy on each GPU behind one port
#         tensor   one engine, each layer shared among all GPUs: for what does not fit into one. It slows small ones down
# PER_GPU engines on each GPU (default 1; the shipped model: 4 to 8, as CPU cores allow, two for each engine)
# GPUS    default: those that nvidia-smi lists
# VENV    vLLM's environment (vllm-environment.sh), default .venv-vllm
set -euo pipefail

gpus="${GPUS:-$(nvidia-smi --list-gpus | wc -l)}"
serve=("${VENV:-.venv-vllm}/bin/crystallm-kit" serve --engine vllm)
case "${LAYOUT:-engines}" in
  engines) exec "${serve[@]}" --engines "$((gpus * ${PER_GPU:-1}))" "$@" ;;
  data) exec "${serve[@]}" --vllm-args "--data-parallel-size $gpus" "$@" ;;
  tensor) exec "${serve[@]}" --vllm-args "--tensor-parallel-size $gpus" "$@" ;;
  *)
    echo "LAYOUT=$LAYOUT: engines, data or tensor expected" >&2
    exit 2
    ;;
esac
