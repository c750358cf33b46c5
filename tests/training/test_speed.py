"""speed.py and what it measures: every row runs at toy size, and its numbers are what they say."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from pymatgen.core import Lattice, Structure

from crystallm_kit.tokens.drawing import Examples, StoredInfo, VocabularyInfo
from crystallm_kit.training.batches import open_source, write_arrays
from crystallm_kit.training.loop import train
from crystallm_kit.training.peer_loops import CrystallmSettings, Gpt, crystallm_loop
from crystallm_kit.training.speed import main, run_row, run_rows, table
from crystallm_kit.training.speed_data import build
from crystallm_kit.training.speed_rows import (
    LLAMA_3_1_8B,
    ROWS,
    Clock,
    Place,
    base_folder,
    labelled_share,
    llama_flops,
    lora_recipe,
)


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads on matrices this small spend their time waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def examples(n: int, seed: int, vocabulary: int) -> Examples:
    """Return random texts of 20 to 60 tokens, a third of each a prompt."""
    random = np.random.default_rng(seed)
    lengths = random.integers(20, 60, n)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    return Examples(random.integers(2, vocabulary, offsets[-1]), offsets, (lengths // 3).astype(np.int32))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Return a folder like speed_data.build's, with random tokens; compact.npz has a large vocabulary."""
    folder = tmp_path_factory.mktemp("data")
    for name, size in (("compact", 9_000), ("wyckoff", 64), ("cif", 64)):
        info = StoredInfo(
            VocabularyInfo(size, 0, 1, n_base=size if name == "compact" else None), name, {}, "t", "0"
        )
        write_arrays(folder / f"{name}.npz", [examples(60, 1, size)], examples(8, 2, size), info)
    return folder


@pytest.fixture
def place(data, tmp_path) -> Place:
    return Place(data, tmp_path, seconds=0.2, is_toy=True)


KIT_ROWS = {
    "lora": "compact.npz",
    "lora-checkpointing": "compact.npz",
    "scratch": "wyckoff.npz",
    "scratch-cif": "cif.npz",
}


@pytest.mark.parametrize("name", KIT_ROWS)
def test_a_row_of_the_kit_measures_tokens_and_crystals(name, place):
    found = ROWS[name].measure(name, place)
    assert found["timed_steps"] >= 1
    assert found["timed_seconds"] >= 0.2
    assert found["tokens_per_second"] == pytest.approx(found["timed_tokens"] / found["timed_seconds"])
    mean = np.diff(open_source(place.data / KIT_ROWS[name]).examples(0).offsets).mean() - 1
    assert found["tokens_per_second"] / found["crystals_per_second"] == pytest.approx(mean)


@pytest.mark.parametrize("name", ["crystal-text-llm", "crystallm"])
def test_a_row_of_a_peer_measures_tokens_and_crystals(name, place):
    """Crystal-text-LLM's steps are one crystal each, CrystaLLM's two passes of two windows of 64 tokens."""
    found = ROWS[name].measure(name, place)
    tokens_per_step = found["timed_tokens"] / found["timed_steps"]
    tokens_per_crystal = found["tokens_per_second"] / found["crystals_per_second"]
    assert found["timed_seconds"] >= 0.2
    if name == "crystallm":
        assert tokens_per_step == 2 * 2 * 64
        lengths = np.diff(open_source(place.data / "cif.npz").examples(0).offsets)
        assert tokens_per_crystal == pytest.approx(lengths.mean())
    else:
        assert tokens_per_step == pytest.approx(tokens_per_crystal)
        assert 20 <= tokens_per_crystal < 60


def test_lora_has_the_same_loss_packed_and_one_crystal_a_row(place):
    """No crystal sees another in a packed row, and the head at labelled positions alone misses none."""
    losses = []
    for rows in ("packed", "padded"):
        chosen = dataclasses.replace(lora_recipe("lora", place), rows=rows, steps=1, eval_every=1)
        losses.append(train(chosen, place.out / rows).validation_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0] == pytest.approx(math.log(9_000), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resume", "resume-fsdp"])
def test_a_run_saved_by_two_processes_goes_on_in_one_with_the_same_losses(name, place):
    found = ROWS[name].measure(name, place)
    assert len(found["losses_on_one"]) == len(found["losses_on_two"]) == 6
    assert found["largest_relative_difference"] < 1e-5
    assert len(set(found["losses_on_two"])) == 6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora-2gpu", "lora-fsdp-2gpu", "scratch-2gpu"])
def test_rows_of_two_processes_are_measured_under_torchrun(name, place):
    found = run_row(name, place, timeout_seconds=170)
    assert "error" not in found, found
    assert "ended_with" not in found
    assert found["timed_steps"] >= 1


def test_the_clock_leaves_the_warm_up_out(monkeypatch):
    now = iter([0.0, 10.0, 11.0, 12.0, 14.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    clock = Clock(seconds=4.0, n_warm=3)
    asked = [
        clock.stepped(100, 2, n_steps) for n_steps in (2, 2, 1, 1)
    ]  # at 10 (warm at 11), 11, 12 and 14 s
    assert asked == [False, False, False, False]
    numbers = clock.numbers()
    assert (numbers["timed_steps"], numbers["timed_tokens"], numbers["timed_seconds"]) == (2, 200, 3.0)
    assert numbers["tokens_per_second"] == pytest.approx(200 / 3)
    assert numbers["warm_up_seconds"] == 11.0


def test_flops_of_llama_8b_are_those_of_its_layers(tmp_path):
    """Counted from the layers that transformers builds, and LoRA's 41,943,040 weights by hand."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**LLAMA_3_1_8B, architectures=["LlamaForCausalLM"])
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linear = {name: m.weight.numel() for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    head = linear.pop("lm_head")
    lora = 32 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    assert lora == 41_943_040
    flops = llama_flops(tmp_path, rank=16, labelled=0.5)
    assert flops.model == 4 * sum(linear.values()) + 4 * head / 2 + 6 * lora
    assert flops.six_n == 6 * (sum(linear.values()) + head + lora)
    queries = llama_flops(tmp_path, rank=8, adapted=("q_proj", "v_proj"))
    assert queries.six_n - 6 * (sum(linear.values()) + head) == 6 * 32 * 8 * (4096 + 4096 + 4096 + 1024)


def test_the_labelled_share_counts_targets_of_texts(place):
    source = open_source(place.data / "compact.npz")
    found = source.examples(0)
    n_targets = sum(len(range(max(p, 1), end - start)) for start, end, p in zip(
        found.offsets, found.offsets[1:], found.prompt_lengths, strict=False))  # fmt: skip
    assert labelled_share(source) == pytest.approx(n_targets / (np.diff(found.offsets) - 1).sum())


def test_crystallms_model_is_gpt2_of_the_published_size():
    """Against transformers' GPT-2 with the same weights and zero biases; 25.9M weights are published."""
    from transformers import GPT2Config, GPT2LMHeadModel

    assert sum(w.numel() for w in Gpt(371, CrystallmSettings()).parameters()) == pytest.approx(
        25.9e6, rel=2e-3
    )
    torch.manual_seed(1)
    settings = CrystallmSettings(n_layers=2, n_heads=2, width=32, window=16, dropout=0.0)
    ours = Gpt(40, settings).eval()
    config = GPT2Config(
        vocab_size=40, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None
    )
    theirs = GPT2LMHeadModel(config).eval()
    weights = {name: torch.zeros_like(w) for name, w in theirs.state_dict().items()}
    weights |= {"transformer.wte.weight": ours.embedding.weight, "lm_head.weight": ours.embedding.weight}
    weights |= {"transformer.wpe.weight": ours.positions.weight, "transformer.ln_f.weight": ours.norm.weight}
    for i, block in enumerate(ours.blocks):
        of_layer = {
            "ln_1": block.norms[0].weight, "ln_2": block.norms[1].weight,
            "attn.c_attn": block.attention.weight.T, "attn.c_proj": block.attended.weight.T,
            "mlp.c_fc": block.wide.weight.T, "mlp.c_proj": block.narrow.weight.T,
        }  # fmt: skip
        weights |= {f"transformer.h.{i}.{name}.weight": weight for name, weight in of_layer.items()}
    theirs.load_state_dict(weights)
    tokens = torch.randint(40, (3, 17))
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(
            theirs(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten()
        )
        assert float(ours(tokens[:, :-1], tokens[:, 1:])) == pytest.approx(float(expected), rel=1e-5)


def test_crystallms_loop_learns_its_stream():
    """A stream of one repeated text: its loss falls far below that of guessing."""
    text = np.arange(2, 12)
    found = Examples(np.tile(text, 30), np.arange(0, 301, 10), np.zeros(30, dtype=np.int32))
    settings = CrystallmSettings(
        n_layers=1, n_heads=2, width=32, window=20, rows=4, accumulation=2, dropout=0.0
    )
    seen = []

    def on_step(n_tokens: int, n_crystals: float) -> bool:
        seen.append((n_tokens, n_crystals))
        return len(seen) == 60

    loss = crystallm_loop(found, 12, on_step, settings=settings, device=torch.device("cpu"))
    assert seen[0] == (160, 16.0)  # 4 rows x 20 x 2 passes, 10 tokens a crystal
    assert loss < 0.5 * math.log(12)


def test_a_base_folder_has_the_shape_and_the_vocabulary_of_the_texts(place):
    config = json.loads((base_folder(place) / "config.json").read_text(encoding="utf-8"))
    assert (config["num_hidden_layers"], config["vocab_size"]) == (2, 9_000)
    assert base_folder(place) == base_folder(place)


def test_a_row_that_does_not_end_is_killed_and_told(place):
    place.out.mkdir(exist_ok=True)
    found = run_row("scratch", place, timeout_seconds=0.3)
    assert found["error"] == "no end within 0 s"
    assert "failed: no end" in table([found])


def test_rows_that_find_no_time_left_are_not_begun(place, capsys):
    assert run_rows(["scratch", "lora"], place, timeout_seconds=9.0, minutes=0.1) == []
    assert "lora: not begun" in capsys.readouterr().out


def test_the_table_has_the_last_of_each_row_and_ratios():
    numbers = {
        "tokens_per_second": 3000.0,
        "timed_steps": 5,
        "timed_seconds": 2.0,
        "mfu": 0.3,
        "mfu_6n": 0.45,
    }
    records = [
        {"row": "lora", "what": "a", **numbers, "crystals_per_second": 1.0, "peak_memory_gb": 101.26},
        {"row": "lora", "what": "a", **numbers, "crystals_per_second": 12.0, "peak_memory_gb": 101.26},
        {"row": "crystal-text-llm", "what": "b", **numbers, "crystals_per_second": 3.0},
        {"row": "resume", "what": "c", "largest_relative_difference": 2e-8},
    ]  # fmt: skip
    text = table(records)
    assert "| lora | a | 3,000 | 12.0 | 30.0% | 45.0% | 101.3 | 5 steps, 2 s |" in text
    assert "lora / crystal-text-llm, crystals/s: 4.00" in text
    assert "losses within 2e-08" in text
    assert text.count("| lora |") == 1


def test_an_unknown_row_is_refused_with_the_known_ones(capsys, tmp_path):
    with pytest.raises(SystemExit):
        main(["lorra", "--data", str(tmp_path), "--out", str(tmp_path)])
    assert "crystal-text-llm" in capsys.readouterr().err


@pytest.fixture(scope="module")
def crystal_files(tmp_path_factory) -> list[Path]:
    """Return CIF files of eight rock salts, and of one crystal with more sites than MP-20 has."""
    folder = tmp_path_factory.mktemp("crystals")
    salts = [("Na", "Cl", 5.64), ("K", "Cl", 6.29), ("Li", "F", 4.03), ("Mg", "O", 4.21), ("Ca", "O", 4.81),
             ("Rb", "Br", 6.85), ("K", "I", 7.07), ("Na", "F", 4.62)]  # fmt: skip
    paths = []
    for cation, anion, a in salts:
        salt = Structure.from_spacegroup(
            "Fm-3m", Lattice.cubic(a), [cation, anion], [[0, 0, 0], [0.5, 0.5, 0.5]]
        )
        paths.append(folder / f"{cation}{anion}.cif")
        salt.get_primitive_structure().to(str(paths[-1]))
    large = salt.get_primitive_structure() * (3, 2, 2)
    large.to(str(folder / "large.cif"))
    return [*paths, folder / "large.cif"]


def test_the_three_corpora_hold_the_same_small_crystals(crystal_files, tmp_path):
    means = build(crystal_files, tmp_path, base_vocabulary=4_096)
    n = {name: len(open_source(tmp_path / f"{name}.npz").examples(0).offsets) - 1 for name in means}
    assert n == {"compact": 8, "wyckoff": 40, "cif": 8}
    assert means["wyckoff"] < means["compact"] < means["cif"]
    compact = open_source(tmp_path / "compact.npz")
    found = compact.examples(0)
    vocabulary = compact.info.vocabulary
    assert vocabulary.size == vocabulary.n_base == 4_096
    assert found.tokens.max() < 4_096
    first, second = found.offsets[:2]
    assert found.tokens[first] == vocabulary.bos_token_id
    assert found.tokens[second - 1] == vocabulary.eos_token_id
    assert 0 < found.prompt_lengths[0] < second - first


def test_digits_are_tokens_of_their_own():
    from crystallm_kit.training.speed_data import _byte_pairs

    tokenizer = _byte_pairs(["5.6 5.6 5.6\n90 90 90\nNa\n0.12 0.45 0.78"] * 20)
    ids = tokenizer("0.12 0.45\nNa", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == "0.12 0.45\nNa"
    assert not [t for t in tokenizer.convert_ids_to_tokens(ids) if sum(c.isdigit() for c in t) > 1]
