"""More training crystals, made from the corpus's own by replacing elements (structures/substitution.py).

    add_substitutes("corpus/", recipe, n_per_crystal=3)  ->  corpus/substituted-00000.parquet ...

A small corpus shows a prototype with few of the elements that form it. Its substitutes show the others, as
guesses: so epochs take them at first, and the last ones leave them out (drawing.py). None of them repeats a
text of the corpus, none has a composition of the validation or test set, and none has a property.

Not here: how likeness is learned and volume scaled (structures/substitution.py).
"""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from crystallm_kit.errors import UserError
from crystallm_kit.recipes import from_dict, recipe_to_dict
from crystallm_kit.records import Crystal
from crystallm_kit.structures.substitution import SubstitutionTable, learn_substitutions, substitute
from crystallm_kit.structures.symmetry import SymmetricCrystal, expand
from crystallm_kit.text.wyckoff import text_to_symmetric
from crystallm_kit.tokens.encoding import CrystalEncoder, EncodedCrystal, EncodingRecipe
from crystallm_kit.tokens.parts import write_rows

SUBSTITUTED = "substituted"
_ROWS_OF_A_TASK = 1000
_Task = tuple[list[str], int, SubstitutionTable, str, int, int, int, str]


def add_substitutes(
    folder: str | Path,
    recipe: EncodingRecipe,
    *,
    n_per_crystal: int,
    seed: int,
    max_tokens: int,
    workers: int = 1,
    tokenizer_folder: Path | None = None,
) -> int:
    """Write a corpus's substitutes beside its shards and return how many there are.

    Args:
        folder: A corpus with its shards.
        recipe: Of the corpus; its format must be wyckoff.
        n_per_crystal: Attempts for each training crystal.
        seed: Of the draws.
        max_tokens: Longer ones are left out.
        workers: Processes.
        tokenizer_folder: Of a base model's tokenizer; None: the format's own.

    Raises:
        UserError: If the format is not wyckoff, which alone tells a crystal's prototype.
    """
    if recipe.format != "wyckoff":
        raise UserError(f"substitutes need the format 'wyckoff', got '{recipe.format}'; set substitutes: 0")
    folder = Path(folder)
    texts = [text for shard in sorted(folder.glob("train-*.parquet")) for text in _column(shard, "text")]
    held_out = {
        composition
        for split in ("validation", "test")
        for shard in folder.glob(f"{split}-*.parquet")
        for composition in _column(shard, "composition")
    }
    table = learn_substitutions(text_to_symmetric(text) for text in texts)
    plain = json.dumps(recipe_to_dict(recipe), sort_keys=True)
    starts = range(0, len(texts), _ROWS_OF_A_TASK)
    tokenizer = "" if tokenizer_folder is None else os.fspath(tokenizer_folder)
    tasks = [
        (
            texts[start : start + _ROWS_OF_A_TASK],
            start,
            table,
            plain,
            n_per_crystal,
            seed,
            max_tokens,
            tokenizer,
        )
        for start in starts
    ]
    seen = set(texts)
    count = 0
    for number, found in enumerate(_spread(tasks, workers)):
        kept = []
        for encoded in found:
            if encoded.text not in seen and encoded.composition not in held_out:
                seen.add(encoded.text)
                kept.append(encoded)
        # their side of the split, which check_splits reads
        write_rows(folder / f"{SUBSTITUTED}-{number:05d}.parquet", kept, "train")
        count += len(kept)
    return count


def _column(shard: Path, name: str) -> list[str]:
    values: list[str] = pq.read_table(shard, columns=[name])[name].to_pylist()
    return values


def _spread(tasks: list[_Task], workers: int) -> Iterator[list[EncodedCrystal]]:
    if workers == 1:
        yield from map(_substitutes_of, tasks)
        return
    with ProcessPoolExecutor(min(workers, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        yield from pool.map(_substitutes_of, tasks)


def _substitutes_of(task: _Task) -> list[EncodedCrystal]:
    """Return the encoded substitutes of some crystals.

    Each depends on its crystal's position and the seed alone.
    """
    texts, start, table, plain, n_per_crystal, seed, max_tokens, tokenizer = task
    encoder = _encoder(plain, seed, tokenizer)
    found = []
    for offset, text in enumerate(texts):
        original: SymmetricCrystal = text_to_symmetric(text)
        rng = np.random.default_rng((seed, start + offset))
        for attempt in range(n_per_crystal):
            crystal = substitute(original, table, rng)
            if crystal is None:
                continue
            try:
                made = Crystal(f"substitute {start + offset}-{attempt}", expand(crystal))
                encoded = encoder(made).without_long_pairs(max_tokens)
            except UserError:
                continue
            if encoded.longest <= max_tokens:
                found.append(encoded)
    return found


@lru_cache(maxsize=1)
def _encoder(plain: str, seed: int, tokenizer: str) -> CrystalEncoder:
    recipe = from_dict(json.loads(plain), EncodingRecipe)
    return CrystalEncoder(recipe, seed=seed, tokenizer_folder=tokenizer or None)
