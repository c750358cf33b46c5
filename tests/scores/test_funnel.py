"""The funnel and the marking of copies."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Lattice, Molecule, Structure

from crystallm_kit.errors import EmptyInput
from crystallm_kit.records import Conditions, Sample, Verdict
from crystallm_kit.scores.funnel import STAGES, funnel, mark_duplicates
from crystallm_kit.scores.validity import validate


def sample(name, structure=None, verdict=None):
    verdict = verdict or validate(structure)
    return Sample(name, "", structure, verdict, Conditions(), 0.0, 0, "test")


def failed(reason, **checks):
    return Verdict(False, reason, "", checks)


FCC = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])


def rocksalt(edge=5.64, cation="Na"):
    return Structure(Lattice.cubic(edge), [cation] * 4 + ["Cl"] * 4, np.vstack([FCC, 0.5 - FCC]))


def cesium_chloride_type(cation="Na"):
    return Structure(Lattice.cubic(3.5), [cation, "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])


def test_a_needle_is_no_copy_and_stops_nothing():
    """A cell of 2.5 x 2.5 x 900 angstrom is valid, but cannot be reduced: it ended the whole run."""
    sites = [[0, 0, i / 4] for i in range(4)]
    needle = Structure(Lattice.tetragonal(2.5, 900), ["Na", "Cl"] * 2, sites)
    marked = mark_duplicates([sample("a", needle), sample("b", rocksalt()), sample("c", needle)])
    assert [s.verdict.reason for s in marked] == [None, None, None]


def test_every_reason_leaves_at_its_own_gate():
    reasons = [
        "truncated",
        "parse:bad_number",
        "formula_mismatch",
        "spacegroup_mismatch",
        "overlap",
        "charge",
    ]
    samples = [sample(r, verdict=failed(r)) for r in reasons]
    samples += [sample("a", rocksalt()), sample("b", rocksalt())]
    found = funnel(mark_duplicates(samples))
    assert [getattr(found, stage) for stage in STAGES] == [8, 7, 6, 5, 4, 3, 2, 1]
    assert found.reasons == dict.fromkeys([*reasons, "duplicate"], 1)
    assert sum(found.reasons.values()) == found.requested - found.unique


def test_a_cell_out_of_range_leaves_with_the_distances_and_a_flat_one_with_the_parsing():
    out_of_range = failed("cell", cell=True, formula=True, sensible_cell=False)
    found = funnel([sample("a", verdict=out_of_range), sample("b", verdict=failed("cell", cell=False))])
    assert (found.parsed, found.symmetry, found.distances) == (1, 1, 0)


def test_a_reason_of_another_stage_is_counted_not_lost():
    found = funnel([sample("a", verdict=failed("known")), sample("b", rocksalt())])
    assert (found.charge, found.unique, found.reasons) == (2, 1, {"known": 1})


def test_no_samples_is_an_error_not_a_rate():
    with pytest.raises(EmptyInput, match="no samples"):
        funnel([])


def test_the_funnel_prints_every_gate_with_its_share_of_the_requested():
    lines = funnel([sample("a", rocksalt()), sample("b", verdict=failed("truncated"))]).lines()
    assert [line.split()[0] for line in lines[:8]] == list(STAGES)
    assert lines[1].split() == ["finished", "1", "50.00%"]
    assert lines[-1].strip() == "stopped by truncated: 1"


def test_the_funnel_as_a_dict_is_json():
    found = funnel([sample("a", rocksalt())])
    assert json.loads(json.dumps(found.as_dict())) == dataclasses.asdict(found)


def test_a_moved_a_scaled_and_a_doubled_copy_are_duplicates_of_the_first():
    moved = rocksalt()
    moved.translate_sites(range(8), [0.1, 0.2, 0.3])
    doubled = rocksalt() * (2, 1, 1)
    samples = [sample("a", rocksalt()), sample("b", moved), sample("c", rocksalt(5.7)), sample("d", doubled)]
    marked = mark_duplicates(samples)
    assert [m.verdict.reason for m in marked] == [None, "duplicate", "duplicate", "duplicate"]
    assert all("sample a" in m.verdict.detail for m in marked[1:])
    assert marked[0].verdict.checks["unique"]
    assert marked[1].verdict.checks["unique"] is False
    assert [m.id for m in marked] == ["a", "b", "c", "d"]


def test_another_polymorph_and_another_formula_are_not_duplicates():
    samples = [
        sample("a", rocksalt()),
        sample("b", cesium_chloride_type()),
        sample("c", rocksalt(cation="K")),
    ]
    assert [m.verdict.valid for m in mark_duplicates(samples)] == [True, True, True]


def test_an_invalid_first_does_not_make_a_valid_second_a_copy():
    samples = [sample("a", rocksalt(), failed("charge")), sample("b", rocksalt())]
    marked = mark_duplicates(samples)
    assert marked[0] == samples[0]
    assert marked[1].verdict.valid


def test_a_turned_molecule_is_a_copy_and_a_bent_one_is_not():
    linear = Molecule(["O", "C", "O"], [[-1.16, 0, 0], [0, 0, 0], [1.16, 0, 0]])
    turned = Molecule(["C", "O", "O"], [[1, 1, 1], [1, 1, 2.16], [1, 1, -0.16]])
    bent = Molecule(["O", "C", "O"], [[-1.16, 0, 0], [0, 0, 0], [0.2, 1.14, 0]])
    marked = mark_duplicates([sample("a", linear), sample("b", turned), sample("c", bent)])
    assert [m.verdict.reason for m in marked] == [None, "duplicate", None]


def test_marking_decides_as_stringently_as_plain_pairwise_matching():
    """The reduced cells and the bucket by size are short cuts; they must not change a decision."""
    rng = np.random.default_rng(3)
    sites = [[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0]]
    structures = []
    for _ in range(16):
        base = Structure(Lattice.tetragonal(3.2, float(rng.choice([3.2, 4.0]))), ["Na", "Na", "Cl"], sites)
        base.perturb(float(rng.choice([0.05, 0.9])), seed=int(rng.integers(10_000)))
        structures.append(base * (1, 1, int(rng.integers(1, 3))))
    marked = mark_duplicates([sample(str(i), s, Verdict(True)) for i, s in enumerate(structures)])
    matcher, kept, expected = StructureMatcher(), [], []
    for structure in structures:
        is_new = not any(matcher.fit(structure, other) for other in kept)
        kept += [structure] if is_new else []
        expected.append(is_new)
    assert [m.verdict.valid for m in marked] == expected
    assert 1 < sum(expected) < len(expected)


@pytest.mark.filterwarnings("ignore:Issues encountered while parsing CIF")
@pytest.mark.real_data
@pytest.mark.slow
def test_crystal_text_llms_metastable_samples_have_2196_different_crystals():
    """Counted once with pymatgen 2023.12: 2,196 of 3,221, first seen kept, within the reduced formula."""
    import csv
    import gzip

    folder = os.environ.get("CRYSTALLM_KIT_SAMPLES")
    if not folder:
        pytest.skip("CRYSTALLM_KIT_SAMPLES is not set")
    path = Path(folder) / "metastable_structures_llama-2-7B_1.0_0.7.csv.gz"
    with gzip.open(path, "rt") as file:
        structures = [Structure.from_str(row["cif"], fmt="cif") for row in csv.DictReader(file)]
    marked = mark_duplicates(sample(str(i), s, Verdict(True)) for i, s in enumerate(structures))
    assert (sum(m.verdict.valid for m in marked), len(marked)) == (2196, 3221)
