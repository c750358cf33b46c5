"""memory.py: the estimate is what a real step holds; published models count as published."""

import dataclasses

import pytest
import torch

from crystallm_kit.models import bases
from crystallm_kit.models.bases import BaseRecipe, LoraRecipe
from crystallm_kit.models.checkpoints import ModelRecipe
from crystallm_kit.tokens.drawing import VocabularyInfo
from crystallm_kit.training.batches import Layout
from crystallm_kit.training.loss import SummedLoss, add_residual_dropout, attention
from crystallm_kit.training.memory import (
    LiveBytes,
    MemoryEstimate,
    memory_estimate,
    scratch_config,
    shape_of_pass,
)
from crystallm_kit.training.recipe import TrainingRecipe

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

LLAMA_3_8B = transformers.LlamaConfig(
    vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131_072,
)  # fmt: skip
LLAMA_3_70B = transformers.LlamaConfig(
    vocab_size=128_256, hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80,
    num_attention_heads=64, num_key_value_heads=8, max_position_embeddings=131_072,
)  # fmt: skip
SMALL = {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
LORA = BaseRecipe("x", lora=LoraRecipe(rank=8, dropout=0.05))
FULL = BaseRecipe("x", method="full")


def recipe_of(base: BaseRecipe, batch: int = 65_536, micro: int = 2_048, **changes) -> TrainingRecipe:
    settings = {"seed": 1, "steps": 1, "batch_tokens": batch, "micro_tokens": micro, "ema_decay": 0.0}
    return TrainingRecipe(base=base, **(settings | changes))


def layout_of(recipe: TrainingRecipe, n_processes: int = 1, max_length: int = 2_048, packed=True) -> Layout:
    return Layout(
        recipe.batch_tokens, recipe.micro_tokens, max_length, False, packed=packed, n_processes=n_processes
    )


def estimate(config, base: BaseRecipe, *, n_processes: int = 1, sharding=None, **changes) -> MemoryEstimate:
    recipe = recipe_of(base, **changes)
    vocabulary = VocabularyInfo(config.vocab_size, None, None)
    layout = layout_of(recipe, n_processes)
    return memory_estimate(config, recipe, layout, vocabulary=vocabulary, sharding=sharding)


def item(found: MemoryEstimate, beginning: str) -> float:
    return next(i.n_bytes for i in found.items if i.name.startswith(beginning))


# ---------------------------------------------------------------- a real step, its bytes counted


def real_peak(config, recipe: TrainingRecipe, layout: Layout) -> int:
    """Return the bytes alive at the highest point of two passes of real training on the CPU."""
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if recipe.base.method == "lora":
        model = bases.with_lora(model, recipe.base, VocabularyInfo(config.vocab_size, None, None))
    if recipe.base.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    transformers.AttentionInterface.register("test_memory", attention)
    model.config._attn_implementation = "test_memory"
    if recipe.residual_dropout:
        add_residual_dropout(model, recipe.residual_dropout)
    loss = SummedLoss(model.train(), "cpu", bfloat16=False)
    rows, positions = shape_of_pass(layout)
    tokens = torch.randint(0, 100, (rows, positions))
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        for _ in range(2):  # in the second pass, the gradients of the first are there
            loss(tokens, tokens, torch.arange(positions)[None], None).backward()
    return live.peak + sum(weight.nbytes for weight in model.parameters())


@pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("config", "base", "changes"),
    [
        (transformers.LlamaConfig(**SMALL, **HEADS, tie_word_embeddings=True), FULL, {}),
        (transformers.LlamaConfig(**SMALL, **HEADS), FULL, {"residual_dropout": 0.1}),
        (transformers.LlamaConfig(**SMALL, **HEADS), LORA, {}),
        (transformers.LlamaConfig(**{**SMALL, "vocab_size": 9_000}, **HEADS), LORA, {}),
        (
            transformers.LlamaConfig(**SMALL, **HEADS),
            dataclasses.replace(LORA, gradient_checkpointing=True),
            {},
        ),
        (
            transformers.LlamaConfig(**SMALL, **HEADS),
            BaseRecipe("x", lora=LoraRecipe(rank=4, dora=True)),
            {},
        ),
        (transformers.Qwen3Config(**SMALL, **HEADS, head_dim=16), FULL, {}),
        (
            transformers.GPT2Config(
                vocab_size=500, n_embd=64, n_layer=3, n_head=4, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0
            ),
            LORA,
            {},
        ),
    ],
    ids=["llama", "dropout", "lora", "large vocabulary", "checkpointing", "dora", "qwen3", "gpt2"],
)
def test_the_estimate_is_what_a_real_step_on_the_cpu_holds(config, base, changes):
    recipe = recipe_of(base, batch=2_048, micro=512, **changes)
    layout = layout_of(recipe, max_length=65, packed=False)
    vocabulary = VocabularyInfo(config.vocab_size, None, None)
    found = memory_estimate(config, recipe, layout, vocabulary=vocabulary, device_type="cpu")
    expected = found.total - item(found, "AdamW")  # no optimizer step in the real one
    assert real_peak(config, recipe, layout) == pytest.approx(expected, rel=0.01)


def test_a_gpt_layer_keeps_34_bytes_a_value_as_korthikanti_counts():
    """Equation 2 of arXiv:2205.05198 in bfloat16, without the attention matrix that flash does not keep."""
    config = transformers.GPT2Config(
        vocab_size=500,
        n_embd=256,
        n_layer=9,
        n_head=4,
        activation_function="gelu",
        bos_token_id=0,
        eos_token_id=0,
    )
    settings = {"n_processes": 2, "sharding": "fsdp", "compile": False}

    def kept(n_layers: int) -> float:
        shallow = transformers.GPT2Config(**{**config.to_dict(), "n_layer": n_layers})
        return item(estimate(shallow, FULL, **settings), "activations")

    per_value = (kept(9) - kept(8)) / 2_048 / 256
    # flash: a float32 for each of 4 heads; 2 norms: mean and deviation in bfloat16
    statistics = (4 * 4 + 2 * 2 * 2) / 256
    assert per_value == pytest.approx(34 + statistics, abs=1e-6)


# ---------------------------------------------------------------- published numbers


def test_llama_shapes_count_as_published():
    eight = estimate(LLAMA_3_8B, FULL)
    assert eight.n_weights == eight.n_trained == 8_030_261_248
    lora = estimate(LLAMA_3_8B, BaseRecipe("x", lora=LoraRecipe(rank=16)))
    assert lora.n_trained == 41_943_040
    assert lora.n_weights == 8_030_261_248 + 41_943_040
    seventy = estimate(LLAMA_3_70B, BaseRecipe("x", quantisation="nf4", gradient_checkpointing=True))
    assert seventy.n_weights - seventy.n_trained == 70_553_706_496


def test_nf4_with_double_quantisation_takes_4_127_bits_of_linear_layers():
    """By hand: 80 layers of 855,638,016 weights in matrices; embedding, head, norms."""
    base = BaseRecipe("x", quantisation="nf4", gradient_checkpointing=True)
    matrices, rest = 80 * 855_638_016, 2 * 1_050_673_152 + 161 * 8_192
    assert item(estimate(LLAMA_3_70B, base), "frozen") == pytest.approx(
        matrices * 4.127 / 8 + rest * 2, rel=1e-4
    )
    single = dataclasses.replace(base, double_quantisation=False)
    assert item(estimate(LLAMA_3_70B, single), "frozen") == pytest.approx(matrices * 4.5 / 8 + rest * 2)
    eight_bits = dataclasses.replace(base, quantisation="int8")
    assert item(estimate(LLAMA_3_70B, eight_bits), "frozen") == pytest.approx(matrices + rest * 2)


def test_a_70b_model_in_nf4_fits_a_gpu_of_80_gb_and_in_bfloat16_does_not():
    base = BaseRecipe("x", quantisation="nf4", gradient_checkpointing=True)
    assert 40e9 < estimate(LLAMA_3_70B, base).total < 72e9
    assert estimate(LLAMA_3_70B, dataclasses.replace(base, quantisation="none")).total > 141e9


# ---------------------------------------------------------------- what changes it


def test_checkpointing_keeps_little_more_than_each_layers_input():
    plain = item(estimate(LLAMA_3_8B, LORA), "activations")
    lean = item(estimate(LLAMA_3_8B, dataclasses.replace(LORA, gradient_checkpointing=True)), "activations")
    inputs = 32 * 2_048 * 4_096 * 2
    assert inputs < lean < 1.3 * inputs
    assert plain > 10 * lean


@pytest.mark.slow
def test_twice_the_positions_take_twice_the_activations():
    small = item(estimate(LLAMA_3_8B, LORA, micro=4_096), "activations")
    large = item(estimate(LLAMA_3_8B, LORA, micro=8_192), "activations")
    assert large == pytest.approx(2 * small, rel=0.01)


def test_logits_are_counted_where_there_are_labels_only():
    recipe = recipe_of(LORA, micro=8_192)
    layout = layout_of(recipe)
    vocabulary = VocabularyInfo(LLAMA_3_8B.vocab_size, None, None)
    all_, few = (
        memory_estimate(LLAMA_3_8B, recipe, layout, vocabulary=vocabulary, labelled_share=share)
        for share in (1.0, 0.25)
    )
    saved = item(all_, "logits") - item(few, "logits")
    assert saved > 0.75 * 8_192 * 128_256 * 2 * 2  # bfloat16, logits and their gradient


@pytest.mark.slow
def test_fsdp_shares_weights_moments_and_gradients_however_many_passes_a_step_has():
    one = estimate(LLAMA_3_8B, FULL)
    spread = estimate(LLAMA_3_8B, FULL, n_processes=8, sharding="fsdp", batch=16_384)
    assert item(spread, "trained") == pytest.approx(item(one, "trained") / 8)
    assert item(spread, "AdamW") == pytest.approx(item(one, "AdamW") / 8)
    several = estimate(LLAMA_3_8B, FULL, n_processes=8, sharding="fsdp", batch=65_536)
    assert item(several, "gradients") == pytest.approx(item(several, "trained"))
    assert item(several, "gradients") >= item(spread, "gradients")
    ddp = estimate(LLAMA_3_8B, FULL, n_processes=8)
    assert item(ddp, "trained") == item(one, "trained")


def test_rows_of_new_tokens_train():
    vocabulary = VocabularyInfo(510, None, None, n_base=500)
    config = transformers.LlamaConfig(**SMALL, **HEADS)
    recipe = recipe_of(LORA)
    plain = memory_estimate(
        config, recipe, layout_of(recipe), vocabulary=VocabularyInfo(500, None, None, n_base=500)
    )
    grown = memory_estimate(config, recipe, layout_of(recipe), vocabulary=vocabulary)
    assert grown.n_trained - plain.n_trained == 2 * 10 * 64  # of the embedding and of the head


def test_a_model_from_scratch_has_the_config_that_training_makes():
    recipe = TrainingRecipe(
        seed=1,
        steps=1,
        model=ModelRecipe(hidden_size=64, n_layers=2, n_heads=2, element_embedding="periodic"),
    )
    config = scratch_config(recipe, 300)
    found = memory_estimate(config, recipe, layout_of(recipe), vocabulary=VocabularyInfo(300, 0, 1))
    # by hand: tied embedding; 2 x (attention, feed-forward of width 192, 2 norms); last norm
    assert found.n_trained == 300 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 192 + 2 * 64) + 64
    assert item(found, "running mean") == 4 * found.n_trained
    assert next(line for line in found.table(80e9) if line.startswith("of the GPU")).endswith("%")


def test_counting_leaves_torchs_dropout_as_it_was():
    before = torch.nn.functional.dropout
    estimate(transformers.LlamaConfig(**SMALL, **HEADS), LORA)
    assert torch.nn.functional.dropout is before
