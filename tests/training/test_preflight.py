"""preflight.py: what cannot work is said before the first step, with what to change."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
import yaml

from crystallm_kit.errors import EmptyInput, RecipeError, TrainingError
from crystallm_kit.models.bases import BaseRecipe
from crystallm_kit.models.checkpoints import ModelRecipe
from crystallm_kit.tokens.drawing import Examples, VocabularyInfo
from crystallm_kit.training.batches import Layout
from crystallm_kit.training.memory import memory_estimate, scratch_config
from crystallm_kit.training.preflight import (
    HOPELESS,
    TIGHT,
    check,
    check_examples,
    check_memory,
    check_stated,
    judge_overfit,
    largest_micro_tokens,
    lengths_report,
    main,
    planned_layout,
)
from crystallm_kit.training.recipe import DataRecipe, OptimizerRecipe, TrainingRecipe

VOCABULARY = VocabularyInfo(32, 0, 1)
RECIPE = TrainingRecipe(
    seed=1, steps=10, batch_tokens=65_536, micro_tokens=65_536,
    model=ModelRecipe(hidden_size=64, n_layers=2, n_heads=2, max_positions=64),
)  # fmt: skip
# Llama 3.1 70B's, as published in its config.json
LLAMA_70B = {
    "model_type": "llama", "vocab_size": 128_256, "hidden_size": 8_192, "intermediate_size": 28_672,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
}  # fmt: skip
QLORA = {
    "seed": 1, "steps": 10, "batch_tokens": 65_536, "micro_tokens": 4_096, "ema_decay": 0,
    "base": {"name": "llama-70b", "quantisation": "nf4", "gradient_checkpointing": True},
}  # fmt: skip


def examples_of(lengths: list[int], prompt: int = 2, largest: int = 31) -> Examples:
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    tokens = np.arange(offsets[-1]) % (largest + 1)
    return Examples(tokens, offsets, np.full(len(lengths), prompt, dtype=np.int32))


def layout_of(**changes) -> Layout:
    settings = {"batch_tokens": 512, "micro_tokens": 512, "max_length": 65, "loss_on_prompt": False}
    return Layout(**{**settings, "packed": True, **changes})


# ---------------------------------------------------------------- lengths and labels


def test_lengths_are_those_counted_by_hand():
    found = lengths_report(examples_of([10, 20, 30, 100], prompt=5), 65)
    assert (found.n, found.median, found.longest) == (4, 25.0, 100)
    assert (found.n_too_long, found.share_too_long, found.n_too_short) == (1, 0.25, 0)
    # inputs 9 + 19 + 29; the first 4 of each predict the prompt
    assert found.labelled_share == pytest.approx((57 - 12) / 57)
    assert sum(found.histogram) == 4
    text = "\n".join(found.lines())
    assert "median 25 tokens" in text
    assert "1 examples (25.0%) have more than 65 tokens" in text
    assert "data.max_length: 100 would keep all" in text
    assert "warning" not in text


def test_more_than_half_too_long_is_a_warning():
    lines = lengths_report(examples_of([100, 100, 100, 10]), 65).lines()
    assert any(line.startswith("warning: 3 examples (75.0%)") for line in lines)


def test_no_example_short_enough_is_refused_with_what_to_set():
    with pytest.raises(EmptyInput, match=r"none of 2 examples has 2 to 65 .* shortest has\s+100.*max_length"):
        check_examples(examples_of([100, 120]), layout_of(), VOCABULARY)
    with pytest.raises(EmptyInput, match="training set: no examples"):
        check_examples(examples_of([]), layout_of(), VOCABULARY)


def test_examples_that_are_prompt_alone_are_refused_unless_prompts_are_learned():
    examples = examples_of([10, 20], prompt=25)
    with pytest.raises(RecipeError, match=r"no position has a loss.*loss_on_prompt: true"):
        check_examples(examples, layout_of(), VOCABULARY)
    assert check_examples(examples, layout_of(loss_on_prompt=True), VOCABULARY).n == 2


def test_a_token_outside_the_vocabulary_is_refused():
    with pytest.raises(RecipeError, match="token id 32 lies outside the vocabulary of 32"):
        check_examples(examples_of([40, 40], largest=32), layout_of(), VOCABULARY)


def test_a_property_that_no_crystal_has_is_refused_and_a_rare_one_told():
    with pytest.raises(RecipeError, match=r"no band_gap_ev, which the template names.*Has: density"):
        check_stated({"band_gap_ev": 0, "density": 100}, 100)
    (warning,) = check_stated({"band_gap_ev": 2, "density": 100}, 100)
    assert warning.startswith("warning: band_gap_ev is known of 2 of 100 crystals (2.0%)")


def test_a_run_on_a_cpu_is_told_its_lengths():
    config = scratch_config(RECIPE, VOCABULARY.size)
    lines = check(RECIPE, config, layout_of(), examples_of([10, 20]), VOCABULARY, device=torch.device("cpu"))
    assert lines[0].startswith("lengths: 2 examples")
    assert not any("memory" in line for line in lines)


def test_a_validation_set_of_which_nothing_fits_is_refused():
    config = scratch_config(RECIPE, VOCABULARY.size)
    with pytest.raises(EmptyInput, match="validation set: none of 1 examples"):
        check(RECIPE, config, layout_of(), examples_of([10]), VOCABULARY, validation=examples_of([90]))


# ---------------------------------------------------------------- memory


@pytest.fixture(scope="module")
def scratch():
    """A model from scratch in passes of 65,536 positions: config, layout, bytes."""
    config = scratch_config(RECIPE, VOCABULARY.size)
    layout = planned_layout(RECIPE, config, 1)
    return config, layout, memory_estimate(config, RECIPE, layout, vocabulary=VOCABULARY).total


def test_what_fits_is_said_to_fit(scratch):
    config, layout, total = scratch
    examples = examples_of([10] * 20)
    lines = check(RECIPE, config, layout, examples, VOCABULARY, capacity=total / TIGHT * 1.01)
    assert lines[-1] == "it fits."
    assert any(line.startswith("activations kept") for line in lines)


def test_what_is_tight_is_a_warning_with_micro_tokens_that_fit(scratch):
    config, layout, total = scratch
    _, lines = check_memory(config, RECIPE, layout, total, vocabulary=VOCABULARY)
    assert lines[-1].startswith("warning: it fits tightly")
    micro = int(re.search(r"micro_tokens: ([\d,]+) \(now 65,536\)", lines[-1])[1].replace(",", ""))
    smaller = dataclasses.replace(layout, micro_tokens=micro)
    assert memory_estimate(config, RECIPE, smaller, vocabulary=VOCABULARY).total < TIGHT * total


def test_what_cannot_fit_is_an_error_with_the_table(scratch):
    config, layout, total = scratch
    with pytest.raises(TrainingError, match=r"does not fit(?s:.*)micro_tokens(?s:.*)activations kept"):
        check_memory(config, RECIPE, layout, total / HOPELESS / 1.1, vocabulary=VOCABULARY)


def test_the_largest_micro_tokens_are_found_where_memory_is_a_straight_line():
    layout = layout_of(batch_tokens=65_536, micro_tokens=65_536)

    def total(_: TrainingRecipe, at: Layout) -> float:
        return 1_000.0 + at.pack_positions

    found = largest_micro_tokens(RECIPE, layout, 1_000 + 20_000, total)
    assert found == 16_384  # 65,536 in 4 equal passes; in 3 they have 21,888 positions
    assert largest_micro_tokens(RECIPE, layout, 1_000, total) is None
    padded = layout_of(batch_tokens=65_536, micro_tokens=65_536, packed=False)
    wide = 1_000 + 20_000

    def padded_total(_: TrainingRecipe, at: Layout) -> float:
        return 1_000.0 + at.micro_tokens

    assert largest_micro_tokens(RECIPE, padded, wide, padded_total) == 16_384


def test_the_command_shows_a_70b_recipe_and_what_it_needs(tmp_path, capsys):
    recipe, config = tmp_path / "qlora.yaml", tmp_path / "config.json"
    recipe.write_text(yaml.safe_dump(QLORA))
    config.write_text(json.dumps(LLAMA_70B))
    arguments = [str(recipe), "--config", str(config), "--gpus", "1", "--gpu-gb"]
    assert main([*arguments, "80"]) == 0
    shown = capsys.readouterr().out
    assert "frozen weights (nf4, double)                39.5" in shown
    assert "70,760,800,256 weights, 207,093,760 of them trained; 4,096 positions" in shown
    assert shown.endswith("it fits.\n")
    assert main([*arguments, "24"]) == 1
    assert "does not fit into the GPU's memory" in capsys.readouterr().err


def test_the_command_names_what_is_missing(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(QLORA))
    assert main([str(recipe), "--config", str(tmp_path), "--gpu-gb", "80"]) == 2
    assert "not a model's config.json" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main([str(recipe)]) == 2
        assert "--gpu-gb 80" in capsys.readouterr().err


# ---------------------------------------------------------------- one batch by heart


def trained_losses(lr: float, *, frozen: bool = False, n: int = 40) -> list[float]:
    """Return the losses of a small network on one batch."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Embedding(8, 16), torch.nn.Linear(16, 8))
    inputs, labels = torch.arange(8), torch.arange(8).flip(0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr)
    losses = []
    for _ in range(n):
        loss = torch.nn.functional.cross_entropy(network(inputs), labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        if not frozen:
            optimizer.step()
    return losses


def test_a_batch_learned_by_heart_is_no_problem():
    assert judge_overfit(trained_losses(1e-1)) is None


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        (trained_losses(1e-5), r"fell only from .* in 40 steps\. Raise optimizer\.lr \(now 0\.003\)"),
        (trained_losses(1e-1, frozen=True), "nothing trains"),
        ([0.0] * 10, "all labels are masked"),
        ([2.0, 3.0, 9.0], "rose from 2.0000 to 9.0000: lower optimizer.lr"),
        ([2.0, float("nan"), 1.0], "nan at step 2"),
        ([1.0], "too few steps"),
    ],
)
def test_a_batch_that_is_not_learned_is_told_with_what_to_look_at(losses, said):
    recipe = dataclasses.replace(RECIPE, optimizer=OptimizerRecipe(lr=3e-3))
    assert re.search(said, judge_overfit(losses, recipe))


def test_a_base_without_a_corpus_is_planned_for_texts_of_2048_tokens():
    recipe = TrainingRecipe(seed=1, steps=1, base=BaseRecipe("x"), data=DataRecipe())
    config = scratch_config(dataclasses.replace(RECIPE, model=ModelRecipe(max_positions=9_000)), 300)
    assert planned_layout(recipe, config, 2).max_length == 2_048
