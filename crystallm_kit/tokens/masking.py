"""Which tokens may come next, for a batch of growing `wyckoff` texts.

What holds for every sample that ends, by construction: the format's grammar; sites that add up to the stated
composition; the composition, elements, number of sites and space group that were asked for; a letter without
free coordinates used once; a cell with a volume. The end stays reachable from every state that a mask lets
through, so no sample is lost to a dead end.

How: everything is data. Per space group a few small integer tables; per sample a few integer counters that
one call of `advance` moves for the whole batch with array operations. Nothing loops over samples or over
tokens, nothing asks Python what comes next, so the same code runs on a GPU beside the model.

The arithmetic that keeps the end reachable. A space group offers letters with free coordinates without limit,
and letters without any (fixed letters) once each. Fixed letters of one multiplicity are alike, so what is
used of them is a small vector of counts, one per multiplicity: at most 27 such vectors in any group, so a set
of them is one integer, and 112 different tables serve 230 groups. Elements compete for fixed letters. What a
composition can use of them, and what it must leave, are such sets, and both grow by one rule:
    after an element with n atoms, set -> { u + v : u in set, v a vector with which n atoms can be placed }
where "placed" means: on exactly the fixed letters v, the rest on free letters. `sums[s, n, u]` holds the
inner set. From the first element on it tells which fixed letters can be in use (while the composition is
being written); from the last element back, which must be left for the elements to come (while sites are being
written). A count, a space group or a letter is let through if something stays possible.

    >>> constraint = WyckoffConstraint([compile_request(Conditions(formula={"Na": 1, "Cl": 1}))] * 8)
    >>> logits_BV.masked_fill_(~constraint.mask(), -inf); constraint.advance(drawn_B)

Not here: sampling (engines/); distances between atoms, which validation checks afterwards
(scores/validity.py).
"""

# Shape legend: B batch, b some of it, V vocabulary, S signature of a group, N count 0-99, C fixed-letter
# vectors, L letters, E elements of one composition, K tracked groups, A count plans, G space groups.

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from crystallm_kit.structures.elements import ELEMENTS
from crystallm_kit.text import wyckoff as format_
from crystallm_kit.tokens.requests import Request
from crystallm_kit.tokens.wyckoff_tables import MAX_ELEMENTS, N_COUNTS, N_LETTERS, tables, witnesses

HEADER_ELEMENT, HEADER_COUNT, SITE_ELEMENT, SITE_LETTER, LATTICE_INTEGER, LATTICE_PAIR, COORDINATE, \
    COORDINATE_PAIR, ENDING, DONE = range(10)  # fmt: skip
_LENGTH_RANGE = (1, 199)  # angstrom
_ANGLE_RANGE = (30, 149)  # degree


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
        requests: Sequence[Request],
        *,
        vocabulary_size: int | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.vocabulary_size = vocabulary_size or len(format_.TOKENS)
        self._t = _device_tables(str(self.device))
        self._ids = _token_tables(str(self.device), self.vocabulary_size)
        self._init_requests(requests)
        self._init_state(len(requests))

    def _init_requests(self, requests: Sequence[Request]) -> None:
        distinct = {r: i for i, r in enumerate(dict.fromkeys(requests))}
        which = torch.tensor([distinct[r] for r in requests], device=self.device)
        size, n_plans = len(distinct), max(1, *(len(r.plans) for r in distinct))
        tracked = {r: self._tracked(r) for r in distinct}
        n_tracked = max(1, *(len(k) for k in tracked.values()))
        elements = np.zeros((size, len(ELEMENTS)), dtype=bool)
        required = np.full((size, MAX_ELEMENTS + 1), len(ELEMENTS))
        plans = np.zeros((size, n_plans, MAX_ELEMENTS), dtype=np.int64)
        alive = np.zeros((size, n_plans), dtype=bool)
        groups = np.zeros((size, 230), dtype=bool)
        tracked_array = np.full((size, n_tracked), -1)
        for r, i in distinct.items():
            elements[i, list(r.elements)] = True
            required[i, : len(r.required)] = r.required
            for j, plan in enumerate(r.plans):
                plans[i, j, : len(plan)] = plan
                alive[i, j] = True
            groups[i, [g - 1 for g in r.groups] if r.groups else slice(None)] = True
            tracked_array[i, : len(tracked[r])] = [g - 1 for g in tracked[r]]

        def per_sample(array: npt.NDArray[np.generic]) -> torch.Tensor:
            return torch.from_numpy(array).to(self.device)[which]

        self.elements = per_sample(elements)  # (B, 103)
        self.elements_after = self.elements.flip(1).cumsum(1).flip(1) - self.elements.long()  # (B, 103)
        self.required = per_sample(required)  # (B, E + 1), increasing, padded with 103
        self.n_required = per_sample(np.array([len(r.required) for r in distinct]))
        self.n_elements = per_sample(np.array([r.n_elements for r in distinct]))
        self.n_sites = per_sample(np.array([r.n_sites for r in distinct]))
        self.max_sites = per_sample(np.array([r.max_sites for r in distinct]))
        self.has_plan = per_sample(np.array([bool(r.plans) for r in distinct]))
        self.plans = per_sample(plans)  # (B, A, E)
        self.alive = per_sample(alive)  # (B, A)
        self.groups = per_sample(groups)  # (B, 230)
        self.tracked = per_sample(tracked_array)  # (B, K), -1 where none
        self.is_tracked = (self.tracked >= 0).any(1)

    @staticmethod
    def _tracked(request: Request) -> tuple[int, ...]:
        if not request.groups or request.plans:
            return ()
        watched = request.groups if len(request.groups) == 1 else witnesses(request.groups)
        t = tables()
        holds_anything = ((t.multiplicity == 1) & ~t.is_fixed).any(1)
        return () if any(holds_anything[g - 1] for g in watched) else watched

    def _init_state(self, size: int) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.long) -> torch.Tensor:
            return torch.zeros(size, *shape, dtype=dtype, device=self.device)

        self.mode = zeros()
        self.k = zeros()  # elements written
        self.rank = zeros() - 1  # of the last element
        self.total = zeros()  # atoms written
        self.required_met = zeros()
        self.composition_rank = zeros(MAX_ELEMENTS)
        self.composition_count = zeros(MAX_ELEMENTS)
        self.used = (self.tracked >= 0).long()  # (B, K): set of vectors in use; at first {0}
        self.group = zeros()
        self.enough = zeros(
            MAX_ELEMENTS + 1
        )  # (B, E + 1): set of vectors left with which elements i, i + 1 ... fit
        self.element = zeros()  # index of the element whose sites are being written
        self.missing = zeros()  # atoms of it still to place
        self.left = zeros()  # vector of fixed letters left
        self.used_letters = zeros(N_LETTERS, dtype=torch.bool)
        self.slot = zeros()  # lattice parameter being written
        self.n_coordinates = zeros()  # free coordinates still to write
        self.angles = zeros(2)  # integer parts of alpha and beta

    def take(self, rows: torch.Tensor) -> "WyckoffConstraint":
        """Return the constraint of some of the samples, for a batch that shrinks. `rows`: (B',) int64."""
        other = object.__new__(WyckoffConstraint)
        for name, value in vars(self).items():
            setattr(other, name, value[rows] if isinstance(value, torch.Tensor) else value)
        return other

    @property
    def done(self) -> torch.Tensor:
        """(B,) bool: samples that have written their end."""
        return self.mode == DONE

    @property
    def in_numbers(self) -> torch.Tensor:
        """(B,) bool: samples whose next token belongs to the cell or to a coordinate."""
        return (self.mode >= LATTICE_INTEGER) & (self.mode <= COORDINATE_PAIR)

    def mask(self) -> torch.Tensor:
        """Return (B, V) bool: True where a token may come next. Never all False."""
        allowed = torch.zeros(len(self.mode), self.vocabulary_size, dtype=torch.bool, device=self.device)
        for mode, write in (
            (HEADER_ELEMENT, self._mask_header), (HEADER_COUNT, self._mask_count),
            (SITE_ELEMENT, self._mask_site_element), (SITE_LETTER, self._mask_letter),
            (LATTICE_INTEGER, self._mask_lattice),
        ):  # fmt: skip
            rows = (self.mode == mode).nonzero().squeeze(1)
            if len(rows):
                write(rows, allowed)
        for mode, ids in self._ids.constant.items():
            allowed |= (self.mode == mode)[:, None] & ids
        return allowed

    def advance(self, tokens: torch.Tensor) -> None:
        """Move every sample on by one token. `tokens`: (B,) int64 ids that the last mask allowed."""
        mode = self.mode.clone()
        for current, step in (
            (HEADER_ELEMENT, self._after_header), (HEADER_COUNT, self._after_count),
            (SITE_ELEMENT, self._after_site_element), (SITE_LETTER, self._after_letter),
            (LATTICE_INTEGER, self._after_lattice_integer), (LATTICE_PAIR, self._after_lattice_pair),
            (COORDINATE, self._after_coordinate), (COORDINATE_PAIR, self._after_coordinate_pair),
            (ENDING, self._after_end),
        ):  # fmt: skip
            rows = (mode == current).nonzero().squeeze(1)
            if len(rows):
                step(rows, tokens[rows])

    # Composition and space group

    def _slots(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (elements still to write at least, whether exactly that many) for each row."""
        required_left = self.n_required[rows] - self.required_met[rows]
        exact = self.n_elements[rows] > 0
        return torch.where(exact, self.n_elements[rows] - self.k[rows], required_left), exact

    def _mask_header(self, rows: torch.Tensor, allowed: torch.Tensor) -> None:
        ranks = torch.arange(len(ELEMENTS), device=self.device)
        slots, exact = self._slots(rows)
        required_left = self.n_required[rows] - self.required_met[rows]
        following = self.required[rows, self.required_met[rows]]  # next required rank, 103 if none
        is_required = ranks == following[:, None]
        room = torch.where(exact, slots > required_left, self.k[rows] + required_left < MAX_ELEMENTS)
        # Elements to come from here on, this one counted, if it is a required one and if it is another.
        needed = slots.clamp(min=1)
        needed_other = torch.where(exact, needed, required_left + 1)
        enough_after = self.elements_after[rows] >= (slots - 1)[:, None]
        element = (
            self.elements[rows]
            & (ranks > self.rank[rows, None])
            & (ranks <= following[:, None])
            & (enough_after | ~exact[:, None])
        )
        more = torch.where(exact, slots > 0, self.k[rows] < MAX_ELEMENTS)
        wanted = self.n_sites[rows]
        atoms = torch.where(wanted > 0, wanted, self.max_sites[rows]) - self.total[rows]
        fits = atoms[:, None] >= torch.stack([needed, needed_other], 1)  # (b, 2)
        tracked = self.is_tracked[rows].nonzero().squeeze(1)
        if len(tracked):
            r = rows[tracked]
            fits[tracked] &= self._room_for(
                r,
                atoms[tracked, None].expand(-1, 2),
                torch.stack([needed, needed_other], 1)[tracked],
                self.used[r][:, None].expand(-1, 2, -1),
            )
        allowed_other = room & fits[:, 1]
        element &= more[:, None] & torch.where(is_required, fits[:, :1], allowed_other[:, None])
        closable = (self.k[rows] > 0) & (slots <= 0) & ((wanted == 0) | (self.total[rows] == wanted))
        allowed[rows[:, None], self._ids.element] = element
        group = self.groups[rows] & closable[:, None]
        ready = closable.nonzero().squeeze(1)
        if len(ready):
            group[ready] &= self.holding_groups(self.composition_count[rows[ready]])
        allowed[rows[:, None], self._ids.group] = group

    def holding_groups(self, counts: torch.Tensor) -> torch.Tensor:
        """Return (B, 230) bool: the space groups that can hold a composition; counts: (B, E), zero-padded."""
        distinct, inverse = torch.unique(counts.sort(1, descending=True).values, dim=0, return_inverse=True)
        used = torch.ones(len(distinct), len(self._t.full), dtype=torch.long, device=self.device)
        for j in range(int((distinct > 0).sum(1).max())):
            used = _union(used, self._t.sums[:, distinct[:, j]].transpose(0, 1))
        return (used != 0)[inverse][:, self._t.signature]

    def _room_for(
        self, rows: torch.Tensor, atoms: torch.Tensor, elements: torch.Tensor, used: torch.Tensor
    ) -> torch.Tensor:
        """Tell whether a tracked group can hold that many more atoms as that many elements or more.

        Without a fixed number of sites, `atoms` is what may at most be added.

        Args:
            rows: (b,) samples.
            atoms: (b, X).
            elements: (b, X), at least.
            used: (b, X, K) sets of vectors in use.

        Returns:
            (b, X) bool
        """
        t, exact = self._t, self.n_sites[rows] > 0
        signature = t.signature[self.tracked[rows].clamp(min=0)][:, None]  # (b, 1, K)
        atoms_K, elements_K = atoms.clamp(min=0)[..., None], elements.clamp(min=0)[..., None]
        sets = torch.where(
            exact[:, None, None],
            t.enough[signature, atoms_K, elements_K],
            t.enough_within[signature, atoms_K, elements_K],
        )
        return (sets & used).ne(0).any(-1) & (atoms >= 0)

    def _mask_count(self, rows: torch.Tensor, allowed: torch.Tensor) -> None:
        counts = torch.arange(N_COUNTS, device=self.device)
        slots, exact = self._slots(rows)  # the element of this count is written already
        wanted, total = self.n_sites[rows, None], self.total[rows, None]
        rest = wanted - total - counts  # (b, N)
        no_more = (self.k[rows] == MAX_ELEMENTS) | (self.elements_after[rows, self.rank[rows]] == 0)
        last = torch.where(exact, slots == 0, no_more)[:, None]
        slots = slots.clamp(min=0)[:, None]
        with_sites = torch.where(last, rest == 0, rest >= slots) & (rest >= 0)
        without = total + counts + slots <= self.max_sites[rows, None]
        fits = (counts > 0) & torch.where(wanted > 0, with_sites, without)
        planned = torch.zeros(len(rows), N_COUNTS, dtype=torch.uint8, device=self.device)
        position = (self.k[rows] - 1)[:, None, None].expand(-1, self.plans.shape[1], 1)
        plan_count = self.plans[rows].gather(2, position).squeeze(2)  # (b, A)
        planned.scatter_reduce_(1, plan_count, self.alive[rows].to(torch.uint8), "amax")
        fits = torch.where(self.has_plan[rows, None], planned.bool() & (counts > 0), fits)
        tracked = self.is_tracked[rows].nonzero().squeeze(1)
        if len(tracked):
            r = rows[tracked]
            sums = self._t.sums[self._t.signature[self.tracked[r].clamp(min=0)]].transpose(
                1, 2
            )  # (b, N, K, C)
            after = _union(self.used[r][:, None].expand(sums.shape[:-1]), sums)
            room = torch.where(
                wanted[tracked] > 0, rest[tracked], self.max_sites[r, None] - total[tracked] - counts
            )
            fits[tracked] &= self._room_for(r, room, slots[tracked].expand_as(room), after)
        allowed[rows[:, None], self._ids.count[1:]] = fits[:, 1:]

    def _after_header(self, rows: torch.Tensor, tokens: torch.Tensor) -> None:
        rank, group = self._ids.rank_of[tokens], self._ids.group_of[tokens]
        element = rank >= 0
        r, v = rows[element], rank[element]
        self.required_met[r] += (self.required[r, self.required_met[r]] == v).long()
        self.composition_rank[r, self.k[r]] = v
        self.rank[r] = v
        self.k[r] += 1
        self.mode[r] = HEADER_COUNT
        r, v = rows[~element], group[~element]
        if len(r):
            self._choose_group(r, v)

    def _after_count(self, rows: torch.Tensor, tokens: torch.Tensor) -> None:
        count = self._ids.count_of[tokens]
        position = self.k[rows] - 1
        self.composition_count[rows, position] = count
        self.total[rows] += count
        plan_count = (
            self.plans[rows].gather(2, position[:, None, None].expand(-1, self.plans.shape[1], 1)).squeeze(2)
        )
        self.alive[rows] &= plan_count == count[:, None]
        tracked = self.is_tracked[rows].nonzero().squeeze(1)
        if len(tracked):
            r = rows[tracked]
            sums = self._t.sums[self._t.signature[self.tracked[r].clamp(min=0)], count[tracked, None]]
            self.used[r] = _union(self.used[r], sums)
        self.mode[rows] = HEADER_ELEMENT

    def _choose_group(self, rows: torch.Tensor, group: torch.Tensor) -> None:
        t, signature = self._t, self._t.signature[group]
        self.group[rows] = group
        everything = torch.full_like(group, (1 << t.n_vectors) - 1)
        self.enough[rows, MAX_ELEMENTS] = everything
        for i in reversed(range(MAX_ELEMENTS)):
            count = self.composition_count[rows, i]
            following = self.enough[rows, i + 1]
            self.enough[rows, i] = torch.where(
                count > 0, _union(following, t.sums[signature, count]), following
            )
        self.left[rows] = t.full[signature]
        self.missing[rows] = self.composition_count[rows, 0]
        self.mode[rows] = SITE_ELEMENT

    # Sites

    def _mask_site_element(self, rows: torch.Tensor, allowed: torch.Tensor) -> None:
        rank = self.composition_rank[rows, self.element[rows]]
        allowed[rows, self._ids.element[rank]] = True

    def _after_site_element(self, rows: torch.Tensor, tokens: torch.Tensor) -> None:
        del tokens  # there was only one choice
        self.mode[rows] = SITE_LETTER

    def _after_this_letter(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (b, L): atoms still missing after each letter, and the fixed letters left (C where
        impossible).
        """
        group = self.group[rows]
        left = (
            self._t.left_after[group]
            .gather(2, self.left[rows][:, None, None].expand(-1, N_LETTERS, 1))
            .squeeze(2)
        )
        return self.missing[rows, None] - self._t.multiplicity[group], left

    def _mask_letter(self, rows: torch.Tensor, allowed: torch.Tensor) -> None:
        t, group = self._t, self.group[rows]
        missing, left = self._after_this_letter(rows)
        fits = (t.multiplicity[group] > 0) & (missing >= 0) & (left < t.n_vectors)
        fits &= ~(t.is_fixed[group] & self.used_letters[rows])
        following = self.enough[rows, self.element[rows] + 1][:, None].expand_as(missing)
        possible = _union(following, t.sums[t.signature[group][:, None], missing.clamp(min=0)])  # (b, L)
        allowed[rows[:, None], self._ids.letter] = fits & (possible >> left & 1).bool()

    def _after_letter(self, rows: torch.Tensor, tokens: torch.Tensor) -> None:
        letter = self._ids.letter_of[tokens]
        missing, left = self._after_this_letter(rows)
        missing = missing.gather(1, letter[:, None]).squeeze(1)
        self.left[rows] = left.gather(1, letter[:, None]).squeeze(1)
        self.used_letters[rows, letter] = True
        self.n_coordinates[rows] += self._t.n_free[self.group[rows], letter]
        done = missing == 0
        element = self.element[rows] + done.long()
        following = self.composition_count[rows, element.clamp(max=MAX_ELEMENTS - 1)]
        self.missing[rows] = torch.where(done, following, missing)
        complete = element == self.k[rows]
        self.element[rows] = element.clamp(max=MAX_ELEMENTS - 1)
        self.mode[rows] = torch.where(complete, LATTICE_INTEGER, SITE_ELEMENT)

    # Numbers

    def _mask_lattice(self, rows: torch.Tensor, allowed: torch.Tensor) -> None:
        values = torch.arange(format_.MAX_INTEGER + 1, device=self.device)
        kind = self._t.lattice_kind[self.group[rows], self.slot[rows]][:, None]
        alpha, beta = self.angles[rows, :1], self.angles[rows, 1:]
        low = torch.where(kind == 0, _LENGTH_RANGE[0], _ANGLE_RANGE[0])
        high = torch.where(kind == 0, _LENGTH_RANGE[1], _ANGLE_RANGE[1])
        # Three angles span a cell if |alpha - beta| < gamma < min(alpha + beta, 360 - alpha - beta).
        low = torch.where(kind == 3, ((alpha - beta).abs() + 2).clamp(min=10), low)
        high = torch.where(
            kind == 3, (torch.minimum(alpha + beta, 358 - alpha - beta) - 2).clamp(max=168), high
        )
        allowed[rows[:, None], self._ids.integer] = (values >= low) & (values <= high)

    def _after_lattice_integer(self, rows: torch.Tensor, tokens: torch.Tensor) -> None:
        kind = self._t.lattice_kind[self.group[rows], self.slot[rows]]
        value = self._ids.integer_of[tokens]
        for index in (0, 1):
            r = rows[kind == index + 1]
            self.angles[r, index] = value[kind == index + 1]
        self.mode[rows] = LATTICE_PAIR

    def _after_lattice_pair(self, rows: torch.Tensor, tokens: torch.Tensor) -> None:
        del tokens
        self.slot[rows] += 1
        more = self.slot[rows] < self._t.n_lattice[self.group[rows]]
        after = torch.where(self.n_coordinates[rows] > 0, COORDINATE, ENDING)
        self.mode[rows] = torch.where(more, LATTICE_INTEGER, after)

    def _after_coordinate(self, rows: torch.Tensor, tokens: torch.Tensor) -> None:
        del tokens
        self.mode[rows] = COORDINATE_PAIR

    def _after_coordinate_pair(self, rows: torch.Tensor, tokens: torch.Tensor) -> None:
        del tokens
        self.n_coordinates[rows] -= 1
        self.mode[rows] = torch.where(self.n_coordinates[rows] > 0, COORDINATE, ENDING)

    def _after_end(self, rows: torch.Tensor, tokens: torch.Tensor) -> None:
        del tokens
        self.mode[rows] = DONE


def _union(sets: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    """Return the union of sums[..., u] over the members u of each set; int64 sets (...), sums (..., C)."""
    out = torch.zeros_like(sets)
    for u in range(sums.shape[-1]):
        out |= -(sets >> u & 1) & sums[..., u]
    return out


@dataclass(frozen=True)
class _DeviceTables:
    """`Tables` as tensors on one device."""

    n_vectors: int
    signature: torch.Tensor
    sums: torch.Tensor
    full: torch.Tensor
    enough: torch.Tensor
    enough_within: torch.Tensor  # (S, N, E + 1): as `enough`, for n atoms or fewer
    multiplicity: torch.Tensor
    is_fixed: torch.Tensor
    left_after: torch.Tensor
    n_free: torch.Tensor
    n_lattice: torch.Tensor
    lattice_kind: torch.Tensor


@functools.lru_cache(maxsize=4)
def _device_tables(device: str) -> _DeviceTables:
    t = tables()

    def move(array: npt.NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    return _DeviceTables(
        n_vectors=t.sums.shape[2], signature=move(t.signature), sums=move(t.sums), full=move(t.full),
        enough=move(t.enough), enough_within=move(np.bitwise_or.accumulate(t.enough, axis=1)),
        multiplicity=move(t.multiplicity), is_fixed=move(t.is_fixed), left_after=move(t.left_after),
        n_free=move(t.n_free), n_lattice=move(t.n_lattice), lattice_kind=move(t.lattice_kind),
    )  # fmt: skip


@dataclass(frozen=True)
class _TokenTables:
    """Ids by meaning, and meaning by id (-1: not that kind)."""

    element: torch.Tensor  # (103,)
    count: torch.Tensor  # (N,), entry 0 unused
    group: torch.Tensor  # (230,)
    letter: torch.Tensor  # (L,)
    integer: torch.Tensor  # (500,)
    rank_of: torch.Tensor  # (V,)
    count_of: torch.Tensor
    group_of: torch.Tensor
    letter_of: torch.Tensor
    integer_of: torch.Tensor
    constant: dict[int, torch.Tensor]  # mode -> (V,) bool, where the mask is always the same


@functools.lru_cache(maxsize=4)
def _token_tables(device: str, vocabulary_size: int) -> _TokenTables:
    position = {token: i for i, token in enumerate(format_.TOKENS)}
    words = {
        "element": ELEMENTS,
        "count": ("1 ", *(f"{n} " for n in range(1, N_COUNTS))),
        "group": format_.SPACEGROUP_TOKENS,
        "letter": format_.LETTER_TOKENS,
        "integer": format_.INTEGER_TOKENS,
    }
    ids = {kind: torch.tensor([position[w] for w in tokens], device=device) for kind, tokens in words.items()}
    meaning = {}
    for kind, index in ids.items():
        table = torch.full((vocabulary_size,), -1, device=device)
        start = 1 if kind == "count" else 0
        table[index[start:]] = torch.arange(start, len(index), device=device)
        meaning[kind] = table

    def only(tokens: Iterable[str]) -> torch.Tensor:
        row = torch.zeros(vocabulary_size, dtype=torch.bool, device=device)
        row[[position[w] for w in tokens]] = True
        return row

    constant = {
        LATTICE_PAIR: only(format_.PAIR_TOKENS),
        COORDINATE: only(format_.COORDINATE_TOKENS),
        COORDINATE_PAIR: only(format_.PAIR_TOKENS),
        ENDING: only([format_.END]),
        DONE: only([format_.PAD]),
    }
    return _TokenTables(
        element=ids["element"], count=ids["count"], group=ids["group"], letter=ids["letter"],
        integer=ids["integer"], rank_of=meaning["element"], count_of=meaning["count"],
        group_of=meaning["group"], letter_of=meaning["letter"],
        integer_of=meaning["integer"], constant=constant,
    )  # fmt: skip
