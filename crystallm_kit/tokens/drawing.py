r"""A tokenised corpus as flat arrays, and epochs drawn from it; numpy alone.

For each crystal the corpus stores its texts (equivalent descriptions, the canonical one first) and the parts
that a prompt about it can have. An epoch draws for each crystal which conditions are stated and which text
follows:

    parts of NaCl   elements= contains= Na Cl " " | n_elements=2 | system=cubic | spacegroup=225\n | crystal\n
    texts of NaCl   "Na1 Cl1 225\nNa a\nCl b\n5.64 end"   "Na1 Cl1 225\nNa b\nCl a\n5.64 end"
    an example      n_elements=2 spacegroup=225\ncrystal\nNa1 Cl1 225\nNa b\nCl a\n5.64 end

The kept parts, joined, are what the template renders for those conditions, and conditions are drawn as
text.prompts.training_conditions draws them. Where a template's prompts are no such sums of parts (English
sentences) a crystal has whole prompts instead, of which an epoch takes one. Other tasks than writing the
crystal (tasks.py) have prompts and answers of their own; an epoch gives each crystal one of its tasks.

Deterministic: (seed, epoch) fixes the epoch. Drawing 27,000 crystals takes a twentieth of a second and their
file has 6 MB, so epochs are drawn where the training runs. As a command it writes drawn epochs as the arrays
that training/batches.py reads:

    python -m crystallm_kit.tokens.drawing corpus.npz --epochs 40 --out drawn.npz

Legend: N crystals, S sequences (texts, prompts or parts of prompts), E element sequences.
Not here: where texts and parts come from (corpus.py), batches (training/batches.py).
"""

import argparse
import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from crystallm_kit.errors import EmptyInput, ReadError
from crystallm_kit.recipes import recipe_to_dict

IntArray = npt.NDArray[np.integer[Any]]
VALIDATION_EPOCH = 2**32 - 1  # its draws belong to no training epoch


class Examples(NamedTuple):
    """Tokenised examples, ragged.

    Attributes:
        tokens: All examples joined: (sum of lengths,).
        offsets: Example i is tokens[offsets[i]:offsets[i + 1]]: (N + 1,) int64.
        prompt_lengths: Leading tokens of each example that are its prompt: (N,) int32.
    """

    tokens: IntArray
    offsets: IntArray
    prompt_lengths: IntArray


@dataclass(frozen=True)
class VocabularyInfo:
    """What a model must know of the tokenizer.

    Attributes:
        size: Rows of the embedding.
        pad_token_id, eos_token_id, bos_token_id: Special ids; a format without such a token has none.
        element_token_ids: Element symbol -> id.
        n_base: Tokens of the base model's tokenizer; those from this id on are new to it. None: no base.
    """

    size: int
    pad_token_id: int | None
    eos_token_id: int | None
    bos_token_id: int | None = None
    element_token_ids: Mapping[str, int] = field(default_factory=dict)
    n_base: int | None = None


@dataclass(frozen=True)
class StoredInfo:
    """What a model trained on a corpus has to know of it.

    Attributes:
        vocabulary: Size and special ids.
        format: Name of the text format.
        format_settings: Its settings.
        template: Name of the prompt template.
        template_sha256: Its hash.
        tokenizer_sha256: Of the tokenizer's tokenizer.json; "" in corpora of before it was noted.
    """

    vocabulary: VocabularyInfo
    format: str
    format_settings: dict[str, Any]
    template: str
    template_sha256: str
    tokenizer_sha256: str = ""


# What a sequence of a prompt is.
CLOSING, ONLY_ELEMENTS, SOME_ELEMENTS, ELEMENT, ELEMENTS_END, CONDITION, WHOLE_PROMPT = 0, 1, 2, 3, 4, 5, 6
FOCUS = 7  # a value of the property in focus; of a crystal's several one is stated
# Prompts of the tasks beside generation; each is followed by its answer.
INFILL, PROPERTY, ANSWER = 8, 9, 10
TASKS = ("generate", "infill", "property")


@dataclass(frozen=True)
class ConditionDropping:
    """How the conditions of a training example are drawn; as text.prompts.training_conditions has it.

    Attributes:
        none_probability: Share of examples without any condition.
        keep_probability: Of each condition, otherwise; None: drawn for each example, evenly from 0 to 1.
        only_elements_probability: Share of element conditions that name all elements; the others name some.
        focus: A property that is to be learned, by the kit's name; for templates that are sums of parts.
        focus_probability: Of stating it, where anything is stated; the other conditions stay as they are.
        alone_probability: Of stating nothing else, where it is stated.
        focus_spread: Standard deviation of the logarithm of what is stated over the true value, so that
            values whose numbers are different tokens learn from one another's crystals.
        focus_values: Values that are stored of one crystal, the true one among them.
    """

    none_probability: float = 0.3
    keep_probability: float | None = None
    only_elements_probability: float = 0.5
    focus: str | None = None
    focus_probability: float = 0.9
    alone_probability: float = 0.5
    focus_spread: float = 0.0
    focus_values: int = 1

    def __post_init__(self) -> None:
        for name in (
            "none_probability",
            "only_elements_probability",
            "focus_probability",
            "alone_probability",
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"'{name}' must be in [0, 1], got {getattr(self, name)}")
        if self.focus_values < 1 or self.focus_spread < 0:
            raise ValueError("'focus_values' must be at least 1 and 'focus_spread' not negative")


class Sequences(NamedTuple):
    """Several sequences of tokens for each of N crystals.

    Attributes:
        tokens: All S sequences joined.
        offsets: Sequence s is tokens[offsets[s]:offsets[s + 1]]: (S + 1,) int64.
        starts: Sequences of crystal i are starts[i] to starts[i + 1]: (N + 1,) int64.
        kinds: What each is, for prompts: (S,) uint8. Texts have zeros.
    """

    tokens: IntArray
    offsets: IntArray
    starts: IntArray
    kinds: IntArray

    @classmethod
    def of(
        cls,
        sequences: Iterable[Sequence[Sequence[int]]],
        kinds: Iterable[Sequence[int]] | None = None,
        *,
        dtype: type[np.integer[Any]] = np.uint16,
    ) -> "Sequences":
        """Return sequences given as one list a crystal, with their kinds given alike."""
        lists = list(sequences)
        flat = [sequence for of_crystal in lists for sequence in of_crystal]
        tokens = [np.asarray(sequence, dtype=dtype) for sequence in flat]
        return cls(
            np.concatenate(tokens) if tokens else np.zeros(0, dtype),
            running_sums([len(sequence) for sequence in flat]),
            running_sums([len(of_crystal) for of_crystal in lists]),
            np.array([k for of_crystal in kinds or () for k in of_crystal], dtype=np.uint8)
            if kinds is not None
            else np.zeros(len(flat), dtype=np.uint8),
        )

    def first(self, n: int | None) -> "Sequences":
        """Return the sequences of the first n crystals; None: of all."""
        if n is None or n == self.n_crystals:
            return self
        last = int(self.starts[n])
        return Sequences(
            self.tokens[: self.offsets[last]],
            self.offsets[: last + 1],
            self.starts[: n + 1],
            self.kinds[:last],
        )

    @property
    def n_crystals(self) -> int:
        """Number of crystals."""
        return len(self.starts) - 1

    @property
    def counts(self) -> IntArray:
        """Sequences of each crystal: (N,)."""
        return np.diff(self.starts)


def draw_examples(
    texts: Sequences,
    prompts: Sequences,
    rng: np.random.Generator,
    *,
    dropping: ConditionDropping,
    other_description_probability: float,
    tasks: Mapping[str, float] | None = None,
) -> Examples:
    """Return one example a crystal, in the corpus's order.

    Args:
        texts: Of N crystals; the first of each is the canonical one.
        prompts: Of the same crystals: parts in the template's order, or whole prompts.
        rng: Draws.
        dropping: How conditions are drawn.
        other_description_probability: How often the text is drawn from all texts instead of being the first.
        tasks: Name in TASKS -> share of the examples; None: generation alone. A crystal without prompts for
            a task takes one of the others.
    """
    kept = draw_prompts(prompts, rng, dropping)  # (S,) of the prompts
    draws = rng.random((2, texts.n_crystals))
    other = np.where(draws[0] < other_description_probability, draws[1], 0.0)
    text = texts.starts[:-1] + (other * texts.counts).astype(np.int64)
    begins = len(prompts.tokens) + texts.offsets[:-1][text]  # (N,) of what follows the prompts
    text_lengths = np.diff(texts.offsets)[text]
    owner = np.repeat(np.arange(prompts.n_crystals), prompts.counts)
    if tasks is not None and set(tasks) != {"generate"}:
        asked = draw_tasks(prompts, rng, tasks)
        others = np.flatnonzero(asked >= 0)
        kept &= asked[owner] < 0
        kept[asked[others]] = True
        begins[others] = prompts.offsets[asked[others] + 1]
        text_lengths[others] = np.diff(prompts.offsets)[asked[others] + 1]
    # one list of sequences: those of each crystal's prompt, then its text or answer
    crystal = np.concatenate([owner[kept], np.arange(texts.n_crystals)])
    begins = np.concatenate([prompts.offsets[:-1][kept], begins])
    lengths = np.concatenate([np.diff(prompts.offsets)[kept], text_lengths])
    order = np.argsort(crystal, kind="stable")
    crystal, begins, lengths = crystal[order], begins[order], lengths[order]
    ends = running_sums(lengths)
    index = np.repeat(begins - ends[:-1], lengths) + np.arange(ends[-1])
    tokens = np.concatenate([prompts.tokens, texts.tokens])[index]
    example_lengths = np.bincount(crystal, weights=lengths, minlength=texts.n_crystals).astype(np.int64)
    prompt_lengths = example_lengths - text_lengths
    return Examples(tokens, running_sums(example_lengths), prompt_lengths.astype(np.int32))


def draw_prompts(
    prompts: Sequences, rng: np.random.Generator, dropping: ConditionDropping
) -> npt.NDArray[np.bool_]:
    """Return which sequences make up the prompts of one epoch: (S,)."""
    n, kinds = prompts.n_crystals, prompts.kinds
    owner = np.repeat(np.arange(n), prompts.counts)
    any_, share, names_all, elements_kept, whole = rng.random((5, n))
    share = share if dropping.keep_probability is None else np.full(n, dropping.keep_probability)
    share = np.where(any_ < dropping.none_probability, 0.0, share)
    focused = np.flatnonzero(kinds == FOCUS)
    if len(focused):
        kept_focus, is_alone = _draw_focus(owner[focused], any_ >= dropping.none_probability, rng, dropping)
        share = np.where(is_alone, 0.0, share)
    kept = rng.random(len(kinds)) < share[owner]  # right for conditions; the other kinds follow
    has_elements = (elements_kept < share)[owner]
    only = (names_all < dropping.only_elements_probability)[owner]
    kept = np.where(kinds == CLOSING, True, kept)
    if len(focused):
        kept[focused] = kept_focus
    kept = np.where(kinds == ONLY_ELEMENTS, has_elements & only, kept)
    kept = np.where(kinds == SOME_ELEMENTS, has_elements & ~only, kept)
    kept = np.where(kinds == ELEMENTS_END, has_elements, kept)
    element = np.flatnonzero(kinds == ELEMENT)  # (E,)
    kept[element] = has_elements[element] & (only[element] | _some_of_each(owner[element], n, rng))
    # whole prompts stand before those of other tasks
    n_whole = np.bincount(owner[kinds == WHOLE_PROMPT], minlength=n)
    chosen = prompts.starts[:-1] + (whole * n_whole).astype(np.int64)
    is_chosen = np.zeros(len(kinds) + 1, dtype=bool)
    is_chosen[chosen] = True
    kept = np.where(kinds == WHOLE_PROMPT, is_chosen[:-1], kept)
    return np.where(kinds >= INFILL, False, kept)


def draw_tasks(prompts: Sequences, rng: np.random.Generator, tasks: Mapping[str, float]) -> IntArray:
    """Return the sequence that asks for each crystal's task, -1 where that is to write the crystal: (N,)."""
    n = prompts.n_crystals
    which, pick = rng.random((2, n))
    owner = np.repeat(np.arange(n), prompts.counts)
    asking = [np.flatnonzero(prompts.kinds == kind) for kind in (INFILL, PROPERTY)]
    counts = [np.bincount(owner[sequences], minlength=n) for sequences in asking]
    shares = [np.full(n, tasks.get("generate", 0.0))]
    shares += [tasks.get(name, 0.0) * (c > 0) for name, c in zip(TASKS[1:], counts, strict=True)]
    borders = np.cumsum(shares, axis=0)  # (3, N)
    task = (which * borders[-1] >= borders[:-1]).sum(axis=0)
    found = np.full(n, -1, dtype=np.int64)
    for number, (sequences, c) in enumerate(zip(asking, counts, strict=True), start=1):
        rows = np.flatnonzero((task == number) & (c > 0))
        found[rows] = sequences[running_sums(c)[rows] + (pick * c)[rows].astype(np.int64)]
    return found


def _draw_focus(
    owner: IntArray,
    states_anything: npt.NDArray[np.bool_],
    rng: np.random.Generator,
    dropping: ConditionDropping,
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Return which values of the property in focus are stated, and which of N crystals state nothing else.

    `owner` names the crystal of each value; the values of a crystal stand together.
    """
    n = len(states_anything)
    given, alone, which = rng.random((3, n))
    counts = np.bincount(owner, minlength=n)
    is_stated = states_anything & (given < dropping.focus_probability) & (counts > 0)
    rank = np.arange(len(owner)) - running_sums(counts)[:-1][owner]
    kept = is_stated[owner] & (rank == (which * counts).astype(np.int64)[owner])
    return kept, is_stated & (alone < dropping.alone_probability)


def _some_of_each(owner: IntArray, n: int, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Return one or more entries of each owner (sorted, in [0, n)), all numbers equally likely: (E,)."""
    counts = np.bincount(owner, minlength=n)
    wanted = 1 + (rng.random(n) * counts).astype(np.int64)
    shuffled = np.lexsort((rng.random(len(owner)), owner))
    rank = np.empty(len(owner), dtype=np.int64)
    rank[shuffled] = np.arange(len(owner)) - running_sums(counts)[:-1][owner]
    return rank < wanted[owner]


class StoredCorpus:
    """A tokenised corpus in one .npz file, which draws its epochs."""

    def __init__(self, path: str | Path, *, seed: int | None = None) -> None:
        """Open the file.

        Args:
            path: What `write_stored` wrote.
            seed: Of the draws; None: the one stored.

        Raises:
            ReadError: If the file is missing, no .npz, or lacks an entry.
        """
        self.path = Path(path)
        try:
            content = self.path.read_bytes()
            arrays = np.load(io.BytesIO(content), allow_pickle=False)
            stored = json.loads(str(arrays["stored"]))
            info = stored["info"]
            self.info = StoredInfo(**{**info, "vocabulary": VocabularyInfo(**info["vocabulary"])})
            self.dropping = ConditionDropping(**stored["dropping"])
            self.other_description_probability = float(stored["other_description_probability"])
            self.tasks: dict[str, float] = stored.get("tasks", {"generate": 1.0})
            self.n_substituted = int(stored.get("n_substituted", 0))
            self.substituted_epochs = int(stored.get("substituted_epochs", 0))
            self.seed = int(stored["seed"]) if seed is None else seed
            self._splits = {
                split: (_unpacked(arrays, f"{split}_texts"), _unpacked(arrays, f"{split}_prompts"))
                for split in ("train", "validation")
            }
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ReadError(
                f"{self.path}: not a stored corpus: {error}; expected export_arrays' file."
            ) from error
        self.sha256 = hashlib.sha256(content + str(self.seed).encode()).hexdigest()
        if not self._splits["train"][0].n_crystals:
            raise EmptyInput(f"{self.path}: no training crystals.")

    @property
    def n_crystals(self) -> int:
        """Training crystals, which is the number of examples of an epoch without substitutes."""
        return self._splits["train"][0].n_crystals - self.n_substituted

    def examples(self, epoch: int) -> Examples:
        """Return the training examples of an epoch (0, 1, ...); the same at every call.

        The first `substituted_epochs` hold the corpus's substitutes too, behind its crystals.
        """
        n = None if epoch < self.substituted_epochs else self.n_crystals
        return self._draw("train", epoch, self.other_description_probability, n)

    def validation(self) -> Examples:
        """Return the validation examples: the canonical text of each crystal after conditions drawn once."""
        return self._draw("validation", VALIDATION_EPOCH, 0.0)

    def _draw(
        self, split: str, epoch: int, other_description_probability: float, n: int | None = None
    ) -> Examples:
        texts, prompts = (sequences.first(n) for sequences in self._splits[split])
        return draw_examples(
            texts,
            prompts,
            np.random.default_rng((self.seed, epoch)),
            dropping=self.dropping,
            other_description_probability=other_description_probability,
            tasks=self.tasks,
        )


def write_stored(
    path: str | Path,
    train: tuple[Sequences, Sequences],
    validation: tuple[Sequences, Sequences],
    info: StoredInfo,
    *,
    seed: int,
    dropping: ConditionDropping,
    other_description_probability: float,
    tasks: Mapping[str, float] | None = None,
    n_substituted: int = 0,
    substituted_epochs: int = 0,
) -> None:
    """Write (texts, prompts) of both splits as the .npz file that StoredCorpus reads.

    The last `n_substituted` training crystals are substitutes, which take part in `substituted_epochs`
    epochs.

    Raises:
        EmptyInput: If no training crystal has the property in focus.
    """
    if dropping.focus and not (train[1].kinds == FOCUS).any():
        raise EmptyInput(
            f"{path}: no training crystal has the property '{dropping.focus}' that encoding.dropping.focus "
            "names. Give data with such a column, or drop the focus."
        )
    stored = {
        "info": recipe_to_dict(info),
        "seed": seed,
        "dropping": recipe_to_dict(dropping),
        "other_description_probability": other_description_probability,
        "tasks": dict(tasks or {"generate": 1.0}),
        "n_substituted": n_substituted,
        "substituted_epochs": substituted_epochs,
    }
    dtype = np.uint16 if info.vocabulary.size <= 65_536 else np.int32
    arrays: dict[str, np.ndarray] = {"stored": np.array(json.dumps(stored))}
    for split, pair in (("train", train), ("validation", validation)):
        for name, sequences in zip(("texts", "prompts"), pair, strict=True):
            arrays[f"{split}_{name}_tokens"] = sequences.tokens.astype(dtype)
            # lengths pack better than offsets
            arrays[f"{split}_{name}_lengths"] = np.diff(sequences.offsets).astype(np.uint16)
            arrays[f"{split}_{name}_counts"] = sequences.counts.astype(np.uint16)
            arrays[f"{split}_{name}_kinds"] = sequences.kinds
    np.savez_compressed(path, allow_pickle=False, **arrays)


def write_drawn(corpus: StoredCorpus, path: str | Path, n_epochs: int) -> None:
    """Write drawn epochs as the arrays that training/batches.ArraySource reads."""
    arrays: dict[str, np.ndarray] = {"info": np.array(json.dumps(recipe_to_dict(corpus.info)))}
    drawn = [(f"_{epoch}", "", corpus.examples(epoch)) for epoch in range(n_epochs)]
    for after, before, examples in [*drawn, ("", "validation_", corpus.validation())]:
        for name, array in examples._asdict().items():
            arrays[f"{before}{name}{after}"] = array
    np.savez(path, allow_pickle=False, **arrays)


def _unpacked(arrays: Mapping[str, np.ndarray], name: str) -> Sequences:
    return Sequences(
        arrays[f"{name}_tokens"],
        running_sums(arrays[f"{name}_lengths"]),
        running_sums(arrays[f"{name}_counts"]),
        arrays[f"{name}_kinds"],
    )


def running_sums(lengths: Sequence[int] | IntArray) -> IntArray:
    """Return 0 and the running sums of lengths: (n + 1,) int64."""
    return np.concatenate(([0], np.cumsum(np.asarray(lengths, dtype=np.int64))))


def main(arguments: list[str] | None = None) -> None:
    """Write drawn epochs of a stored corpus."""
    parser = argparse.ArgumentParser(prog="python -m crystallm_kit.tokens.drawing", description=main.__doc__)
    parser.add_argument("corpus", type=Path, help="the stored corpus (.npz)")
    parser.add_argument("--epochs", type=int, required=True, help="how many to draw")
    parser.add_argument("--seed", type=int, default=None, help="of the draws; default: the stored one")
    parser.add_argument("--out", type=Path, required=True, help="the file to write (.npz)")
    options = parser.parse_args(arguments)
    corpus = StoredCorpus(options.corpus, seed=options.seed)
    write_drawn(corpus, options.out, options.epochs)
    mean = np.diff(corpus.examples(0).offsets).mean()
    print(f"{options.out}: {options.epochs} epochs of {corpus.n_crystals:,} examples of {mean:.1f} tokens")


if __name__ == "__main__":
    main()
