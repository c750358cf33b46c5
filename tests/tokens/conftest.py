"""Small tokenizers of the kinds that base models have, trained here on a few texts."""

import json
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

LINES = [
    "Below is a description of a bulk material. The chemical formula is BaTiO3.\n5.64 5.64 5.64\n90.0 90.0\n",
    "Ba\n0.000 0.000 0.000\nTi\n0.500 0.500 0.500\nO\n0.500 0.500 0.000\nNa1 Cl1 225\nNa a\nCl b\n5.64 end",
    "_cell_length_a 5.6400\nLattice=\"3.988 0.000 0.000\" Properties=species:S:1:pos:R:3 pbc=\"T T T\"\n",
]  # fmt: skip


def _saved(tokenizer: Tokenizer, folder: Path, **special: str) -> Path:
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory) -> Path:
    """Return the folder of a byte-level BPE as Llama 3, Qwen and GPT-2 have it, digits one by one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<|begin|>", "<|end|>"],
    )  # fmt: skip
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
    )
    return _saved(
        tokenizer, tmp_path_factory.mktemp("byte_level"), bos_token="<|begin|>", eos_token="<|end|>"
    )


@pytest.fixture(scope="session")
def sentence_piece(tmp_path_factory) -> Path:
    """Return the folder of a SentencePiece BPE as Llama 2 and Mistral have it: "▁" before the first word."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    # words and digits apart, as SentencePiece trains; dropped afterwards, as Llama 2's file has none
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁?[A-Za-z]+|▁?[0-9]|."), "isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=500, show_progress=False,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
    )  # fmt: skip
    tokenizer.train_from_iterator([line for text in LINES for line in text.split("\n")], trainer)
    tokenizer.pre_tokenizer = None
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder = tmp_path_factory.mktemp("sentence_piece")
    return _saved(tokenizer, folder, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def llama_2(sentence_piece, tmp_path_factory) -> Path:
    """Return the folder of the same vocabulary under the class that Llama 2's files name."""
    state = json.loads((sentence_piece / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    tokenizer = LlamaTokenizer(
        vocab=state["vocab"],
        merges=[tuple(pair) for pair in state["merges"]],
        legacy=True,
        add_bos_token=True,
    )
    folder = tmp_path_factory.mktemp("llama_2")
    tokenizer.save_pretrained(str(folder))
    return folder
