"""adapters.py: an adapter comes back as it was trained, wherever its base is; what is damaged is named."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from crystallm_kit.errors import MissingExtra, ModelError, UnknownName
from crystallm_kit.models.adapters import merge_adapter
from crystallm_kit.models.bases import BaseRecipe, LoraRecipe, load_base, save_adapter
from crystallm_kit.models.checkpoints import Manifest
from crystallm_kit.models.loading import load_model_folder
from crystallm_kit.text.prompts import template_named
from crystallm_kit.tokens.drawing import VocabularyInfo

# peft asks transformers for a name that it is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
families = pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3", "gpt2"]
)
TEMPLATE = template_named("crystal-text-llm")
MANIFEST = Manifest(
    {"seed": 1},
    "compact",
    {},
    TEMPLATE.name,
    TEMPLATE.hash,
    "cd" * 32,
    1,
    base={"name": "x", "method": "lora"},
)
NEW_TOKENS = [f"[{i}]" for i in range(14)]
PUBLISHED = {"length_decimals": 1, "angle_decimals": 0, "coordinate_decimals": 2}


def extended(folder, to) -> VocabularyInfo:
    """Write the base's tokenizer with new tokens, and return what a corpus would say of it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    n_base = len(tokenizer)
    tokenizer.add_tokens(NEW_TOKENS)
    tokenizer.save_pretrained(to)
    return VocabularyInfo(len(tokenizer), None, tokenizer.eos_token_id, tokenizer.bos_token_id, {}, n_base)


def trained(folder, vocabulary, **settings):
    """Return a model whose adapter does something, in evaluation mode."""
    lora = LoraRecipe(rank=4, **settings.pop("lora", {}))
    model = load_base(BaseRecipe(str(folder), lora=lora, **settings), vocabulary, device="cpu", seed=1)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(2)
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.05 * torch.randn_like(weight))
    return model.eval()


def logits(model, size: int = 310) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(0, size, 7)[None], use_cache=False).logits


@pytest.fixture
def adapter(base_folder, tmp_path):
    """Return (folder of an adapter of a Llama with new tokens, the model that it was written from)."""
    vocabulary = extended(base_folder("llama"), tmp_path / "tokenizer")
    model = trained(base_folder("llama"), vocabulary)
    return save_adapter(tmp_path / "adapter", model, tmp_path / "tokenizer", MANIFEST), model


def refusal(folder, error: type[Exception] = ModelError, **settings) -> str:
    with pytest.raises(error) as caught:
        load_model_folder(folder, **settings)
    return str(caught.value)


# ---------------------------------------------------------------- there and back


@families
@pytest.mark.parametrize("lora", [{}, {"dora": True, "rslora": True}], ids=["lora", "dora"])
def test_an_adapter_loads_and_merges_to_the_model_that_was_trained(base_folder, family, lora, tmp_path):
    vocabulary = extended(base_folder(family), tmp_path / "tokenizer")
    model = trained(base_folder(family), vocabulary, lora=lora)
    folder = save_adapter(tmp_path / "adapter", model, tmp_path / "tokenizer", MANIFEST)
    wanted = logits(model, vocabulary.size)
    loaded, tokenizer, manifest = load_model_folder(folder)
    torch.testing.assert_close(logits(loaded, vocabulary.size), wanted, rtol=1e-4, atol=1e-4)
    assert not loaded.training
    assert not any("lora" in name for name, _ in loaded.named_parameters())
    assert len(tokenizer) == vocabulary.size == loaded.config.vocab_size
    assert manifest == MANIFEST

    out = merge_adapter(folder, tmp_path / "merged", dtype="float32")
    plain = AutoModelForCausalLM.from_pretrained(out).eval()
    torch.testing.assert_close(logits(plain, vocabulary.size), wanted, rtol=1e-4, atol=1e-4)
    again, _, manifest = load_model_folder(out)
    torch.testing.assert_close(logits(again), logits(loaded))
    assert manifest == dataclasses.replace(MANIFEST, base={"name": "x", "method": "lora", "merged": True})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "merged", "tokenizer"]


def test_the_folder_is_one_that_peft_loads(adapter, base_folder):
    from peft import PeftModel

    folder, model = adapter
    names = sorted(path.name for path in folder.iterdir())
    assert names == [
        "adapter_config.json", "adapter_model.safetensors", "manifest.json", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    weights = load_file(folder / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    base = AutoModelForCausalLM.from_pretrained(base_folder("llama"))
    base.resize_token_embeddings(324, mean_resizing=False)
    theirs = PeftModel.from_pretrained(base, folder).eval()
    torch.testing.assert_close(logits(theirs, 324), logits(model, 324))


def test_writing_is_deterministic_and_names_the_base_as_the_recipe_does(tmp_path):
    rows = VocabularyInfo(1, None, None)
    for name in ("a", "b"):
        model = load_base(BaseRecipe("shipped"), rows, device="cpu", seed=1)
        save_adapter(tmp_path / name, model, None, MANIFEST)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "shipped"
    assert settings["target_modules"] == sorted(settings["target_modules"])
    loaded, _, _ = load_model_folder(tmp_path / "a")  # the tokenizer is the base's, too
    assert type(loaded).__name__ == "LlamaForCausalLM"


def test_weights_gathered_from_elsewhere_are_written_in_place_of_the_models(adapter, tmp_path):
    folder, model = adapter
    whole = {name: torch.zeros_like(weight) for name, weight in model.state_dict().items()}
    other = save_adapter(tmp_path / "other", model, None, MANIFEST, weights=whole)
    weights = load_file(other / "adapter_model.safetensors")
    assert weights.keys() == load_file(folder / "adapter_model.safetensors").keys()
    assert not any(weight.any() for weight in weights.values())


def test_an_adapter_of_a_quantised_base_is_merged_into_the_whole_one(base_folder, tmp_path):
    pytest.importorskip("bitsandbytes")
    vocabulary = extended(base_folder("llama"), tmp_path / "tokenizer")
    model = trained(base_folder("llama"), vocabulary, quantisation="nf4")
    folder = save_adapter(tmp_path / "adapter", model, tmp_path / "tokenizer", MANIFEST)
    merged, _, _ = load_model_folder(merge_adapter(folder, tmp_path / "merged", dtype="float32"))
    base = AutoModelForCausalLM.from_pretrained(base_folder("llama"))
    weights = load_file(folder / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.1.mlp.up_proj"
    update = weights[f"{prefix}.lora_B.weight"] @ weights[f"{prefix}.lora_A.weight"] * 32 / 4
    wanted = base.model.layers[1].mlp.up_proj.weight + update
    torch.testing.assert_close(merged.model.layers[1].mlp.up_proj.weight, wanted, rtol=1e-4, atol=1e-5)


def test_bfloat16_weights_are_merged_and_written_as_such(adapter, tmp_path):
    folder, model = adapter
    out = merge_adapter(folder, tmp_path / "merged", dtype="bfloat16", max_shard_mb=0.1)
    assert len(list(out.glob("model-*.safetensors"))) > 1
    with safe_open(next(out.glob("model-*.safetensors")), "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    loaded, _, _ = load_model_folder(out)
    alike = torch.nn.functional.cosine_similarity(logits(loaded).flatten(), logits(model).flatten(), dim=0)
    assert alike > 0.99


# ---------------------------------------------------------------- where the base is


def test_a_base_that_moved_is_given_anew(adapter, base_folder, tmp_path):
    folder, model = adapter
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(tmp_path / "gone")
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    message = refusal(folder)
    assert "no such folder" in message
    assert "--base" in message
    loaded, _, _ = load_model_folder(folder, base=str(base_folder("llama")))
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)


def test_a_relative_base_starts_from_the_adapter_too(adapter, base_folder, tmp_path):
    folder, model = adapter
    shutil.copytree(base_folder("llama"), tmp_path / "base")
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps({**settings, "base_model_name_or_path": "../base"})
    )
    loaded, _, _ = load_model_folder(folder)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)


def test_a_base_on_hugging_face_that_cannot_be_reached_says_what_to_do(adapter, monkeypatch):
    folder, _ = adapter
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "no-such-owner/no-such-model"
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    message = refusal(folder)
    assert "no-such-owner/no-such-model" in message
    assert "HF_HUB_OFFLINE" in message
    assert "--base" in message


# ---------------------------------------------------------------- adapters of others


@pytest.fixture
def published(base_folder, tmp_path):
    """Return an adapter in the manner of Crystal-text-LLM's, made by peft alone, and its model.

    Its tokenizer has a token [PAD] more than the base has rows, and the new row is the mean (Gruver et al.
    2024, arXiv:2402.04379); of the attention's layers all four are adapted; there is no manifest.
    """
    from peft import LoraConfig, get_peft_model

    base = tmp_path / "base"
    shutil.copytree(base_folder("llama"), base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"<fill{i}>" for i in range(320 - len(tokenizer))])
    tokenizer.save_pretrained(base)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for layer in (model.model.embed_tokens, model.lm_head):
            layer.weight[320] = layer.weight[:320].mean(0)
    config = LoraConfig(
        r=8,
        lora_alpha=32,
        lora_dropout=0.05,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        bias="none",
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    model = get_peft_model(model, config).eval()
    folder = tmp_path / "published"
    model.save_pretrained(folder, save_embedding_layers=False)
    tokenizer.save_pretrained(folder)
    return folder, model


def test_an_adapter_of_crystal_text_llm_loads_with_its_template(published):
    folder, model = published
    network, tokenizer, manifest = load_model_folder(
        folder, template="crystal-text-llm", format="compact", format_settings=PUBLISHED
    )
    torch.testing.assert_close(logits(network, 321), logits(model, 321), rtol=1e-4, atol=1e-4)
    assert tokenizer.pad_token_id == 320
    assert (manifest.template, manifest.template_sha256) == (TEMPLATE.name, TEMPLATE.hash)
    assert (manifest.format, manifest.format_settings) == ("compact", PUBLISHED)


def test_its_merged_form_needs_no_template_any_more(published, tmp_path):
    folder, model = published
    out = merge_adapter(
        folder,
        tmp_path / "merged",
        dtype="float32",
        template="crystal-text-llm",
        format="compact",
        format_settings=PUBLISHED,
    )
    network, _, manifest = load_model_folder(out)
    torch.testing.assert_close(logits(network, 321), logits(model, 321), rtol=1e-4, atol=1e-4)
    assert manifest.template == "crystal-text-llm"


def test_embeddings_saved_whole_beside_the_adapter_are_taken_over(published):
    """peft writes a resized embedding into the adapter unless told otherwise; it knows the rows."""
    folder, model = published
    with torch.no_grad():
        model.get_base_model().model.embed_tokens.weight.mul_(1.5)
    model.save_pretrained(folder, save_embedding_layers=True)
    for file in folder.glob("tokenizer*"):
        file.unlink()  # the base's will do, which has a token less
    network, _, _ = load_model_folder(folder, template="crystal-text-llm", format="compact")
    torch.testing.assert_close(logits(network, 321), logits(model, 321), rtol=1e-4, atol=1e-4)


def test_the_older_weights_file_of_peft_is_read_without_running_code(published):
    folder, model = published
    weights = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(weights, folder / "adapter_model.bin")
    network, _, _ = load_model_folder(folder, template="crystal-text-llm", format="compact")
    torch.testing.assert_close(logits(network, 321), logits(model, 321), rtol=1e-4, atol=1e-4)


def test_without_a_manifest_template_and_format_must_be_given(published, adapter):
    folder, _ = published
    assert "no manifest.json" in refusal(folder)
    assert "give the format that it was trained with" in refusal(folder, template="crystal-text-llm")
    assert "give the template" in refusal(folder, format="compact")
    assert "did you mean 'crystal-text-llm'" in refusal(
        folder, UnknownName, template="crystal-text-lm", format="compact"
    )
    message = refusal(adapter[0], template="kit-1")
    assert "template 'kit-1' is asked for, but its manifest.json says 'crystal-text-llm'" in message


# ---------------------------------------------------------------- refused


def test_damaged_adapters_are_refused(adapter):
    folder, _ = adapter
    weights, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    content, text = weights.read_bytes(), settings.read_text()
    weights.write_bytes(content[:-1])
    assert f"{weights}: truncated" in refusal(folder)
    weights.unlink()
    assert "no adapter_model.safetensors: the model's weights are missing" in refusal(folder)
    weights.write_bytes(content)
    settings.write_text("{")
    assert "not an adapter's settings" in refusal(folder)
    settings.write_text(json.dumps({**json.loads(text), "peft_type": "PREFIX_TUNING"}))
    assert "an adapter of type PREFIX_TUNING" in refusal(folder)
    settings.write_text(json.dumps({**json.loads(text), "base_model_name_or_path": None}))
    assert "names no base model" in refusal(folder)


@pytest.mark.parametrize("change", ["less", "more", "other base"])
def test_an_adapter_that_does_not_fit_its_base_is_refused(adapter, base_folder, change):
    folder, _ = adapter
    weights = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
    if change == "less":
        del weights[name]
    elif change == "more":
        weights[name.replace("layers.1", "layers.2")] = weights[name].clone()
    save_file(weights, folder / "adapter_model.safetensors")
    base = str(base_folder("gpt2")) if change == "other base" else None
    message = refusal(folder, base=base)
    assert "does not fit its base model" in message
    assert change == "other base" or "up_proj" in message


def test_what_is_no_adapter_is_not_merged(adapter, base_folder, tmp_path):
    folder, _ = adapter
    with pytest.raises(ModelError, match="no adapter folder"):
        merge_adapter(base_folder("llama"), tmp_path / "merged")
    with pytest.raises(ModelError, match="would replace the adapter"):
        merge_adapter(folder, folder)
    assert "it has no base" in refusal(base_folder("llama"), base="shipped")


def test_without_peft_the_extra_is_named(adapter, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'crystallm-kit[train]'" in refusal(adapter[0], MissingExtra)
