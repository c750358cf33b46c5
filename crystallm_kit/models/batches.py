"""Batches: tokenised examples as steps of a training run, each cut into groups of alike length.

An example is one crystal: prompt, text and end token. No row ever holds two crystals, so no crystal attends to
another, positions start at 0, and plain causal attention (the flash kernel of scaled_dot_product_attention) is
exact. What packing would save is saved by the cut: a step is a random sample of the epoch, sorted by length and cut
where the padding that is left costs least. The measured padding and the comparison with packed rows under a
block-diagonal mask are in finetune/README.md.

    lengths of a step  31 33 35 36 | 44 46 47 | 71   ->  groups (4, 36), (3, 48), (1, 72): rows, positions

Deterministic: (seed, epoch) fixes every batch, whatever the number of GPUs, so a run resumes at any step.

Legend: B rows, T positions, N examples.
Not here: where examples come from (tokens/corpus.py prepares them), the loop (training.py).
"""

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from crystallm_kit.errors import EmptyInput, ReadError, RecipeError
from crystallm_kit.models.checkpoints import Vocabulary
from crystallm_kit.recipes import from_dict, recipe_to_dict

IGNORED = -100  # label of positions without loss, as torch's cross_entropy has it
LENGTH_MULTIPLE = 4


class Examples(NamedTuple):
    """Tokenised examples, ragged.

    Attributes:
        tokens: All examples joined: (sum of lengths,) of an integer type.
        offsets: Example i is tokens[offsets[i]:offsets[i + 1]]: (N + 1,) int64.
        prompt_lengths: Leading tokens of each example that are its prompt: (N,) int.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    prompt_lengths: np.ndarray


@dataclass(frozen=True)
class CorpusInfo:
    """What a model trained on a corpus has to know of it.

    Attributes:
        vocabulary: Size and special ids.
        format: Name of the text format.
        format_settings: Its settings.
        template: Name of the prompt template.
        template_sha256: Its hash.
    """

    vocabulary: Vocabulary
    format: str
    format_settings: dict[str, Any]
    template: str
    template_sha256: str


class TokenSource(Protocol):
    """Where a training run gets its examples."""

    @property
    def info(self) -> CorpusInfo:
        """Return vocabulary, format and template."""

    @property
    def sha256(self) -> str:
        """Return a hash of the data."""

    def examples(self, epoch: int) -> Examples:
        """Return the training examples of an epoch (0, 1, ...), augmented for it; the same at every call."""

    def validation(self) -> Examples:
        """Return the validation examples."""


class ArraySource:
    """Examples from one .npz file: whole epochs, tokenised beforehand; epoch e reads epoch e modulo their number.

    Entries: `info` (JSON of CorpusInfo), `tokens_0, offsets_0, prompt_lengths_0`, `tokens_1, ...` and
    `validation_tokens, validation_offsets, validation_prompt_lengths`.
    """

    def __init__(self, path: str | Path) -> None:
        """Open the file. Raises ReadError if it is missing, no npz, or lacks an entry."""
        self.path = Path(path)
        try:
            content = self.path.read_bytes()
            self._arrays = np.load(io.BytesIO(content))
            info = json.loads(str(self._arrays["info"]))
            self.info = from_dict(info, CorpusInfo, where=f"{self.path}: info")
        except (OSError, ValueError, KeyError, RecipeError) as error:
            raise ReadError(f"{self.path}: not a corpus of token arrays: {error}") from error
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.n_epochs = sum(name.startswith("tokens_") for name in self._arrays.files)
        if not self.n_epochs:
            raise EmptyInput(f"{self.path}: no training examples (entries tokens_0, offsets_0, ...).")

    def examples(self, epoch: int) -> Examples:
        """Return the training examples of an epoch."""
        i = epoch % self.n_epochs
        return self._read((f"tokens_{i}", f"offsets_{i}", f"prompt_lengths_{i}"))

    def validation(self) -> Examples:
        """Return the validation examples."""
        return self._read(("validation_tokens", "validation_offsets", "validation_prompt_lengths"))

    def _read(self, names: tuple[str, str, str]) -> Examples:
        try:
            return Examples(*(self._arrays[name] for name in names))
        except KeyError as error:
            raise ReadError(f"{self.path}: entry {error} is missing.") from error


def write_arrays(
    path: str | Path, epochs: Sequence[Examples], validation: Examples, info: CorpusInfo
) -> None:
    """Write examples as the .npz file that ArraySource reads; tokens are stored as uint16 where they fit."""
    arrays: dict[str, np.ndarray] = {"info": np.array(json.dumps(recipe_to_dict(info)))}
    dtype = np.uint16 if info.vocabulary.size <= 65_536 else np.int32
    named = [(f"_{i}", "", examples) for i, examples in enumerate(epochs)] + [("", "validation_", validation)]
    for after, before, examples in named:
        arrays[f"{before}tokens{after}"] = examples.tokens.astype(dtype)
        arrays[f"{before}offsets{after}"] = examples.offsets.astype(np.int64)
        arrays[f"{before}prompt_lengths{after}"] = examples.prompt_lengths.astype(np.int32)
    np.savez_compressed(path, allow_pickle=False, **arrays)


@dataclass(frozen=True)
class Group:
    """Rows of one forward pass.

    Attributes:
        rows: Indices of examples; -1 is a row of padding: (B,) int64.
        n_positions: T; the longest example has at most n_positions + 1 tokens.
    """

    rows: np.ndarray
    n_positions: int


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        groups: Its forward passes.
        n_targets: Positions with a loss, over all groups.
        n_tokens: Input tokens, padding left out.
        n_padded: Input positions, padding included.
    """

    groups: tuple[Group, ...]
    n_targets: int
    n_tokens: int
    n_padded: int


def epoch_steps(
    examples: Examples,
    *,
    batch_tokens: int,
    micro_tokens: int,
    max_length: int,
    loss_on_prompt: bool,
    row_multiple: int = 1,
    order: np.random.Generator | None = None,
) -> Iterator[Step]:
    """Return the steps of an epoch: each a random sample of about `batch_tokens` tokens, each example once.

    Args:
        examples: Of the epoch.
        batch_tokens: Tokens of a step, over all GPUs. The epoch is cut evenly, so that no step is a remainder.
        micro_tokens: Largest group, in positions: what fits into memory.
        max_length: Longer examples, in tokens, are left out (a crystal without its end teaches the wrong thing).
        loss_on_prompt: Whether the tokens of prompts count as targets.
        row_multiple: Rows of a group are filled up to a multiple of it (the number of GPUs).
        order: Shuffles; None: sorted by length, as for validation.

    Raises:
        EmptyInput: If no example is left.
    """
    lengths = np.diff(examples.offsets)
    kept = np.flatnonzero((lengths <= max_length) & (lengths > 1))
    if not len(kept):
        raise EmptyInput(f"no example of 2 to {max_length} tokens among {len(lengths)}.")
    rows = kept[np.argsort(lengths[kept], kind="stable")] if order is None else order.permutation(kept)
    n_inputs = lengths[rows] - 1
    unpaid = 0 if loss_on_prompt else np.maximum(examples.prompt_lengths[rows].astype(np.int64) - 1, 0)
    n_targets = np.maximum(n_inputs - unpaid, 0)
    ends = np.cumsum(n_inputs)
    n_steps = max(1, round(int(ends[-1]) / batch_tokens))
    cuts = np.searchsorted(ends, ends[-1] * np.arange(1, n_steps) / n_steps, side="right")
    for part in np.split(np.arange(len(rows)), cuts):
        if not len(part):
            continue
        groups = length_groups(rows[part], n_inputs[part], micro_tokens, batch_tokens // 64, row_multiple)
        yield Step(
            groups,
            max(1, int(n_targets[part].sum())),
            int(n_inputs[part].sum()),
            sum(len(group.rows) * group.n_positions for group in groups),
        )


def length_groups(
    rows: np.ndarray, n_inputs: np.ndarray, micro_tokens: int, group_cost: int, row_multiple: int = 1
) -> tuple[Group, ...]:
    """Return rows cut by length so that padding plus `group_cost` per group is least.

    Args:
        rows: Indices of examples: (N,).
        n_inputs: Positions that each needs: (N,).
        micro_tokens: Groups of more positions are halved until they fit.
        group_cost: What one more forward pass costs, as positions.
        row_multiple: Rows are filled up with -1 to a multiple of it.
    """
    by_length = np.argsort(n_inputs, kind="stable")
    rows = rows[by_length]
    needed = -(-n_inputs[by_length] // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    widths, counts = np.unique(needed, return_counts=True)
    ends = np.concatenate(([0], np.cumsum(counts)))
    best = np.zeros(len(widths) + 1)  # best[j]: least cost of the j shortest widths
    start = np.zeros(len(widths) + 1, dtype=np.int64)
    for j in range(1, len(widths) + 1):
        costs = best[:j] + (ends[j] - ends[:j]) * widths[j - 1] + group_cost
        start[j] = np.argmin(costs)
        best[j] = costs[start[j]]
    groups: list[Group] = []
    j = len(widths)
    while j:
        i = int(start[j])
        width = int(widths[j - 1])
        part = rows[ends[i] : ends[j]]
        n_parts = -(-len(part) * width // max(micro_tokens, width))
        groups.extend(Group(_filled(piece, row_multiple), width) for piece in np.array_split(part, n_parts))
        j = i
    return tuple(groups)


def _filled(rows: np.ndarray, multiple: int) -> np.ndarray:
    missing = -len(rows) % multiple
    return np.concatenate((rows, np.full(missing, -1, dtype=rows.dtype))) if missing else rows


class DeviceExamples:
    """Examples of an epoch in a device's memory, from which batches are gathered without the host waiting."""

    def __init__(
        self, examples: Examples, device: torch.device, *, pad_token_id: int, loss_on_prompt: bool
    ) -> None:
        self.device = device
        self.pad_token_id = pad_token_id
        # one more token and one more, empty, example at the end: rows of padding are index -1
        tokens = np.append(examples.tokens.astype(np.int32), np.int32(pad_token_id))
        lengths = np.append(np.diff(examples.offsets), 0)
        first_targets = np.maximum(np.append(examples.prompt_lengths, 0).astype(np.int64) - 1, 0)
        self.tokens = self._put(tokens)
        self.starts = self._put(np.append(examples.offsets[:-1], 0))
        self.n_inputs = self._put(np.maximum(lengths - 1, 0))
        self.first_targets = self._put(np.zeros_like(first_targets) if loss_on_prompt else first_targets)

    def batch(self, rows: np.ndarray, n_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return input ids (B, T) int64 and labels (B, T) int64, already shifted: labels[b, t] follows inputs[b, t]."""
        rows_B = self._put(rows)
        positions_T = torch.arange(n_positions, device=self.device)
        index_BT = self.starts[rows_B][:, None] + positions_T
        real_BT = positions_T < self.n_inputs[rows_B][:, None]
        index_BT = torch.where(real_BT, index_BT, 0)
        inputs_BT = torch.where(real_BT, self.tokens[index_BT], self.pad_token_id).long()
        paid_BT = real_BT & (positions_T >= self.first_targets[rows_B][:, None])
        labels_BT = torch.where(paid_BT, self.tokens[index_BT + 1], IGNORED).long()
        return inputs_BT, labels_BT

    def _put(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)
