"""finetune/: every recipe trains at toy size, every launch file starts what it says."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest
import torch
import yaml
from pymatgen.core import Lattice, Structure

from crystallm_kit.cli import _parser
from crystallm_kit.fine_tuning import fine_tune
from crystallm_kit.models.checkpoints import read_manifest
from crystallm_kit.models.loading import load_model_folder
from crystallm_kit.recipes import load_recipe
from crystallm_kit.records import Crystal
from crystallm_kit.structures.writing import write
from crystallm_kit.training.preflight import main as preflight
from crystallm_kit.training.recipe import TrainingRecipe

ROOT = Path(__file__).parents[2]
FINETUNE = ROOT / "finetune"
RECIPES = sorted(
    path for path in FINETUNE.glob("*.yaml") if not path.name.startswith(("corpus-", "accelerate-"))
)
BASED = [path for path in RECIPES if "scratch" not in path.name and "shipped" not in path.name]
SCRATCH = [path for path in RECIPES if "scratch" in path.name]
SIZES = {"Li": 4.0, "Na": 4.5, "K": 5.1, "Rb": 5.4, "F": 0.2, "Cl": 1.2, "Br": 1.5, "I": 2.0}
# Of the published models, as their config.json has it.
LLAMA_3_1 = {
    "model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 131072, "num_key_value_heads": 8,
    "rope_theta": 500000.0, "tie_word_embeddings": False, "rms_norm_eps": 1e-5,
}  # fmt: skip
LLAMA_70B = {
    **LLAMA_3_1, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
    "num_attention_heads": 64,
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def crystals(tmp_path_factory) -> Path:
    """Return a file of alkali halides, each in the rock-salt and in the CsCl structure."""
    found = []
    for cation, anion in product(("Li", "Na", "K", "Rb"), ("F", "Cl", "Br", "I")):
        length = SIZES[cation] + SIZES[anion]
        for group, scale in (("Fm-3m", 1.0), ("Pm-3m", 0.6)):
            cell = Lattice.cubic(length * scale)
            structure = Structure.from_spacegroup(group, cell, [cation, anion], [[0, 0, 0], [0.5] * 3])
            found.append(Crystal(f"{cation}{anion}-{group[0]}", structure.get_primitive_structure()))
    path = tmp_path_factory.mktemp("data") / "halides.json"
    write(found, path)
    return path


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """Once, from another folder than the project's, no corpus recipe and no tokenizer was found."""
    monkeypatch.chdir(tmp_path)


def toy(crystals: Path, *more: str) -> tuple[str, ...]:
    """Return settings that make a recipe a matter of seconds on a CPU, and nothing else of it."""
    return (
        f"data.inputs=[{crystals}]", "epochs=null", "steps=2", "batch_tokens=4096", "micro_tokens=2048",
        "schedule.warmup_steps=1", "eval_every=2", "checkpoint_every=2", "log_every=1", *more,
    )  # fmt: skip


@pytest.mark.parametrize("path", BASED, ids=lambda path: path.stem)
def test_a_recipe_of_a_base_trains_a_two_layer_one(path, crystals, base_folder, tmp_path, elsewhere):
    small = [f"base.name={base_folder('llama')}", "base.quantisation=none"]  # which a CPU cannot
    result = fine_tune(path, tmp_path / "run", overrides=toy(crystals, *small))
    assert (result.stopped, result.steps) == ("done", 2)
    shipped = load_recipe(path, TrainingRecipe)
    is_lora = shipped.base.method == "lora"
    assert (result.model_folder / "adapter_model.safetensors").is_file() == is_lora
    manifest = read_manifest(result.model_folder)
    assert (manifest.format, manifest.template) == ("compact", "crystal-text-llm")
    assert manifest.results["tasks"] == ["generate", "infill"]
    assert (result.model_folder / "tokenizer.json").is_file()
    model, _, _ = load_model_folder(result.model_folder)
    assert type(model).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("path", SCRATCH, ids=lambda path: path.stem)
def test_a_recipe_from_scratch_trains_two_layers(path, crystals, tmp_path, elsewhere):
    small = ["model.hidden_size=64", "model.n_heads=2", "model.intermediate_size=128", "model.n_layers=2"]
    result = fine_tune(path, tmp_path / "run", overrides=toy(crystals, *small))
    assert (result.stopped, result.steps) == ("done", 2)
    assert read_manifest(result.model_folder).format == ("cif" if "cif" in path.name else "wyckoff")
    assert (result.model_folder / "tokenizer.json").is_file()


def test_the_70b_recipe_shows_the_memory_that_preflight_estimates(tmp_path, capsys):
    path = FINETUNE / "llama3.1-70b-qlora-compact.yaml"
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    assert preflight([str(path), "--config", str(tmp_path), "--gpu-gb", "80"]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = [line.removeprefix("#   ") for line in path.read_text().splitlines() if line.startswith("#   ")]
    assert shown[1:] == lines, "write the new estimate into the recipe's head"


# ---------------------------------------------------------------- launch files


def executable(path: Path, text: str) -> None:
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(0o755)


@pytest.mark.parametrize("name", ["torchrun-nodes.sh", "slurm-nodes.sbatch"])
def test_bash_reads_the_launch_files(name):
    subprocess.run(["bash", "-n", FINETUNE / name], check=True)


def test_torchrun_and_the_command_line_take_what_the_launch_file_gives_them(tmp_path):
    from torch.distributed.run import parse_args

    executable(tmp_path / "torchrun", "import json, sys\nprint(json.dumps(sys.argv[1:]))")
    given = ["finetune/llama3.1-8b-full-fsdp-compact.yaml", "--out", "runs/a", "--set", "data.inputs=[a b]"]
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "NODES": "2", "NODE": "1"}
    run = subprocess.run(
        [FINETUNE / "torchrun-nodes.sh", *given],
        env={**environment, "HEAD": "gpu01"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    launched = parse_args(json.loads(run.stdout))
    assert (launched.nnodes, launched.node_rank, launched.nproc_per_node) == ("2", 1, "8")
    assert (launched.master_addr, launched.master_port) == ("gpu01", 29500)
    assert launched.module
    assert launched.training_script == "crystallm_kit"
    options = _parser().parse_args(launched.training_script_args)
    assert (options.verb, options.out, options.set) == ("train", Path("runs/a"), ["data.inputs=[a b]"])
    load_recipe(ROOT / options.recipe, TrainingRecipe, tuple(options.set))


def directives() -> dict[str, str]:
    found = re.findall(
        r"^#SBATCH --([\w-]+)(?:=(\S+))?$", (FINETUNE / "slurm-nodes.sbatch").read_text(), flags=re.MULTILINE
    )
    return dict(found)


def test_slurm_is_told_to_signal_the_processes_in_time_and_to_queue_again():
    given = directives()
    text = (FINETUNE / "slurm-nodes.sbatch").read_text()
    assert len(given) == text.count("#SBATCH") == text.count("\n#SBATCH --")
    assert text.index("#SBATCH") < text.index("\nset -euo"), "Slurm reads none after the first command"
    assert given["ntasks-per-node"] == given["gpus-per-node"], "one process for each GPU"
    assert given["requeue"] == ""
    name, seconds = given["signal"].split("@")  # not B:..., which would signal the batch shell alone
    assert name == "TERM"
    assert int(seconds) >= 120
    assert given["open-mode"] == "append", "the log of before stays"


SRUN = """
import os, signal, subprocess, sys
command = [argument for argument in sys.argv[1:]]
while command[0].startswith("--"):
    command.pop(0)
tasks = [
    subprocess.Popen(command, env={**os.environ, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)})
    for i in range(2)
]
open(os.environ["TASKS"], "w").write(" ".join(str(task.pid) for task in tasks))
sys.exit(max(abs(task.wait()) for task in tasks))
"""
SCONTROL = """
import os, sys
if sys.argv[1:3] == ["show", "hostnames"]:
    print("127.0.0.1\\nother")
else:
    open(os.environ["ASKED"], "a").write(" ".join(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_pre_empted_slurm_job_saves_is_queued_again_and_goes_on(crystals, tmp_path):
    """srun and scontrol are stand-ins that start two processes and note what is asked; the rest is real."""
    executable(tmp_path / "srun", SRUN)
    executable(tmp_path / "scontrol", SCONTROL)
    out = tmp_path / "runs" / "a"
    small = ["model.hidden_size=64", "model.n_heads=2", "model.intermediate_size=128", "model.n_layers=2"]
    settings = toy(crystals, *small, "steps=400", "sharding=fsdp", "eval_every=1000")
    command = ["bash", FINETUNE / "slurm-nodes.sbatch", FINETUNE / "llama-scratch-wyckoff-mp.yaml", out]
    command += [part for setting in settings for part in ("--set", setting)]
    environment = {
        **os.environ, "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true",
        "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS": "2",
        "SLURM_CPUS_PER_TASK": "1", "TASKS": str(tmp_path / "tasks"), "ASKED": str(tmp_path / "asked"),
    }  # fmt: skip
    job = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (out / "checkpoints" / "00000004").exists():
        assert job.poll() is None, job.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for task in (tmp_path / "tasks").read_text().split():
        os.kill(int(task), signal.SIGTERM)
    _, errors = job.communicate(timeout=120)
    assert job.returncode == 0, errors
    assert "stopped by a signal at step" in errors
    assert (tmp_path / "asked").read_text() == f"requeue {os.getpid()}"
    assert not (out / "model").exists()

    stopped = max(int(path.name) for path in (out / "checkpoints").iterdir() if path.name.isdecimal())
    end = ["--set", f"steps={stopped + 2}"]
    again = subprocess.run(
        [*command, *end], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=200
    )
    assert again.returncode == 0, again.stderr
    assert f"resuming at step {stopped}" in again.stderr
    assert (out / "model" / "model.safetensors").exists()
    assert (tmp_path / "asked").read_text() == f"requeue {os.getpid()}", "a finished job is not queued again"


@pytest.mark.parametrize("path", sorted(FINETUNE.glob("accelerate-*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_config_and_the_command_in_its_head(path):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    config = load_config_from_file(str(path))
    assert config.num_processes == 8
    assert config.mixed_precision == "no"
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed-zero2": "DEEPSPEED"}
    assert str(config.distributed_type.value) == kinds[path.stem.removeprefix("accelerate-")]
    head = re.findall(r"^#   (.*?)(\\\n#     (.*))?$", path.read_text(), flags=re.MULTILINE)
    command = shlex.split(head[0][0].replace("\\", "") + head[0][2])
    assert command[:2] == ["accelerate", "launch"]
    launched = launch_command_parser().parse_args(command[2:])
    assert ROOT / launched.config_file == path
    assert launched.module
    assert launched.training_script == "crystallm_kit"
    assert _parser().parse_args(launched.training_script_args).verb == "train"


def test_the_commands_in_the_heads_of_recipes_are_read_by_the_command_line():
    seen = 0
    for path in RECIPES:
        head = path.read_text().partition("\n\n")[0].replace("\\\n#", " ")
        for line in head.splitlines():
            if not re.match(r"#   (crystallm-kit|torchrun) ", line):
                continue
            words = shlex.split(line.removeprefix("#"))
            if words[0] == "torchrun":
                words = words[words.index("crystallm_kit") :]
            if words[1] == "train":
                options = _parser().parse_args(words[1:])
                assert ROOT / options.recipe == path
                load_recipe(path, TrainingRecipe, tuple(options.set))
                seen += 1
    assert seen >= len(RECIPES)


def test_every_recipe_is_in_the_readme_and_every_file_in_it_is_there():
    text = (FINETUNE / "README.md").read_text()
    for path in FINETUNE.iterdir():
        if path.suffix in (".yaml", ".sh", ".sbatch"):
            assert f"`{path.name}`" in text, path.name
    for name in re.findall(r"`(?:finetune/)?([\w.-]+\.(?:yaml|sh|sbatch))`", text):
        assert (FINETUNE / name).exists() or name in ("recipe.yaml",), name


def test_every_command_of_the_readme_is_read_by_the_command_line():
    text = (FINETUNE / "README.md").read_text()
    blocks = re.findall(r"```sh\n(.*?)```", text.partition("### Speed")[0], flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    assert len(lines) > 5
    for line in lines:
        words = shlex.split(line, comments=True)
        program = next(word for word in words if "=" not in word)
        if program in ("crystallm-kit", "torchrun", "accelerate"):
            start = words.index("crystallm-kit" if program == "crystallm-kit" else "crystallm_kit")
            options = _parser().parse_args(words[start + 1 :])
            if options.verb == "train":
                load_recipe(ROOT / options.recipe, TrainingRecipe, tuple(options.set))
        else:
            named = [word for word in words if word.startswith("finetune/")]
            assert named or program == "python", line
            assert all((ROOT / name).is_file() for name in named), line


def test_yaml_of_accelerate_is_yaml():
    for path in FINETUNE.glob("accelerate-*.yaml"):
        assert isinstance(yaml.safe_load(path.read_text()), dict)
