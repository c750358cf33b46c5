"""Batches: tokenised examples as the steps of a training run, in one of two layouts, both exact.

An example is one crystal: prompt, text and end token. No crystal attends to another, and positions start at 0
with each. The layouts:

    packed   one row of crystals end to end, their borders given to the flash kernel (GPU): nothing is padded,
    every
             pass has the same shape, and a step needs few of them
    padded   rows of one crystal each, sorted by length and cut into groups where padding costs least: any
    device

    lengths of a step  31 33 35 36 | 44 46 47 | 71   ->  padded groups of (rows, positions) (4, 36), (3, 48),
    (1, 72)

A step is a random sample of the epoch either way. (seed, epoch) fixes every batch, so a run resumes at any
step.

Legend: B rows, T positions, N examples, S sequences of a pack.
Not here: where examples come from (tokens/corpus.py prepares them), the loop (loop.py).
"""

import hashlib
import io
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch

from crystallm_kit.errors import EmptyInput, ReadError, RecipeError
from crystallm_kit.recipes import from_dict, recipe_to_dict
from crystallm_kit.tokens.drawing import Examples, StoredCorpus, StoredInfo

IGNORED = -100  # label of positions without loss, as torch's cross_entropy has it
LENGTH_MULTIPLE = 4


class TokenSource(Protocol):
    """Where a training run gets its examples.

    Attributes:
        info: Vocabulary, format and template.
        sha256: Hash of the data.
        tasks: What the examples ask for (tokens/tasks.py), with the share of each.
    """

    info: StoredInfo
    sha256: str
    tasks: dict[str, float]

    def examples(self, epoch: int) -> Examples:
        """Return the training examples of an epoch (0, 1, ...), augmented for it; the same at every call."""

    def validation(self) -> Examples:
        """Return the validation examples."""


class ArraySource:
    """Examples from one .npz file of whole epochs; epoch e reads epoch e modulo their number.

    Entries: `info` (JSON of StoredInfo), `tokens_0, offsets_0, prompt_lengths_0`, `tokens_1, ...` and
    `validation_tokens, validation_offsets, validation_prompt_lengths`.
    """

    def __init__(self, path: str | Path) -> None:
        """Open the file. Raises ReadError if it is missing, no npz, or lacks an entry."""
        self.path = Path(path)
        try:
            content = self.path.read_bytes()
            self._arrays = np.load(io.BytesIO(content))
            info = json.loads(str(self._arrays["info"]))
            self.info = from_dict(info, StoredInfo, where=f"{self.path}: info")
        except (OSError, ValueError, KeyError, RecipeError) as error:
            raise ReadError(f"{self.path}: not a corpus of token arrays: {error}") from error
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.tasks: dict[str, float] = {"generate": 1.0}
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


def open_source(path: str | Path) -> TokenSource:
    """Return a corpus: a prepared folder, its corpus.npz, or an .npz file of drawn epochs (ArraySource).

    Raises:
        ReadError: If it is neither.
    """
    path = Path(path) / "corpus.npz" if Path(path).is_dir() else Path(path)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            is_stored = "stored" in arrays.files
    except (OSError, ValueError) as error:
        raise ReadError(f"{path}: not a corpus: {error}; expected the .npz file of a corpus.") from error
    return StoredCorpus(path) if is_stored else ArraySource(path)


def write_arrays(
    path: str | Path, epochs: Sequence[Examples], validation: Examples, info: StoredInfo
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
    """One forward pass.

    Attributes:
        rows: Indices of examples; -1 is padding: (B,) int64, or (S,) when packed.
        n_positions: T of each row, or of the one packed row.
        lengths: Packed: positions of each sequence, those of the padding at the end included: (S,) int64,
            with the sum n_positions. None: padded.
        longest: Packed: no sequence of the epoch has more positions. The flash kernel visits so many for
            every sequence, also for empty ones.
    """

    rows: np.ndarray
    n_positions: int
    lengths: np.ndarray | None = None
    longest: int = 0

    @property
    def n_padded(self) -> int:
        """Return the number of positions, padding included."""
        return self.n_positions * (1 if self.lengths is not None else len(self.rows))


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        groups: Its forward passes.
        n_targets: Positions with a loss, over all groups.
        n_tokens: Input tokens, padding left out.
    """

    groups: tuple[Group, ...]
    n_targets: int
    n_tokens: int


@dataclass(frozen=True)
class Layout:
    """How examples become steps.

    Attributes:
        batch_tokens: Tokens of a step, over all GPUs.
        micro_tokens: Positions of one forward pass on one GPU at most: what fits into memory.
        max_length: Longer examples, in tokens, are left out (a crystal without its end teaches the wrong
            thing).
        loss_on_prompt: Whether the tokens of prompts count as targets.
        packed: The layout.
        n_processes: GPUs that share a step.
    """

    batch_tokens: int
    micro_tokens: int
    max_length: int
    loss_on_prompt: bool
    packed: bool
    n_processes: int = 1

    @property
    def groups_per_step(self) -> int:
        """Return the packs of a step: a multiple of the number of processes."""
        per_process = -(-self.batch_tokens // (self.micro_tokens * self.n_processes))
        return per_process * self.n_processes

    @property
    def pack_positions(self) -> int:
        """Return the positions of a pack: the same for all, so that one compiled graph serves them."""
        wanted = -(-self.batch_tokens // self.groups_per_step)
        return -(-max(wanted, self.max_length) // 128) * 128

    def own(self, step: Step, process: int) -> list[Group]:
        """Return the part of a step that one process computes; all get as many groups of as many rows."""
        if self.packed:
            return list(step.groups[process :: self.n_processes])
        return [Group(g.rows[process :: self.n_processes], g.n_positions) for g in step.groups]

    def epoch(self, examples: Examples, order: np.random.Generator | None = None) -> Iterator[Step]:
        """Yield the steps of an epoch: random samples of about batch_tokens tokens, each example once.

        Args:
            examples: Of the epoch.
            order: Shuffles; None: in the order given, as for validation.

        Raises:
            EmptyInput: If no example is short enough.
        """
        lengths = np.diff(examples.offsets)
        rows = np.flatnonzero((lengths <= self.max_length) & (lengths > 1))
        if not len(rows):
            raise EmptyInput(f"no example of 2 to {self.max_length} tokens among {len(lengths)}.")
        if order is not None:
            rows = order.permutation(rows)
        n_inputs = lengths[rows] - 1
        unpaid = (
            0 if self.loss_on_prompt else np.maximum(examples.prompt_lengths[rows].astype(np.int64) - 1, 0)
        )
        n_targets = np.maximum(n_inputs - unpaid, 0)
        for start, end, groups in (self._packs if self.packed else self._groups)(rows, n_inputs):
            yield Step(groups, max(1, int(n_targets[start:end].sum())), int(n_inputs[start:end].sum()))

    def _groups(self, rows: np.ndarray, n_inputs: np.ndarray) -> Iterator[tuple[int, int, tuple[Group, ...]]]:
        ends = np.cumsum(n_inputs)
        n_steps = max(1, round(int(ends[-1]) / self.batch_tokens))
        cuts = np.searchsorted(ends, ends[-1] * np.arange(1, n_steps) / n_steps, side="right")
        bounds = np.unique(np.concatenate(([0], cuts, [len(rows)])))
        for start, end in itertools.pairwise(bounds.tolist()):
            yield (
                start,
                end,
                length_groups(
                    rows[start:end],
                    n_inputs[start:end],
                    self.micro_tokens * self.n_processes,
                    self.batch_tokens // 64,
                    self.n_processes,
                ),
            )

    def _packs(self, rows: np.ndarray, n_inputs: np.ndarray) -> Iterator[tuple[int, int, tuple[Group, ...]]]:
        ends = np.cumsum(n_inputs)
        n_packs = -(-int(ends[-1]) // max(1, self.pack_positions - int(n_inputs.max())))
        longest = -(-int(n_inputs.max()) // 128) * 128
        # alike for all packs, so that one compiled graph serves them; a fifth more than an even pack has
        most = 1.2 * self.pack_positions * len(rows) / int(ends[-1]) + 1
        n_sequences = -(-(int(most) + -(-self.pack_positions // longest)) // 256) * 256
        while (
            True
        ):  # even cuts, so that the last pack is no remainder; each overshoots by one example at most
            cuts = np.searchsorted(ends, ends[-1] * np.arange(1, n_packs) / n_packs, side="right")
            bounds = np.unique(np.concatenate(([0], cuts, [len(rows)])))
            if np.diff(bounds).max() <= most:
                break
            n_packs += 1
        n_packs = len(bounds) - 1
        n_steps = max(1, round(n_packs / self.groups_per_step))
        for part in np.array_split(np.arange(n_packs), n_steps):
            spans = [(int(bounds[i]), int(bounds[i + 1])) for i in part]
            groups = [self._pack(rows[a:b], n_inputs[a:b], n_sequences, longest) for a, b in spans]
            while len(groups) % self.n_processes:
                groups.append(self._pack(rows[:0], n_inputs[:0], n_sequences, longest))
            yield spans[0][0], spans[-1][1], tuple(groups)

    def _pack(self, rows: np.ndarray, n_inputs: np.ndarray, n_sequences: int, longest: int) -> Group:
        """Return a pack of fixed shape; the rest of it is cut into sequences of padding, then empty ones."""
        left = self.pack_positions - int(n_inputs.sum())
        padding = np.clip(left - longest * np.arange(n_sequences - len(rows)), 0, longest)
        return Group(
            np.concatenate((rows, np.full(len(padding), -1, dtype=np.int64))),
            self.pack_positions,
            np.concatenate((n_inputs, padding)),
            longest,
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
        n_parts = -(-len(part) // max(1, micro_tokens // width))
        groups.extend(Group(_filled(piece, row_multiple), width) for piece in np.array_split(part, n_parts))
        j = i
    return tuple(groups)


def _filled(rows: np.ndarray, multiple: int) -> np.ndarray:
    missing = -len(rows) % multiple
    return np.concatenate((rows, np.full(missing, -1, dtype=rows.dtype))) if missing else rows


class Batch(NamedTuple):
    """Tensors of one forward pass.

    Attributes:
        inputs: (B, T) int64.
        labels: (B, T) int64, shifted already: labels[b, t] follows inputs[b, t]; IGNORED where there is no
            loss.
        positions: (1, T) int64: of each token in its crystal.
        borders: Packed: where crystals begin and end, (S + 1,) int32. None: padded.
        longest: Packed: no crystal of the epoch has more positions.
    """

    inputs: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    borders: torch.Tensor | None
    longest: int = 0


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

    def batch(self, group: Group) -> "Batch":
        """Return the tensors of one forward pass."""
        rows = self._put(group.rows)
        if group.lengths is None:
            borders = None
            positions = torch.arange(group.n_positions, device=self.device)[None]
            sequence_rows = rows[:, None]
        else:
            ends = np.concatenate(([0], np.cumsum(group.lengths)))
            borders = self._put(ends.astype(np.int32))
            sequences = torch.repeat_interleave(
                torch.arange(len(group.rows), device=self.device),
                self._put(group.lengths),
                output_size=group.n_positions,
            )[None]
            positions = torch.arange(group.n_positions, device=self.device)[None] - borders[sequences]
            sequence_rows = rows[sequences]
        real = positions < self.n_inputs[sequence_rows]
        index = torch.where(real, self.starts[sequence_rows] + positions, 0)
        inputs = torch.where(real, self.tokens[index], self.pad_token_id).long()
        paid = real & (positions >= self.first_targets[sequence_rows])
        labels = torch.where(paid, self.tokens[index + 1], IGNORED).long()
        return Batch(inputs, labels, positions.long(), borders, group.longest)

    def _put(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)
