"""learner.py and loss.py: what learns, on which loss, at what cost."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from crystallm_kit.models.bases import BaseRecipe, LoraRecipe, load_base
from crystallm_kit.models.checkpoints import ModelRecipe, new_model
from crystallm_kit.tokens.drawing import Examples, StoredInfo, VocabularyInfo
from crystallm_kit.training import loss as loss_module
from crystallm_kit.training.batches import ArraySource, DeviceExamples, Layout, write_arrays
from crystallm_kit.training.distribution import Distribution
from crystallm_kit.training.learner import Learner, layout_of, matrix_weights
from crystallm_kit.training.loss import ATTENTION, SummedLoss, add_noise, attention, decoder_layers
from crystallm_kit.training.recipe import DataRecipe, TrainingRecipe

VOCABULARY = VocabularyInfo(32, 0, 1)
CPU = torch.device("cpu")
SMALL = ModelRecipe(hidden_size=64, n_layers=2, n_heads=2, max_positions=64)


def examples(n: int = 12) -> Examples:
    random = np.random.default_rng(3)
    lengths = random.integers(8, 24, n)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    return Examples(random.integers(2, 32, offsets[-1]), offsets, np.full(n, 3))


def batches(packed: bool, loss_on_prompt: bool = False) -> list:
    layout = Layout(512, 512, 64, loss_on_prompt, packed=packed)
    data = DeviceExamples(examples(), CPU, pad_token_id=0, loss_on_prompt=loss_on_prompt)
    return [data.batch(group) for step in layout.epoch(examples()) for group in step.groups]


@pytest.fixture
def toy():
    AttentionInterface.register(ATTENTION, attention)
    model = new_model(SMALL, VOCABULARY, seed=1).train()
    model.config._attn_implementation = ATTENTION
    return model


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_a_large_vocabulary_has_the_loss_and_gradient_of_a_small_one(toy, packed, monkeypatch):
    """Logits at labelled positions alone, piece by piece, are the same sum."""

    def summed() -> tuple[torch.Tensor, torch.Tensor]:
        toy.zero_grad()
        loss = sum(SummedLoss(toy, "cpu", bfloat16=False)(*batch) for batch in batches(packed))
        loss.backward()
        return loss.detach(), toy.model.embed_tokens.weight.grad.clone()

    plain = summed()
    monkeypatch.setattr(loss_module, "_LARGE_VOCABULARY", 16)
    monkeypatch.setattr(loss_module, "_PIECE", 7)
    pieces = summed()
    torch.testing.assert_close(pieces[0], plain[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(pieces[1], plain[1], rtol=1e-4, atol=1e-5)


def test_a_batch_without_labels_has_no_loss_and_a_gradient_of_zero(toy, monkeypatch):
    """A process that got only padding takes part in the step all the same."""
    monkeypatch.setattr(loss_module, "_LARGE_VOCABULARY", 16)
    batch = batches(False)[0]
    empty = batch._replace(labels=torch.full_like(batch.labels, loss_module.IGNORED))
    loss = SummedLoss(toy, "cpu", bfloat16=False)(*empty)
    loss.backward()
    assert loss.item() == 0
    assert not toy.lm_head.weight.grad.any()


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_noise_on_the_embedding_is_uniform_and_shrinks_with_length_and_width(toy, packed):
    """NEFTune: of size alpha / sqrt(length x width), with each crystal's own length where rows are packed."""
    loss = SummedLoss(toy, "cpu", bfloat16=False)
    add_noise(loss, 5.0)
    batch = batches(packed)[0]
    loss.borders = batch.borders
    clean = toy.model.embed_tokens.weight[batch.inputs]
    torch.manual_seed(0)
    noise = (toy.model.embed_tokens(batch.inputs) - clean).abs()
    if packed:
        n = int((batch.borders.diff() > 0).sum())
        spans = list(zip(batch.borders[:n].tolist(), batch.borders[1 : n + 1].tolist(), strict=True))
        parts = [(noise[0, begin:end], end - begin) for begin, end in spans]
    else:
        parts = [(noise, batch.inputs.shape[1])]
    for part, length in parts:
        size = 5.0 / (length * 64) ** 0.5
        assert part.max() <= size * 1.0001
        assert part.mean().item() == pytest.approx(size / 2, rel=0.1)
    assert torch.equal(toy.eval().model.embed_tokens(batch.inputs), clean)


def test_matrices_are_counted_as_a_token_meets_them():
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, tie_word_embeddings=False,
        )
    )  # fmt: skip
    by_hand = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96) + 32 * 64
    assert matrix_weights(llama) == (0, by_hand)
    assert matrix_weights(llama.requires_grad_(False)) == (by_hand, 0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=64, n_layer=2, n_head=2, n_positions=64))
    assert matrix_weights(gpt2) == (0, 2 * 12 * 64 * 64 + 32 * 64)


def test_lora_adds_its_own_matrices_to_the_frozen_ones(tmp_path):
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2
        )
    ).save_pretrained(tmp_path)
    model = load_base(
        BaseRecipe(str(tmp_path), lora=LoraRecipe(rank=4)), VOCABULARY, device=CPU, seed=1
    )  # fmt: skip
    frozen, trained = matrix_weights(model)
    assert frozen == 2 * (4 * 64 * 64 + 3 * 64 * 96) + 32 * 64
    assert trained == 2 * 4 * (4 * (64 + 64) + 3 * (64 + 96))
    assert trained == sum(w.numel() for w in model.parameters() if w.requires_grad)
    assert len(decoder_layers(model)) == 2


def test_a_step_in_many_passes_is_a_step_in_one(tmp_path):
    """micro_tokens is about memory alone."""
    path = tmp_path / "toy.npz"
    write_arrays(path, [examples()], examples(), StoredInfo(VOCABULARY, "wyckoff", {}, "kit-1", "ab" * 32))
    source = ArraySource(path)
    gradients = []
    for micro_tokens in (512, 64):
        recipe = TrainingRecipe(
            seed=1, steps=1, batch_tokens=512, micro_tokens=micro_tokens, ema_decay=0.0, model=SMALL,
            data=DataRecipe(corpus=path),
        )  # fmt: skip
        distribution = Distribution()
        layout = layout_of(recipe, distribution)
        learner = Learner(recipe, source.info, layout, distribution)
        data = DeviceExamples(source.examples(0), CPU, pad_token_id=0, loss_on_prompt=False)
        (step,) = layout.epoch(source.examples(0))
        loss, norm = learner.step([data.batch(group) for group in step.groups], step.n_targets, 1e-3)
        gradients.append((len(step.groups), loss.item(), norm.item()))
    (n_one, *one), (n_many, *many) = gradients
    assert n_many > n_one
    assert many == pytest.approx(one, rel=1e-5)


def test_averaged_weights_come_and_go_without_a_trace(tmp_path):
    path = tmp_path / "toy.npz"
    write_arrays(path, [examples()], examples(), StoredInfo(VOCABULARY, "wyckoff", {}, "kit-1", "ab" * 32))
    recipe = TrainingRecipe(seed=1, steps=1, ema_decay=0.9, model=SMALL, data=DataRecipe(corpus=path))
    distribution = Distribution()
    learner = Learner(recipe, ArraySource(path).info, layout_of(recipe, distribution), distribution)
    first = {name: weight.detach().clone() for name, weight in learner.weights.items()}
    for _ in range(3):
        learner.step(batches(False), 100, 1e-2)
    last = {name: weight.detach().clone() for name, weight in learner.weights.items()}
    with learner.averaged():
        between = learner.model.lm_head.weight.detach().clone()
    name = next(n for n, w in learner.weights.items() if w is learner.model.lm_head.weight)
    assert not torch.equal(between, last[name])
    assert (between - first[name]).norm() < (last[name] - first[name]).norm()
    for n, weight in learner.weights.items():
        assert torch.equal(weight, last[n])


def test_rows_that_a_model_cannot_have_are_refused():
    recipe = TrainingRecipe(seed=1, steps=1, model=dataclasses.replace(SMALL, attention_dropout=0.1))
    assert not layout_of(recipe, Distribution()).packed  # a CPU pads by itself
