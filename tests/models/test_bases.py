"""bases.py: every family trains by LoRA, QLoRA and as a whole; what cannot is refused before any weights."""

import dataclasses
import importlib.util
import json
import shutil

import pytest
import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from crystallm_kit.errors import MissingExtra, ModelError, RecipeError
from crystallm_kit.models.bases import (
    BaseRecipe,
    LoraRecipe,
    check_base,
    check_same_template,
    check_same_tokens,
    load_base,
    max_positions,
    packing_problem,
)
from crystallm_kit.models.checkpoints import Manifest, save_model
from crystallm_kit.models.loading import load_model_folder
from crystallm_kit.recipes import from_dict
from crystallm_kit.text.prompts import template_named
from crystallm_kit.tokens.drawing import StoredInfo, VocabularyInfo
from crystallm_kit.training.loss import ATTENTION, attention

FAMILY_NAMES = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3", "gpt2")
families = pytest.mark.parametrize("family", FAMILY_NAMES)
# 310 tokens of the base in 320 rows; 14 new ones need four rows more.
N_BASE, SIZE = 310, 324
GROWN = VocabularyInfo(SIZE, None, 0, None, {}, N_BASE)
SAME = VocabularyInfo(N_BASE, None, 0, None, {}, N_BASE)
TEMPLATE = template_named("crystal-text-llm")
MANIFEST = Manifest({"seed": 1}, "compact", {}, TEMPLATE.name, TEMPLATE.hash, "cd" * 32, 1)


def recipe(folder, **settings) -> BaseRecipe:
    lora = {"rank": 4, "dropout": 0.0, **settings.pop("lora", {})}
    return BaseRecipe(str(folder), lora=LoraRecipe(**lora), **settings)


def tokens(n: int, *, below: int = N_BASE, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, below, (1, n), generator=torch.Generator().manual_seed(seed))


def logits(model, ids: torch.Tensor, **given) -> torch.Tensor:
    positions = given.pop("position_ids", torch.arange(ids.shape[1])[None])
    return model(input_ids=ids, position_ids=positions, use_cache=False, **given).logits


def original(folder):
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def trainable(model) -> dict[str, torch.nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


# ---------------------------------------------------------------- every family


@families
def test_lora_begins_as_the_base_and_only_its_own_weights_train(base_folder, family):
    folder = base_folder(family)
    model = load_base(recipe(folder), GROWN, device="cpu", seed=1)
    ids = tokens(12)
    base = original(folder)
    torch.testing.assert_close(
        logits(model.eval(), ids)[..., :N_BASE], logits(base, ids)[..., :N_BASE], rtol=1e-4, atol=1e-4
    )
    weights = trainable(model)
    assert {name.rpartition(".default")[0].split(".")[-2 if "token" in name else -1] for name in weights}
    assert all("lora_" in name or "trainable_tokens" in name for name in weights)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    adapted = {name.split(".lora_")[0] for name in weights if "lora_" in name}
    assert len(adapted) == 2 * (4 if family == "gpt2" else 7)  # all linear layers of both blocks

    frozen = {name: w.detach().clone() for name, w in model.named_parameters() if not w.requires_grad}
    optimizer = torch.optim.SGD(weights.values(), lr=0.1)
    ids = tokens(24, below=SIZE)
    losses = []
    for _ in range(4):
        model.train()
        out = logits(model, ids)[0, :-1]
        loss = torch.nn.functional.cross_entropy(out, ids[0, 1:])
        loss.backward()
        assert all(weight.grad is not None for weight in weights.values())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01
    for name, weight in model.named_parameters():
        if name in frozen:
            assert torch.equal(weight, frozen[name]), name


@families
def test_new_rows_start_as_the_mean_of_the_old_in_both_embeddings(base_folder, family):
    folder = base_folder(family)
    for method in ("lora", "full"):
        model = load_base(recipe(folder, method=method), GROWN, device="cpu", seed=1)
        plain = model.get_base_model() if method == "lora" else model
        assert plain.config.vocab_size == SIZE
        base = original(folder)
        for ours, theirs in (
            (plain.get_input_embeddings(), base.get_input_embeddings()),
            (plain.get_output_embeddings(), base.get_output_embeddings()),
        ):
            weight, before = ours.weight, theirs.weight
            assert weight.shape[0] == SIZE
            torch.testing.assert_close(weight[:N_BASE], before[:N_BASE], rtol=0, atol=0)
            mean = before[:N_BASE].mean(0).expand(SIZE - N_BASE, -1)
            torch.testing.assert_close(weight[N_BASE:], mean)


@families
def test_packed_crystals_see_nothing_of_each_other(base_folder, family):
    AttentionInterface.register(ATTENTION, attention)
    model = load_base(recipe(base_folder(family)), GROWN, device="cpu", seed=1).eval()
    first, second = tokens(9, below=SIZE, seed=1), tokens(6, below=SIZE, seed=2)
    alone = torch.cat([logits(model, first), logits(model, second)], dim=1)
    if family == "gemma2":
        assert "caps its attention logits" in packing_problem(model.config, 16)
        model.config._attn_implementation = ATTENTION  # what would be lost
        assert (logits(model, first) - alone[:, :9]).abs().max() > 0.01
        return
    assert packing_problem(model.config, 16) is None
    model.config._attn_implementation = ATTENTION
    row = torch.cat([first, second], dim=1)
    packed = logits(
        model,
        row,
        position_ids=torch.cat([torch.arange(9), torch.arange(6)])[None],
        borders=torch.tensor([0, 9, 15], dtype=torch.int32),
        longest=9,
    )
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)
    unpacked = logits(model, row)
    assert (unpacked[:, 9:] - alone[:, 9:]).abs().max() > 0.01  # the borders are what keeps them apart


@families
def test_gradient_checkpointing_changes_no_gradient(base_folder, family):
    gradients = []
    for is_on in (False, True):
        model = load_base(
            recipe(base_folder(family), gradient_checkpointing=is_on), GROWN, device="cpu", seed=1
        ).train()
        plain = model.get_base_model()
        assert any(getattr(m, "gradient_checkpointing", False) for m in plain.modules()) is is_on
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # GPT-2 drops out
            logits(model, tokens(8, below=SIZE)).square().mean().backward()
        gradients.append({name: weight.grad for name, weight in trainable(model).items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


@families
def test_full_fine_tuning_saves_a_model_folder_that_loads_alike(base_folder, family, tmp_path):
    """transformers refused to save a base whose settings of generation contradict themselves (Llama 2's)."""
    source = shutil.copytree(base_folder(family), tmp_path / "base")
    (source / "generation_config.json").write_text(json.dumps({"do_sample": False, "temperature": 0.9}))
    model = load_base(recipe(source, method="full"), SAME, device="cpu", seed=1).eval()
    assert len(trainable(model)) == len(list(model.parameters()))
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.01)
    folder = save_model(tmp_path / "model", model, source, MANIFEST, dtype="float32")
    loaded, tokenizer, _ = load_model_folder(folder)
    ids = tokens(10)
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids))
    assert tokenizer.eos_token_id is not None
    settings = json.loads((folder / "generation_config.json").read_text())
    assert "temperature" not in settings
    assert settings["eos_token_id"] == 0


@families
def test_learned_positions_and_limits_are_read_from_the_config(base_folder, family):
    assert max_positions(AutoConfig.from_pretrained(base_folder(family))) == 512


# ---------------------------------------------------------------- settings


def test_lora_is_fixed_by_the_seed_and_leaves_the_random_state_alone(base_folder):
    before = torch.get_rng_state()
    first, again, other = (
        trainable(load_base(recipe(base_folder("llama")), GROWN, device="cpu", seed=seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(before, torch.get_rng_state())
    name = next(name for name in first if "lora_A" in name)
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])


def test_without_new_tokens_the_embedding_stays_as_it_is(base_folder):
    folder = base_folder("llama")
    for vocabulary in (SAME, dataclasses.replace(SAME, size=320, n_base=None)):
        model = load_base(recipe(folder), vocabulary, device="cpu", seed=1)
        assert not any("token" in name for name in trainable(model))
        before = original(folder).get_input_embeddings().weight
        assert torch.equal(model.get_input_embeddings().weight, before)


@pytest.mark.parametrize("size", [321, 400])
def test_a_corpus_of_another_tokenizer_is_refused(base_folder, size):
    for vocabulary in (VocabularyInfo(size, None, 0), VocabularyInfo(size, None, 0, n_base=size)):
        with pytest.raises(ModelError, match=f"rows for 320 tokens, the corpus's tokenizer has {size}"):
            load_base(recipe(base_folder("llama")), vocabulary, device="cpu", seed=1)


def test_dora_rslora_and_target_modules_are_obeyed(base_folder):
    chosen = recipe(
        base_folder("llama"),
        lora={"dora": True, "rslora": True, "alpha": 8.0, "target_modules": ("q_proj", "v_proj")},
    )
    check_base(chosen, device_type="cpu")
    model = load_base(chosen, SAME, device="cpu", seed=1)
    layers = {name.split(".lora_")[0].rpartition(".")[2] for name in trainable(model)}
    assert layers == {"q_proj", "v_proj"}
    assert any("lora_magnitude_vector" in name for name in trainable(model))
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == pytest.approx(8 / 4**0.5)


def test_attention_dropout_is_off_for_packed_rows_have_none(base_folder):
    model = load_base(recipe(base_folder("gpt2")), SAME, device="cpu", seed=1)
    assert AutoConfig.from_pretrained(base_folder("gpt2")).attn_pdrop == 0.1
    assert {layer.attn.attn_dropout.p for layer in model.get_base_model().transformer.h} == {0.0}


def test_random_weights_need_no_weights_file(base_folder, tmp_path):
    shutil.copy(base_folder("llama") / "config.json", tmp_path / "config.json")
    chosen = recipe(tmp_path, weights="random")
    first, again = (load_base(chosen, GROWN, device="cpu", seed=1) for _ in range(2))
    weights = dict(again.named_parameters())
    assert all(torch.equal(weight, weights[name]) for name, weight in first.named_parameters())
    spread = first.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight.std().item()
    assert spread == pytest.approx(0.2, rel=0.1)
    with pytest.raises(ModelError, match="weights are missing"):
        load_base(dataclasses.replace(chosen, weights="pretrained"), GROWN, device="cpu", seed=1)


def test_an_attention_window_must_hold_the_texts(base_folder):
    AttentionInterface.register(ATTENTION, attention)
    config = AutoConfig.from_pretrained(base_folder("mistral"), sliding_window=8)
    assert packing_problem(config, 8) is None
    assert "do not fit the attention window of 8" in packing_problem(config, 9)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for length, is_alike in ((8, True), (9, False)):
        ids = tokens(length)
        model.config._attn_implementation = "eager"
        theirs = logits(model, ids)
        model.config._attn_implementation = ATTENTION
        assert torch.allclose(theirs, logits(model, ids), atol=1e-5) is is_alike
    gemma = AutoConfig.from_pretrained(base_folder("gemma3"))
    assert "window of 64" in packing_problem(gemma, 65)
    assert packing_problem(AutoConfig.from_pretrained(base_folder("qwen2")), 10**6) is None  # switched off


# ---------------------------------------------------------------- quantised


def quantised(**settings):
    return pytest.param(settings, id=" ".join(map(str, settings.values())))


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize(
    "settings",
    [quantised(quantisation="nf4", weights=w) for w in ("pretrained", "random")]
    + [quantised(quantisation="int8", weights=w) for w in ("pretrained", "random")]
    + [quantised(quantisation="nf4", double_quantisation=False)],
)
def test_frozen_layers_are_quantised_and_lora_trains_beside_them(base_folder, family, settings):
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.functional import dequantize_4bit

    folder = base_folder(family)
    model = load_base(recipe(folder, **settings), GROWN, device="cpu", seed=1)
    plain = model.get_base_model()
    is_nf4 = settings["quantisation"] == "nf4"
    packed = {p for p in plain.parameters() if p.dtype == (torch.uint8 if is_nf4 else torch.int8)}
    assert len(packed) == 2 * (4 if family == "gpt2" else 7)
    if is_nf4:
        assert {p.quant_state.nested for p in packed} == {settings.get("double_quantisation", True)}
        assert {p.quant_type for p in packed} == {"nf4"}
    assert {w.dtype for w in trainable(model).values()} == {torch.float32}
    frozen = {w.dtype for w in model.parameters() if not w.requires_grad and w not in packed}
    assert frozen == {torch.bfloat16}
    ids = tokens(12)
    ours = logits(model, ids)[..., :N_BASE].float()
    ours.square().mean().backward()
    assert all(w.grad is not None and w.grad.isfinite().all() for w in trainable(model).values())
    base = original(folder)
    if settings.get("weights") == "random":
        theirs = logits(base, ids)[..., :N_BASE]
        assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.3)
        return
    for name, layer in plain.named_modules():
        if name.endswith(".base_layer") and getattr(layer, "weight", None) in packed:
            theirs = base.get_submodule(name.removesuffix(".base_layer")).weight
            theirs = theirs.T if family == "gpt2" else theirs
            # of a normal distribution, nf4 loses 9 %, 8 bits less than 1 %
            weight = layer.weight
            if is_nf4:
                read = dequantize_4bit(weight.data, weight.quant_state)
            else:
                read = weight.data * layer.state.SCB[:, None] / 127
            assert (read.float() - theirs).std() / theirs.std() < (0.12 if is_nf4 else 0.01), name


def test_random_quantised_weights_are_fixed_by_the_seed(base_folder):
    pytest.importorskip("bitsandbytes")
    chosen = recipe(base_folder("llama"), quantisation="nf4", weights="random")
    first, again = (load_base(chosen, GROWN, device="cpu", seed=4).eval() for _ in range(2))
    assert torch.equal(logits(first, tokens(8)), logits(again, tokens(8)))


# ---------------------------------------------------------------- refused


def refusal(chosen: BaseRecipe, error: type[Exception] = ModelError, *, device_type: str = "cpu") -> str:
    with pytest.raises(error) as caught:
        check_base(chosen, device_type=device_type)
    return str(caught.value)


@families
def test_the_check_reads_the_config_alone(base_folder, family, tmp_path):
    shutil.copy(base_folder(family) / "config.json", tmp_path / "config.json")
    config = check_base(recipe(tmp_path), device_type="cpu")
    assert config.vocab_size == 320


def test_the_shipped_model_is_a_base():
    assert check_base(recipe("shipped"), device_type="cpu").model_type == "llama"


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "BertForMaskedLM is not a causal LM"),
        (
            {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
            "T5ForConditionalGeneration is not a causal LM",
        ),
        (
            {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
            "LlamaForSequenceClassification is not a causal LM",
        ),
        (
            {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]},
            "Gemma3ForConditionalGeneration reads more than text",
        ),
        ({"model_type": "vit", "architectures": ["ViTModel"]}, "ViTModel is not a causal LM"),
        ({"model_type": "no_such_type"}, "transformers cannot read its config"),
        (
            {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}},
            "a model's own code is not run",
        ),
        (
            {"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4}},
            "its weights are quantised already",
        ),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_what_is_no_causal_lm_of_text_is_refused_by_name(tmp_path, config, named):
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('code of the model was run')")
    message = refusal(recipe(tmp_path))
    assert named in message
    assert str(tmp_path) in message


@pytest.mark.parametrize("quantisation", ["nf4", "int8"])
def test_quantisation_without_a_gpu_is_refused(base_folder, quantisation):
    message = refusal(recipe(base_folder("llama"), quantisation=quantisation), RecipeError)
    assert f"base.quantisation {quantisation}: it needs a CUDA GPU; this run is on cpu" in message


@pytest.mark.parametrize(
    ("missing", "settings", "extra"),
    [("peft", {}, "train"), ("bitsandbytes", {"quantisation": "nf4"}, "qlora")],
)
def test_a_missing_library_is_named_with_its_extra(base_folder, monkeypatch, missing, settings, extra):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    message = refusal(recipe(base_folder("llama"), **settings), MissingExtra, device_type="cuda")
    assert f"needs {missing}, which is not installed. Run: pip install 'crystallm-kit[{extra}]'" in message


def test_full_fine_tuning_needs_no_peft(base_folder, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find(name))
    check_base(recipe(base_folder("llama"), method="full"), device_type="cpu")


@pytest.mark.parametrize(
    ("family", "target", "near"), [("llama", "q_porj", "q_proj"), ("gpt2", "c_atn", "c_attn")]
)
def test_a_target_that_matches_no_layer_is_refused_with_the_nearest(base_folder, family, target, near):
    message = refusal(recipe(base_folder(family), lora={"target_modules": (near, target)}), RecipeError)
    assert f"is called '{target}'; did you mean '{near}'? Known: " in message


def test_the_output_head_is_no_target(base_folder):
    assert "'lm_head'" in refusal(
        recipe(base_folder("llama"), lora={"target_modules": ("lm_head",)}), RecipeError
    )


def test_rows_of_named_tokens_train_and_the_others_stay():
    """The shipped model's prompts have words that its training texts had not."""
    asked = recipe("shipped", lora={"rank": 2, "train_tokens": r"bulk_modulus=|[1-4]\d\d\."})
    check_base(asked, device_type="cpu")
    model = load_base(asked, VocabularyInfo(1092, None, 0), device="cpu", seed=1)
    (rows,) = [w for name, w in trainable(model).items() if "token" in name]
    assert rows.shape == (401, 384)  # 100. to 499., and the name
    before = model.get_input_embeddings()(torch.arange(1092)).detach().clone()
    with torch.no_grad():
        rows += 1.0
    changed = (model.get_input_embeddings()(torch.arange(1092)) != before).any(dim=1)
    assert changed.sum() == 401


def test_tokens_that_the_base_does_not_have_are_refused_before_any_weights():
    unknown = recipe("shipped", lora={"rank": 2, "train_tokens": "youngs_modulus="})
    assert "no token of 'shipped' matches it" in refusal(unknown, RecipeError)
    with pytest.raises(ValueError, match="'train_tokens' is no regular expression"):
        LoraRecipe(train_tokens="(")
    with pytest.raises(ValueError, match="'fresh_tokens' is no regular expression"):
        LoraRecipe(fresh_tokens="(")


def test_fresh_rows_tell_numbers_apart_that_the_base_does_not():
    """150 and 400 have one and the same row in the shipped model, which met neither; LoRA on that row learns
    to ask for stiff crystals, but not how stiff."""
    same = VocabularyInfo(1092, None, 0)
    before = load_base(recipe("shipped"), same, device="cpu", seed=1).get_input_embeddings().weight.detach()
    first = 471  # id of "0."
    assert torch.cosine_similarity(before[first + 150], before[first + 400], dim=0) > 0.99
    lora = {"rank": 2, "train_tokens": r"\d\.", "fresh_tokens": r"bulk_modulus=|(1[3-9]\d|[2-4]\d\d)\."}
    model = load_base(recipe("shipped", lora=lora), same, device="cpu", seed=1)
    rows = model.get_input_embeddings()(torch.arange(1092)).detach()

    def alike(a: int, b: int) -> float:
        return float(torch.cosine_similarity(rows[first + a], rows[first + b], dim=0))

    assert alike(300, 301) > 0.99
    assert 0.9 < alike(150, 160) < 0.999
    assert alike(150, 400) < 0.5 < alike(150, 200) < alike(150, 160)
    sizes = rows.norm(dim=1)
    assert sizes[first + 130 : first + 500].mean() == pytest.approx(
        float(before.norm(dim=1).median()), rel=0.15
    )
    changed = (rows != before).any(dim=1)
    assert changed[first + 130 : first + 500].all()
    assert changed.sum() == 371  # those of train_tokens start as they are
    (trained,) = [w for name, w in trainable(model).items() if "token" in name]
    assert len(trained) == 371 + 10


def test_an_id_that_cannot_be_reached_says_what_to_do(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refusal(recipe("no-such-owner/no-such-model"))
    assert "base model 'no-such-owner/no-such-model': neither a folder nor readable" in message
    assert "HF_HUB_OFFLINE" in message


def test_folders_that_hold_no_model_are_refused(tmp_path):
    assert "no such folder" in refusal(recipe(tmp_path / "none"))
    assert "no config.json" in refusal(recipe(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "an adapter, not a whole model. Merge it first" in refusal(recipe(tmp_path))


def test_damaged_weights_are_refused(base_folder, tmp_path):
    folder = shutil.copytree(base_folder("llama"), tmp_path / "base")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ModelError, match="truncated"):
        load_base(recipe(folder), SAME, device="cpu", seed=1)


def test_rank_0_and_a_quantised_full_run_are_refused_with_their_key():
    for settings, message in (
        ({"lora": {"rank": 0}}, "lora: 'rank' must be at least 1, got 0"),
        ({"method": "full", "quantisation": "nf4"}, "quantisation nf4 freezes the weights"),
    ):
        with pytest.raises(RecipeError, match=message):
            from_dict({"name": "shipped", **settings}, BaseRecipe, where="x")


def test_a_base_of_the_kit_keeps_its_template_format_and_tokenizer():
    rows = check_base(recipe("shipped"), device_type="cpu").vocab_size
    kit = template_named("kit-1")
    info = StoredInfo(VocabularyInfo(rows, None, 0), "wyckoff", {}, kit.name, kit.hash)
    check_same_template("shipped", info)
    for change, message in (
        ({"template": TEMPLATE.name, "template_sha256": TEMPLATE.hash}, "template: kit-1 .*crystal-text-llm"),
        ({"format": "compact"}, "format: wyckoff, of the corpus compact"),
        ({"vocabulary": VocabularyInfo(99, None, 0)}, f"tokenizer: {rows} tokens, of the corpus 99 tokens"),
    ):
        with pytest.raises(ModelError, match=message):
            check_same_template("shipped", dataclasses.replace(info, **change))


def test_a_base_of_others_takes_any_template(base_folder):
    info = StoredInfo(SAME, "compact", {}, TEMPLATE.name, TEMPLATE.hash)
    check_same_template(str(base_folder("llama")), info)


def test_a_corpus_of_another_tokenizer_is_refused_though_the_base_has_rows_for_it(base_folder, tmp_path):
    """It trained without a word where the base had rows enough, on tokens that meant something else to it."""
    from crystallm_kit.tokens.tokenizer import load_tokenizer

    folder = base_folder("llama")
    asked, config = recipe(folder), AutoConfig.from_pretrained(folder)
    grown = load_tokenizer(folder)
    grown.add_tokens(["[MASK]"])
    grown.save_pretrained(tmp_path / "grown")
    n_base = len(grown) - 1
    check_same_tokens(
        asked, config, VocabularyInfo(n_base + 1, None, 0, None, {}, n_base), tmp_path / "grown"
    )
    other = json.loads((folder / "tokenizer.json").read_text())
    words = other["model"]["vocab"]
    a, b = list(words)[20:22]
    words[a], words[b] = words[b], words[a]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(other))
    shutil.copy(folder / "tokenizer_config.json", tmp_path / "other")
    known = VocabularyInfo(n_base, None, 0, None, {}, n_base)
    with pytest.raises(ModelError, match=rf"2 of its {n_base} tokens are others in .*--tokenizer"):
        check_same_tokens(asked, config, known, tmp_path / "other")
    with pytest.raises(ModelError, match="rows for 320 tokens, the corpus's tokenizer has 999"):
        check_same_tokens(asked, config, VocabularyInfo(999, None, 0, None, {}, 999), None)


# ---------------------------------------------------------------- on a GPU


@pytest.fixture
def wide_config(tmp_path):
    """Return a folder with the config of a Llama whose layers hold 134 million weights."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=320, hidden_size=1024, intermediate_size=4096, num_hidden_layers=8,
        num_attention_heads=8, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path / "wide")
    return tmp_path / "wide"


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("quantisation", "bits", "most"), [("none", 16, 1.3), ("nf4", 4.13, 1.6), ("int8", 8, 1.6)]
)
def test_random_weights_are_made_on_the_gpu_and_never_all_unquantised(wide_config, quantisation, bits, most):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    chosen = recipe(wide_config, weights="random", quantisation=quantisation)
    check_base(chosen, device_type="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = load_base(chosen, SAME, device="cuda", seed=1)
    n_weights = 8 * (4 * 1024 * 1024 + 3 * 1024 * 4096)
    assert torch.cuda.max_memory_allocated() - before < most * n_weights * bits / 8
    assert {w.device.type for w in model.parameters()} == {"cuda"}
    assert torch.bfloat16 in {w.dtype for w in model.parameters() if not w.requires_grad}
    assert {w.dtype for w in trainable(model).values()} == {torch.float32}
    ids = tokens(12).cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = model(input_ids=ids, position_ids=torch.arange(12).cuda()[None], use_cache=False).logits
    out.float().square().mean().backward()
    assert all(w.grad is not None and w.grad.isfinite().all() for w in trainable(model).values())
