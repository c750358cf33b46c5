"""fine_tuning.py: one command from crystal files to a published model, interrupted anywhere and looked at."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from pymatgen.core import Lattice, Structure

from crystallm_kit.cli import main
from crystallm_kit.errors import MissingExtra, ModelError, RecipeError, UserError
from crystallm_kit.fine_tuning import (
    corpus_recipe_of,
    fine_tune,
    look_ahead,
    sampler,
    validation_requests,
    with_corpus,
)
from crystallm_kit.generation import generate
from crystallm_kit.models.bases import BaseRecipe, LoraRecipe, load_base
from crystallm_kit.models.checkpoints import ModelRecipe, read_manifest
from crystallm_kit.recipes import recipe_to_dict
from crystallm_kit.records import Conditions, Crystal
from crystallm_kit.structures.writing import write
from crystallm_kit.text.prompts import template_named
from crystallm_kit.tokens.tokenizer import load_tokenizer
from crystallm_kit.training.batches import open_source
from crystallm_kit.training.live_model import lent
from crystallm_kit.training.loss import ATTENTION
from crystallm_kit.training.recipe import (
    DataRecipe,
    OptimizerRecipe,
    ScheduleRecipe,
    TrainingRecipe,
)

ROOT = Path(__file__).parents[1]
SIZES = {"Li": 4.0, "Na": 4.5, "K": 5.1, "Rb": 5.4, "F": 0.2, "Cl": 1.2, "Br": 1.5, "I": 2.0}


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads on matrices this small spend their time waiting for each other."""
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
            found.append(Crystal(f"{cation}{anion}-{group[0]}", structure))
    path = tmp_path_factory.mktemp("data") / "halides.json"
    write(found, path)
    return path


@pytest.fixture
def recipe(crystals) -> TrainingRecipe:
    return TrainingRecipe(
        seed=1,
        steps=12,
        batch_tokens=512,
        micro_tokens=512,
        eval_every=4,
        checkpoint_every=4,
        log_every=4,
        sample_every=4,
        samples=4,
        ema_decay=0.9,
        residual_dropout=0.1,
        model=ModelRecipe(hidden_size=32, n_layers=1, n_heads=2, max_positions=128),
        data=DataRecipe(inputs=(crystals,)),
        optimizer=OptimizerRecipe(lr=5e-3),
        schedule=ScheduleRecipe(warmup_steps=2),
    )


@pytest.fixture(scope="module")
def corpus(crystals, tmp_path_factory) -> Path:
    """Return a prepared corpus, for tests that are about something else."""
    recipe = TrainingRecipe(seed=1, steps=1, model=ModelRecipe(), data=DataRecipe(inputs=(crystals,)))
    return with_corpus(recipe, tmp_path_factory.mktemp("prepared")).data.corpus


@pytest.fixture
def prepared(recipe, corpus) -> TrainingRecipe:
    """Return the recipe over a corpus that is prepared."""
    return dataclasses.replace(recipe, data=DataRecipe(corpus=corpus))


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def curve(out: Path, name: str) -> dict[int, float]:
    return {line["step"]: line[name] for line in metrics(out) if name in line}


def start(recipe: TrainingRecipe, out: Path, *launcher: str, **environment: str) -> subprocess.Popen:
    """Run `crystallm-kit train` in a process of its own, or in several by a launcher."""
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe_to_dict(recipe)))
    command = [sys.executable, "-m", *launcher, "crystallm_kit", "train", str(path), "--out", str(out)]
    return subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process: subprocess.Popen, seconds: float = 120) -> tuple[str, str]:
    """Return what a process printed, after it ended well."""
    output, errors = process.communicate(timeout=seconds)
    assert process.returncode == 0, errors
    return output, errors


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.01)


# ---------------------------------------------------------------- from files to a model


def test_one_command_prepares_trains_looks_at_samples_and_writes_a_card(recipe, tmp_path, capsys):
    out = tmp_path / "run"
    result = fine_tune(recipe, out)
    assert (result.stopped, result.steps) == ("done", 12)
    assert "32 entries -> " in capsys.readouterr().err
    assert sorted(p.name for p in out.iterdir()) == [
        "checkpoints", "corpus", "metrics.jsonl", "model", "recipe.yaml", "samples",
    ]  # fmt: skip
    for name in ("sample_parse", "sample_as_asked", "sample_validity", "sample_unique"):
        values = curve(out, name)
        assert list(values) == [4, 8, 12]
        assert all(0 <= value <= 1 for value in values.values())
    for step in (4, 8, 12):
        lines = (out / "samples" / f"{step:08d}.jsonl").read_text().splitlines()
        assert len(lines) == recipe.samples
        assert {"text", "reason", "conditions"} <= json.loads(lines[0]).keys()
    manifest = read_manifest(result.model_folder)
    assert manifest.results["elements"] == sorted(SIZES)  # what constrained sampling offers
    assert manifest.data_sha256 in (result.model_folder / "README.md").read_text()
    assert (result.model_folder / "tokenizer.json").is_file()


def test_the_same_command_again_prepares_and_trains_nothing_anew(recipe, tmp_path):
    out = tmp_path / "run"
    first = fine_tune(recipe, out)
    stamps = [(p, p.stat().st_mtime_ns) for p in sorted((out / "corpus").iterdir())]
    before = metrics(out)
    again = fine_tune(dataclasses.replace(recipe, steps=16), out)
    assert [(p, p.stat().st_mtime_ns) for p in sorted((out / "corpus").iterdir())] == stamps
    assert metrics(out)[: len(before)] == before
    assert (first.steps, again.steps) == (12, 16)


def test_beginning_anew_keeps_the_corpus_of_the_same_recipe_and_replaces_another(recipe, tmp_path):
    out = tmp_path / "run"
    fine_tune(dataclasses.replace(recipe, steps=4), out)
    stamp = (out / "corpus" / "manifest.json").stat().st_mtime_ns
    fine_tune(dataclasses.replace(recipe, steps=2), out, resume=False)
    assert (out / "corpus" / "manifest.json").stat().st_mtime_ns == stamp
    assert not (out / "samples").exists()
    other = dataclasses.replace(recipe, steps=2, seed=2)
    with pytest.raises(UserError, match="holds a finished corpus of another recipe"):
        fine_tune(other, out)
    assert fine_tune(other, out, resume=False).stopped == "done"


def test_looking_at_samples_changes_no_loss_and_no_weight(prepared, tmp_path):
    """Same seed, with and without looks: the losses are equal to the last digit, dropout included."""
    looked = fine_tune(prepared, tmp_path / "looked")
    blind = fine_tune(dataclasses.replace(prepared, sample_every=None), tmp_path / "blind")
    assert curve(tmp_path / "looked", "sample_parse")
    assert not curve(tmp_path / "blind", "sample_parse")
    for name in ("loss", "validation_loss", "gradient_norm"):
        assert curve(tmp_path / "looked", name) == curve(tmp_path / "blind", name)
    weights = [(r.model_folder / "model.safetensors").read_bytes() for r in (looked, blind)]
    assert weights[0] == weights[1]


def test_samples_of_a_good_model_are_found_good(crystals, corpus, tmp_path):
    """The kit's own model, LoRA around it, before any training: most of what it writes is a valid crystal."""
    base = BaseRecipe(name="shipped", lora=LoraRecipe(rank=2))
    recipe = TrainingRecipe(seed=1, steps=1, samples=12, base=base, data=DataRecipe(corpus=corpus))
    vocabulary = open_source(corpus).info.vocabulary
    model = load_base(base, vocabulary, device="cpu", seed=1)
    numbers = sampler(recipe, tmp_path)(model, 1)
    assert numbers["sample_parse"] >= 0.75
    assert numbers["sample_as_asked"] <= numbers["sample_parse"]
    assert 0.5 <= numbers["sample_validity"] <= numbers["sample_as_asked"]


@pytest.mark.parametrize(("family", "new_tokens"), [("llama", "none"), ("gpt2", "format")])
def test_a_base_model_is_fine_tuned_with_its_own_tokenizer_and_asked_afterwards(
    recipe, base_folder, tmp_path, family, new_tokens
):
    """From files to samples of the adapter: the prompts in English, cut by the base model's tokenizer."""
    (tmp_path / "corpus.yaml").write_text(
        "seed: 1\nmax_tokens: 400\nencoding: {format: compact, template: crystal-text-llm"
        + (f", tokenizer: {base_folder(family)}, new_tokens: format" if new_tokens == "format" else "")
        + "}\n"
    )
    data = dataclasses.replace(recipe.data, corpus_recipe=tmp_path / "corpus.yaml")
    base = BaseRecipe(name=str(base_folder(family)), lora=LoraRecipe(rank=2))
    recipe = dataclasses.replace(
        recipe, model=None, base=base, data=data, steps=2, sample_every=2, samples=2, eval_every=2,
        batch_tokens=1024, micro_tokens=1024, residual_dropout=0.0, ema_decay=0.0,
    )  # fmt: skip
    result = fine_tune(recipe, tmp_path / "run")
    lines = (tmp_path / "run" / "samples" / "00000002.jsonl").read_text().splitlines()
    asked = [json.loads(line)["conditions"] for line in lines]
    assert len(asked) == 2
    assert all(set(conditions.get("formula", {})) <= set(SIZES) for conditions in asked)
    assert any(asked)
    assert (result.model_folder / "adapter_model.safetensors").is_file()
    samples = generate(Conditions(formula={"Na": 1, "Cl": 1}), n=2, model=str(result.model_folder))
    assert len(samples) == 2
    assert all(sample.verdict.reason for sample in samples)  # two steps teach nothing


# ---------------------------------------------------------------- lending a model


def states() -> list:
    """Return the states of the global random generators."""
    legacy = np.random.get_state()  # noqa: NPY002 - it is what libraries draw from
    return [torch.get_rng_state().tolist(), random.getstate(), legacy[1].tolist(), legacy[2:]]


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_a_lent_model_comes_back_as_it_was(toy_model, corpus, tmp_path, gradient_checkpointing):
    base = BaseRecipe(
        name=str(toy_model), lora=LoraRecipe(rank=2), gradient_checkpointing=gradient_checkpointing
    )
    recipe = TrainingRecipe(seed=1, steps=1, samples=2, base=base, data=DataRecipe(corpus=corpus))
    vocabulary = open_source(corpus).info.vocabulary
    model = load_base(base, vocabulary, device="cpu", seed=1).train()
    model.config._attn_implementation = ATTENTION
    frozen = next(m for n, m in model.named_modules() if n.endswith("q_proj.base_layer"))
    frozen.eval()  # one module of another mode than the rest
    modes = [m.training for m in model.modules()]
    weights = [w.detach().clone() for w in model.parameters()]
    generators = states()
    numbers = sampler(recipe, tmp_path)(model, 1)
    assert [m.training for m in model.modules()] == modes
    assert model.config._attn_implementation == ATTENTION
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert states() == generators
    assert sampler(recipe, tmp_path)(model, 2) == numbers  # the same requests and draws every time
    ids = torch.tensor([[5, 6, 7]])
    with lent(model, bfloat16=True) as network, torch.no_grad():
        logits = network(input_ids=ids).logits
        assert logits.dtype == torch.float32  # a CPU trains in float32 whatever the recipe says
        assert model.config._attn_implementation == "sdpa"
        assert not model.training
    assert torch.isfinite(logits).all()


def test_a_lent_model_comes_back_after_an_error_too(toy_model):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(toy_model).train()
    model.config._attn_implementation = ATTENTION
    with pytest.raises(KeyError), lent(model):
        raise KeyError
    assert model.training
    assert model.config._attn_implementation == ATTENTION


def test_compiled_layers_run_as_written_while_a_model_is_lent(toy_model):
    """A batch that changes its shape with every token would compile them anew with every token."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(toy_model)
    compiled = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        compiled.append(graph)
        return graph.forward

    model.model.layers[0].mlp.compile(backend=backend)
    with torch.no_grad():
        with lent(model) as network:
            inside = network(input_ids=torch.tensor([[5, 6, 7]])).logits
        assert not compiled
        outside = model(input_ids=torch.tensor([[5, 6, 7]])).logits
    assert compiled
    torch.testing.assert_close(inside, outside)


# ---------------------------------------------------------------- what the samples are asked


def test_samples_are_asked_what_the_validation_prompts_ask(corpus):
    source = open_source(corpus)
    tokenizer = load_tokenizer(corpus / "tokenizer")
    template = template_named("kit-1")
    requests = validation_requests(source, tokenizer, template, n=40)
    assert len(requests) == 40
    examples = source.validation()
    prompts = {
        tokenizer.decode(examples.tokens[begin : begin + n].tolist())
        for begin, n in zip(examples.offsets, examples.prompt_lengths, strict=False)
    }
    rendered = {template.render(conditions) for conditions in requests}
    assert rendered == prompts


def test_where_the_prompt_begins_the_text_its_first_line_is_asked_for(crystals, tmp_path):
    corpus_recipe = tmp_path / "cif.yaml"
    corpus_recipe.write_text("seed: 1\nmax_tokens: 1024\nencoding: {format: cif, template: cif-crystallm}\n")
    data = DataRecipe(inputs=(crystals,), corpus_recipe=corpus_recipe)
    recipe = TrainingRecipe(seed=1, steps=1, model=ModelRecipe(), data=data)
    corpus = with_corpus(recipe, tmp_path).data.corpus
    requests = validation_requests(
        open_source(corpus), load_tokenizer(corpus / "tokenizer"), template_named("cif-crystallm"), n=3
    )
    assert len(requests) == 3
    for conditions in requests:
        assert set(conditions.formula) <= set(SIZES)
        assert conditions == Conditions(formula=conditions.formula)


# ---------------------------------------------------------------- what the corpus is made with


def test_a_property_in_focus_that_the_data_lack_is_refused(crystals, tmp_path, monkeypatch):
    """Crystals without bulk moduli were prepared and trained on, which taught nothing of them."""
    monkeypatch.chdir(tmp_path)
    path = ROOT / "finetune" / "shipped-lora-wyckoff-bulk-modulus.yaml"
    corpus_recipe = "finetune/corpus-wyckoff-bulk-modulus.yaml"  # of the kit, from whatever folder
    with pytest.raises(UserError, match=r"no entry has the property 'bulk_modulus_gpa'.*bulk_modulus_vrh"):
        look_ahead(
            path, "run", overrides=(f"data.inputs=[{crystals}]", f"data.corpus_recipe={corpus_recipe}")
        )


def test_what_a_recipe_names_is_looked_for_before_any_work(crystals, tmp_path):
    """A run whose data.tokenizer was not there trained to its end; its model could not be asked anything."""
    path = tmp_path / "mine.yaml"
    path.write_text("seed: 1\nsteps: 1\nmodel: {hidden_size: 32, n_heads: 2}\n")
    for setting, message in (
        ("data.tokenizer=nowhere", "data.tokenizer 'nowhere': no tokenizer.json there.*null"),
        ("data.corpus_recipe=corpus.yaml", r"data.corpus_recipe 'corpus.yaml': no such file"),
        ("epochs=2", r"give one of 'epochs' and 'steps', and null for the other; got epochs 2.0 and steps 1"),
    ):
        with pytest.raises(RecipeError, match=message):
            fine_tune(path, tmp_path / "run", overrides=(f"data.inputs=[{crystals}]", setting))


def test_a_base_model_brings_its_tokenizer_into_the_corpus(recipe, toy_model, tmp_path):
    def tokenizer_for(base: str, text: str = "seed: 1\n") -> str | None:
        path = tmp_path / "corpus.yaml"
        path.write_text(text)
        data = DataRecipe(inputs=recipe.data.inputs, corpus_recipe=path)
        asked = dataclasses.replace(recipe, model=None, base=BaseRecipe(name=base), data=data)
        return corpus_recipe_of(asked).encoding.tokenizer

    assert tokenizer_for("my-lab/a-llama") == "my-lab/a-llama"
    assert tokenizer_for("my-lab/a-llama", "seed: 1\nencoding: {tokenizer: other/one}\n") == "other/one"
    assert tokenizer_for("shipped") is None  # it has the format's own tokens
    assert tokenizer_for(str(toy_model)) is None
    xyz = "seed: 1\nencoding: {format: compact, template: crystal-text-llm}\n"
    assert tokenizer_for(str(toy_model), xyz) == str(toy_model)  # which other tokens follow, preparing says
    assert corpus_recipe_of(recipe).encoding.tokenizer is None
    assert corpus_recipe_of(recipe).seed == recipe.seed


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"data": DataRecipe()}, RecipeError, "nothing to train on. Name crystal files"),
        ({"data": DataRecipe(inputs=(Path("a"),), corpus=Path("b"))}, RecipeError, "are both given"),
        ({"sample_every": 0}, RecipeError, "'sample_every' and 'samples' must be at least 1"),
        ({"push_to_hub": "crystals"}, UserError, "expected ORG/NAME"),
        ({"model": None, "base": BaseRecipe(name="no/such/folder")}, ModelError, "no such folder"),
        (
            {"model": None, "base": BaseRecipe(name="shipped", quantisation="nf4")},
            RecipeError,
            "needs a CUDA GPU",
        ),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_prepared(recipe, tmp_path, changes, error, said):
    if "needs a CUDA GPU" in said and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(error, match=said):
        fine_tune(dataclasses.replace(recipe, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_is_missing_is_said_before_anything_is_prepared(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("crystallm_kit.training.curves.find_spec", lambda _: None)
    with pytest.raises(MissingExtra, match="pip install wandb"):
        fine_tune(dataclasses.replace(recipe, track=("wandb",)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- interruptions


def test_sigterm_while_the_corpus_is_prepared_keeps_what_is_done(recipe, tmp_path, capsys):
    """The exit code is 0, and the result is JSON, which knows no infinity for the loss that is not there."""
    out, small = tmp_path / "run", tmp_path / "corpus.yaml"
    small.write_text("seed: 1\npart_entries: 2\n")
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, corpus_recipe=small))

    def stop_after_the_first_part() -> None:
        while not list((out / "corpus" / ".parts").glob("*.parquet")):
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=stop_after_the_first_part)
    thread.start()
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(recipe_to_dict(recipe)))
    assert main(["train", str(tmp_path / "run.yaml"), "--out", str(out)]) == 0
    thread.join()
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert (result["stopped"], result["steps"], result["validation_loss"]) == ("signal", 0, None)
    assert "while the corpus was prepared; the same command goes on" in said.err
    assert signal.getsignal(signal.SIGTERM) == before
    assert not (out / "corpus" / "manifest.json").exists()
    assert fine_tune(recipe, out).stopped == "done"


@pytest.mark.slow
def test_a_run_that_was_killed_ends_as_if_it_had_not_been(recipe, tmp_path):
    """SIGKILL, then the same command: the same curves, in TensorBoard as well, and each step once."""
    track = ("tensorboard",) if find_spec("tensorboard") else ()
    recipe = dataclasses.replace(recipe, steps=60, checkpoint_every=10, sample_every=10, track=track)
    finished(start(recipe, tmp_path / "whole"))
    process = start(recipe, tmp_path / "killed")
    wait_for(tmp_path / "killed" / "checkpoints" / "00000020", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed" / "model").exists()
    output, _ = finished(start(recipe, tmp_path / "killed"))
    assert json.loads(output)["stopped"] == "done"
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    if track:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        shown = EventAccumulator(str(tmp_path / "killed" / "tensorboard"))
        shown.Reload()
        assert [e.step for e in shown.Scalars("loss")] == list(range(1, 61))
        assert [e.step for e in shown.Scalars("sample_validity")] == [10, 20, 30, 40, 50, 60]


@pytest.mark.slow
def test_sigterm_saves_and_exits_with_zero(recipe, tmp_path):
    recipe = dataclasses.replace(recipe, steps=5_000, checkpoint_every=1_000, sample_every=None)
    process = start(recipe, tmp_path / "run")
    wait_for(tmp_path / "run" / "metrics.jsonl", process)
    process.send_signal(signal.SIGTERM)
    output, _ = finished(process)
    result = json.loads(output)
    assert result["stopped"] == "signal"
    assert list((tmp_path / "run" / "checkpoints").glob(f"{result['steps']:08d}"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ("torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"),
        ("accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
         "--mixed_precision", "no", "--dynamo_backend", "no", "-m"),
    ],
    ids=["torchrun", "accelerate"],
)  # fmt: skip
def test_two_processes_prepare_one_corpus_and_one_model(recipe, tmp_path, launcher):
    """The first prepares, looks at samples, prints and publishes; losses are those of one process."""
    recipe = dataclasses.replace(recipe, residual_dropout=0.0)
    alone = fine_tune(recipe, tmp_path / "one")
    process = start(recipe, tmp_path / "two", *launcher, ACCELERATE_USE_CPU="true")
    output, errors = finished(process, seconds=250)
    result = json.loads(output)  # one document: the other process printed nothing
    assert (result["stopped"], result["steps"]) == ("done", 12)
    assert errors.count("32 entries -> ") == 1
    assert result["validation_loss"] == pytest.approx(alone.validation_loss, rel=1e-4)
    assert curve(tmp_path / "two", "loss") == pytest.approx(curve(tmp_path / "one", "loss"), rel=1e-4)
    assert list(curve(tmp_path / "two", "sample_parse")) == [4, 8, 12]
    assert (tmp_path / "two" / "model" / "README.md").is_file()


def test_a_process_that_is_not_the_first_waits_for_the_corpus_and_prepares_none(
    recipe, corpus, tmp_path, monkeypatch
):
    monkeypatch.setenv("RANK", "1")
    out = tmp_path / "run"
    out.mkdir()
    thread = threading.Timer(0.3, lambda: (out / "corpus").symlink_to(corpus))
    thread.start()
    begun = time.monotonic()
    found = with_corpus(recipe, out)
    thread.join()
    assert time.monotonic() - begun >= 0.3
    assert found.data.corpus == out / "corpus"


# ---------------------------------------------------------------- the verbs


def test_the_verbs_train_merge_and_push(recipe, corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = DataRecipe(corpus=corpus)
    base = BaseRecipe(name="shipped", lora=LoraRecipe(rank=2))
    recipe = dataclasses.replace(
        recipe, model=None, base=base, data=data, residual_dropout=0.0, ema_decay=0.0, sample_every=None
    )
    plain = yaml.safe_dump(recipe_to_dict(recipe))
    Path("lora.yaml").write_text(plain)
    assert main(["train", "lora.yaml", "--set", "steps=1"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["stopped"], result["model_folder"]) == ("done", "runs/lora/model")
    assert Path("runs/lora/model/adapter_config.json").is_file()
    assert (
        "A LoRA adapter for the model that crystallm-kit ships"
        in Path("runs/lora/model/README.md").read_text()
    )
    assert main(["merge", "runs/lora/model", "--out", "merged"]) == 0
    assert "crystallm-kit generate --model merged" in capsys.readouterr().out
    assert Path("merged/config.json").is_file()
    assert "library_name: transformers" in Path("merged/README.md").read_text()
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert main(["push", "merged", "my-lab/crystals"]) == 2
    said = capsys.readouterr().err
    assert "push to my-lab/crystals: not sent" in said
    assert "run: crystallm-kit push merged my-lab/crystals" in said


def test_preflight_says_what_it_finds_and_stops_there(prepared, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("toy.yaml").write_text(yaml.safe_dump(recipe_to_dict(prepared)))
    assert main(["train", "toy.yaml", "--preflight"]) == 0
    assert "lengths: " in capsys.readouterr().out
    assert not list(tmp_path.glob("runs/*/checkpoints"))
    assert look_ahead(prepared, tmp_path / "run")[0].startswith("lengths: ")


def test_a_push_that_fails_after_training_leaves_the_model_whole(prepared, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    recipe = dataclasses.replace(prepared, steps=2, sample_every=None, push_to_hub="my-lab/crystals")
    with pytest.raises(UserError, match=r"run: crystallm-kit push .*run/model my-lab/crystals"):
        fine_tune(recipe, tmp_path / "run")
    assert read_manifest(tmp_path / "run" / "model").results["steps"] == 2
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "--model my-lab/crystals\n" in card
