"""What tests of the report share: the folder of a small scoring run, as the command `score` writes it."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pymatgen.core import Lattice, Structure
from pymatgen.io.cif import CifWriter

from crystallm_kit.scores.score import Score, mean, not_computed, share

# Rock salt (AFLOW AB_cF8_225_a_b) and a perovskite (AFLOW AB3C_cP5_221_a_c_b).
ROCK_SALT = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5] * 3])
PEROVSKITE = Structure.from_spacegroup(
    "Pm-3m", Lattice.cubic(3.905), ["Sr", "Ti", "O"], [[0, 0, 0], [0.5] * 3, [0, 0.5, 0.5]]
)


def cif_of(structure):
    return str(CifWriter(structure))


def failed(index, *, reason="charge", detail="no neutral oxidation states", formula="NaCl2", id=None):
    return {
        "id": id or f"sample:{index}", "index": index, "formula": formula, "n_sites": 12,
        "spacegroup_number": 225, "reason": reason, "detail": detail,
    }  # fmt: skip


def scored(n_valid, n_unique, n):
    """Return scores of a set of n samples, as the run counts them."""
    return [
        share("cdvae.structure_valid", n, n),
        share("cdvae.comp_valid", n_valid, n),
        Score("cdvae.wdist_density", 0.3021, "g/cm3", over="valid", low=0.27, high=0.34, interval="bootstrap",
              better="lower"),
        not_computed("cdvae.cov_recall", "no reference set: give --reference", better="higher"),
        share("lemat.unique", n_unique, n_valid, over="valid"),
        mean("kit.hull_distance", [0.1, 0.2, 0.4], unit="eV/atom", over="scored", better="lower"),
    ]  # fmt: skip


def distributions(shift=0):
    return {
        "density_g_cm3": {
            "kind": "numeric", "unit": "g/cm3", "edges": [0, 2, 4, 6], "counts": [5 + shift, 4, 1],
        },
        "n_elements": {"kind": "category", "unit": "", "values": {"2": 7, "3": 3 + shift}},
        "spacegroup_number": {"kind": "category", "unit": "", "values": {"225": 6, "221": 4 + shift}},
        "crystal_system": {"kind": "category", "unit": "", "values": {"cubic": 10 + shift}},
        "elements": {"kind": "category", "unit": "", "values": {"Na": 6, "Cl": 6, "O": 4 + shift}},
    }  # fmt: skip


def set_of(name, n_valid, rows, **changes):
    n = 100
    one = {
        "name": name, "sources": [f"{name}.pt"], "n_requested": n,
        "funnel": [["requested", n], ["parsed", n], ["charge", n_valid], ["unique", n_valid - 2]],
        "reasons": {"charge": n - n_valid - 1, "overlap": 1, "duplicate": 2},
        "scores": [score.as_dict() for score in scored(n_valid, n_valid - 2, n)],
        "distributions": distributions(),
        "gallery": [
            {"id": "best:1", "kind": "best", "reason": None, "detail": "", "formula": "NaCl",
             "spacegroup_number": 225, "cif": cif_of(ROCK_SALT.get_primitive_structure()),
             "measures": {"density_g_cm3": 2.165}},
            {"id": "typical:2", "kind": "typical", "reason": None, "detail": "", "formula": "SrTiO3",
             "spacegroup_number": 221, "cif": cif_of(PEROVSKITE), "measures": {}},
            {"id": "bad:3", "kind": "failure", "reason": "parse:cell", "detail": "no cell", "formula": None,
             "spacegroup_number": None, "cif": "", "measures": {}},
        ],
        "parity": [{"title": "Asked and found", "x_label": "asked", "y_label": "found", "unit": "GPa",
                    "x": [50, 100, 150, None], "y": [40, 110, 160, 3]}],
        "rows": rows,
    }  # fmt: skip
    return one | changes


def report_of(*sets, **changes):
    return {
        "schema": 1, "created": "2026-11-28T23:41:05+00:00", "command": "crystallm-kit score a.pt b.pt",
        "versions": {"pymatgen": "2026.10.24"}, "settings": {"reference": ["mp_val.parquet"], "seed": 0},
        "protocols": {
            "cdvae": {"title": "CDVAE", "text": "No two sites within 0.5 A.", "settings": {"smact": "2.2.1"}},
            "lemat": {"title": "LeMat-GenBench", "text": "Over the valid.", "settings": {}},
        },
        "sets": list(sets), "reference": {"name": "mp_val", "n": 10, "distributions": distributions(3)},
        "published": [], "notes": ["Half of the official split."],
    } | changes  # fmt: skip


def write_run(folder, report, rows):
    """Write report.json, and the rows of each set where they are given: set's rows path -> rows."""
    (folder / "rows").mkdir(parents=True, exist_ok=True)
    for path, content in rows.items():
        pq.write_table(pa.Table.from_pylist(content), folder / path)
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")
    return folder


def rows_of(n_failed):
    passed = {**failed(0), "reason": None, "detail": None, "id": "sample:fine"}
    return [passed, *(failed(k) for k in range(1, n_failed + 1)), failed(999, reason="overlap", formula="H2")]


@pytest.fixture
def small_run(tmp_path):
    """Write a run of two sets into a folder and return it; `changes` are to the report."""

    def make(name="run", *, n_valid=(83, 60), **changes):
        sets = [
            set_of("DiffCSP", n_valid[0], "rows/a.parquet"),
            set_of("the kit", n_valid[1], "rows/b.parquet"),
        ]
        rows = {"rows/a.parquet": rows_of(16), "rows/b.parquet": rows_of(45)}
        return write_run(tmp_path / name, report_of(*sets, **changes), rows)

    return make
