"""zero.py: DeepSpeed takes the steps that one process takes, and its checkpoints are anybody's."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from crystallm_kit.errors import RecipeError
from crystallm_kit.models.bases import BaseRecipe, LoraRecipe
from crystallm_kit.models.checkpoints import ModelRecipe
from crystallm_kit.recipes import recipe_to_dict
from crystallm_kit.tokens.drawing import Examples, StoredInfo, VocabularyInfo
from crystallm_kit.training.batches import write_arrays
from crystallm_kit.training.loop import train
from crystallm_kit.training.recipe import (
    DataRecipe,
    OptimizerRecipe,
    ScheduleRecipe,
    TrainingRecipe,
)
from crystallm_kit.training.zero import engine_config

ROOT = Path(__file__).parents[2]
# Starts recipes with the environment that `accelerate launch --config_file` gives its processes.
DRIVER = """
import os, sys
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env
config, *jobs = sys.argv[1:]
given = launch_command_parser().parse_args(["--config_file", config, "--num_processes", "2", "-m", "x"])
options, defaults, _ = _validate_launch_command(given)
options.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
_, environment = prepare_deepspeed_cmd_env(options)
os.environ.update({name: value for name, value in environment.items() if name.startswith("ACCELERATE_")})
from crystallm_kit.training.loop import main
for job in jobs:
    recipe, out, *settings = job.split(",")
    assert main([recipe, "--out", out, *(f"--set={setting}" for setting in settings)]) == 0, job
"""


def test_the_engine_leaves_steps_precision_and_clipping_to_the_recipe():
    given = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": 5.0,
        "zero_optimization": {
            "stage": 2, "offload_optimizer": {"device": "none"}, "reduce_bucket_size": "auto",
            "stage3_gather_16bit_weights_on_model_save": True,
        },
    }  # fmt: skip
    made = engine_config(given, 1.0)
    assert made["zero_optimization"] == {"stage": 2}
    assert made["gradient_clipping"] == 1.0
    assert made["gradient_accumulation_steps"] == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero_optimization": {"stage": 3}}, "zero_stage 3.*sharding: fsdp"),
        ({"zero_optimization": {}}, "zero_stage None"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            "offload_optimizer_device: none",
        ),
        ({"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}, "precision is the recipe's"),
    ],
)
def test_what_the_loop_does_otherwise_is_refused(settings, message):
    with pytest.raises(RecipeError, match=message):
        engine_config(settings, 1.0)


def sequences(n: int, seed: int) -> Examples:
    random = np.random.default_rng(seed)
    texts = []
    for length in random.integers(8, 24, n):
        first, step = random.integers(0, 30), random.integers(1, 4)
        texts.append(np.append((first + step * np.arange(length)) % 30 + 2, 1))
    offsets = np.concatenate(([0], np.cumsum([len(text) for text in texts])))
    return Examples(np.concatenate(texts), offsets, np.full(n, 2))


def losses(out: Path) -> dict[int, float]:
    lines = (json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_two_processes_under_zero_take_the_steps_of_one_and_share_its_checkpoints(tmp_path, base_folder):
    corpus = tmp_path / "toy.npz"
    info = StoredInfo(VocabularyInfo(32, 0, 1, None, {}), "wyckoff", {}, "kit-1", "ab" * 32)
    write_arrays(corpus, [sequences(80, 0)], sequences(20, 9), info)
    scratch = TrainingRecipe(
        seed=1,
        steps=8,
        batch_tokens=512,
        micro_tokens=150,  # several passes for each step
        eval_every=3,
        checkpoint_every=4,
        log_every=2,
        ema_decay=0.9,
        overfit_check=20,
        model=ModelRecipe(hidden_size=64, n_layers=2, n_heads=2, max_positions=64),
        data=DataRecipe(corpus=corpus),
        optimizer=OptimizerRecipe(lr=5e-3, gradient_clip=0.5),
        schedule=ScheduleRecipe("constant", warmup_steps=2),
    )
    base = BaseRecipe(str(base_folder("llama")), lora=LoraRecipe(rank=4, dropout=0.0))
    kinds = {
        "scratch": scratch,
        "lora": dataclasses.replace(scratch, model=None, base=base, overfit_check=0),
    }
    jobs = []
    for kind, recipe in kinds.items():
        path = tmp_path / f"{kind}.yaml"
        path.write_text(yaml.safe_dump(recipe_to_dict(recipe)))
        train(recipe, tmp_path / f"{kind}-one")
        train(dataclasses.replace(recipe, steps=4), tmp_path / f"{kind}-grown")
        jobs += [
            f"{path},{tmp_path}/{kind}-zero",
            f"{path},{tmp_path}/{kind}-grown",
            f"{path},{tmp_path}/{kind}-shrunk,steps=4",
        ]
    (tmp_path / "driver.py").write_text(DRIVER)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29597"]
    config = ROOT / "finetune" / "accelerate-deepspeed-zero2.yaml"
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    run = subprocess.run(
        [*command, str(tmp_path / "driver.py"), str(config), *jobs],
        env=environment, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "Setting accelerator to CPU" in run.stdout + run.stderr  # DeepSpeed's own word: it was there
    for kind, recipe in kinds.items():
        train(recipe, tmp_path / f"{kind}-shrunk")
        one = losses(tmp_path / f"{kind}-one")
        for way in ("zero", "grown", "shrunk"):
            assert losses(tmp_path / f"{kind}-{way}") == pytest.approx(one, rel=5e-6), (kind, way)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
