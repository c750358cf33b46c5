"""Which tokens may come next, for a batch of growing `wyckoff` texts.

What holds for every sample that ends, by construction: the format's grammar; sites that add up to the stated
composition; the composition, elements, number of sites and space group that were asked for; a letter without
free coordinates used once; a cell with a volume. The end stays reachable from every state that a mask lets
through, so no sample is lost to a dead end.

How: everything is data. Per space group a few small integer tables; per sample one row of integers that one
call of `advance` moves for the whole batch with array operations, all kinds of token at once. Nothing loops
over samples or over tokens, nothing asks Python what comes next and nothing waits for the device, so the same
code runs on a GPU beside the model, and inside a CUDA graph.

A batch has slots: a sample takes one (`put`), and leaves it to another while the rest go on.

The arithmetic that keeps the end reachable (wyckoff_tables.py has the tables). Elements compete for fixed
letters. What a composition can use of them, and what it must leave, are sets of fixed-letter vectors, and
both grow by one rule:
    after an element with n atoms, set -> { u + v : u in set, v a vector with which n atoms can be placed }
where "placed" means: on exactly the fixed letters v, the rest on free letters. From the first element on such
a set tells which fixed letters can be in use (while the composition is being written); from the last element
back, which must be left for the elements to come (while sites are being written). A count, a space group or a
letter is let through if something stays possible.

    >>> constraint = WyckoffConstraint([compile_request(Conditions(formula={"Na": 1, "Cl": 1}))] * 8)
    >>> logits_BV.masked_fill_(~constraint.mask(), -inf); constraint.advance(drawn_B)

Not here: sampling (engines/); what is asked (requests.py); distances between atoms, which validation checks
afterwards (scores/validity.py).
"""

# Shape legend: B batch (slots), V vocabulary, S signature of a group, N count 0-99, C fixed-letter vectors,
# X sets of them, L letters, E elements of one composition, K tracked groups, A count plans, G space groups.

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from crystallm_kit.structures.elements import ELEMENTS
from crystallm_kit.text import wyckoff as format_
from crystallm_kit.tokens.requests import Request
from crystallm_kit.tokens.wyckoff_tables import (
    MAX_ELEMENTS,
    N_COUNTS,
    N_LETTERS,
    automaton,
    tables,
    witnesses,
)

HEADER_ELEMENT, HEADER_COUNT, SITE_ELEMENT, SITE_LETTER, LATTICE_INTEGER, LATTICE_PAIR, COORDINATE, \
    COORDINATE_PAIR, ENDING, DONE, FREE = range(11)  # fmt: skip
# The kind of token after each kind; where it depends on more, advance() has the last word.
_AFTER = (
    HEADER_COUNT, HEADER_ELEMENT, SITE_LETTER, SITE_ELEMENT, LATTICE_PAIR, LATTICE_INTEGER, COORDINATE_PAIR,
    COORDINATE, DONE, DONE, FREE,
)  # fmt: skip
_LENGTH_RANGE = (1, 199)  # angstrom
_ANGLE_RANGE = (30, 149)  # degree
_N_ELEMENTS = len(ELEMENTS)
_N_GROUPS = 230
_N_TRACKED = 5  # groups whose room is watched while a composition is written
_N_SIGNATURES = 112
_MAX_KNOWN = 4_096  # different requests whose tables are kept on the device

# What a sample was asked for: names and widths of the columns of one int16 row.
_ASKED = {
    "elements": _N_ELEMENTS,  # may occur
    "elements_after": _N_ELEMENTS,  # how many of them come later
    "required": MAX_ELEMENTS + 1,  # ranks, increasing, padded with 103
    "n_required": 1,
    "n_elements": 1,
    "n_sites": 1,
    "max_sites": 1,
    "has_plan": 1,
    "groups": _N_GROUPS,
    "tracked": _N_TRACKED,  # index of the group, -1 where none
}
# Where a sample stands: the same for one int64 row.
_STATE = {
    "mode": 1,
    "k": 1,  # elements written
    "rank": 1,  # of the last element
    "total": 1,  # atoms written
    "required_met": 1,
    "composition_rank": MAX_ELEMENTS,
    "composition_count": MAX_ELEMENTS,
    "used": _N_TRACKED,  # set of vectors in use, of each tracked group
    "used_in": _N_SIGNATURES,  # the same of each signature
    "group": 1,
    "enough": MAX_ELEMENTS + 1,  # set of vectors left with which elements i, i + 1 ... fit
    "element": 1,  # index of the element whose sites are being written
    "missing": 1,  # atoms of it still to place
    "left": 1,  # vector of fixed letters left
    "used_letters": N_LETTERS,
    "slot": 1,  # lattice parameter being written
    "n_coordinates": 1,  # free coordinates still to write
    "angles": 2,  # integer parts of alpha and beta
}


class WyckoffConstraint:
    """The state of a batch, and the mask of what may come next.

    Every sample starts at the first token of its text, behind its prompt. A given beginning (a partly known
    crystal) is fed through `advance`.

    Args:
        requests: One per sample.
        vocabulary_size: Columns of the logits; ids from the alphabet's size on are never allowed.
        device: Where the tensors live.
    """

    def __init__(
        self,
        requests: Sequence[Request | None],
        *,
        vocabulary_size: int | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.vocabulary_size = vocabulary_size or len(format_.TOKENS)
        self._t = _device_tables(str(self.device))
        self._ids = _token_tables(str(self.device), self.vocabulary_size)
        self.tracks = False  # whether a sample's groups were ever tracked
        self._known: dict[Request | None, int] = {}
        self._known_asked = torch.zeros(0, sum(_ASKED.values()), dtype=torch.int16, device=self.device)
        self._known_plans = torch.zeros(0, 1, MAX_ELEMENTS, dtype=torch.uint8, device=self.device)
        size = len(requests)
        self._look_at(
            torch.zeros(size, sum(_ASKED.values()), dtype=torch.int16, device=self.device),
            torch.zeros(size, sum(_STATE.values()), dtype=torch.long, device=self.device),
            torch.zeros(size, 1, MAX_ELEMENTS, dtype=torch.uint8, device=self.device),
            torch.zeros(size, 1, dtype=torch.bool, device=self.device),
        )
        self.put(range(size), requests)

    @classmethod
    def empty(
        cls, n_slots: int, *, vocabulary_size: int | None = None, device: str | torch.device = "cpu"
    ) -> "WyckoffConstraint":
        """Return a constraint of free slots: everything is allowed in them, and `advance` leaves them."""
        return cls([None] * n_slots, vocabulary_size=vocabulary_size, device=device)

    def _look_at(
        self, asked: torch.Tensor, state: torch.Tensor, plans: torch.Tensor, alive: torch.Tensor
    ) -> None:
        """Take over the tensors of the batch, and name their columns.

        Args:
            asked: (B, sum of _ASKED) int16.
            state: (B, sum of _STATE) int64.
            plans: (B, A, E) uint8: counts of the elements in order, zero-padded.
            alive: (B, A) bool: plans that what is written agrees with.
        """
        self._asked, self._state, self.plans, self.alive = asked, state, plans, alive
        for tensor, columns in ((asked, _ASKED), (state, _STATE)):
            start = 0
            for name, width in columns.items():
                view = tensor[:, start] if width == 1 else tensor[:, start : start + width]
                setattr(self, name, view)
                start += width

    # what _look_at names
    elements: torch.Tensor
    elements_after: torch.Tensor
    required: torch.Tensor
    n_required: torch.Tensor
    n_elements: torch.Tensor
    n_sites: torch.Tensor
    max_sites: torch.Tensor
    has_plan: torch.Tensor
    groups: torch.Tensor
    tracked: torch.Tensor
    mode: torch.Tensor
    k: torch.Tensor
    rank: torch.Tensor
    total: torch.Tensor
    required_met: torch.Tensor
    composition_rank: torch.Tensor
    composition_count: torch.Tensor
    used: torch.Tensor
    used_in: torch.Tensor
    group: torch.Tensor
    enough: torch.Tensor
    element: torch.Tensor
    missing: torch.Tensor
    left: torch.Tensor
    used_letters: torch.Tensor
    slot: torch.Tensor
    n_coordinates: torch.Tensor
    angles: torch.Tensor

    # Slots

    def put(self, rows: Sequence[int], requests: Sequence[Request | None]) -> None:
        """Start a sample in each of these slots; None: a free slot."""
        if not len(rows):
            return
        if len(self._known) + len(requests) > _MAX_KNOWN:
            self._known.clear()
            self._known_asked, self._known_plans = self._known_asked[:0], self._known_plans[:0]
        which = torch.tensor([self._number(r) for r in requests]).to(self.device, non_blocking=True)
        index = torch.tensor(list(rows)).to(self.device, non_blocking=True)
        width = self._known_plans.shape[1]
        if width > self.plans.shape[1]:
            plans, alive = self.plans, self.alive
            self.plans = plans.new_zeros(len(plans), width, MAX_ELEMENTS)
            self.alive = alive.new_zeros(len(alive), width)
            self.plans[:, : plans.shape[1]] = plans
            self.alive[:, : alive.shape[1]] = alive
        asked, plans = self._known_asked[which], self._known_plans[which]
        self._asked[index] = asked
        self.plans[index] = plans
        self.alive[index] = plans[:, :, 0] > 0
        self._state[index] = self._t.first_state
        tracked = asked[:, -_N_TRACKED:].long()
        signature = self._t.signature[tracked.clamp(min=0)]
        self.used[index] = torch.where(tracked >= 0, self._t.nothing_used[signature], 0)
        self.mode[index] = torch.where(asked[:, 0] < 0, FREE, HEADER_ELEMENT)

    def _number(self, request: Request | None) -> int:
        """Return where a request's tables stand on the device; they are made when it is first met."""
        if request in self._known:
            return self._known[request]
        plans = request.plans if request else ()
        width = self._known_plans.shape[1]
        while width < len(plans):
            width *= 2
        padded = np.zeros((1, width, MAX_ELEMENTS), dtype=np.uint8)
        for j, plan in enumerate(plans):
            padded[0, j, : len(plan)] = plan
        self.tracks |= bool(request and _tracked(request))
        wider = self._known_plans.new_zeros(len(self._known_plans), width, MAX_ELEMENTS)
        wider[:, : self._known_plans.shape[1]] = self._known_plans
        self._known_plans = torch.cat([wider, torch.from_numpy(padded).to(self.device)])
        asked = torch.from_numpy(_asked_row(request)[None]).to(self.device)
        self._known_asked = torch.cat([self._known_asked, asked])
        self._known[request] = len(self._known_asked) - 1
        return self._known[request]

    def move(self, from_rows: Sequence[int], to_rows: Sequence[int]) -> None:
        """Copy the samples of some slots to others, all at once; what stood there is gone."""
        origin, target = (torch.tensor(list(rows), device=self.device) for rows in (from_rows, to_rows))
        for tensor in (self._asked, self._state, self.plans, self.alive):
            tensor[target] = tensor[origin]

    def take(self, rows: torch.Tensor | slice) -> "WyckoffConstraint":
        """Return the constraint of some of the samples: (B',) int64 rows, for a batch that shrinks, or a
        slice, whose tensors are these, seen in part.
        """
        other = object.__new__(WyckoffConstraint)
        other.__dict__.update(vars(self))
        other._look_at(self._asked[rows], self._state[rows], self.plans[rows], self.alive[rows])
        return other

    def changing(self) -> list[torch.Tensor]:
        """Return the tensors that `advance` writes to."""
        return [self._state, self.alive]

    @property
    def done(self) -> torch.Tensor:
        """(B,) bool: samples that have written their end."""
        return self.mode == DONE

    @property
    def in_numbers(self) -> torch.Tensor:
        """(B,) bool: samples whose next token belongs to the cell or to a coordinate."""
        return (self.mode >= LATTICE_INTEGER) & (self.mode <= COORDINATE_PAIR)

    # What may come next

    def mask(self) -> torch.Tensor:
        """Return (B, V) bool: True where a token may come next. Never all False."""
        header = self.mode == HEADER_ELEMENT
        element, group = self._header()
        element &= header[:, None]
        at_site = self.composition_rank.gather(1, self.element.clamp(max=MAX_ELEMENTS - 1)[:, None])
        element |= (self._ids.ranks == at_site) & (self.mode == SITE_ELEMENT)[:, None]
        values = torch.cat(
            [
                element,
                self._counts() & (self.mode == HEADER_COUNT)[:, None],
                group & header[:, None],
                self._letters() & (self.mode == SITE_LETTER)[:, None],
                self._lattice_integers() & (self.mode == LATTICE_INTEGER)[:, None],
                torch.zeros_like(header)[:, None],
            ],
            1,
        )
        return self._ids.constant[self.mode] | values[:, self._ids.column]

    def _still_to_write(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (elements still to write at least, whether exactly that many): (B,) each."""
        exact = self.n_elements > 0
        return torch.where(exact, self.n_elements - self.k, self.n_required - self.required_met), exact

    def _header(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which elements (B, 103) and groups (B, 230) may come where an element or group is due."""
        slots, exact = self._still_to_write()
        required_left = self.n_required - self.required_met
        following = self.required.gather(1, self.required_met[:, None]).long()  # next required, 103 if none
        is_required = self._ids.ranks == following
        room = torch.where(exact, slots > required_left, self.k + required_left < MAX_ELEMENTS)
        # Elements to come from here on, this one counted, if it is a required one and if it is another.
        needed = slots.clamp(min=1)
        needed = torch.stack([needed, torch.where(exact, needed, required_left + 1)], 1)  # (B, 2)
        enough_after = self.elements_after >= (slots - 1)[:, None]
        element = (
            (self.elements > 0)
            & (self._ids.ranks > self.rank[:, None])
            & (self._ids.ranks <= following)
            & (enough_after | ~exact[:, None])
        )
        more = torch.where(exact, slots > 0, self.k < MAX_ELEMENTS)
        atoms = torch.where(self.n_sites > 0, self.n_sites, self.max_sites) - self.total
        fits = atoms[:, None] >= needed
        if self.tracks:
            used = self.used[:, None].expand(-1, 2, -1)
            fits &= self._room_for(atoms[:, None].expand(-1, 2), needed, used)
        element &= more[:, None] & torch.where(is_required, fits[:, :1], (room & fits[:, 1])[:, None])
        closable = (self.k > 0) & (slots <= 0) & ((self.n_sites == 0) | (self.total == self.n_sites))
        group = (self.groups > 0) & closable[:, None] & (self.used_in > 0)[:, self._t.signature]
        return element, group

    def _room_for(self, atoms: torch.Tensor, elements: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
        """Tell whether a tracked group can hold that many more atoms as that many elements or more.

        Without a fixed number of sites, `atoms` is what may at most be added. True where no group is tracked.

        Args:
            atoms: (B, Y).
            elements: (B, Y), at least.
            used: (B, Y, K) sets of vectors in use.

        Returns:
            (B, Y) bool
        """
        t = self._t
        signature = t.signature[self.tracked.clamp(min=0).long()][:, None]  # (B, 1, K)
        atoms_K = atoms.clamp(0, N_COUNTS - 1)[..., None]
        elements_K = elements.clamp(0, MAX_ELEMENTS)[..., None]
        sets = torch.where(
            (self.n_sites > 0)[:, None, None],
            t.enough[signature, atoms_K, elements_K],
            t.enough_within[signature, atoms_K, elements_K],
        )
        fits = ((sets & t.members[used]) != 0).any(-1) & (atoms >= 0)
        return fits | (self.tracked[:, :1] < 0)

    def _counts(self) -> torch.Tensor:
        """Return (B, N): which counts an element may have; its symbol is written already."""
        counts = self._ids.counts
        slots, exact = self._still_to_write()
        wanted, total = self.n_sites[:, None], self.total[:, None]
        rest = wanted - total - counts  # (B, N)
        n_after = self.elements_after.gather(1, self.rank.clamp(min=0)[:, None]).squeeze(1)
        last = torch.where(exact, slots == 0, (self.k == MAX_ELEMENTS) | (n_after == 0))[:, None]
        slots = slots.clamp(min=0)[:, None]
        with_sites = torch.where(last, rest == 0, rest >= slots) & (rest >= 0)
        without = total + counts + slots <= self.max_sites[:, None]
        fits = torch.where(wanted > 0, with_sites, without)
        position = (self.k - 1).clamp(min=0)[:, None, None].expand(-1, self.plans.shape[1], 1)
        plan_count = self.plans.gather(2, position).squeeze(2).long()  # (B, A)
        planned = torch.zeros_like(fits, dtype=torch.uint8)
        planned = planned.scatter_reduce(1, plan_count, self.alive.to(torch.uint8), "amax") > 0
        fits = torch.where(self.has_plan[:, None] > 0, planned, fits)
        fits &= counts > 0
        if self.tracks:
            after = self._t.after[self.used].transpose(1, 2)  # (B, N, K)
            room = torch.where(wanted > 0, rest, self.max_sites[:, None] - total - counts)
            fits &= self._room_for(room, slots.expand_as(room), after)
        return fits

    def _after_each_letter(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (B, L): atoms still missing after each letter, and the fixed letters left (C where
        impossible).
        """
        left = self._t.left_after[self.group[:, None], self._ids.letters, self.left[:, None]]
        return self.missing[:, None] - self._t.multiplicity[self.group], left

    def _letters(self) -> torch.Tensor:
        """Return (B, L): which letters an atom may take."""
        t = self._t
        missing, left = self._after_each_letter()
        fits = (t.multiplicity[self.group] > 0) & (missing >= 0) & (left < t.n_vectors)
        fits &= ~(t.is_fixed[self.group] & (self.used_letters > 0))
        following = self.enough.gather(1, (self.element + 1).clamp(max=MAX_ELEMENTS)[:, None])
        possible = t.members[t.after[following, missing.clamp(min=0)]]
        return fits & ((possible >> left & 1) > 0)

    def _lattice_integers(self) -> torch.Tensor:
        """Return (B, 500): which integer parts a length or an angle may have."""
        kind = self._t.lattice_kind[self.group, self.slot.clamp(max=5)][:, None]
        alpha, beta = self.angles[:, :1], self.angles[:, 1:]
        low = torch.where(kind == 0, _LENGTH_RANGE[0], _ANGLE_RANGE[0])
        high = torch.where(kind == 0, _LENGTH_RANGE[1], _ANGLE_RANGE[1])
        # Three angles span a cell if |alpha - beta| < gamma < min(alpha + beta, 360 - alpha - beta).
        low = torch.where(kind == 3, ((alpha - beta).abs() + 2).clamp(min=10), low)
        high = torch.where(
            kind == 3, (torch.minimum(alpha + beta, 358 - alpha - beta) - 2).clamp(max=168), high
        )
        return (self._ids.integers >= low) & (self._ids.integers <= high)

    # What a token changes

    def advance(self, tokens: torch.Tensor, moves: torch.Tensor | None = None) -> None:
        """Move samples on by one token.

        Args:
            tokens: (B,) int64 ids that the last mask allowed.
            moves: (B,) bool: the samples that move; None: all.
        """
        mode = self.mode.clone()
        if moves is not None:
            mode = torch.where(moves, mode, FREE)
        following = self._ids.following[mode]
        following = self._write_composition(mode, tokens, following)
        following = self._choose_group(mode, tokens, following)
        following = self._use_letter(mode, tokens, following)
        following = self._write_number(mode, tokens, following)
        torch.where(mode == FREE, self.mode, following, out=self.mode)

    def _write_composition(
        self, mode: torch.Tensor, tokens: torch.Tensor, following: torch.Tensor
    ) -> torch.Tensor:
        rank = self._ids.rank_of[tokens]
        writes = (mode == HEADER_ELEMENT) & (rank >= 0)
        at = (self._ids.positions == self.k[:, None]) & writes[:, None]
        torch.where(at, rank[:, None], self.composition_rank, out=self.composition_rank)
        due = self.required.gather(1, self.required_met[:, None]).squeeze(1)
        self.required_met.add_(writes & (due == rank))
        torch.where(writes, rank, self.rank, out=self.rank)
        self.k.add_(writes)

        counts = mode == HEADER_COUNT
        count = torch.where(counts, self._ids.count_of[tokens], 0).clamp(min=0)
        position = (self.k - 1).clamp(min=0)
        at = (self._ids.positions == position[:, None]) & counts[:, None]
        torch.where(at, count[:, None], self.composition_count, out=self.composition_count)
        self.total.add_(count)
        plan_count = self.plans.gather(2, position[:, None, None].expand(-1, self.plans.shape[1], 1))
        self.alive.logical_and_(~counts[:, None] | (plan_count.squeeze(2) == count[:, None]))
        for used in (self.used, self.used_in):
            torch.where(counts[:, None], self._t.after[used, count[:, None]], used, out=used)
        return following

    def _choose_group(
        self, mode: torch.Tensor, tokens: torch.Tensor, following: torch.Tensor
    ) -> torch.Tensor:
        group = self._ids.group_of[tokens]
        chosen = (mode == HEADER_ELEMENT) & (group >= 0)
        torch.where(chosen, group, self.group, out=self.group)
        signature = self._t.signature[self.group]
        needed = self._t.everything[signature]  # (B,)
        columns = [needed]
        for i in reversed(range(MAX_ELEMENTS)):
            count = self.composition_count[:, i]
            needed = torch.where(count > 0, self._t.after[needed, count], needed)
            columns.append(needed)
        enough = torch.stack(columns[::-1], 1)
        torch.where(chosen[:, None], enough, self.enough, out=self.enough)
        torch.where(chosen, self._t.full[signature], self.left, out=self.left)
        torch.where(chosen, self.composition_count[:, 0], self.missing, out=self.missing)
        return torch.where(chosen, SITE_ELEMENT, following)

    def _use_letter(self, mode: torch.Tensor, tokens: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
        uses = mode == SITE_LETTER
        letter = torch.where(uses, self._ids.letter_of[tokens], 0).clamp(min=0)
        missing = self.missing - self._t.multiplicity[self.group, letter]
        left = self._t.left_after[self.group, letter, self.left]
        torch.where(uses, left, self.left, out=self.left)
        at = (self._ids.letters == letter[:, None]) & uses[:, None]
        self.used_letters.masked_fill_(at, 1)
        n_free = self._t.n_free[self.group, letter]
        self.n_coordinates.add_(torch.where(uses, n_free, 0))
        placed = uses & (missing == 0)
        element = self.element + placed.long()
        next_count = self.composition_count.gather(1, element.clamp(max=MAX_ELEMENTS - 1)[:, None])
        missing = torch.where(placed, next_count.squeeze(1), missing)
        torch.where(uses, missing, self.missing, out=self.missing)
        complete = uses & (element == self.k)
        self.element.copy_(element.clamp(max=MAX_ELEMENTS - 1))
        return torch.where(complete, LATTICE_INTEGER, following)

    def _write_number(
        self, mode: torch.Tensor, tokens: torch.Tensor, following: torch.Tensor
    ) -> torch.Tensor:
        kind = self._t.lattice_kind[self.group, self.slot.clamp(max=5)][:, None]
        at = (kind == self._ids.positions[1:3]) & (mode == LATTICE_INTEGER)[:, None]
        torch.where(at, self._ids.integer_of[tokens][:, None], self.angles, out=self.angles)
        in_lattice, in_coordinates = mode == LATTICE_PAIR, mode == COORDINATE_PAIR
        self.slot.add_(in_lattice)
        self.n_coordinates.sub_(in_coordinates.long())
        ends_lattice = in_lattice & (self.slot >= self._t.n_lattice[self.group])
        after = torch.where(self.n_coordinates > 0, COORDINATE, ENDING)
        return torch.where(ends_lattice | in_coordinates, after, following)


def _asked_row(request: Request | None) -> npt.NDArray[np.int16]:
    """Return a request as the columns of _ASKED; of no request, the first column is -1."""
    columns = {name: np.zeros(width, dtype=np.int16) for name, width in _ASKED.items()}
    if request is None:
        columns["elements"][0] = -1
        return np.concatenate(list(columns.values()))
    columns["elements"][list(request.elements)] = 1
    columns["elements_after"][:] = columns["elements"][::-1].cumsum()[::-1] - columns["elements"]
    columns["required"][:] = _N_ELEMENTS
    columns["required"][: len(request.required)] = request.required
    columns["n_required"][:] = len(request.required)
    columns["n_elements"][:] = request.n_elements
    columns["n_sites"][:] = request.n_sites
    columns["max_sites"][:] = request.max_sites
    columns["has_plan"][:] = bool(request.plans)
    columns["groups"][[g - 1 for g in request.groups] if request.groups else slice(None)] = 1
    tracked = _tracked(request)
    columns["tracked"][:] = -1
    columns["tracked"][: len(tracked)] = [g - 1 for g in tracked]
    return np.concatenate(list(columns.values()))


def _tracked(request: Request) -> tuple[int, ...]:
    """Return the groups whose room limits a composition; none where one that is asked for holds anything."""
    if not request.groups or request.plans:
        return ()
    watched = request.groups if len(request.groups) == 1 else witnesses(request.groups)
    t = tables()
    holds_anything = ((t.multiplicity == 1) & ~t.is_fixed).any(1)
    return () if any(holds_anything[g - 1] for g in watched) else tuple(watched)


@dataclass(frozen=True)
class _DeviceTables:
    """`Tables` and the `Automaton` as tensors on one device."""

    n_vectors: int
    signature: torch.Tensor
    full: torch.Tensor
    enough: torch.Tensor
    enough_within: torch.Tensor  # (S, N, E + 1): as `enough`, for n atoms or fewer
    multiplicity: torch.Tensor
    is_fixed: torch.Tensor
    left_after: torch.Tensor
    n_free: torch.Tensor
    n_lattice: torch.Tensor
    lattice_kind: torch.Tensor
    after: torch.Tensor
    members: torch.Tensor
    nothing_used: torch.Tensor
    everything: torch.Tensor
    first_state: torch.Tensor  # the row of _STATE that every sample begins with


@functools.lru_cache(maxsize=4)
def _device_tables(device: str) -> _DeviceTables:
    t, a = tables(), automaton()
    columns = {name: np.zeros(width, dtype=np.int64) for name, width in _STATE.items()}
    columns["rank"][:] = -1
    columns["used_in"][:] = a.nothing_used

    def move(array: npt.NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    return _DeviceTables(
        n_vectors=t.sums.shape[2], signature=move(t.signature), full=move(t.full), enough=move(t.enough),
        enough_within=move(np.bitwise_or.accumulate(t.enough, axis=1)), multiplicity=move(t.multiplicity),
        is_fixed=move(t.is_fixed), left_after=move(t.left_after), n_free=move(t.n_free),
        n_lattice=move(t.n_lattice), lattice_kind=move(t.lattice_kind), after=move(a.after),
        members=move(a.members), nothing_used=move(a.nothing_used), everything=move(a.everything),
        first_state=move(np.concatenate(list(columns.values()))),
    )  # fmt: skip


@dataclass(frozen=True)
class _TokenTables:
    """What ids mean (-1: not that kind), and the ids that a kind of token may have."""

    rank_of: torch.Tensor  # (V,)
    count_of: torch.Tensor
    group_of: torch.Tensor
    letter_of: torch.Tensor
    integer_of: torch.Tensor
    column: torch.Tensor  # (V,): column among elements, counts, groups, letters, integers; the last is none
    constant: torch.Tensor  # (modes, V) bool: what may come whatever else is written
    following: torch.Tensor  # (modes,): _AFTER
    ranks: torch.Tensor  # 0, 1 ... 102
    counts: torch.Tensor  # 0 ... 99
    letters: torch.Tensor
    integers: torch.Tensor
    positions: torch.Tensor  # of elements in a composition


@functools.lru_cache(maxsize=4)
def _token_tables(device: str, vocabulary_size: int) -> _TokenTables:
    position = {token: i for i, token in enumerate(format_.TOKENS)}
    words: dict[str, tuple[str, ...]] = {
        "rank_of": tuple(ELEMENTS),
        "count_of": ("", *(f"{n} " for n in range(1, N_COUNTS))),
        "group_of": format_.SPACEGROUP_TOKENS,
        "letter_of": format_.LETTER_TOKENS,
        "integer_of": format_.INTEGER_TOKENS,
    }
    n_columns = sum(map(len, words.values()))
    column = torch.full((vocabulary_size,), n_columns)
    meaning = {kind: torch.full((vocabulary_size,), -1) for kind in words}
    start = 0
    for kind, tokens in words.items():
        for value, token in enumerate(tokens):
            if token:
                meaning[kind][position[token]] = value
                column[position[token]] = start + value
        start += len(tokens)
    constant = torch.zeros(len(_AFTER), vocabulary_size, dtype=torch.bool)
    for mode, allowed in (
        (LATTICE_PAIR, format_.PAIR_TOKENS), (COORDINATE, format_.COORDINATE_TOKENS),
        (COORDINATE_PAIR, format_.PAIR_TOKENS), (ENDING, [format_.END]), (DONE, [format_.PAD]),
    ):  # fmt: skip
        constant[mode, [position[token] for token in allowed]] = True
    constant[FREE] = True
    return _TokenTables(
        **{kind: table.to(device) for kind, table in meaning.items()},
        column=column.to(device),
        constant=constant.to(device),
        following=torch.tensor(_AFTER, device=device),
        ranks=torch.arange(_N_ELEMENTS, device=device),
        counts=torch.arange(N_COUNTS, device=device),
        letters=torch.arange(N_LETTERS, device=device),
        integers=torch.arange(format_.MAX_INTEGER + 1, device=device),
        positions=torch.arange(MAX_ELEMENTS, device=device),
    )
