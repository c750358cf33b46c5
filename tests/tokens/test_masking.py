"""masking.py: whatever is asked for is either refused with a reason, or every sample ends and obeys."""

import functools
import itertools
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from pymatgen.core import Lattice, Structure

from crystallm_kit.errors import ImpossibleRequest, UnknownName, UserError
from crystallm_kit.records import Conditions, Crystal
from crystallm_kit.structures.elements import ELEMENTS, SYMBOL
from crystallm_kit.structures.symmetry import crystal_system, expand, space_group
from crystallm_kit.text.representation import cut
from crystallm_kit.text.wyckoff import TOKENS, WyckoffRepresentation, text_to_symmetric
from crystallm_kit.tokens.masking import WyckoffConstraint
from crystallm_kit.tokens.requests import Request, compile_request
from crystallm_kit.tokens.wyckoff_tables import _CUBIC_WITNESSES, N_COUNTS, can_hold

ID = {token: i for i, token in enumerate(TOKENS)}
KNOWN = tuple(sorted(set(ELEMENTS) - {"Ac", "Pa", "Np", "Pu", "Am", "Cm", "Po", "At", "Fr", "Ra"}))
SYSTEMS = ("triclinic", "monoclinic", "orthorhombic", "tetragonal", "trigonal", "hexagonal", "cubic")


def walk(requests: list[Request], seed: int, *, eager: float = 0.3) -> list[str]:
    """Return one random text for each request: every token is drawn from those that the mask lets through.

    A share `eager` of the draws takes the last allowed token: large counts, where the limits are.
    """
    constraint = WyckoffConstraint(requests)
    rng = np.random.default_rng(seed)
    texts, rows = [""] * len(requests), np.arange(len(requests))
    for _ in range(900):
        mask = constraint.mask().numpy()
        dead = np.flatnonzero(~mask.any(1))
        if len(dead):
            pytest.fail(f"nothing may follow {texts[rows[dead[0]]]!r}")
        drawn = []
        for row, allowed in zip(rows, map(np.flatnonzero, mask), strict=True):
            drawn.append(allowed[-1] if rng.random() < eager else rng.choice(allowed))
            texts[row] += TOKENS[drawn[-1]]
        constraint.advance(torch.tensor(np.array(drawn)))
        running = (~constraint.done).nonzero()[:, 0]
        if not len(running):
            return texts
        if len(running) < len(rows):
            constraint, rows = constraint.take(running), rows[running.numpy()]
    raise AssertionError(f"no end after 900 tokens: {texts[rows[0]]!r}")


def anonymous(counts: list[int]) -> list[int]:
    unit = functools.reduce(np.gcd, counts)
    return sorted(n // int(unit) for n in counts)


def obeys(text: str, conditions: Conditions) -> None:
    """Check a text against what was asked for, from the text alone."""
    crystal = text_to_symmetric(text)
    counts = {SYMBOL[z]: n for z, n in crystal.counts.items()}
    c = conditions
    if c.formula is not None:
        assert set(counts) == set(c.formula)
        assert len({counts[e] * 10_000 // c.formula[e] for e in counts}) == 1
    assert set(c.elements) <= set(counts)
    if c.only_elements:
        assert set(counts) == set(c.elements)
    if c.n_elements is not None:
        assert len(counts) == c.n_elements
    if c.anonymous_formula is not None:
        letters = Counter()
        for part in re.findall(r"([A-Z])(\d*)", c.anonymous_formula):
            letters[part[0]] += int(part[1] or 1)
        assert anonymous(list(counts.values())) == anonymous(list(letters.values()))
    if c.spacegroup_number is not None:
        assert crystal.spacegroup_number == c.spacegroup_number
    if c.crystal_system is not None:
        assert crystal_system(crystal.spacegroup_number) == c.crystal_system
    if c.n_sites is not None:
        assert sum(counts.values()) == c.n_sites


def random_conditions(rng: np.random.Generator) -> Conditions:
    def some(probability: float) -> bool:
        return bool(rng.random() < probability)

    pool = list(rng.choice(ELEMENTS, 12, replace=False))
    formula = {str(e): int(rng.integers(1, 7)) for e in pool[: rng.integers(1, 5)]} if some(0.3) else None
    n_elements = int(rng.integers(1, 12)) if some(0.25) else None
    elements = tuple(str(e) for e in pool[: rng.integers(1, 5)]) if some(0.35) else ()
    pattern = sorted((int(rng.integers(1, 7)) for _ in range(rng.integers(1, 5))), reverse=False)
    name = "".join(f"{'ABCDEFGH'[i]}{n if n > 1 else ''}" for i, n in enumerate(pattern))
    return Conditions(
        formula=formula,
        elements=elements,
        only_elements=bool(elements) and some(0.4),
        n_elements=n_elements,
        anonymous_formula=name if formula is None and some(0.25) else None,
        spacegroup_number=int(rng.integers(1, 231)) if some(0.4) else None,
        crystal_system=str(rng.choice(SYSTEMS)) if some(0.2) else None,
        n_sites=int(rng.integers(1, 33)) if some(0.4) else None,
    )


def check_random_requests(seed: int, n_requests: int) -> None:
    rng = np.random.default_rng(seed)
    accepted = []
    for _ in range(n_requests):
        conditions = random_conditions(rng)
        try:
            accepted.append((conditions, compile_request(conditions, known_elements=KNOWN, max_sites=24)))
        except (ImpossibleRequest, UnknownName):
            continue
    # Neither all nor none can be met.
    assert 0.4 < len(accepted) / n_requests < 0.8
    texts = walk([r for _, r in accepted], seed)
    for (conditions, request), text in zip(accepted, texts, strict=True):
        obeys(text, conditions)
        if conditions.n_sites is None:
            assert sum(text_to_symmetric(text).counts.values()) <= request.max_sites


def test_every_random_walk_ends_parses_and_obeys_whatever_is_asked():
    """Requests of every kind in one batch."""
    check_random_requests(5, 160)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6, 12))
def test_many_random_walks_end_parse_and_obey_whatever_is_asked(seed):
    check_random_requests(seed, 1000)


# (conditions, the bug that it found): each once led to a state in which nothing could follow.
DEAD_ENDS = [
    # Another element than the required ones was let through where only the required ones had room left.
    (Conditions(elements=("O",)), "Mg23 Na1"),
    (Conditions(elements=("Ag",), n_sites=17), "other element with one atom left"),
    (Conditions(elements=("W", "O"), spacegroup_number=107), "the same in a group with few letters"),
    # A required element that is last in the order was let through before the others had come.
    (Conditions(elements=("K", "F"), n_elements=10, n_sites=37), "K28 F1"),
]


@pytest.mark.parametrize(("conditions", "text"), DEAD_ENDS)
def test_required_elements_keep_their_room(conditions, text):
    """A composition could be filled up before all required elements were there: nothing could follow."""
    request = compile_request(conditions, known_elements=KNOWN, max_sites=24)
    for seed, eager in enumerate((0.1, 0.5, 0.9)):
        for text in walk([request] * 20, seed, eager=eager):
            obeys(text, conditions)


@pytest.mark.parametrize("number", range(1, 231))
def test_every_group_can_be_asked_for_with_nothing_else_or_with_elements(number):
    for conditions in (
        Conditions(spacegroup_number=number),
        Conditions(spacegroup_number=number, elements=("O", "Si")),
        Conditions(spacegroup_number=number, n_elements=2),
    ):
        request = compile_request(conditions, known_elements=KNOWN, max_sites=24)
        for text in walk([request] * 4, number):
            obeys(text, conditions)


# What is refused

REFUSED = [
    (Conditions(formula={"Na": 3, "Cl": 1}, spacegroup_number=227, n_sites=4),
     "Na3Cl in space group 227 with 4 sites: no assignment of Wyckoff positions adds up"),
    (Conditions(formula={"Na": 3, "Cl": 1}, spacegroup_number=230, n_sites=16),
     "Na3Cl in space group 230 with 16 sites"),
    (Conditions(formula={"Na": 2, "O": 1}, n_sites=4), "4 atoms are no multiple of the 3"),
    (Conditions(formula={"Na": 1, "Cl": 1}, n_elements=3), "2 different elements and n_elements 3"),
    (Conditions(formula={"Na": 1, "Cl": 1}, elements=("K",)), "does not have exactly the elements asked for"),
    (Conditions(formula={"Na": 1, "Cl": 1}, elements=("Na",), only_elements=True), "Cl too many"),
    (Conditions(formula={"Na": 1, "Cl": 1}, anonymous_formula="AB3"), "NaCl is AB, not AB3"),
    (Conditions(formula={}), "at least one element"),
    (Conditions(formula={"Na": 0}), "each count 1 or more"),
    (Conditions(n_sites=0), "n_sites is 0"),
    (Conditions(n_elements=-1), "n_elements is -1"),
    (Conditions(n_elements=11), "11 elements asked for; at most 10"),
    (Conditions(elements=tuple(ELEMENTS[:12])), "12 elements asked for; at most 10"),
    (Conditions(n_sites=3, n_elements=4), "3 sites cannot hold 4 atoms"),
    (Conditions(n_sites=100), "100 sites asked for; at most 99"),
    (Conditions(n_elements=9, spacegroup_number=229),
     "at most 24 sites in space group 229 with 9 elements: no assignment"),
    (Conditions(n_elements=10, crystal_system="cubic"),
     "at most 24 sites in any cubic space group with 10 elements"),
    (Conditions(elements=("Na", "Cl", "O", "S"), spacegroup_number=230),
     "with 4 elements or more: no assignment"),
    (Conditions(n_sites=7, spacegroup_number=227), "7 sites in space group 227"),
    (Conditions(spacegroup_number=225, crystal_system="hexagonal"), "is cubic, not hexagonal"),
    (Conditions(anonymous_formula="AB2C3D4E5F6G7H8I9J10"), "more than the 2520 that are followed"),
]  # fmt: skip


@pytest.mark.parametrize(("conditions", "message"), REFUSED)
def test_what_no_crystal_can_meet_is_refused_with_the_reason(conditions, message):
    with pytest.raises(ImpossibleRequest) as caught:
        compile_request(conditions, known_elements=KNOWN, max_sites=24)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "conditions",
    [Conditions(elements=("Xx",)), Conditions(formula={"Nacl": 1}), Conditions(crystal_system="round")],
)
def test_unknown_names_are_refused(conditions):
    with pytest.raises(UnknownName):
        compile_request(conditions)


def test_a_group_beyond_230_is_refused():
    with pytest.raises(UserError):
        compile_request(Conditions(spacegroup_number=231))


def test_elements_that_the_model_does_not_know_come_only_where_they_are_asked_for():
    free = compile_request(Conditions(), known_elements=("Na", "Cl"))
    asked = compile_request(Conditions(elements=("Pu",)), known_elements=("Na", "Cl"))
    assert {e for text in walk([free] * 20, 0) for e in re.findall(r"[A-Z][a-z]?", text.split("\n")[0])} == {
        "Na", "Cl",
    }  # fmt: skip
    assert all("Pu" in text for text in walk([asked] * 20, 0))


def test_more_sites_than_the_model_holds_are_allowed_where_they_are_asked_for():
    for conditions in (Conditions(n_sites=60), Conditions(formula={"Mg": 20, "Si": 31})):
        [text] = walk([compile_request(conditions, max_sites=24)], 0)
        obeys(text, conditions)


def test_a_formula_gets_the_smallest_cell_that_its_space_group_can_hold():
    """LiFePO4 in Pnma, 28 sites, was refused because a model's cells usually have at most 24."""
    olivine = Conditions(formula={"Li": 1, "Fe": 1, "P": 1, "O": 4}, spacegroup_number=62)
    request = compile_request(olivine, max_sites=24)
    assert request.plans == ((4, 4, 4, 16),)
    for text in walk([request] * 5, 0):
        obeys(text, olivine)


# Against brute force


@functools.cache
def compositions(number: int, most: int) -> frozenset[tuple[int, ...]]:
    """Return the sorted contents of up to 2 elements of every choice of orbits, at most `most` atoms."""
    positions = [(p.primitive_multiplicity, p.n_free == 0) for p in space_group(number).positions]
    found: set[tuple[int, int]] = {(0, 0)}
    for multiplicity, fixed in positions:
        frontier = found
        while frontier:
            grown = {
                pair
                for a, b in frontier
                for pair in ((a + multiplicity, b), (a, b + multiplicity))
                if sum(pair) <= most and pair not in found
            }
            found = found | grown
            frontier = set() if fixed else grown
    return frozenset(tuple(sorted(pair)) for pair in found)


@pytest.mark.parametrize("number", range(1, 231))
def test_can_hold_agrees_with_an_enumeration_of_orbits(number):
    possible = compositions(number, 40)
    for a, b in itertools.combinations_with_replacement(range(41), 2):
        if 0 < a + b <= 40:
            assert can_hold(number, [n for n in (a, b) if n]) == ((a, b) in possible), (a, b)


def test_the_groups_offered_after_a_composition_are_those_that_can_hold_it():
    rng = np.random.default_rng(0)
    constraint = WyckoffConstraint([compile_request(Conditions(), max_sites=99)] * 40)
    compositions = [rng.integers(1, 25, rng.integers(1, 5)).tolist() for _ in range(40)]
    for j in range(max(map(len, compositions))):
        moves = torch.tensor([len(counts) > j for counts in compositions])
        constraint.advance(torch.full((40,), ID[ELEMENTS[j]]), moves)
        token = [ID[f"{counts[j]} "] if len(counts) > j else 0 for counts in compositions]
        constraint.advance(torch.tensor(token), moves)
    groups = constraint.mask()[:, [ID[f"{number}\n"] for number in range(1, 231)]]
    for counts, offered in zip(compositions, groups.tolist(), strict=True):
        assert offered == [can_hold(number, counts) for number in range(1, 231)], counts


def test_what_any_cubic_group_holds_one_of_the_witnesses_holds():
    distinct = {tuple(sorted((p.primitive_multiplicity, p.n_free == 0) for p in space_group(n).positions)): n
                for n in range(195, 231)}  # fmt: skip
    counts = [c for k in (1, 2, 3) for c in itertools.combinations_with_replacement(range(1, 25), k)]
    counts += list(itertools.combinations_with_replacement((1, 2, 3, 4, 6, 8, 9, 12), 4))
    for c in counts:
        if not any(can_hold(witness, c) for witness in _CUBIC_WITNESSES):
            assert not any(can_hold(number, c) for number in distinct.values()), c


# The mask as an object


def test_a_row_has_the_same_mask_alone_and_in_a_batch():
    conditions = [
        Conditions(), Conditions(formula={"Ba": 1, "Ti": 1, "O": 3}), Conditions(spacegroup_number=227),
        Conditions(elements=("O",), n_sites=12), Conditions(crystal_system="cubic", n_elements=3),
        Conditions(anonymous_formula="AB2"), Conditions(n_sites=7), Conditions(spacegroup_number=2),
    ]  # fmt: skip
    requests = [compile_request(c, known_elements=KNOWN, max_sites=24) for c in conditions]
    batch, alone = WyckoffConstraint(requests), [WyckoffConstraint([r]) for r in requests]
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        mask = batch.mask()
        for row, one in zip(mask, alone, strict=True):
            assert torch.equal(row, one.mask()[0])
        token = (torch.rand(mask.shape, generator=generator) * mask).argmax(1)
        batch.advance(token)
        for t, one in zip(token, alone, strict=True):
            one.advance(t[None])


def test_taking_rows_leaves_their_masks_and_the_batch_as_they_were():
    requests = [compile_request(Conditions(n_sites=n)) for n in (4, 9, 14)]
    batch = WyckoffConstraint(requests)
    batch.advance(torch.tensor([ID["Na"], ID["K"], ID["Fe"]]))
    before = batch.mask()
    taken = batch.take(torch.tensor([2, 0]))
    assert torch.equal(taken.mask(), before[[2, 0]])
    taken.advance(torch.tensor([ID["3 "], ID["2 "]]))
    assert torch.equal(batch.mask(), before)


def test_the_vocabulary_may_be_wider_than_the_alphabet():
    constraint = WyckoffConstraint([compile_request(Conditions())], vocabulary_size=1280)
    assert constraint.mask().shape == (1, 1280)
    assert not constraint.mask()[:, len(TOKENS) :].any()


# Real texts


def refusals(texts: list[str], request: Request) -> list[str]:
    """Return the texts that the mask stops first, with where."""
    alphabet = WyckoffRepresentation().alphabet()
    cuts = [[ID[token] for token in cut(text, alphabet)] for text in texts]
    constraint = WyckoffConstraint([request] * len(texts))
    for t in range(max(map(len, cuts))):
        token = torch.tensor([ids[t] if t < len(ids) else 0 for ids in cuts])
        allowed = constraint.mask().gather(1, token[:, None])[:, 0]
        if not allowed.all():
            return [
                f"{texts[row]!r} at {TOKENS[int(token[row])]!r}"
                for row in (~allowed).nonzero()[:, 0].tolist()
            ]
        constraint.advance(token)
    assert constraint.done.all()
    return []


@functools.cache
def real_texts() -> tuple[str, ...]:
    third = 1 / 3
    prototypes = [
        (225, Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]),
        (227, Lattice.cubic(3.567), ["C"], [[0, 0, 0]]),
        (221, Lattice.cubic(4.0), ["Ba", "Ti", "O"], [[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0]]),
        (136, Lattice.tetragonal(4.594, 2.959), ["Ti", "O"], [[0, 0, 0], [0.3053, 0.3053, 0]]),
        (186, Lattice.hexagonal(3.82, 6.26), ["Zn", "S"],
         [[third, 2 * third, 0], [third, 2 * third, 0.3748]]),
        (166, Lattice.hexagonal(4.38, 30.49), ["Bi", "Te", "Te"], [[0, 0, 0.4], [0, 0, 0], [0, 0, 0.2097]]),
        (152, Lattice.hexagonal(4.916, 5.405), ["Si", "O"], [[0.4697, 0, third], [0.4135, 0.2669, 0.4524]]),
        (227, Lattice.cubic(8.08), ["Mg", "Al", "O"], [[0] * 3, [0.625] * 3, [0.3874] * 3]),
        (62, Lattice.orthorhombic(5.38, 7.64, 5.44), ["Ca", "Ti", "O", "O"],
         [[0.036, 0.25, 0.993], [0, 0, 0.5], [0.484, 0.25, 0.071], [0.289, 0.037, 0.711]]),
        (14, Lattice.monoclinic(5.169, 5.232, 5.341, 99.2), ["Zr", "O", "O"],
         [[0.2758, 0.0411, 0.2082], [0.0703, 0.3359, 0.3406], [0.4423, 0.7549, 0.4789]]),
        (2, Lattice.from_parameters(5.1, 6.3, 7.2, 83.1, 77.2, 101.4), ["K", "O"],
         [[0.11, 0.23, 0.37], [0.61, 0.19, 0.83]]),
        (1, Lattice.from_parameters(4.12, 5.37, 6.81, 82.3, 97.6, 104.9), ["K", "Sb", "O", "F"],
         [[0.03, 0.11, 0.07], [0.52, 0.36, 0.71], [0.27, 0.81, 0.43], [0.77, 0.62, 0.15]]),
        (229, Lattice.cubic(3.165), ["W"], [[0, 0, 0]]),
        (205, Lattice.cubic(5.418), ["Fe", "S"], [[0, 0, 0], [0.3849, 0.3849, 0.3849]]),
        (230, Lattice.cubic(11.46), ["Ca", "Al", "Si", "O"],
         [[0.125, 0, 0.25], [0, 0, 0], [0.375, 0, 0.25], [0.0381, 0.0449, 0.1514]]),
    ]  # fmt: skip
    wyckoff = WyckoffRepresentation()
    return tuple(
        text
        for p in prototypes
        for text in wyckoff.encode_descriptions(Crystal("", Structure.from_spacegroup(*p)))[:3]
    )


def test_every_real_text_is_let_through_token_by_token():
    assert len(real_texts()) > 25
    assert refusals(list(real_texts()), compile_request(Conditions(), max_sites=99)) == []


def test_a_real_text_is_let_through_when_its_own_composition_and_group_are_asked_for():
    for text in real_texts()[::5]:
        crystal = text_to_symmetric(text)
        counts = {SYMBOL[z]: n for z, n in crystal.counts.items()}
        request = compile_request(
            Conditions(
                formula=counts, spacegroup_number=crystal.spacegroup_number, n_sites=sum(counts.values())
            )
        )
        assert refusals([text], request) == []
        wrong = compile_request(Conditions(spacegroup_number=crystal.spacegroup_number % 230 + 1))
        assert refusals([text], wrong) != []


@pytest.mark.real_data
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:pymatgen")  # rounding of coordinates in the files
def test_the_texts_of_mp_val_are_let_through():
    folder = os.environ.get("CRYSTALLM_KIT_DATA")
    if not folder:
        pytest.skip("CRYSTALLM_KIT_DATA does not name the data folder")
    import pyarrow.parquet as pq

    rows = pq.read_table(Path(folder) / "mp_val.parquet").column("cif").to_pylist()[:200]
    texts = [WyckoffRepresentation().encode(Crystal("", Structure.from_str(row, fmt="cif"))) for row in rows]
    assert refusals(texts, compile_request(Conditions(), max_sites=N_COUNTS - 1)) == []


def test_every_triclinic_walk_spans_a_cell():
    for text in walk(
        [compile_request(Conditions(crystal_system="triclinic", n_sites=2))] * 200, 3, eager=0.2
    ):
        assert expand(text_to_symmetric(text)).volume > 0


def test_a_sample_in_a_slot_goes_on_as_if_it_were_alone():
    """Slots are taken, left, taken again and moved while others go on."""
    requests = [
        compile_request(Conditions(formula={"Ba": 1, "Ti": 1, "O": 3})),
        None,
        compile_request(Conditions(anonymous_formula="ABC2")),
        compile_request(Conditions(crystal_system="cubic", elements=("Li",))),
        compile_request(Conditions(spacegroup_number=62)),
    ]
    batch = WyckoffConstraint.empty(6)
    alone: dict[int, WyckoffConstraint] = {}
    rng = np.random.default_rng(1)
    for step in range(300):
        if step % 7 == 0:
            row, which = int(rng.integers(6)), int(rng.integers(5))
            batch.put([row], [requests[which]])
            alone[row] = WyckoffConstraint([requests[which]])
        if step % 11 == 0 and len(alone) == 6:
            order = rng.permutation(6).tolist()
            batch.move(order, list(range(6)))
            alone = {to: alone[origin] for to, origin in enumerate(order)}
        mask = batch.mask()
        tokens, moves = torch.zeros(6, dtype=torch.long), torch.zeros(6, dtype=torch.bool)
        for row, single in alone.items():
            assert torch.equal(mask[row], single.mask()[0]), (step, row)
            tokens[row] = int(rng.choice(np.flatnonzero(mask[row].numpy())))
            moves[row] = bool(rng.random() < 0.8)
            if moves[row]:
                single.advance(tokens[row : row + 1])
        batch.advance(tokens, moves)


def test_a_free_slot_allows_everything_and_stays_free():
    batch = WyckoffConstraint.empty(2, vocabulary_size=1100)
    batch.advance(torch.tensor([5, 1099]))
    assert batch.mask().all()
    batch.put([1], [compile_request(Conditions())])
    assert batch.mask()[0].all()
    assert not batch.mask()[1, len(TOKENS) :].any()
