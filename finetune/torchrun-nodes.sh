#!/usr/bin/env bash
# Train on the GPUs of one or several machines, by torchrun. Run it on each of them; all see the same files.
#   NODES=2 NODE=0 HEAD=gpu01 finetune/torchrun-nodes.sh finetune/llama3.1-8b-full-fsdp-compact.yaml --out runs/8b-full
#   NODES=2 NODE=1 HEAD=gpu01 finetune/torchrun-nodes.sh ... (the same on the second)
# NODES  machines (default 1)           NODE  number of this one, from 0 (default 0)
# HEAD   name of machine 0              GPUS  of each machine (default 8)        PORT  free on machine 0 (default 29500)
# What follows is for `crystallm-kit train`. Interrupted, run it again everywhere: it goes on from the last checkpoint.
set -euo pipefail

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
exec torchrun \
  --nnodes="${NODES:-1}" --node-rank="${NODE:-0}" --nproc-per-node="${GPUS:-8}" \
  --master-addr="${HEAD:-localhost}" --master-port="${PORT:-29500}" \
  -m crystallm_kit train "$@"
