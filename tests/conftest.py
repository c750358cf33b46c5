"""What tests of several rooms share: a toy model, base models, Chromium; nothing is downloaded."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Of the base models: two layers, random weights.
SHAPE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # wide, so that differences show
}
# Family -> config class, its own settings, kind of tokenizer.
FAMILIES = {
    "llama": ("LlamaConfig", SHAPE, "sentencepiece"),
    "qwen2": ("Qwen2Config", SHAPE, "bytes"),
    "qwen3": ("Qwen3Config", {**SHAPE, "head_dim": 16, "tie_word_embeddings": True}, "bytes"),
    "mistral": ("MistralConfig", SHAPE, "sentencepiece"),
    "gemma": ("GemmaConfig", {**SHAPE, "head_dim": 16}, "sentencepiece"),
    "gemma2": ("Gemma2Config", {**SHAPE, "head_dim": 16, "attn_logit_softcapping": 1.0}, "sentencepiece"),
    "gemma3": ("Gemma3TextConfig", {**SHAPE, "head_dim": 16, "sliding_window": 64}, "sentencepiece"),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": 320, "n_positions": 512, "n_embd": 64, "n_layer": 2, "n_head": 4,
            "initializer_range": 0.2,
        },
        "bytes",
    ),
}  # fmt: skip
# What the small tokenizers learn their merges from.
TEXTS = (
    "Below is a description of a bulk material. The chemical formula is NaCl. The band gap is 5.2.",
    "Generate a description of the lengths and angles of the lattice vectors and then the element type and "
    "coordinates for each atom within the lattice:\n",
    "3.99 3.99 3.99\n60.0 60.0 60.0\nNa\n0.000 0.000 0.000\nCl\n0.500 0.500 0.500",
)


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory) -> Path:
    """Return a model folder with a random Llama of 2 layers, 64 wide, that writes `wyckoff` text."""
    from crystallm_kit.models.checkpoints import Manifest, ModelRecipe, new_model, save_model
    from crystallm_kit.text.prompts import template_named
    from crystallm_kit.tokens.drawing import VocabularyInfo
    from crystallm_kit.tokens.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(ROOT / "tokenizers" / "wyckoff")
    vocabulary = VocabularyInfo(len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id)
    shape = ModelRecipe(hidden_size=64, n_layers=2, n_heads=2, max_positions=256)
    manifest = Manifest({"seed": 1}, "wyckoff", {}, "kit-1", template_named("kit-1").hash, "0" * 64, 1)
    folder = tmp_path_factory.mktemp("models") / "toy"
    return save_model(folder, new_model(shape, vocabulary, seed=1), ROOT / "tokenizers" / "wyckoff", manifest)


def base_tokenizer(kind: str):
    """Return a tokenizer of up to 320 tokens: "sentencepiece" as Llama 2's (BOS, a blank put before texts,
    bytes for what is unknown), "bytes" as GPT-2's and Qwen's (no BOS of its own accord)."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=310,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(TEXTS, trainer)
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    special = ["<unk>", "<s>", "</s>"]
    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    learner.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=100, special_tokens=special, show_progress=False)
    )
    learned = json.loads(learner.to_str())["model"]
    tokens = [t for t in sorted(learned["vocab"], key=learned["vocab"].get) if t not in special]
    names = [*special, *(f"<0x{i:02X}>" for i in range(256)), *(t for t in tokens if t != "\n")][:310]
    vocabulary = {token: i for i, token in enumerate(names)}
    merges = [tuple(m) for m in learned["merges"] if "".join(m) in vocabulary]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory) -> Callable[[str], Path]:
    """Return a function from a family to the folder of its base model, written once."""
    import torch
    import transformers

    home = tmp_path_factory.mktemp("bases")

    def folder(family: str) -> Path:
        path = home / family
        if not path.is_dir():
            name, settings, kind = FAMILIES[family]
            tokenizer = base_tokenizer(kind)
            ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
            config = getattr(transformers, name)(**settings, **ids, pad_token_id=None)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1)
                transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
            tokenizer.save_pretrained(path)
        return path

    return folder


@pytest.fixture(scope="session")
def new_chromium() -> Callable[..., contextlib.AbstractContextManager]:
    """Return what starts a Chromium without a window; skipped where one or its driver is absent.

    `with new_chromium() as driver` draws WebGL in software, `new_chromium(webgl=False)` has none.
    """
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium drives the browser; it is absent")
    from selenium.webdriver.chrome.service import Service

    browser = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
    program = shutil.which("chromedriver")
    if not (browser and program):
        pytest.skip("no chromium and chromedriver on the PATH")

    @contextlib.contextmanager
    def started(*, webgl: bool = True) -> Iterator:
        options = selenium.ChromeOptions()
        options.binary_location = browser
        for argument in (
            "--headless=new",
            "--no-sandbox",
            "--disable-dev-shm-usage",
            "--force-prefers-reduced-motion",
            *(
                ("--enable-unsafe-swiftshader", "--use-gl=angle", "--use-angle=swiftshader")
                if webgl
                else ("--disable-gpu", "--disable-3d-apis")
            ),
        ):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        driver = selenium.Chrome(service=Service(program), options=options)
        try:
            yield driver
        finally:
            driver.quit()

    return started
