"""Verdicts on single structures."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from pymatgen.core import Lattice, Molecule, Structure

from crystallm_kit.errors import EncodeError, UnknownName, UserError
from crystallm_kit.records import Conditions, Crystal
from crystallm_kit.scores.bonds import bond_score
from crystallm_kit.scores.measures import measure
from crystallm_kit.scores.thresholds import PROTOCOLS
from crystallm_kit.scores.validity import validate, validate_and_measure
from crystallm_kit.structures.symmetry import spacegroup_number
from crystallm_kit.text.cif_standard_cell import standard_cell_by_moyo

FCC = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])


@pytest.fixture
def rocksalt():
    """NaCl, AFLOW AB_cF8_225_a_b, conventional cell."""
    return Structure(Lattice.cubic(5.64), ["Na"] * 4 + ["Cl"] * 4, np.vstack([FCC, 0.5 - FCC]))


@pytest.fixture
def water():
    return Molecule(["O", "H", "H"], [[0, 0, 0.119], [0, 0.763, -0.477], [0, -0.763, -0.477]])


def cubic(edge, species, coordinates):
    return Structure(Lattice.cubic(edge), species, coordinates)


@pytest.mark.parametrize("protocol", sorted(PROTOCOLS))
def test_rock_salt_is_valid_under_every_protocol(rocksalt, protocol):
    verdict = validate(rocksalt, protocol=protocol, stated_spacegroup=225)
    assert verdict.valid, verdict
    assert verdict.reason is None
    assert all(verdict.checks.values())


def test_measures_of_rock_salt(rocksalt):
    assert measure(Crystal("nacl", rocksalt)) == {
        "volume_per_atom_angstrom3": pytest.approx(5.64**3 / 8),
        "nearest_distance_angstrom": pytest.approx(2.82),
        "density_g_cm3": pytest.approx(float(rocksalt.density), rel=1e-6),
        "spacegroup_number": 225,
    }


@pytest.mark.parametrize(
    ("structure", "blind"),
    [
        (cubic(0.48, ["Fe"], [[0, 0, 0]]), "cdvae"),
        (Structure(Lattice.orthorhombic(0.3, 10, 10), ["Na", "Cl"], [[0, 0, 0], [0, 0.5, 0.5]]), "cdvae"),
        (cubic(1.3, ["Li"], [[0, 0, 0]]), "lemat_geometry"),
        (
            Structure(Lattice.orthorhombic(1.0, 10, 10), ["Na", "Cl"], [[0, 0, 0], [0, 0.5, 0.5]]),
            "lemat_geometry",
        ),
    ],
)
def test_an_atom_on_its_own_image_is_an_overlap_where_peers_are_blind(structure, blind):
    """The loopholes of PROTOCOLS: images of the same atom are not looked at."""
    assert validate(structure, protocol=blind).valid
    verdict = validate(structure)
    assert verdict.reason == "overlap"
    assert "own image" in verdict.detail


def test_overlap_names_the_pair_the_distance_and_the_limit():
    verdict = validate(cubic(6, ["Na", "Cl"], [[0, 0, 0], [0.1, 0, 0]]))
    assert verdict.reason == "overlap"
    assert verdict.detail == "Na0-Cl1: 0.600 angstrom, at least 1.750 expected"
    assert list(verdict.checks.items())[-1] == ("overlap", False)
    assert "charge" not in verdict.checks


# Carbon atoms on the body diagonal of a flat rhombohedral cell, some 0.01 angstrom apart, and half an
# angstrom: which is the image of which is a guess at 0.1 angstrom, and moyo 0.21 tries them all, for hours.
def string(a: float, c: float, coordinates: tuple[float, ...]) -> Structure:
    """Atoms at x x x and -x -x -x; a, c: of the hexagonal cell."""
    x, y = a / 2, a / (2 * 3**0.5)
    lattice = Lattice([[x, y, c / 3], [-x, y, c / 3], [0, -2 * y, c / 3]])
    return Structure(
        lattice, ["C"] * 2 * len(coordinates), [[s * v] * 3 for v in coordinates for s in (1, -1)]
    )


STRINGS = {
    "10 mA": string(
        8.05, 2.88, (0.0397, 0.0741, 0.1486, 0.2999, 0.4088, 0.0837, 0.2096, 0.4126, 0.324, 0.4297)
    ),
    "0.5 A": Structure.from_sites(
        [
            *string(8.11, 4.3, (0.2577, 0.1178, 0.3784)),
            *string(8.11, 4.3, (0.0, 0.5))[::2],
        ]
    ),
}


@pytest.mark.parametrize("name", STRINGS)
def test_atoms_that_nearly_coincide_are_an_overlap_and_nothing_hangs(name):
    structure = STRINGS[name]
    wanted = Conditions(formula={"C": len(structure)}, n_sites=len(structure), spacegroup_number=166)
    found = validate(structure, conditions=wanted)
    assert (found.reason, found.checks) == ("overlap", {"cell": True, "formula": True, "overlap": False})
    assert "spacegroup_number" not in measure(structure)
    with pytest.raises(EncodeError, match=r"two sites are 0\.\d+ angstrom apart"):
        spacegroup_number(structure)
    with pytest.raises(EncodeError, match="two sites are"):
        standard_cell_by_moyo(Crystal("string", structure), 0.1)
    assert validate(structure, conditions=Conditions(formula={"Si": 1})).reason == "formula_mismatch"


def test_a_pair_across_the_cell_border_is_seen():
    assert (
        validate(cubic(6, ["Na", "Cl"], [[0.01, 0, 0], [0.96, 0, 0]]), protocol="cdvae").reason == "overlap"
    )


@pytest.mark.parametrize(
    ("lattice", "coordinates"),
    [
        (Lattice([[5, 0, 0], [0, 5, 0], [5, 5, 0]]), [[0, 0, 0], [0.5, 0.5, 0.5]]),
        (Lattice.cubic(5), [[0, 0, 0], [np.nan, 0.5, 0.5]]),
    ],
)
def test_a_flat_cell_and_a_missing_number_fail_the_cell(lattice, coordinates):
    verdict, measures = validate_and_measure(Structure(lattice, ["Na", "Cl"], coordinates))
    assert verdict.reason == "cell"
    assert measures == {}


def test_an_empty_structure_is_no_cell():
    assert validate(Structure(Lattice.cubic(3), [], [])).detail == "no sites"


def test_a_partly_occupied_site_is_refused_with_a_reason():
    verdict = validate(cubic(4, [{"Na": 0.5}, "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]))
    assert verdict.reason == "parse:disordered"


def test_a_gas_of_atoms_fails_the_density():
    assert validate(cubic(60, ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])).reason == "density"


def test_unbalanced_charge_is_the_last_reason():
    structure = cubic(8, ["Na", "Cl", "Cl", "Cl"], [[0, 0, 0], [0.5, 0, 0], [0, 0.5, 0], [0, 0, 0.5]])
    verdict = validate(structure)
    assert verdict.reason == "charge"
    assert "Cl3Na" in verdict.detail
    assert validate(structure, protocol="lemat_geometry").valid


@pytest.mark.parametrize(
    ("conditions", "check", "reason"),
    [
        (Conditions(formula={"K": 1, "Cl": 1}), "formula", "formula_mismatch"),
        (Conditions(formula={"Na": 1, "Cl": 2}), "formula", "formula_mismatch"),
        (Conditions(elements=("Na", "O")), "elements", "formula_mismatch"),
        (Conditions(elements=("Na",), only_elements=True), "only_elements", "formula_mismatch"),
        (Conditions(n_elements=3), "n_elements", "formula_mismatch"),
        (Conditions(anonymous_formula="ABC3"), "anonymous_formula", "formula_mismatch"),
        (Conditions(formula={"Na": 2, "Cl": 2}, n_sites=4), "n_sites", "formula_mismatch"),
        (Conditions(crystal_system="tetragonal"), "crystal_system", "spacegroup_mismatch"),
        (Conditions(spacegroup_number=221), "spacegroup", "spacegroup_mismatch"),
    ],
)
def test_each_unmet_condition_has_its_check_and_reason(rocksalt, conditions, check, reason):
    verdict = validate(rocksalt, conditions=conditions)
    assert (verdict.valid, verdict.reason) == (False, reason)
    assert [name for name, passed in verdict.checks.items() if not passed] == [check]
    assert any(word in verdict.detail for word in ("expected", "asked for", "has no"))


def test_met_conditions_pass_whatever_the_cell_and_the_multiple(rocksalt):
    conditions = Conditions(
        formula={"Cl": 3, "Na": 3}, elements=("Na",), n_elements=2, anonymous_formula="AB",
        spacegroup_number=225, crystal_system="cubic", n_sites=2,
    )  # fmt: skip
    for structure in (rocksalt, rocksalt.get_primitive_structure(), rocksalt * (2, 1, 1)):
        assert validate(structure, conditions=conditions, stated_spacegroup=225).valid


def test_a_stated_space_group_is_compared_with_the_one_found(rocksalt):
    rocksalt.translate_sites([0], [0.05, 0.0, 0.0])
    verdict = validate(rocksalt, stated_spacegroup=225)
    assert verdict.reason == "spacegroup_mismatch"
    assert "225 stated" in verdict.detail


def test_an_unknown_protocol_is_named_with_the_nearest(rocksalt):
    with pytest.raises(UnknownName, match="did you mean 'cdvae'"):
        validate(rocksalt, protocol="cdva")


def test_water_is_a_valid_connected_molecule(water):
    verdict, measures = validate_and_measure(water, conditions=Conditions(formula={"H": 2, "O": 1}))
    assert verdict.valid
    assert measures == {"n_fragments": 1, "nearest_distance_angstrom": pytest.approx(0.969, abs=1e-3)}


def test_two_far_waters_are_two_fragments(water):
    far = Molecule(water.species * 2, np.vstack([water.cart_coords, water.cart_coords + 6.0]))
    assert measure(far)["n_fragments"] == 2


def test_molecules_overlap_by_covalent_radii_and_know_no_symmetry(water):
    squeezed = Molecule(water.species, water.cart_coords * 0.5)
    assert validate(squeezed).reason == "overlap"
    assert validate(water, conditions=Conditions(formula={"H": 2, "S": 1})).reason == "formula_mismatch"
    with pytest.raises(UserError, match="leave it out"):
        validate(water, conditions=Conditions(spacegroup_number=225))
    with pytest.raises(UserError, match="judges crystals"):
        validate(water, protocol="cdvae")


def test_the_bond_score_is_one_for_rock_salt_and_falls_when_it_is_squeezed(rocksalt):
    assert bond_score(rocksalt) == 1.0
    rocksalt.scale_lattice(rocksalt.volume * 0.6**3)
    assert bond_score(rocksalt) < 1.0
    assert validate(rocksalt, protocol="crystallm").reason == "bonds"


def test_a_crystal_without_bonds_between_sites_has_no_bond_score():
    with pytest.raises(UserError, match="no bond between different sites"):
        bond_score(cubic(2.7, ["Fe"], [[0, 0, 0]]))


@pytest.mark.filterwarnings("ignore:Issues encountered while parsing CIF")
@pytest.mark.real_data
def test_real_crystals_fail_nothing_but_the_charge_rule():
    import pyarrow.parquet as pq

    folder = os.environ.get("CRYSTALLM_KIT_DATA")
    if not folder:
        pytest.skip("CRYSTALLM_KIT_DATA is not set")
    texts = pq.read_table(Path(folder) / "mp_val.parquet")["cif"].to_pylist()[:300]
    reasons = Counter(validate(Structure.from_str(text, fmt="cif")).reason for text in texts)
    assert set(reasons) <= {None, "charge"}
    assert reasons[None] >= 0.85 * len(texts)


@pytest.mark.real_data
@pytest.mark.slow
def test_diffcsps_published_samples_have_their_known_structural_validity():
    structures = _diffcsp()
    n_passed = {}
    for protocol in ("cdvae", "diffcsp", "crystallm_pi_xrd", "lemat_geometry"):
        reasons = Counter(validate(structure, protocol=protocol).reason for structure in structures)
        n_passed[protocol] = reasons[None] + reasons["charge"]
    assert n_passed == {"cdvae": 10000, "diffcsp": 10000, "crystallm_pi_xrd": 9979, "lemat_geometry": 9940}


def _diffcsp():
    folder = os.environ.get("CRYSTALLM_KIT_SAMPLES")
    if not folder:
        pytest.skip("CRYSTALLM_KIT_SAMPLES is not set")
    import torch

    data = torch.load(Path(folder) / "DiffCSP_mp_20.pt", weights_only=True, map_location="cpu")
    ends = np.cumsum(data["num_atoms"].reshape(-1).numpy())
    species, coordinates = data["atom_types"].reshape(-1).numpy(), data["frac_coords"].reshape(-1, 3).numpy()
    cells = np.hstack([data["lengths"].reshape(-1, 3).numpy(), data["angles"].reshape(-1, 3).numpy()])
    return [
        Structure(Lattice.from_parameters(*cell), species[start:end], coordinates[start:end])
        for cell, start, end in zip(cells.astype(float), [0, *ends[:-1]], ends, strict=True)
    ]
