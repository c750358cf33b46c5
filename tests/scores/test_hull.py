"""scores/stability/hull.py and hull_sources.py: distances are pymatgen's; what is missing is named."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlparse

import numpy as np
import pytest
from pymatgen.core import Composition

from crystallm_kit.errors import EmptyInput, ImpossibleRequest, ReadError, UserError
from crystallm_kit.scores.stability.hull import Hull
from crystallm_kit.scores.stability.hull_sources import hull_of_rows, materials_project_hull, read_hull

# Li-Fe-P-O and Na-Cl, eV/atom: invented, of the size of real ones.
PHASES = {
    "LiFePO4": -2.50, "FePO4": -2.23, "Li3PO4": -2.77, "Fe2O3": -1.78, "FeO": -1.50, "Fe3O4": -1.73,
    "Li2O": -2.07, "P2O5": -2.30, "Li4P2O7": -2.69, "Li3P": -0.88, "FeP": -0.66, "LiFeO2": -1.98,
    "Li2O2": -1.65, "Fe2P": -0.69, "LiPO3": -2.55, "NaCl": -2.10, "NaCl3": -0.80, "Na2Cl": 0.30,
}  # fmt: skip


@pytest.fixture
def hull():
    return Hull.from_formation_energies(PHASES, PHASES.values(), name="phases")


def pymatgens(entries, composition, energy):
    """Return the distance that pymatgen's PhaseDiagram gives."""
    from pymatgen.analysis.phase_diagram import PDEntry, PhaseDiagram

    symbols = {e.symbol for e in composition}
    inside = [(Composition(f), e) for f, e in entries if {x.symbol for x in Composition(f)} <= symbols]
    points = [PDEntry(c, e * c.num_atoms) for c, e in inside]
    points += [PDEntry(Composition(s), 0.0) for s in symbols]
    found = PhaseDiagram(points).get_decomp_and_e_above_hull(
        PDEntry(composition, energy * composition.num_atoms), allow_negative=True
    )
    return found[1]


@pytest.mark.parametrize(
    ("formula", "energy"),
    [("LiFePO4", -2.4), ("LiFePO4", -2.6), ("LiFeP2O7", -2.3), ("Li5FeO4", -1.9), ("FeP3", -0.4),
     ("LiFe3P7O25", -2), ("NaCl3", -0.9), ("Na3Cl", 0.1), ("O2", 0.02), ("Li2Fe2P2O8", -2.5), ("FeO", -1.5)],
)  # fmt: skip
def test_the_distance_is_pymatgens(hull, formula, energy):
    composition = Composition(formula)
    expected = pymatgens(PHASES.items(), composition, energy)
    assert hull.distance(composition, energy) == pytest.approx(expected, abs=1e-9)
    assert hull.distance(composition, energy) == pytest.approx(expected, abs=1e-9)  # from what is kept


def test_random_systems_give_what_a_linear_program_gives():
    from scipy.optimize import linprog

    generator = np.random.default_rng(3)
    for elements in ("Li", "Li Fe", "Li Fe P", "Li Fe P O", "Li Fe P O Mn", "Li Fe P O Mn Co"):
        symbols = elements.split()
        amounts = generator.integers(0, 4, (60, len(symbols)))
        amounts = amounts[amounts.sum(axis=1) > 0]
        compositions = [Composition(dict(zip(symbols, a, strict=True))) for a in amounts.tolist()]
        energies = -generator.random(len(compositions)) * np.array(
            [len(c.elements) - 1 for c in compositions]
        )
        hull = Hull.from_formation_energies(
            [*compositions, *map(Composition, symbols)], [*energies, *[0.0] * len(symbols)], name="random"
        )
        points = np.vstack([np.eye(len(symbols)), amounts / amounts.sum(axis=1, keepdims=True)])
        costs = np.concatenate([np.zeros(len(symbols)), energies])
        for at in points[len(symbols) :][:25]:
            best = linprog(costs, A_eq=points.T, b_eq=at, method="highs").fun
            composition = Composition(dict(zip(symbols, at, strict=True)))
            assert hull.distance(composition, 0.0) == pytest.approx(-best, abs=1e-9)


def test_the_products_weigh_what_is_asked(hull):
    place = hull.place(Composition("Li4FeP2O8"), -2.0)
    shares = sum(share * np.array([Composition(f).get_atomic_fraction(e) for e in ("Li", "Fe", "P", "O")])
                 for f, share in place.products.items())  # fmt: skip
    assert shares == pytest.approx(np.array([4, 1, 2, 8]) / 15)
    assert place.n_competing == 15


def test_an_entry_of_the_hull_lies_on_it_or_above_and_a_better_one_below(hull):
    assert hull.distance(Composition("NaCl"), -2.10) == pytest.approx(0, abs=1e-12)
    assert hull.distance(Composition("NaCl"), -2.13) == pytest.approx(-0.03)
    # NaCl3 decomposes to NaCl and 2 Cl: -2.10 / 2 a formula unit's four atoms
    assert hull.distance(Composition("NaCl3"), -0.80) == pytest.approx(0.25)


def test_a_missing_element_is_named(hull):
    place = hull.place(Composition("NaOg2Cl"), 0.0)
    assert (place.distance_ev_per_atom, place.missing, place.n_competing) == (None, ("Og",), 0)
    with pytest.raises(ImpossibleRequest, match="hull 'phases' has no entry of Og, which NaClOg2 contains"):
        hull.distance(Composition("NaClOg2"), 0.0)


def test_a_system_with_nothing_but_elements_says_so(hull):
    place = hull.place(Composition("NaFe"), -0.01)
    assert (place.n_competing, place.distance_ev_per_atom) == (0, pytest.approx(-0.01))
    assert hull.place(Composition("NaCl"), -0.01).n_competing == 3


def test_oxidation_states_and_noble_gases_change_nothing(hull):
    assert hull.distance(Composition({"Na+": 1, "Cl-": 1}), -2.0) == pytest.approx(0.10)
    with_helium = Hull.from_formation_energies(["Na2He", "HeNa2"], [0.5, 0.1], name="He")
    assert with_helium.distance(Composition("Na2He"), 0.1) == pytest.approx(0.1)


def test_no_entries_and_energies_that_are_none_are_refused():
    with pytest.raises(EmptyInput, match="hull 'x': no entries"):
        Hull.from_formation_energies([], [], name="x")
    with pytest.raises(ImpossibleRequest, match="formation energy of NaCl is nan"):
        Hull.from_formation_energies(["NaCl"], [float("nan")], name="x")


# ---------------------------------------------------------------- files


TOTAL = {"Na": -1.31, "Na2": -1.30, "Cl2": -1.84, "NaCl": -3.68, "KCl": -3.9}


def written(folder, kind):
    path = folder / f"hull.{kind}"
    rows = [{"id": str(i), "formula": f, "energy_per_atom": e} for i, (f, e) in enumerate(TOTAL.items())]
    if kind == "csv":
        lines = [
            "id,formula,energy_per_atom",
            *(f"{r['id']},{r['formula']},{r['energy_per_atom']}" for r in rows),
        ]
        path.write_text("\n".join(lines))
    elif kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif kind == "json":
        path.write_text(json.dumps({"entries": rows}))
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl", "parquet"])
def test_total_energies_become_formation_energies_and_what_lacks_an_element_is_named(tmp_path, kind):
    hull = read_hull(written(tmp_path, kind))
    # -3.68 - (-1.31 - 1.84) / 2
    assert hull.distance(Composition("NaCl"), -2.0) == pytest.approx(-2.0 + 3.68 - 1.575)
    assert hull.name == f"hull.{kind} (without K: no energy of the element)"
    assert hull.missing_elements(Composition("KCl")) == ("K",)


def test_entries_of_pymatgen_are_read(tmp_path):
    from pymatgen.entries.computed_entries import ComputedEntry

    entries = [
        ComputedEntry("Na2", -2.62),
        ComputedEntry("Cl2", -3.68),
        ComputedEntry("Na4Cl4", -29.0, correction=-0.44),
    ]
    path = tmp_path / "entries.json"
    path.write_text(json.dumps([e.as_dict() for e in entries]))
    assert read_hull(path).distance(Composition("NaCl"), 0.0) == pytest.approx(29.44 / 8 - 1.575)


@pytest.mark.parametrize(
    ("name", "text", "error", "words"),
    [
        ("none.csv", None, ReadError, "no such file"),
        ("a.xlsx", "x", ReadError, "'.xlsx' is no kind of hull file"),
        ("a.json", "{", ReadError, "no json file"),
        ("a.json", '{"a": 1}', ReadError, "expected a list of objects"),
        ("a.csv", "formula,gap\nNaCl,1\n", EmptyInput, r"no entry can be used \(row 0: no energy"),
        ("a.csv", "name,energy_per_atom\nNaCl,1\n", EmptyInput, r"row 0: no formula; expected"),
        ("a.csv", "formula,energy_per_atom\nNaCl,-3\n", EmptyInput, "no entry of the elements Cl, Na"),
        ("a.parquet", "no parquet", ReadError, "no Parquet file"),
    ],
)  # fmt: skip
def test_files_that_are_no_hull_are_refused_with_the_reason(tmp_path, name, text, error, words):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(error, match=words):
        read_hull(tmp_path / name)


def test_rows_that_cannot_be_read_are_counted_in_the_name():
    rows = [
        {"formula": "NaCl", "e_form": -2.1},
        {"formula": "Xx9", "e_form": 1},
        {"formula": "NaCl", "e_form": "x"},
    ]
    hull = hull_of_rows(rows, name="mine", source="here")
    assert hull.name.startswith("mine (2 of 3 rows not read; row 1: ")
    mixed = [*rows, {"formula": "Na", "energy_per_atom": -1}]
    with pytest.raises(ReadError, match="formation and total energies mixed"):
        hull_of_rows(mixed, name="mine", source="here")


# ---------------------------------------------------------------- the Materials Project, by a stand-in


class Service(BaseHTTPRequestHandler):
    """Answers as /materials/thermo/ does, a page at a time; the real one was not asked."""

    refuses_pages = False
    busy = 0

    def do_GET(self):
        asked = {k: v[0] for k, v in parse_qs(urlparse(self.path).query).items()}
        kind = type(self)
        if self.headers["x-api-key"] != "right":
            return self._say(403, {"message": "Invalid key"})
        if kind.busy:
            kind.busy -= 1
            return self._say(503, {"message": "busy"})
        if kind.refuses_pages and "_per_page" in asked:
            return self._say(400, {"detail": "unknown parameters _per_page, _page"})
        systems = asked["chemsys"].split(",")
        rows = [
            {"formula_pretty": f, "formation_energy_per_atom": e, "thermo_type": "GGA_GGA+U"}
            for f, e in PHASES.items()
            if Composition(f).chemical_system in systems
        ]
        rows += [
            {"formula_pretty": "NaCl", "formation_energy_per_atom": -9.0, "thermo_type": "R2SCAN"}
        ] * 1500
        page = int(asked.get("_page", 1))
        rows = rows[(page - 1) * 1000 : page * 1000] if "_page" in asked else rows
        return self._say(200, {"data": rows})

    def _say(self, code, what):
        body = json.dumps(what).encode()
        self.send_response(code)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture
def service():
    handler = type("Fresh", (Service,), {})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", handler
        server.shutdown()


@pytest.mark.parametrize("refuses", [False, True])
def test_the_materials_project_is_asked_for_every_system_within_the_elements(service, refuses):
    url, handler = service
    handler.refuses_pages = refuses
    handler.busy = 1
    hull = materials_project_hull(["O", "Li", "Fe", "P"], api_key="right", url=url)
    expected = {f for f in PHASES if "Na" not in f}
    assert hull.n_entries == len(expected)
    assert hull.name.startswith("Materials Project, GGA_GGA+U, Fe-Li-O-P, 20")
    assert hull.distance(Composition("LiFePO4"), -2.4) == pytest.approx(
        pymatgens([(f, PHASES[f]) for f in expected], Composition("LiFePO4"), -2.4), abs=1e-9
    )


def test_a_service_that_cannot_be_used_is_said(service, monkeypatch):
    url, handler = service
    monkeypatch.delenv("MP_API_KEY", raising=False)
    with pytest.raises(UserError, match="needs an API key: set MP_API_KEY"):
        materials_project_hull(["Na"], url=url)
    with pytest.raises(UserError, match="the API key is refused"):
        materials_project_hull(["Na"], api_key="wrong", url=url)
    with pytest.raises(UserError, match="1 to 8 expected"):
        materials_project_hull(["H", "He", "Li", "Be", "B", "C", "N", "O", "F"], api_key="right", url=url)
    with pytest.raises(UserError, match="not reached in 1 tries"):
        materials_project_hull(["Na"], api_key="right", url="http://127.0.0.1:9", tries=1)
    handler.busy = 5
    with pytest.raises(UserError, match=r"not reached in 1 tries.*503"):
        materials_project_hull(["Na"], api_key="right", url=url, tries=1)


# ---------------------------------------------------------------- real data


@pytest.mark.real_data
def test_the_hull_of_mp20_agrees_with_pymatgen_and_with_the_files_own_distances():
    import os
    from pathlib import Path

    import pyarrow.parquet

    folder = os.environ.get("CRYSTALLM_KIT_DATA")
    if not folder:
        pytest.skip("CRYSTALLM_KIT_DATA names no data folder")
    path = Path(folder) / "mp20_hull_reference.parquet"
    hull = read_hull(path)
    assert hull.n_entries == 34_424
    rows = pyarrow.parquet.read_table(path).to_pylist()
    entries = [(r["formula"], r["formation_energy_per_atom"]) for r in rows]
    by_system = {}
    for formula, energy in entries:
        by_system.setdefault(frozenset(Composition(formula).chemical_system.split("-")), []).append(
            (formula, energy)
        )
    picked = np.random.default_rng(0).permutation(len(rows))[:60]
    off = []
    for i in picked:
        composition, energy = Composition(rows[i]["formula"]), rows[i]["formation_energy_per_atom"] - 0.03
        symbols = {e.symbol for e in composition}
        near = [e for system, some in by_system.items() if system <= symbols for e in some]
        assert hull.distance(composition, energy) == pytest.approx(
            pymatgens(near, composition, energy), abs=1e-9
        )
        off.append(abs(hull.distance(composition, energy + 0.03) - rows[i]["e_above_hull"]))
    # the file's distances are from all of the Materials Project: 0.0027 on average over the file
    assert np.mean(off) < 0.01
