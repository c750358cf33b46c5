"""run_state.py: a checkpoint is whole or not there, and a killed run goes on from it as if nothing was."""

import dataclasses
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from crystallm_kit.models.bases import BaseRecipe, LoraRecipe
from crystallm_kit.recipes import recipe_to_dict
from crystallm_kit.tokens.drawing import Examples, StoredInfo, VocabularyInfo
from crystallm_kit.training.batches import write_arrays
from crystallm_kit.training.distribution import Distribution
from crystallm_kit.training.loop import train
from crystallm_kit.training.recipe import (
    DataRecipe,
    OptimizerRecipe,
    ScheduleRecipe,
    TrainingRecipe,
)
from crystallm_kit.training.run_state import (
    checkpoint_folders,
    copy_whole,
    last_step,
    read_facts,
    read_tensors,
    read_weights,
    save_checkpoint,
    save_weights,
    whole_on_main,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def alone() -> Distribution:
    return Distribution()


def tensors() -> dict[str, torch.Tensor]:
    return {"a": torch.arange(6.0).view(2, 3), "b": torch.ones((), dtype=torch.bfloat16)}


def test_what_is_saved_is_read_bit_by_bit(tmp_path, alone):
    facts = {"step": 3, "random": [{"cpu": torch.get_rng_state()}], "loss": float("inf")}
    save_checkpoint(tmp_path / "00000003", facts, tensors(), alone)
    found = read_facts(tmp_path / "00000003")
    assert found["step"] == 3
    assert torch.equal(found["random"][0]["cpu"], facts["random"][0]["cpu"])
    empty = {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}
    read_tensors(tmp_path / "00000003", found, empty)
    for name, tensor in tensors().items():
        assert torch.equal(empty[name], tensor)
    with pytest.raises(KeyError, match="c"):
        read_tensors(tmp_path / "00000003", found, {"c": torch.zeros(1)})


def test_the_last_two_stay(tmp_path, alone):
    assert last_step(tmp_path) is None
    assert last_step(tmp_path / "none") is None
    for step in (5, 10, 15):
        save_checkpoint(tmp_path / f"{step:08d}", {"step": step}, tensors(), alone)
    assert [folder.name for folder in checkpoint_folders(tmp_path)] == ["00000010", "00000015"]
    assert last_step(tmp_path) == 15


def test_a_folder_that_is_being_written_or_is_no_checkpoint_is_not_one(tmp_path):
    for name in (".00000020.writing", "best", "20.old"):
        (tmp_path / name).mkdir()
    assert checkpoint_folders(tmp_path) == []


def test_what_a_killed_process_left_half_written_is_written_over(tmp_path, alone):
    half = tmp_path / ".00000005.writing"
    half.mkdir()
    (half / "state.pt").write_bytes(b"half")
    (half / "__1_0.distcp").write_bytes(b"of another number of processes")
    save_checkpoint(tmp_path / "00000005", {}, tensors(), alone)
    assert [path.name for path in tmp_path.iterdir()] == ["00000005"]
    assert [path.name for path in (tmp_path / "00000005").iterdir()] == ["state.pt"]


@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_damaged_checkpoint_is_an_error_that_the_loop_knows(tmp_path, alone, damage):
    save_checkpoint(tmp_path / "00000005", {}, tensors(), alone)
    state = tmp_path / "00000005" / "state.pt"
    content = state.read_bytes()
    state.unlink()
    if damage == "cut":
        state.write_bytes(content[: len(content) // 2])
    with pytest.raises((OSError, RuntimeError, EOFError, ValueError)):
        read_facts(tmp_path / "00000005")


def test_nothing_is_executed_when_a_checkpoint_is_read(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / "00000005").mkdir()
    torch.save({"a": Evil()}, tmp_path / "00000005" / "state.pt")
    with pytest.raises(ValueError, match="cannot be read as plain values"):
        read_facts(tmp_path / "00000005")
    assert not (tmp_path / "ran").exists()


def test_a_full_disk_leaves_the_checkpoint_before_and_nothing_half(tmp_path, alone, monkeypatch):
    """torch's zip writer says it as a RuntimeError; how much is free tells what it was."""
    save_checkpoint(tmp_path / "00000005", {}, tensors(), alone)

    def full(content, path):
        Path(path).write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RuntimeError, match="PytorchStreamWriter"):
        save_checkpoint(tmp_path / "00000010", {}, tensors(), alone)
    usage = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    for save in (
        lambda: save_checkpoint(tmp_path / "00000010", {}, tensors(), alone),
        lambda: save_weights(tmp_path / "best", 10, tensors(), alone),
    ):
        with pytest.raises(OSError, match="no space left") as caught:
            save()
        assert caught.value.errno == errno.ENOSPC
    assert [path.name for path in tmp_path.iterdir()] == ["00000005"]


def test_the_best_weights_are_replaced_as_a_whole(tmp_path, alone):
    save_weights(tmp_path / "best", 5, tensors(), alone)
    changed = {name: tensor + 1 for name, tensor in tensors().items()}
    save_weights(tmp_path / "best", 10, changed, alone)
    found = read_weights(tmp_path / "best")
    assert all(torch.equal(found[name], tensor) for name, tensor in changed.items())
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_copies_on_the_main_process_share_what_was_shared(alone):
    weight = torch.ones(3)
    whole = whole_on_main({"a": weight, "b": weight, "c": torch.ones(3)}, alone)
    weight.zero_()
    assert whole["a"].tolist() == [1, 1, 1]
    assert whole["a"] is whole["b"]
    assert whole["a"] is not whole["c"]
    copy_whole(weight, whole["a"])
    assert weight.tolist() == [1, 1, 1]


# ---------------------------------------------------------------- killed


def sequences(n: int, seed: int) -> Examples:
    drawn = np.random.default_rng(seed)
    texts = []
    for length in drawn.integers(8, 24, n):
        first, step = drawn.integers(0, 30), drawn.integers(1, 4)
        texts.append(np.append((first + step * np.arange(length)) * 10 % 320 + 2, 1))
    offsets = np.concatenate(([0], np.cumsum([len(text) for text in texts])))
    return Examples(np.concatenate(texts), offsets, np.full(n, 2))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_lora_run_killed_anywhere_has_the_losses_of_one_that_was_not(tmp_path, base_folder, seed):
    """To the last digit, with dropout, noise on the embeddings, and new rows of the base's embedding."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    corpus = tmp_path / "toy.npz"
    info = StoredInfo(VocabularyInfo(324, 0, 1, None, {}, 310), "wyckoff", {}, "kit-1", "ab" * 32)
    write_arrays(corpus, [sequences(80, seed) for seed in range(2)], sequences(20, 9), info)
    recipe = TrainingRecipe(
        seed=seed,
        steps=120,
        batch_tokens=512,
        micro_tokens=300,
        eval_every=20,
        checkpoint_every=7,
        log_every=5,
        ema_decay=0.9,
        neftune_alpha=5.0,
        base=BaseRecipe(str(base_folder("llama")), lora=LoraRecipe(rank=4, dropout=0.1)),
        data=DataRecipe(corpus=corpus),
        optimizer=OptimizerRecipe(lr=5e-3),
        schedule=ScheduleRecipe(warmup_steps=5),
    )
    train(recipe, tmp_path / "whole")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_to_dict(recipe)))
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "crystallm_kit.training.loop", str(path), "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (out / "checkpoints" / "00000007").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(random.random())
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (out / "model").exists()
    result = train(recipe, out)
    torch.set_num_threads(before)
    assert (result.stopped, result.steps) == ("done", 120)

    def metrics(name: str) -> list[dict]:
        return [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    assert metrics("killed") == metrics("whole")
    weights = [(tmp_path / name / "model" / "adapter_model.safetensors") for name in ("killed", "whole")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    plain = dataclasses.replace(recipe.base.lora, dropout=0.0)
    dry = dataclasses.replace(recipe, steps=3, base=dataclasses.replace(recipe.base, lora=plain))
    train(dry, tmp_path / "dry")
    assert [line["loss"] for line in metrics("dry")[:3]] != [line["loss"] for line in metrics("whole")[:3]]
