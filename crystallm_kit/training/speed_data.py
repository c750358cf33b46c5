"""The texts that the speed table trains on: the same real crystals in three formats, as token arrays.

    python -m crystallm_kit.training.speed --build-data mp_train.parquet --out data

    data/compact.npz   English prompts and texts of Crystal-text-LLM (`compact` at its decimals), for a base
    data/wyckoff.npz   the kit's own prompts and texts (kit-1, `wyckoff`), drawn anew for each epoch; each
                       crystal five times, so that an epoch is as long as a corpus of 50,000 would make it
    data/cif.npz       CrystaLLM's texts, without prompts; joined, they are its token stream

Crystals of at most 20 sites, as in MP-20, shuffled by the seed. Ids of compact.npz are those of a byte-level
BPE trained on the very texts, every digit a token of its own as in Llama 2: valid rows of a base model's
vocabulary of 128,256, and speed asks no more of them. Llama 3's own tokenizer joins up to three digits, so
its texts would be shorter, for every way of training alike.

Not here: what is measured on them (speed.py); corpora to learn from (tokens/corpus.py).
"""

import itertools
import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from crystallm_kit.errors import EmptyInput, EncodeError, ParseError
from crystallm_kit.tokens.drawing import (
    ConditionDropping,
    Examples,
    Sequences,
    StoredInfo,
    VocabularyInfo,
    running_sums,
    write_stored,
)
from crystallm_kit.training.batches import write_arrays

if TYPE_CHECKING:
    from crystallm_kit.records import Crystal

T = TypeVar("T")
MOST_SITES = 20  # as in MP-20, which the published systems learned
BASE_VOCABULARY = 128_256  # Llama 3's
_BPE_TOKENS = 2_048
_DESCRIPTIONS = 8  # equivalent wyckoff texts kept of a crystal, as in finetune/corpus-wyckoff-mp.yaml
_VALIDATION = 64  # crystals
_COPIES = 5


def build(
    inputs: Sequence[Path],
    out: Path,
    *,
    seed: int = 1,
    n_crystals: int = 10_000,
    n_compact: int = 4_000,
    base_vocabulary: int = BASE_VOCABULARY,
) -> dict[str, float]:
    """Write the three files; return the mean number of tokens of a crystal in each.

    Args:
        inputs: Crystal files, as structures.files reads them.
        out: Folder.
        seed: Of the order and of what prompts state.
        n_crystals: At most, of each format.
        n_compact: At most, of compact.npz, which has 32-bit ids.
        base_vocabulary: Rows of the base model's embedding.

    Raises:
        ReadError: If an input cannot be read.
        EmptyInput: If it holds too few crystals.
    """
    from crystallm_kit.structures.files import read

    crystals = [crystal for crystal in read(inputs) if len(crystal.structure) <= MOST_SITES]
    if len(crystals) < 2:
        raise EmptyInput(f"{len(crystals)} crystals of at most {MOST_SITES} sites; expected 2 and more.")
    order = np.random.default_rng(seed).permutation(len(crystals))[:n_crystals]
    chosen = [crystals[i] for i in order]
    out.mkdir(parents=True, exist_ok=True)
    return {
        "compact": _write_compact(chosen[:n_compact], out / "compact.npz", seed, base_vocabulary),
        "wyckoff": _write_wyckoff(chosen, out / "wyckoff.npz", seed),
        "cif": _write_cif(chosen, out / "cif.npz", seed),
    }


def _write_compact(crystals: Sequence["Crystal"], path: Path, seed: int, vocabulary: int) -> float:
    from crystallm_kit.text.compact import CompactRepresentation
    from crystallm_kit.text.prompts import template_named, training_conditions

    template, format_ = template_named("crystal-text-llm"), CompactRepresentation.crystal_text_llm()
    rng = np.random.default_rng((seed, 1))
    prompts = [
        template.render(training_conditions(crystal, rng, template=template.name), rng)
        for crystal in crystals
    ]
    texts = [format_.encode(crystal) for crystal in crystals]
    tokenizer = _byte_pairs([prompt + text for prompt, text in zip(prompts, texts, strict=True)])
    begin, end = tokenizer.convert_tokens_to_ids(["<s>", "</s>"])
    heads = [[begin, *ids] for ids in tokenizer(prompts, add_special_tokens=False)["input_ids"]]
    tails = [[*ids, end] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    info = StoredInfo(
        VocabularyInfo(vocabulary, end, end, begin, n_base=vocabulary),
        format_.name,
        {"length_decimals": 1, "angle_decimals": 0, "coordinate_decimals": 2},
        template.name,
        template.hash,
    )
    return _write(path, heads, tails, info)


def _byte_pairs(texts: list[str]) -> Any:
    """Return a tokenizer trained on texts: byte-level BPE in Llama's manner, digits apart."""
    from transformers import PreTrainedTokenizerFast

    before = [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ]
    rules = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": before},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": {}, "merges": []},
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tokenizer.json")
        path.write_text(json.dumps(rules), encoding="utf-8")
        untrained = PreTrainedTokenizerFast(tokenizer_file=str(path), bos_token="<s>", eos_token="</s>")
    return untrained.train_new_from_iterator(texts, _BPE_TOKENS, show_progress=False)


def _write_wyckoff(crystals: Sequence["Crystal"], path: Path, seed: int) -> float:
    from crystallm_kit.tokens.encoding import CrystalEncoder, EncodingRecipe

    encoder = CrystalEncoder(EncodingRecipe("wyckoff", n_texts=_DESCRIPTIONS), seed=seed)
    encoded = _encoded(crystals, encoder)
    repeated = encoded * _COPIES
    texts = Sequences.of(one.texts for one in repeated)
    prompts = Sequences.of((one.prompts for one in repeated), (one.prompt_kinds for one in repeated))
    n = min(_VALIDATION, len(encoded))
    write_stored(
        path,
        (texts, prompts),
        (texts.first(n), prompts.first(n)),
        encoder.info,
        seed=seed,
        dropping=ConditionDropping(),
        other_description_probability=0.5,
    )
    return float(np.mean([len(one.texts[0]) for one in encoded]))


def _write_cif(crystals: Sequence["Crystal"], path: Path, seed: int) -> float:
    from crystallm_kit.tokens.encoding import CrystalEncoder, EncodingRecipe

    encoder = CrystalEncoder(EncodingRecipe("cif", template="cif-crystallm"), seed=seed)
    texts = _encoded(crystals, lambda crystal: encoder.cut(encoder.format.encode(crystal)))
    return _write(path, [[] for _ in texts], texts, encoder.info)


def _encoded(crystals: Iterable["Crystal"], encode: Callable[["Crystal"], T]) -> list[T]:
    """Return what the format makes of each crystal; those that it cannot carry are left out."""
    found = []
    for crystal in crystals:
        try:
            found.append(encode(crystal))
        except (EncodeError, ParseError):
            continue
    return found


def _write(path: Path, heads: list[list[int]], tails: list[list[int]], info: StoredInfo) -> float:
    """Write prompts and texts as examples of one epoch; return their mean length."""
    lengths = [len(head) + len(tail) for head, tail in zip(heads, tails, strict=True)]
    joined = itertools.chain.from_iterable(head + tail for head, tail in zip(heads, tails, strict=True))
    offsets = running_sums(lengths)
    prompt_lengths = np.array([len(head) for head in heads], dtype=np.int32)
    examples = Examples(np.fromiter(joined, np.int32, offsets[-1]), offsets, prompt_lengths)
    n = min(_VALIDATION, len(heads))
    validation = Examples(examples.tokens[: offsets[n]], offsets[: n + 1], prompt_lengths[:n])
    write_arrays(path, [examples], validation, info)
    return float(np.mean(lengths))
