"""Sampling from models that bring a tokenizer of their own: prompts as trained, texts with every blank."""

import dataclasses
import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer

from crystallm_kit.engines.engine import Prompt, Sampling
from crystallm_kit.engines.transformers_local import TransformersEngine
from crystallm_kit.errors import ModelError
from crystallm_kit.generation import generate, load_model, takes_requests
from crystallm_kit.models.bases import BaseRecipe, LoraRecipe, load_base, save_adapter
from crystallm_kit.models.checkpoints import Manifest, save_model
from crystallm_kit.models.loading import load_model_folder
from crystallm_kit.records import Conditions
from crystallm_kit.text.prompts import template_named
from crystallm_kit.tokens.drawing import VocabularyInfo
from crystallm_kit.tokens.tokenizer import prompt_ids

FAMILY_NAMES = ["llama", "qwen2", "mistral", "gemma2", "gemma3", "gpt2"]
families = pytest.mark.parametrize("family", FAMILY_NAMES)
TEMPLATE = template_named("crystal-text-llm")
MANIFEST = Manifest({"seed": 1}, "compact", {}, TEMPLATE.name, TEMPLATE.hash, "cd" * 32, 1)
PROMPT = TEMPLATE.render(Conditions())
SALT = "3.99 3.99 3.99\n60.0 60.0 60.0\nNa\n0.000 0.000 0.000\nCl\n0.500 0.500 0.500"


@pytest.fixture(scope="module")
def engine_of(base_folder, tmp_path_factory):
    """Return a function from a family to an engine of its base, saved as a model of the kit."""
    made = {}

    def engine(family: str) -> TransformersEngine:
        if family not in made:
            folder = base_folder(family)
            tokenizer = AutoTokenizer.from_pretrained(folder)
            vocabulary = VocabularyInfo(
                len(tokenizer), None, tokenizer.eos_token_id, tokenizer.bos_token_id, {}, len(tokenizer)
            )
            model = load_base(BaseRecipe(str(folder), method="full"), vocabulary, device="cpu", seed=1)
            home = tmp_path_factory.mktemp(family) / "model"
            save_model(home, model, folder, MANIFEST, dtype="float32")
            made[family] = TransformersEngine(
                *load_model_folder(home)[:2], batch_size=32, device="cpu", threads=1
            )
        return made[family]

    return engine


@families
def test_probabilities_are_those_of_the_prompt_as_trained_and_one_pass(engine_of, family):
    """A key-value cache, an attention window or a cap on the logits must not change them."""
    engine = engine_of(family)
    prompts = [Prompt(PROMPT), Prompt(PROMPT, SALT[:40]), Prompt("Na")]
    for completion in engine.complete(prompts, Sampling(max_new_tokens=40, seed=3)):
        begin = prompt_ids(engine.tokenizer, completion.prompt)
        ids = torch.tensor([[*begin, *completion.token_ids]])
        with torch.no_grad():
            logits = engine.model(input_ids=ids).logits[0, len(begin) - 1 : -1].float()
        chosen = torch.log_softmax(logits, -1).gather(1, ids[0, len(begin) :, None]).sum().item()
        assert completion.log_probability == pytest.approx(chosen, rel=1e-4, abs=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_beginning_is_written_as_it_was_given(engine_of, family):
    engine = engine_of(family)
    for beginning in (SALT, SALT[:17], "3.99 "):
        (found,) = engine.complete([Prompt(PROMPT, beginning)], Sampling(max_new_tokens=80, seed=1))
        assert found.text.startswith(beginning)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("first", [" ", "3", "\n", " 3.99"])
def test_no_blank_is_lost_where_the_crystal_begins(engine_of, family, first):
    """SentencePiece tokenizers drop the blank in front when a completion is decoded alone."""
    engine = engine_of(family)
    given = engine.tokenizer(f"{PROMPT}{first}", add_special_tokens=False)["input_ids"]
    begin = engine.tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    if given[: len(begin)] != begin:
        pytest.skip("this tokenizer joins the blank to the prompt's end")
    assert engine.texts.text_of(begin, given[len(begin) :]) == first


def test_the_end_is_left_out_and_other_special_tokens_stay(engine_of):
    engine = engine_of("llama")
    begin = prompt_ids(engine.tokenizer, PROMPT)
    numbers = engine.tokenizer("3.99", add_special_tokens=False)["input_ids"]
    assert engine.texts.text_of(begin, [*numbers, engine.tokenizer.eos_token_id]).strip() == "3.99"
    assert "<unk>" in engine.texts.text_of(begin, [*numbers, engine.tokenizer.unk_token_id, *numbers])


def test_prompts_begin_with_bos_where_the_tokenizer_puts_one(engine_of):
    llama, gpt2 = engine_of("llama"), engine_of("gpt2")
    assert prompt_ids(llama.tokenizer, PROMPT)[0] == llama.tokenizer.bos_token_id
    assert gpt2.tokenizer.decode(prompt_ids(gpt2.tokenizer, PROMPT)) == PROMPT


def test_a_sample_ends_at_the_end_token(engine_of):
    engine = engine_of("gpt2")
    found = list(
        engine.complete([Prompt(PROMPT)] * 32, Sampling(max_new_tokens=40, seed=1, temperature=50.0))
    )
    ended = [completion for completion in found if completion.stop_reason == "stop"]
    assert ended
    for completion in ended:
        assert completion.token_ids[-1] == engine.tokenizer.eos_token_id
        assert "<|endoftext|>" not in completion.text


# ---------------------------------------------------------------- generation


@pytest.fixture(scope="module")
def adapter(base_folder, tmp_path_factory):
    """Return an adapter's folder whose base is a copy that a test may move."""
    folder = base_folder("gpt2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    vocabulary = VocabularyInfo(len(tokenizer), None, tokenizer.eos_token_id, None, {}, len(tokenizer))
    model = load_base(BaseRecipe(str(folder), lora=LoraRecipe(rank=2)), vocabulary, device="cpu", seed=1)
    return save_adapter(tmp_path_factory.mktemp("adapter") / "adapter", model, folder, MANIFEST)


def test_an_adapter_generates_and_every_sample_gets_a_verdict(adapter):
    samples = generate(n=3, seed=1, model=adapter, sampling=Sampling(max_new_tokens=40))
    assert len(samples) == 3
    assert all(not sample.verdict.valid and sample.verdict.reason for sample in samples)


def test_an_adapter_is_put_on_the_base_that_is_named(adapter, base_folder, tmp_path):
    base = shutil.copytree(base_folder("gpt2"), tmp_path / "base")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    moved = shutil.copytree(adapter, tmp_path / "moved")
    (moved / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "gone"}))
    here, there = load_model(adapter=adapter), load_model(base, adapter=moved)
    assert (here.name, there.name) == (str(adapter), f"{base} + {moved}")
    weights = dict(there.engine.model.named_parameters())
    assert all(torch.equal(w, weights[name]) for name, w in here.engine.model.named_parameters())
    with pytest.raises(ModelError, match=r"adapter 'no-such-name': no such folder, and none of that name"):
        load_model(adapter="no-such-name")


def test_a_model_taught_to_write_a_crystal_writes_it(base_folder, tmp_path):
    """From tokens to a judged crystal: LoRA learns rock salt by heart, the folder is loaded, and asked."""
    folder = base_folder("llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    vocabulary = VocabularyInfo(
        len(tokenizer), None, tokenizer.eos_token_id, tokenizer.bos_token_id, {}, len(tokenizer)
    )
    recipe = BaseRecipe(str(folder), lora=LoraRecipe(rank=16, alpha=32, dropout=0.0))
    model = load_base(recipe, vocabulary, device="cpu", seed=1).train()
    begin = prompt_ids(tokenizer, PROMPT)
    from crystallm_kit.tokens.cutting import BaseCutter

    text = [*BaseCutter(tokenizer)(SALT), tokenizer.eos_token_id]
    ids = torch.tensor([[*begin, *text]])
    optimizer = torch.optim.Adam([w for w in model.parameters() if w.requires_grad], lr=1e-2)
    for _ in range(60):
        logits = model(input_ids=ids, use_cache=False).logits[0, len(begin) - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, ids[0, len(begin) :])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss.item() < 0.01:
            break
    home = save_adapter(tmp_path / "adapter", model, folder, MANIFEST)
    samples = generate(n=2, seed=1, model=home, sampling=Sampling(temperature=0), unique=False)
    for sample in samples:
        assert sample.text == SALT
        assert sample.verdict.valid, sample.verdict
        assert sample.structure.composition.reduced_formula == "NaCl"


def test_wyckoff_text_in_other_tokens_is_sampled_unconstrained(engine_of, toy_model):
    model = load_model(toy_model)
    assert takes_requests(model)
    assert not takes_requests(dataclasses.replace(model, engine=engine_of("gpt2")))


def test_a_model_on_hugging_face_that_cannot_be_reached_says_so(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"model 'no-such-owner/no-such-model': no such folder, and Hugging"):
        load_model("no-such-owner/no-such-model")


def test_names_that_are_no_ids_are_folders(tmp_path):
    with pytest.raises(ModelError, match="no such model folder"):
        load_model(tmp_path / "none")
    with pytest.raises(ModelError, match="none: no such model folder"):
        load_model("none")
