#!/usr/bin/env bash
# vLLM alone, with the crystal constraint plugged in, for `crystallm-kit serve --upstream` on this or another machine.
#   serve/vllm-server.sh MODEL_FOLDER [what else `vllm serve` takes]
#   serve/vllm-server.sh shipped --port 8001
# `crystallm-kit serve --engine vllm` does this by itself on one machine; here vLLM is started by other means: on
# several nodes, in a container of its own, as a service of its own.
# PYTHON  of vLLM's environment (vllm-environment.sh), default .venv-vllm/bin/python
set -euo pipefail

python="${PYTHON:-.venv-vllm/bin/python}"
model="$1"
shift
if [[ "$model" == shipped ]]; then
  model="$("$python" -c \
    'from crystallm_kit.models.folders import shipped_model_folder; print(shipped_model_folder())')"
fi

# The constraint is written for vLLM's V1 interface, which CPU and GPU releases share (engines/vllm_constraint.py).
export VLLM_USE_V2_MODEL_RUNNER=0
# Nothing is fetched, nothing is reported.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1

# processed_logits: log-probabilities of what was drawn, under the constraint. It listens on this machine alone, unless
# a later --host says otherwise; a key for it is read from VLLM_API_KEY.
exec "$python" -m vllm.entrypoints.cli.main serve "$model" \
  --host 127.0.0.1 --port 8001 \
  --served-model-name "${SERVED_NAME:-crystallm-kit}" \
  --logits-processors crystallm_kit.engines.vllm_constraint:CrystalConstraint \
  --logprobs-mode processed_logits \
  --max-num-seqs "${MAX_NUM_SEQS:-1024}" \
  "$@"
