#!/usr/bin/env bash
# vLLM alone, with the crystal constraint plugged in, for `crystallm-kit serve --upstream` on this or another machine.
#   serve/vllm-server.sh MODEL_FOLDER [what else `vllm serve` takes]
#   serve/vllm-server.sh shipped --port 8001
#   serve/vllm-server.sh runs/8b/merged --data-parallel-size 4
# `crystallm-kit serve --engine vllm` does this by itself on one machine; here vLLM is started by other means: on
# several nodes, in a container of its own, as a service of its own.
# PYTHON      of vLLM's environment (vllm-environment.sh), default .venv-vllm/bin/python
# CONSTRAINT  "" for a model that does not write the `wyckoff` format: nothing could be held to a constraint there
set -euo pipefail

python="${PYTHON:-.venv-vllm/bin/python}"
model="$1"
shift
if [[ "$model" == shipped ]]; then
  model="$("$python" -c \
    'from crystallm_kit.models.folders import shipped_model_folder; print(shipped_model_folder())')"
fi
constraint="${CONSTRAINT-crystallm_kit.engines.vllm_constraint:CrystalConstraint}"

options=(
  # this machine alone, unless a later --host says otherwise
  --host 127.0.0.1 --port 8001
  --served-model-name "${SERVED_NAME:-crystallm-kit}"
  # the request says how tokens are drawn, not a file of the model
  --generation-config vllm
  # log-probabilities of what was drawn, under the constraint
  --logprobs-mode processed_logits
  # of its own, or all engines would draw the same samples for requests without a seed
  --seed "$RANDOM"
  --max-num-seqs "${MAX_NUM_SEQS:-1024}"
  --disable-uvicorn-access-log
)
if [[ -n "$constraint" ]]; then
  options+=(--logits-processors "$constraint")
fi
# Tokens that are not made into text, a route that later releases open only when asked.
if "$python" -c 'import sys; from crystallm_kit.server.vllm_jobs import find_vllm
sys.exit(not getattr(find_vllm(), "has_scale_out_option", False))'; then
  options+=(--enable-scale-out)
fi

# The constraint is of vLLM's V1 interface, which CPU and GPU releases share; it is told which model it serves.
export VLLM_USE_V2_MODEL_RUNNER=0 CRYSTALLM_KIT_SERVED_MODEL="$model"
# Nothing is fetched, nothing is reported. A key is asked for where VLLM_API_KEY holds one.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1

exec "$python" -m vllm.entrypoints.cli.main serve "$model" "${options[@]}" "$@"
