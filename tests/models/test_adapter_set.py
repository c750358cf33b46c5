"""adapter_set.py: several adapters over one base, each as if it were alone, whoever else computes."""

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from crystallm_kit.errors import ModelError, UnknownName
from crystallm_kit.models.adapter_set import AdapterSet
from crystallm_kit.models.bases import BaseRecipe, LoraRecipe, load_base, save_adapter
from crystallm_kit.models.checkpoints import Manifest
from crystallm_kit.models.loading import load_model_folder
from crystallm_kit.text.prompts import template_named
from crystallm_kit.tokens.drawing import VocabularyInfo

# peft asks transformers for a name that it is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
TEMPLATE = template_named("crystal-text-llm")
MANIFEST = Manifest({}, "compact", {}, TEMPLATE.name, TEMPLATE.hash, "cd" * 32, 1, base={"method": "lora"})
IDS = torch.arange(0, 310, 7)[None]


def trained(base_folder, to, *, family: str = "llama", n_new: int = 0, **lora):
    """Return the folder of an adapter of a base whose model has rows for ten tokens more than it uses."""
    folder = base_folder(family)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    n_base = len(tokenizer)
    tokenizer.add_tokens([f"[{i}]" for i in range(n_new)])
    tokenizer.save_pretrained(to / "tokenizer")
    vocabulary = VocabularyInfo(
        len(tokenizer), None, tokenizer.eos_token_id, tokenizer.bos_token_id, {}, n_base
    )
    recipe = BaseRecipe(str(folder), lora=LoraRecipe(rank=4, **lora))
    model = load_base(recipe, vocabulary, device="cpu", seed=1)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(sum(map(ord, str(to.name))))
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.05 * torch.randn_like(weight))
    return save_adapter(to / "adapter", model, to / "tokenizer", MANIFEST)


@pytest.fixture(scope="module")
def folders(base_folder, tmp_path_factory):
    """Return adapters of three kinds: plain, with rows for new tokens, with DoRA."""
    home = tmp_path_factory.mktemp("set")
    kinds = {"plain.1": {}, "tokens": {"n_new": 5}, "dora": {"dora": True}}
    for name in kinds:
        (home / name).mkdir()
    return {name: trained(base_folder, home / name, **kind) for name, kind in kinds.items()}


@pytest.fixture
def base(base_folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base_folder("llama")).eval()


@torch.inference_mode()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits


def test_each_adapter_computes_as_if_it_were_merged_and_alone(base, folders):
    plain = logits(base)
    alone = {name: logits(load_model_folder(folder)[0]) for name, folder in folders.items()}
    adapters = AdapterSet(base, folders)
    assert adapters.names == tuple(folders)
    for name in ("tokens", "", "plain.1", "dora", "plain.1", "tokens", "", "dora"):
        found = logits(adapters.model(name))
        if name:
            torch.testing.assert_close(found, alone[name], atol=1e-4, rtol=0)
            assert (found - plain).abs().max() > 0.1
        else:
            assert torch.equal(found, plain)


def test_the_base_is_held_once(base, folders):
    adapters = AdapterSet(base, folders)
    mine = {weight.data_ptr(): weight.numel() for weight in base.parameters()}
    theirs = {w.data_ptr(): w.numel() for name in folders for w in adapters.model(name).parameters()}
    assert mine.keys() <= theirs.keys()
    own = sum(theirs.values()) - sum(mine.values())
    assert own == sum(
        tensor.numel()
        for folder in folders.values()
        for tensor in load_file(folder / "adapter_model.safetensors").values()
    )


def test_an_adapter_is_read_when_it_is_first_asked_for_and_once(base, folders):
    adapters = AdapterSet(base, folders)
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(adapters.model, ["dora"] * 12))
    assert len({id(model) for model in found}) == 1
    assert adapters.model("") is base


def test_threads_compute_with_different_adapters_at_once(base, folders):
    adapters = AdapterSet(base, folders)
    names = ["", *folders]
    wanted = {name: logits(adapters.model(name)) for name in names}
    barrier = threading.Barrier(len(names), timeout=20)

    def compute(name: str) -> float:
        barrier.wait()
        return max(float((logits(adapters.model(name)) - wanted[name]).abs().max()) for _ in range(5))

    with ThreadPoolExecutor(len(names)) as pool:
        assert max(pool.map(compute, names)) < 1e-5


def test_whole_embeddings_beside_an_adapter_are_its_own(base, folders, tmp_path):
    """peft writes them over the base's, which all share."""
    folder = shutil.copytree(folders["plain.1"], tmp_path / "whole")
    weights = load_file(folder / "adapter_model.safetensors")
    rows = base.get_input_embeddings().weight.detach() + 1.0
    weights["base_model.model.model.embed_tokens.weight"] = rows
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    plain = logits(base)
    adapters = AdapterSet(base, {"whole": folder, **folders})
    found = logits(adapters.model("whole"))
    assert torch.equal(logits(base), plain)
    torch.testing.assert_close(found, logits(load_model_folder(folder)[0]), atol=1e-4, rtol=0)
    assert (found - logits(adapters.model("plain.1"))).abs().max() > 0.1


def test_an_unknown_adapter_is_refused_with_the_nearest(base, folders):
    with pytest.raises(UnknownName, match="did you mean 'tokens'"):
        AdapterSet(base, folders).model("token")
    with pytest.raises(UnknownName, match="no adapter 'x'"):
        AdapterSet(base).check("x")


def test_an_adapter_for_more_tokens_than_the_base_has_is_refused(base, base_folder, tmp_path):
    large = trained(base_folder, tmp_path, n_new=14)
    with pytest.raises(ModelError, match=r"has 324 tokens, the base 320.*crystallm-kit merge"):
        AdapterSet(base, {"large": large})


def test_what_is_no_adapter_is_refused_before_it_is_asked_for(base, base_folder):
    with pytest.raises(ModelError, match=r"adapter_config\.json"):
        AdapterSet(base, {"a base": base_folder("llama")})
    with pytest.raises(ModelError, match="needs a name"):
        AdapterSet(base, {"": base_folder("llama")})


def test_an_adapter_of_another_base_is_refused_and_leaves_no_trace(base, folders, base_folder, tmp_path):
    other = trained(base_folder, tmp_path, family="gpt2")
    adapters = AdapterSet(base, {**folders, "other": other})
    plain = logits(base)
    with pytest.raises(ModelError, match="does not fit its base"):
        adapters.model("other")
    assert torch.equal(logits(base), plain)
    torch.testing.assert_close(
        logits(adapters.model("dora")), logits(load_model_folder(folders["dora"])[0]), atol=1e-4, rtol=0
    )
