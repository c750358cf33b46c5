"""Pictures of the report against hand counts, numpy and known crystals."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest
from pymatgen.core import Lattice, Structure
from pymatgen.io.cif import CifWriter

from crystallm_kit.scoring.axes import Frame, number, percent, ticks, written_unit
from crystallm_kit.scoring.gallery import drawn, element_table, gradients, scene_of
from crystallm_kit.scoring.histograms import Series, category_picture, elements_picture, numeric_picture
from crystallm_kit.scoring.plots import funnel_picture, parity_picture

ROCK_SALT = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5] * 3])
# Albite-like axes: nothing is a right angle.
TRICLINIC = Structure(
    Lattice.from_parameters(8.14, 12.79, 7.16, 94.3, 116.6, 87.7),
    ["Na", "Al", "Si", "O"],
    [[0.27, 0.99, 0.15], [0.01, 0.17, 0.21], [0.0, 0.82, 0.24], [0.0, 0.13, 0.97]],
)


def cif_of(structure):
    return str(CifWriter(structure))


def parsed(picture):
    return ElementTree.fromstring(picture)


def named(picture, kind):
    return [e for e in parsed(picture).iter() if kind in (e.get("class") or "").split()]


# ---------------------------------------------------------------- numbers and axes


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0631, "0.0631"), (12.5, "12.5"), (3.0, "3"), (1234.4, "1,234"), (1e-7, "1e-07"),
     (float("nan"), "–"), (-2.54, "-2.54")],
)  # fmt: skip
def test_numbers_are_written_as_people_do(value, text):
    assert number(value) == text


def test_units_and_percentages_are_written_as_people_do():
    assert [written_unit(u) for u in ("angstrom^3", "angstrom", "g/cm3", "")] == ["Å³", "Å", "g/cm³", ""]
    assert written_unit("(V/N)^(1/3)") == "(V/N)^(1/3)"
    assert [percent(x) for x in (0, 0.8325, 1, 0.9999)] == ["0 %", "83.2 %", "100 %", "100 %"]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0.31), (-3, 17), (12.2, 12.9), (0, 23_456)])
def test_ticks_are_round_and_inside(low, high):
    found = ticks(low, high)
    assert 3 <= len(found) <= 7
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)
    steps = np.diff(found)
    assert np.allclose(steps, steps[0])
    assert float(f"{steps[0]:.0e}"[0]) in (1, 2, 5)


def test_an_axis_without_extent_still_has_a_tick():
    assert ticks(2, 2) == [2]
    assert np.isfinite(Frame(100, (2, 2)).x(2))


# ---------------------------------------------------------------- funnels


def test_bars_of_a_funnel_are_as_wide_as_their_counts():
    picture = funnel_picture([["requested", 200], ["parsed", 150], ["valid", 0]], "x", 0)
    widths = [float(bar.get("width")) for bar in named(picture, "fill")]
    assert widths[1] / widths[0] == pytest.approx(0.75)
    assert widths[2] == 1  # nothing left is still seen
    assert [e.text for e in named(picture, "lost")] == ["−50", "−150"]
    assert "requested 200, parsed 150, valid 0" in parsed(picture)[0].text


def test_texts_of_a_picture_are_escaped():
    picture = funnel_picture([["<b>&", 1]], "</svg><script>", 0)
    assert "<script" not in picture
    assert parsed(picture)[0].text == "Funnel of </svg><script>: <b>& 1"


# ---------------------------------------------------------------- distributions


def heights(path, frame_height=190, foot=34):
    """Return the heights at which a line of steps runs, in the picture's units above the axis."""
    return [frame_height - foot - float(y) for y in re.findall(r"V([\d.-]+)H", path)]


def test_a_histogram_shows_shares_of_each_set_not_counts():
    edges = [0, 1, 2, 3]
    few = Series("few", 0, {"kind": "numeric", "edges": edges, "counts": [1, 2, 1]})
    many = Series("many", 1, {"kind": "numeric", "edges": edges, "counts": [100, 200, 100]})
    one, other = (e.get("d") for e in named(numeric_picture("x", [few, many], None, ""), "line"))
    assert one == other
    found = heights(one)
    assert found[1] / found[0] == pytest.approx(2, abs=0.01)


def test_bins_that_are_not_the_same_are_compared_by_density():
    """One bin of width 2 with all the samples is half as high as one of width 1."""
    wide = Series("wide", 0, {"kind": "numeric", "edges": [0, 2], "counts": [10]})
    narrow = Series("narrow", 1, {"kind": "numeric", "edges": [0, 1, 2], "counts": [10, 0]})
    one, other = (e.get("d") for e in named(numeric_picture("x", [wide, narrow], None, ""), "line"))
    assert heights(other)[0] / heights(one)[0] == pytest.approx(2, abs=0.01)


def test_a_distribution_without_samples_is_no_picture():
    empty = {"kind": "numeric", "edges": [0, 1], "counts": [0]}
    assert numeric_picture("x", [Series("a", 0, empty)], empty, "") == ""
    assert category_picture("x", [Series("a", 0, {"kind": "category", "values": {}})], None, {}) == ""


def test_crystal_systems_come_in_their_order_and_other_categories_by_frequency():
    systems = Series("a", 0, {"values": {"cubic": 5, "triclinic": 1, "hexagonal": 3}})
    texts = [e.text for e in parsed(category_picture("x", [systems], None, {})).iter() if e.get("x") == "98"]
    assert texts == ["triclinic", "hexagonal", "cubic"]
    groups = Series("a", 0, {"values": {"1": 2, "225": 5}})
    picture = category_picture("x", [groups], None, {"225": "Fm-3m (225)"})
    assert [e.text for e in parsed(picture).iter() if e.get("x") == "98"] == ["Fm-3m (225)", "1"]


def test_the_periodic_table_has_every_element_once_and_the_strongest_where_it_is_most():
    picture = elements_picture("x", 0, {"values": {"O": 4, "Fe": 1}}, 0.8)
    titles = [e.text for e in parsed(picture).iter() if e.tag.endswith("title")][1:]
    assert len(titles) == len({t.split(":")[0] for t in titles}) == 118
    assert "O: 80.0 %" in titles
    opacity = {e[0].text.split(":")[0]: float(e[2].get("fill-opacity")) for e in parsed(picture)[1]}
    assert opacity["O"] == 1
    assert opacity["Fe"] == 0.5  # the root of a quarter
    assert opacity["He"] == 0


# ---------------------------------------------------------------- parity


def test_parity_tells_what_numpy_finds():
    rng = np.random.default_rng(0)
    x = rng.normal(10, 3, 200)
    y = x + rng.normal(0, 1, 200)
    plot = {"title": "t", "x_label": "a", "y_label": "b", "unit": "GPa", "x": x.tolist(), "y": y.tolist()}
    picture, said = parity_picture(plot, 0)
    assert f"mean absolute difference {np.abs(x - y).mean():.3g} GPa" in said
    assert f"correlation {np.corrcoef(x, y)[0, 1]:.3f}" in said
    assert named(picture, "diagonal")


def test_pairs_that_are_not_two_numbers_are_left_out():
    plot = {"title": "t", "x_label": "a", "y_label": "b", "unit": "", "x": [1, None, 3, float("nan")],
            "y": [1, 2, 4, 5]}  # fmt: skip
    assert parity_picture(plot, 0)[1].startswith("2 pairs")
    assert parity_picture({**plot, "x": [None] * 4}, 0) == ("", "no pair of numbers")


def test_a_few_asked_values_become_medians_with_their_middle_half():
    asked = [50.0] * 5 + [100.0] * 5
    found = [40, 45, 50, 55, 60, 90, 95, 100, 105, 110]
    plot = {"title": "t", "x_label": "a", "y_label": "b", "unit": "GPa", "x": asked, "y": found}
    picture, said = parity_picture(plot, 0)
    assert "medians" in said
    assert len(named(picture, "whisker")) == len(named(picture, "mark")) == 2


def test_many_points_are_thinned_and_the_sentence_says_so():
    x = np.linspace(0, 1, 20_000)
    plot = {"title": "t", "x_label": "a", "y_label": "b", "unit": "", "x": x.tolist(), "y": x.tolist()}
    picture, said = parity_picture(plot, 0)
    assert len(picture) < 60_000
    assert "20,000 pairs" in said
    assert "of them drawn" in said


def test_calibration_compares_what_was_told_with_what_came():
    """Told 0.95, came 19 of 20: calibrated; told 0.15, came half of 20: off by 0.35. Mean: 17.5 %."""
    plot = {
        "title": "t", "x_label": "told", "y_label": "came", "unit": "", "kind": "calibration",
        "x": [0.95] * 20 + [0.15] * 20, "y": [1] * 19 + [0] + [1] * 10 + [0] * 10,
    }  # fmt: skip
    picture, said = parity_picture(plot, 0)
    assert said == "40 cases in 2 groups; mean calibration error 17.5 %"
    assert len(named(picture, "whisker")) == 2


# ---------------------------------------------------------------- structures


def test_a_cell_of_rock_salt_shows_27_atoms_and_their_54_bonds():
    """Faces repeat: 3 x 3 x 3 positions of alternating Na and Cl, bonded along the 54 edges of that grid."""
    scene = scene_of([s.specie.symbol for s in ROCK_SALT], ROCK_SALT.frac_coords, ROCK_SALT.lattice.matrix)
    assert len(scene.places) == 27
    assert sorted(scene.elements).count("Na") == 14
    assert len(scene.bonds) == len(set(scene.bonds)) == 54
    lengths = [np.linalg.norm(scene.places[a] - scene.places[b]) for a, b in scene.bonds]
    assert np.allclose(lengths, 2.82)
    assert np.linalg.norm(scene.places, axis=1).max() < scene.radius


def test_a_triclinic_cell_keeps_its_lengths_and_distances():
    crystal = drawn(cif_of(TRICLINIC))
    lattice = Lattice(crystal.data["lattice"])
    assert np.allclose(lattice.parameters, TRICLINIC.lattice.parameters, atol=1e-3)
    again = Structure(lattice, [s["element"] for s in crystal.data["sites"]],
                      [s["at"] for s in crystal.data["sites"]])  # fmt: skip
    assert np.allclose(again.distance_matrix, TRICLINIC.distance_matrix, atol=1e-3)
    assert crystal.counts == {"Na": 1, "Al": 1, "Si": 1, "O": 1}


def test_a_primitive_cell_is_drawn_in_its_conventional_one_only_where_asked():
    cif = cif_of(ROCK_SALT.get_primitive_structure())
    assert len(drawn(cif).data["sites"]) == 2
    assert drawn(cif, conventional=True).counts == {"Na": 4, "Cl": 4}


def test_a_still_uses_only_gradients_that_the_page_has():
    crystal = drawn(cif_of(TRICLINIC))
    used = set(re.findall(r"url\(#([\w-]+)\)", crystal.still))
    assert used == {"ball-Na", "ball-Al", "ball-Si", "ball-O"}
    assert used <= set(re.findall(r'id="([\w-]+)"', gradients(set(crystal.counts))))
    parsed(crystal.still)


def test_colours_and_radii_are_those_of_the_servers_page():
    table = element_table()
    assert len(table) >= 103
    assert table["O"] == ("#ff0d0d", 0.66)
    assert table["Na"][1] == 1.66  # Cordero et al. 2008


@pytest.mark.parametrize(
    ("cif", "said"),
    [
        ("", "cannot be read"),
        ("data_x\nloop_\n_atom_site_label\nNa", "cannot be read"),
        ("\x00\xff</script>", "cannot be read"),
        (cif_of(ROCK_SALT * (4, 4, 4)), "512 sites; up to 300 are drawn"),
    ],
)
def test_what_cannot_be_drawn_says_why(cif, said):
    crystal = drawn(cif)
    assert said in crystal.fault
    assert crystal.still == ""
    assert crystal.data == {}
