"""loop.py: the loop learns, resumes to the same losses after a kill, and stops with a reason."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from crystallm_kit.errors import RecipeError, TrainingError
from crystallm_kit.models.checkpoints import ModelRecipe, new_model, read_manifest
from crystallm_kit.recipes import recipe_to_dict
from crystallm_kit.tokens.drawing import Examples, StoredInfo, VocabularyInfo
from crystallm_kit.training.batches import ArraySource, DeviceExamples, Layout, write_arrays
from crystallm_kit.training.loop import main, train
from crystallm_kit.training.loss import SummedLoss, add_residual_dropout
from crystallm_kit.training.recipe import (
    DataRecipe,
    OptimizerRecipe,
    ScheduleRecipe,
    TrainingRecipe,
    learning_rate,
)

ROOT = Path(__file__).parents[2]
VOCABULARY = VocabularyInfo(32, 0, 1, None, {"Na": 5, "K": 6, "Cl": 7})


def sequences(n: int, seed: int) -> Examples:
    """Return texts that can be learned: a prompt of two tokens starts a progression; the rest; an end."""
    random = np.random.default_rng(seed)
    texts = []
    for length in random.integers(8, 24, n):
        first, step = random.integers(0, 30), random.integers(1, 4)
        texts.append(np.append((first + step * np.arange(length)) % 30 + 2, 1))
    offsets = np.concatenate(([0], np.cumsum([len(text) for text in texts])))
    return Examples(np.concatenate(texts), offsets, np.full(n, 2))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "toy.npz"
    info = StoredInfo(VOCABULARY, "wyckoff", {}, "kit-1", "ab" * 32)
    write_arrays(path, [sequences(80, seed) for seed in range(2)], sequences(20, 9), info)
    return path


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads on matrices this small spend their time waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def recipe(corpus):
    return TrainingRecipe(
        seed=1,
        steps=30,
        batch_tokens=512,
        eval_every=10,
        checkpoint_every=5,
        log_every=5,
        ema_decay=0.9,
        residual_dropout=0.1,
        model=ModelRecipe(
            hidden_size=64, n_layers=2, n_heads=2, max_positions=64, element_embedding="periodic"
        ),
        data=DataRecipe(corpus=corpus),
        optimizer=OptimizerRecipe(lr=5e-3),
        schedule=ScheduleRecipe(warmup_steps=5),
    )


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in metrics(out) if "loss" in line}


def start(recipe: TrainingRecipe, out: Path) -> subprocess.Popen:
    """Run a recipe in a process of its own, with as many threads as this one."""
    import yaml

    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe_to_dict(recipe)))
    command = [sys.executable, "-m", "crystallm_kit.training.loop", str(path), "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.01)


def test_the_model_learns_and_its_folder_says_where_it_came_from(recipe, tmp_path):
    result = train(recipe, tmp_path / "run")
    assert result.stopped == "done"
    assert result.steps == 30
    assert losses(tmp_path / "run")[1] == pytest.approx(math.log(32), rel=0.05)  # evenly over 32 tokens
    assert result.validation_loss < 0.75 * losses(tmp_path / "run")[1]
    manifest = read_manifest(result.model_folder)
    assert manifest.recipe == recipe_to_dict(recipe)
    assert (manifest.format, manifest.template, manifest.seed) == ("wyckoff", "kit-1", 1)
    assert manifest.data_sha256 == ArraySource(recipe.data.corpus).sha256
    assert manifest.results["validation_loss"] == result.validation_loss
    assert manifest.results["training_tokens"] == sum(
        line.get("tokens", 0) for line in metrics(tmp_path / "run")
    )
    assert {"torch", "transformers", "numpy"} <= set(manifest.versions)
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "00000025",
        "00000030",
        "best",
    ]


def test_the_exported_model_is_a_plain_llama_with_the_validation_loss_that_was_measured(recipe, tmp_path):
    """Averaged weights, no dropout: as transformers' own loss has it, row by row and without any padding."""
    from transformers import AutoModelForCausalLM

    result = train(dataclasses.replace(recipe, export_dtype="float32"), tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(result.model_folder)
    assert type(model).__name__ == "LlamaForCausalLM"
    examples = ArraySource(recipe.data.corpus).validation()
    total = n = 0
    for begin, end in zip(examples.offsets[:-1], examples.offsets[1:], strict=True):
        ids = torch.from_numpy(examples.tokens[begin:end].astype(np.int64))[None]
        labels = ids.clone()
        labels[:, :2] = -100
        n_targets = ids.shape[1] - 2
        with torch.no_grad():
            total += model(input_ids=ids, labels=labels).loss.item() * n_targets
        n += n_targets
    assert total / n == pytest.approx(result.validation_loss, rel=1e-5)


def test_a_killed_run_resumes_to_the_same_losses_to_the_last_digit(recipe, tmp_path):
    recipe = dataclasses.replace(recipe, steps=100, eval_every=20, checkpoint_every=10)
    train(recipe, tmp_path / "whole")
    process = start(recipe, tmp_path / "killed")
    wait_for(tmp_path / "killed" / "checkpoints" / "00000010", process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed" / "model").exists()
    assert len(losses(tmp_path / "killed")) < 100
    result = train(recipe, tmp_path / "killed")
    assert result.stopped == "done"
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    whole, killed = (
        (tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "killed")
    )
    assert whole == killed


def test_sigterm_saves_and_exits_with_zero(recipe, tmp_path):
    recipe = dataclasses.replace(recipe, steps=5_000, checkpoint_every=1_000)
    process = start(recipe, tmp_path / "run")
    wait_for(tmp_path / "run" / "metrics.jsonl", process)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    result = json.loads(output)
    assert result["stopped"] == "signal"
    assert (tmp_path / "run" / "checkpoints" / f"{result['steps']:08d}" / "state.pt").exists()
    assert f"stopped by a signal at step {result['steps']}" in errors


def test_a_half_written_checkpoint_is_never_taken_for_whole(recipe, tmp_path, capsys):
    train(dataclasses.replace(recipe, steps=10), tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / ".00000015.writing").mkdir()
    state = checkpoints / "00000010" / "state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    train(dataclasses.replace(recipe, steps=12), tmp_path / "run")
    errors = capsys.readouterr().err
    assert "00000010 cannot be read" in errors
    assert "resuming at step 5" in errors
    assert sorted(losses(tmp_path / "run")) == list(range(1, 13))


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_good_checkpoint(recipe, tmp_path):
    train(dataclasses.replace(recipe, steps=5), tmp_path / "run")
    state = torch.load(tmp_path / "run" / "checkpoints" / "00000005" / "state.pt", weights_only=True)
    state["tensors"]["weight model.norm.weight"][0] = math.nan
    torch.save(state, tmp_path / "run" / "checkpoints" / "00000005" / "state.pt")
    with pytest.raises(TrainingError) as caught:
        train(dataclasses.replace(recipe, steps=50), tmp_path / "run")
    message = str(caught.value)
    assert "the loss is nan at step 6. The checkpoint of step 5 is whole and stays" in message
    assert "Lower optimizer.lr (now 0.005)" in message
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdecimal()] == [
        "00000005"
    ]


def test_a_full_disk_is_named_and_the_last_checkpoint_stays(recipe, tmp_path, monkeypatch):
    train(dataclasses.replace(recipe, steps=5), tmp_path / "run")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.save", full)
    with pytest.raises(
        TrainingError, match=r"the disk is full, or a quota is\. The checkpoint of step 5 is whole"
    ):
        train(recipe, tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "00000005" / "state.pt").exists()
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def test_a_run_is_not_resumed_with_other_settings(recipe, tmp_path):
    train(dataclasses.replace(recipe, steps=5), tmp_path / "run")
    other = dataclasses.replace(recipe, optimizer=OptimizerRecipe(lr=1e-4))
    with pytest.raises(RecipeError, match=r"other settings: optimizer.lr was 0.005, is 0.0001"):
        train(other, tmp_path / "run")
    assert train(dataclasses.replace(other, steps=6), tmp_path / "run", resume=False).steps == 6


def test_a_run_is_not_resumed_with_another_template(recipe, tmp_path):
    """A model asked in two ways answers neither."""
    train(dataclasses.replace(recipe, steps=5), tmp_path / "run")
    other = tmp_path / "other.npz"
    info = StoredInfo(VOCABULARY, "wyckoff", {}, "words-1", "cd" * 32)
    write_arrays(other, [sequences(80, seed) for seed in range(2)], sequences(20, 9), info)
    with pytest.raises(RecipeError, match=r"the prompt template was 'kit-1' \(ab.*\), is 'words-1' \(cd"):
        train(dataclasses.replace(recipe, data=DataRecipe(corpus=other)), tmp_path / "run")


def test_looking_at_samples_changes_no_loss(recipe, tmp_path):
    plain = dataclasses.replace(recipe, steps=12)
    train(plain, tmp_path / "plain")
    seen = []

    def look(model, step):
        seen.append((step, model.training, model.lm_head.weight.detach().clone()))
        torch.manual_seed(5)
        torch.rand(3)
        return {"sample_validity": 0.5}

    train(dataclasses.replace(plain, sample_every=6), tmp_path / "looked", on_samples=look)
    assert losses(tmp_path / "looked") == losses(tmp_path / "plain")
    assert [(step, training) for step, training, _ in seen] == [(6, False), (12, False)]
    logged = [line for line in metrics(tmp_path / "looked") if "sample_validity" in line]
    assert logged == [{"step": step, "sample_validity": 0.5} for step in (6, 12)]


def test_a_batch_learned_by_heart_is_forgotten_again(recipe, tmp_path, capsys):
    plain = dataclasses.replace(recipe, steps=6)
    train(plain, tmp_path / "plain")
    train(dataclasses.replace(plain, overfit_check=40), tmp_path / "checked")
    assert "overfit check: one batch, 40 steps, loss 3." in capsys.readouterr().err
    assert losses(tmp_path / "checked") == losses(tmp_path / "plain")
    stuck = dataclasses.replace(plain, overfit_check=40, optimizer=OptimizerRecipe(lr=1e-9))
    with pytest.raises(TrainingError, match="the loss on one batch fell only from"):
        train(stuck, tmp_path / "stuck")


def test_it_stops_early_when_validation_gets_no_better(recipe, tmp_path):
    stuck = dataclasses.replace(
        recipe, optimizer=OptimizerRecipe(lr=0.0), early_stopping_patience=2, eval_every=2, steps=100
    )
    result = train(stuck, tmp_path / "run")
    assert (result.stopped, result.steps) == ("early", 6)
    assert result.model_folder is not None


def test_epochs_count_passes_over_the_data(recipe, tmp_path):
    result = train(dataclasses.replace(recipe, steps=None, epochs=2), tmp_path / "run")
    examples = ArraySource(recipe.data.corpus)
    expected = sum(len(examples.examples(epoch).tokens) - 80 for epoch in (0, 1))
    assert sum(line.get("tokens", 0) for line in metrics(tmp_path / "run")) == expected
    assert result.steps == len(losses(tmp_path / "run"))


def toy_loss(
    packed: bool, dropout: float = 0.0, n_key_value_heads: int | None = None
) -> tuple[float, torch.Tensor]:
    """Return the summed loss over some sequences and its gradient on the embedding."""
    examples = sequences(12, 3)
    recipe = ModelRecipe(
        hidden_size=64, n_layers=2, n_heads=4, n_key_value_heads=n_key_value_heads, max_positions=64
    )
    model = new_model(recipe, VOCABULARY, seed=1).train()
    from transformers import AttentionInterface

    from crystallm_kit.training.loss import attention

    AttentionInterface.register("crystallm_kit_training", attention)
    model.config._attn_implementation = "crystallm_kit_training"
    if dropout:
        add_residual_dropout(model, dropout)
    loss = SummedLoss(model, "cpu", bfloat16=False)
    layout = Layout(512, 512, 64, loss_on_prompt=False, packed=packed)
    device = DeviceExamples(examples, torch.device("cpu"), pad_token_id=0, loss_on_prompt=False)
    total = torch.zeros(())
    for step in layout.epoch(examples):
        for group in step.groups:
            total = total + loss(*device.batch(group))
    total.backward()
    return total.item(), model.model.embed_tokens.weight.grad


@pytest.mark.parametrize("n_key_value_heads", [None, 2])
def test_no_crystal_sees_another_in_either_layout(n_key_value_heads):
    """Packed end to end, padded, and one by one by transformers' own attention: one loss, one gradient."""
    packed, packed_gradient = toy_loss(True, n_key_value_heads=n_key_value_heads)
    padded, padded_gradient = toy_loss(False, n_key_value_heads=n_key_value_heads)
    recipe = ModelRecipe(
        hidden_size=64, n_layers=2, n_heads=4, n_key_value_heads=n_key_value_heads, max_positions=64
    )
    model = new_model(recipe, VOCABULARY, seed=1)
    examples = sequences(12, 3)
    alone = torch.zeros(())
    for begin, end in zip(examples.offsets[:-1], examples.offsets[1:], strict=True):
        ids = torch.from_numpy(examples.tokens[begin:end])[None]
        logits = model(input_ids=ids).logits[0, 1:-1]
        alone = alone + torch.nn.functional.cross_entropy(logits, ids[0, 2:], reduction="sum")
    alone.backward()
    assert packed == pytest.approx(alone.item(), rel=1e-5)
    assert padded == pytest.approx(alone.item(), rel=1e-5)
    for gradient in (packed_gradient, padded_gradient):
        torch.testing.assert_close(gradient, model.model.embed_tokens.weight.grad, rtol=1e-4, atol=1e-4)


def test_residual_dropout_acts_in_training_only():
    torch.manual_seed(0)
    assert toy_loss(False, dropout=0.5)[0] != toy_loss(False)[0]
    model = new_model(ModelRecipe(hidden_size=64, n_layers=2, n_heads=2), VOCABULARY, seed=1)
    ids = torch.arange(2, 12)[None]
    before = model.eval()(input_ids=ids).logits
    add_residual_dropout(model, 0.5)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert not torch.equal(model.train()(input_ids=ids).logits, before)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", {0: 0.1, 9: 1.0, 50: 1.0, 99: 1.0}),
        ("cosine", {0: 0.1, 9: 1.0, 10: 1.0, 55: 0.55, 100: 0.1}),
        (
            "wsd",
            {9: 1.0, 79: 1.0, 85: 0.55, 100: 0.1},
        ),  # a quarter of the decay: sqrt(1/4) = a half of the way
    ],
)
def test_schedules_pass_through_points_computed_by_hand(kind, expected):
    recipe = TrainingRecipe(
        seed=1,
        steps=100,
        model=ModelRecipe(),
        optimizer=OptimizerRecipe(lr=1.0),
        schedule=ScheduleRecipe(kind, warmup_steps=10, final_lr_ratio=0.1, decay_fraction=0.2),
    )
    for step, rate in expected.items():
        assert learning_rate(step, 100, recipe) == pytest.approx(rate), step


def test_the_command_prints_a_mistake_and_exits_with_two(corpus, tmp_path, capsys):
    (tmp_path / "x.yaml").write_text("seed: 1\nsteps: 1\nmodel: {}\noptimizer: {lr_rate: 1}\n")
    assert main([str(tmp_path / "x.yaml"), "--npz", str(corpus), "--out", str(tmp_path / "run")]) == 2
    assert "RecipeError" in (errors := capsys.readouterr().err)
    assert "did you mean 'lr'?" in errors
    (tmp_path / "y.yaml").write_text("seed: 1\nsteps: 1\nmodel: {hidden_size: 96}\n")
    assert (
        main([str(tmp_path / "y.yaml"), "--npz", str(tmp_path / "no.npz"), "--out", str(tmp_path / "run")])
        == 2
    )
    assert "no.npz: not a corpus" in capsys.readouterr().err


def test_training_imports_neither_pymatgen_nor_transformers_until_it_runs():
    code = (
        "import sys, crystallm_kit.training.loop\n"
        "print([m for m in ('pymatgen', 'transformers', 'datasets', 'moyopy') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one_and_one_resumes_them(recipe, tmp_path):
    import yaml

    constant = ScheduleRecipe("constant", warmup_steps=5)
    recipe = dataclasses.replace(recipe, residual_dropout=0.0, steps=20, schedule=constant)
    train(recipe, tmp_path / "one")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe_to_dict(dataclasses.replace(recipe, steps=10))))
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29591"]
    command += [
        "-m",
        "crystallm_kit.training.loop",
        str(tmp_path / "r.yaml"),
        "--out",
        str(tmp_path / "two"),
    ]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert sorted(two) == list(range(1, 11))
    train(recipe, tmp_path / "two")
    resumed = losses(tmp_path / "two")
    assert sorted(resumed) == sorted(one)
    for step in one:  # sums in another order: equal to what float32 leaves after so many steps
        assert resumed[step] == pytest.approx(one[step], rel=1e-5 if step < 4 else 1e-3), step


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_packed_on_a_gpu_learns_as_padded_on_the_cpu(recipe, tmp_path):
    recipe = dataclasses.replace(recipe, residual_dropout=0.0)
    packed = train(recipe, tmp_path / "packed")
    padded = train(dataclasses.replace(recipe, rows="padded", precision="float32"), tmp_path / "padded")
    assert packed.validation_loss == pytest.approx(padded.validation_loss, rel=0.05)
