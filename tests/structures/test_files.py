"""One call reads whatever people bring, reports what it cannot, and goes on."""

import csv
import gzip
import io
import json
import logging
import os
import subprocess
import sys
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pymatgen.core import Lattice, Molecule, Structure
from pymatgen.io.cif import CifWriter

from crystallm_kit.errors import EmptyInput, ReadError, UnknownName, UserError
from crystallm_kit.records import Crystal
from crystallm_kit.structures.files import read, write

# Rock salt, https://next-gen.materialsproject.org/materials/mp-22862
ROCK_SALT = Structure.from_spacegroup(
    "Fm-3m", Lattice.cubic(5.6402), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]
)
TRICLINIC = Structure(
    Lattice.from_parameters(5.1, 6.2, 7.3, 81, 97, 103),
    ["Cu", "Cd", "Cu", "O"],
    [[0.01, 0.2, 0.3], [0.5, 0.51, 0.52], [0.7, 0.1, 0.9], [0.99999, 0.25, 0.6]],
)
MIXED = Structure(Lattice.cubic(4), [{"Na": 0.5, "K": 0.5}, "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
WATER = Molecule(["O", "H", "H"], [[0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]])
CRYSTALS = [
    Crystal("mp-22862", ROCK_SALT, {"band_gap_ev": 5.0, "note": "halite", "n": 1, "is_known": True}),
    Crystal("a/b c", TRICLINIC, {"band_gap_ev": 1}),
]


def cif(structure: Structure, **settings) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # spglib tells pymatgen of a setting that it is to drop
        return str(CifWriter(structure, **settings))


def read_all(path, **settings):
    """Return crystals and failures."""
    failures = []
    return list(read(path, on_error=failures.append, **settings)), failures


def same(one: Structure | Molecule, other: Structure | Molecule, tolerance: float = 1e-7) -> bool:
    if [s.species_string for s in one] != [s.species_string for s in other]:
        return False
    if isinstance(one, Molecule):
        return np.allclose(one.cart_coords, other.cart_coords, atol=tolerance)
    apart = one.frac_coords - other.frac_coords
    return np.allclose(apart, np.round(apart), atol=tolerance) and np.allclose(
        one.lattice.parameters, other.lattice.parameters, atol=tolerance
    )


@pytest.mark.parametrize(
    "name", ["out", "out.zip", "out.extxyz", "out.xyz", "out.json", "out.json.gz", "out.parquet"]
)
def test_what_is_written_is_read_back(tmp_path, name):
    assert write(iter(CRYSTALS), tmp_path / name) == 2
    found = sorted(read(tmp_path / name), key=lambda crystal: -len(crystal.structure))
    assert [len(crystal.structure) for crystal in found] == [8, 4]
    for crystal, origin in zip(found, CRYSTALS, strict=True):
        assert same(crystal.structure, origin.structure)
        if name not in ("out", "out.zip"):  # a CIF has no room for more
            assert crystal.id == origin.id
            assert origin.properties.items() <= crystal.properties.items()
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["one.cif", "one.vasp", "POSCAR", "one.json", "one.parquet"])
def test_one_crystal_fits_in_one_file(tmp_path, name):
    assert write(CRYSTALS[1:], tmp_path / name) == 1
    (found,) = read(tmp_path / name)
    assert same(found.structure, TRICLINIC)


def test_pymatgen_and_ase_read_what_is_written(tmp_path):
    import ase.io

    for name in ("one.cif", "POSCAR", "one.json"):
        write(CRYSTALS[:1], tmp_path / name)
        assert Structure.from_file(tmp_path / name).matches(ROCK_SALT)
    write(CRYSTALS, tmp_path / "two.extxyz")
    assert [len(atoms) for atoms in ase.io.read(tmp_path / "two.extxyz", index=":")] == [8, 4]


def test_molecules_go_to_xyz_json_and_parquet_and_to_nothing_else(tmp_path):
    for name in ("w.xyz", "w.json", "w.parquet"):
        write([Crystal("water", WATER)], tmp_path / name)
        (found,) = read(tmp_path / name)
        assert found.id == "water"
        assert isinstance(found.structure, Molecule)
        assert same(found.structure, WATER)
    for name in ("w.cif", "POSCAR", "w.zip"):
        with pytest.raises(UserError, match="'water' is a molecule"):
            write([Crystal("water", WATER)], tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {"w.xyz", "w.json", "w.parquet"}


def test_a_write_that_breaks_leaves_the_old_file(tmp_path):
    target = tmp_path / "x.parquet"
    write(CRYSTALS, target)
    before = target.read_bytes()

    def breaking():
        yield CRYSTALS[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(breaking(), target)
    assert target.read_bytes() == before
    assert list(tmp_path.iterdir()) == [target]


def test_parquet_widens_columns_that_come_late(tmp_path):
    rows = [{}, {"a": 1}, {"a": 2.5, "b": True}, {"b": "maybe"}]
    write([Crystal(str(i), TRICLINIC, row) for i, row in enumerate(rows)], tmp_path / "x.parquet")
    table = pq.read_table(tmp_path / "x.parquet")
    assert table.column_names == ["id", "formula", "n_sites", "cif", "a", "b"]
    assert table["a"].to_pylist() == [None, 1.0, 2.5, None]
    assert table["b"].to_pylist() == [None, None, "True", "maybe"]


def test_names_of_files_are_safe_and_differ(tmp_path):
    ids = ["../../etc/passwd", "x", "X", "x", ".hidden", ""]
    write([Crystal(one, TRICLINIC) for one in ids], tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["X-2.cif", "_.._etc_passwd.cif", "crystal.cif", "hidden.cif", "x-3.cif", "x.cif"]


def test_wrong_targets_are_refused(tmp_path):
    with pytest.raises(EmptyInput):
        write([], tmp_path / "x.cif")
    with pytest.raises(UserError, match="holds one crystal"):
        write(CRYSTALS, tmp_path / "x.cif")
    with pytest.raises(UnknownName, match="did you mean 'extxyz'"):
        write(CRYSTALS, tmp_path / "x", format="exyz")
    with pytest.raises(UserError, match="no format is known by the suffix '\\.doc'"):
        write(CRYSTALS, tmp_path / "x.doc")
    with pytest.raises(UserError, match="make it first"):
        write(CRYSTALS, tmp_path / "missing" / "x.json")
    with pytest.raises(UserError, match="disordered"):
        write([Crystal("m", MIXED)], tmp_path / "x.extxyz")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".parquet"])
@pytest.mark.parametrize("column", ["cif", "cif_str", "cif_string", "structure", "dict"])
def test_tables_are_read_with_ids_and_properties(tmp_path, suffix, column):
    content = json.dumps(TRICLINIC.as_dict()) if column == "dict" else cif(TRICLINIC)
    rows = [
        {
            "": 0,
            "structure" if column == "dict" else column: content,
            "material_id": "mp-1",
            "e_above_hull": 0.25,
        },
        {
            "": 1,
            "structure" if column == "dict" else column: content,
            "material_id": None,
            "e_above_hull": None,
        },
    ]
    path = tmp_path / f"table{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        opened = gzip.open if suffix.endswith("gz") else open
        with opened(path, "wt", newline="") as lines:
            writer = csv.DictWriter(lines, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    first, second = read(path)
    assert (first.id, second.id) == ("mp-1", f"table{suffix}:1")
    assert first.properties == {"hull_distance_ev_per_atom": 0.25}
    assert second.properties == {}
    assert same(first.structure, TRICLINIC)


def test_a_bad_row_is_reported_and_the_rest_goes_on(tmp_path):
    good = cif(TRICLINIC)
    cells = [
        good,
        "",
        "no cif at all",
        good.replace("_cell_angle_alpha   81.00000000", "_cell_angle_alpha   x"),
        good,
    ]
    pq.write_table(pa.table({"cif": [*cells, cif(MIXED)]}), tmp_path / "x.parquet")
    found, failures = read_all(tmp_path / "x.parquet")
    assert [crystal.id for crystal in found] == ["x.parquet:0", "x.parquet:4"]
    assert [failure.entry for failure in failures] == ["row 1", "row 2", "row 3", "row 5"]
    assert "no structure in this row" in failures[0].reason
    assert "it begins 'no cif at all'" in failures[1].reason
    assert "'x.parquet:5' is disordered" in failures[3].reason
    assert str(failures[0]) == f"{tmp_path / 'x.parquet'}: row 1: no structure in this row"


def test_disordered_structures_come_when_asked_for(tmp_path):
    (tmp_path / "m.cif").write_text(cif(MIXED))
    (found,) = read(tmp_path / "m.cif", allow_disordered=True)
    assert found.structure.composition == MIXED.composition


def test_failures_are_logged_with_their_number(tmp_path, caplog):
    (tmp_path / "bad.cif").write_text("data_bad")
    (tmp_path / "good.cif").write_text(cif(TRICLINIC))
    with caplog.at_level(logging.WARNING):
        assert len(list(read(tmp_path))) == 1
    assert "bad.cif: no CIF" in caplog.messages[0]
    assert caplog.messages[-1] == "1 of 2 entries could not be read"


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "POSCAR").write_text(ROCK_SALT.to(fmt="poscar"))
    (tmp_path / "a.cif").write_text(cif(TRICLINIC))
    (tmp_path / "c.cif.gz").write_bytes(gzip.compress(cif(ROCK_SALT, symprec=0.1).encode()))
    (tmp_path / "README.md").write_text("not a crystal")
    (tmp_path / ".hidden.cif").write_text("data_x")
    (tmp_path / "d.pkl.gz").write_bytes(b"x")
    (tmp_path / "e.cif").touch()
    found, failures = read_all(tmp_path)
    assert [crystal.id for crystal in found] == ["a", "b/POSCAR", "c"]
    assert [Path(failure.file).name for failure in failures] == ["d.pkl.gz", "e.cif"]
    assert "pickle" in failures[0].reason
    assert failures[1].reason == "an empty file"


def archive_of(path: Path, files: dict[str, bytes]) -> None:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", compression=zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("name", ["x.zip", "x.tar.gz"])
def test_archives_are_read_in_memory_and_member_by_member(tmp_path, name):
    text = cif(TRICLINIC).encode()
    table = b'id,cif\nrow-id,"' + text + b'"\nbad,\n'
    archive_of(
        tmp_path / name,
        {
            "run/one.cif": text,
            "../../escaped.cif": text,
            "__MACOSX/run/._one.cif": b"\0",
            "notes.txt": b"",
            "inner.zip": b"PK",
            "bomb.cif": b" " * (65 * 2**20),
            "table.csv": table,
            "last.extxyz": b'1\nLattice="3 0 0 0 3 0 0 0 3"\nFe 0 0 0\n',
        },
    )
    found, failures = read_all(tmp_path / name)
    assert [crystal.id for crystal in found] == ["run/one", "../../escaped", "row-id", "last.extxyz:0"]
    assert [failure.entry for failure in failures] == ["inner.zip", "bomb.cif", "table.csv: row 1"]
    assert "more than 64 MiB" in failures[1].reason
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert not (tmp_path.parent.parent / "escaped.cif").exists()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("x.cif", b"", "an empty file"),
        ("x.cif", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git-LFS pointer"),
        ("x.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        ("x.pkl.gz", b"x", "a pickle runs whatever code"),
        ("x.docx", b"x", "Known: a folder, .cif, .extxyz"),
        ("x.zip", b"PK no zip", "damaged after 0 entries"),
        ("x.tar.gz", b"no tar", "damaged after 0 entries"),
        ("x.csv.gz", b"no gzip", "damaged after 0 entries"),
        ("x.parquet", b"no parquet", "no Parquet file"),
        ("x.pt", b"no tensors", "damaged"),
        ("x.json", b"{", "no JSON"),
        ("x.json", b"[]", "no entries in it"),
        ("x.json", b"3", "a JSON int"),
        ("x.csv", b"a,b\n1,2\n", "no column with structures; got a, b; expected one of cif, cif_str"),
        ("x.csv", b"id,cif\n", "no entries in it"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ReadError, match=reason) as caught:
        list(read(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value)


def test_empty_archives_and_folders_say_so(tmp_path):
    archive_of(tmp_path / "x.zip", {})
    archive_of(tmp_path / "y.zip", {"notes.txt": b"x"})
    (tmp_path / "folder").mkdir()
    with pytest.raises(ReadError, match="an archive of 0 files, none of a known kind"):
        list(read(tmp_path / "x.zip"))
    with pytest.raises(ReadError, match="an archive of 1 files"):
        list(read(tmp_path / "y.zip"))
    with pytest.raises(ReadError, match="no file of a known kind"):
        list(read(tmp_path / "folder"))
    with pytest.raises(ReadError, match="no such file"):
        read(tmp_path / "missing.cif")  # at once, not at the first crystal


def test_of_several_files_a_damaged_one_is_reported(tmp_path):
    (tmp_path / "x.zip").write_bytes(b"PK no zip")
    (tmp_path / "y.cif").write_text(cif(TRICLINIC))
    found, failures = read_all([tmp_path / "x.zip", tmp_path / "y.cif"])
    assert [crystal.id for crystal in found] == ["y"]
    assert "damaged" in failures[0].reason


@pytest.mark.parametrize(
    ("held", "ids"),
    [
        (TRICLINIC.as_dict(), ["x"]),
        ([TRICLINIC.as_dict()] * 2, ["x.json:0", "x.json:1"]),
        ({"mp-1": TRICLINIC.as_dict(), "mp-2": TRICLINIC.as_dict()}, ["mp-1", "mp-2"]),
        ([{"material_id": "mp-3", "structure": TRICLINIC.as_dict(), "band_gap": 1.5}], ["mp-3"]),
        (
            {"index": [0], "columns": ["structure", "band_gap"], "data": [[TRICLINIC.as_dict(), 1.5]]},
            ["x.json:0"],
        ),
    ],
)
def test_pymatgens_json_is_read_in_all_its_shapes(tmp_path, held, ids):
    (tmp_path / "x.json").write_text(json.dumps(held))
    found = list(read(tmp_path / "x.json"))
    assert [crystal.id for crystal in found] == ids
    assert all(same(crystal.structure, TRICLINIC) for crystal in found)
    if "band_gap" in json.dumps(held):
        assert found[0].properties == {"band_gap_ev": 1.5}


def test_oxidation_states_are_dropped_from_json_and_poscar(tmp_path):
    charged = ROCK_SALT.copy()
    charged.add_oxidation_state_by_element({"Na": 1, "Cl": -1})
    (tmp_path / "x.json").write_text(json.dumps(charged.as_dict()))
    (found,) = read(tmp_path / "x.json")
    assert same(found.structure, ROCK_SALT)


def test_a_poscar_without_symbols_is_refused(tmp_path):
    """pymatgen numbers the elements from hydrogen on, with no more than a warning."""
    lines = ROCK_SALT.to(fmt="poscar").splitlines()
    (tmp_path / "POSCAR").write_text("\n".join(["some cell", *lines[1:5], *lines[6:]]))
    found, failures = read_all(tmp_path / "POSCAR")
    assert not found
    assert "no line of element symbols" in failures[0].reason


def test_a_poscar_that_claims_a_billion_atoms_is_refused(tmp_path):
    text = ROCK_SALT.to(fmt="poscar").replace("4 4", "1000000000 4")
    (tmp_path / "POSCAR").write_text(text)
    assert "lines for 1000000004 atoms" in read_all(tmp_path / "POSCAR")[1][0].reason


def test_a_cif_of_several_blocks_gives_a_crystal_each(tmp_path):
    (tmp_path / "x.cif").write_text("data_global\n_journal_year 2000\n" + cif(TRICLINIC) + cif(ROCK_SALT))
    assert [crystal.id for crystal in read(tmp_path / "x.cif")] == ["x:0", "x:1"]


def test_the_flat_cell_that_hung_pymatgen_is_a_failure(tmp_path):
    """The cell of pymatgen issue 4028: 20.6 + 63.0 degrees make the third angle, so the volume is 0."""
    flat = Structure(
        Lattice.from_parameters(1.49, 3.79, 30.4, 90, 90, 90), ["V", "Ni"], [[0, 0, 0], [0.5] * 3]
    )
    text = cif(flat)
    for name, angle in {"alpha": "20.62129211", "beta": "83.61568451", "gamma": "62.99439240"}.items():
        text = text.replace(f"_cell_angle_{name}   90.00000000", f"_cell_angle_{name}   {angle}")
    (tmp_path / "flat.cif").write_text(text)
    found, failures = read_all(tmp_path / "flat.cif")
    assert not found
    assert "volume" in failures[0].reason


def test_order_is_kept_when_some_cifs_need_the_slower_reader(tmp_path):
    quick, slow = cif(TRICLINIC), cif(TRICLINIC).replace("'x, y, z'", "x,y,z")
    texts = [quick, slow, quick, slow, "data_x _cell_length_a", quick]
    pq.write_table(pa.table({"cif": texts}), tmp_path / "x.parquet")
    found, failures = read_all(tmp_path / "x.parquet", workers=1)
    assert [crystal.id for crystal in found] == [f"x.parquet:{i}" for i in (0, 1, 2, 3, 5)]
    assert all(same(crystal.structure, TRICLINIC) for crystal in found)
    assert [failure.entry for failure in failures] == ["row 4"]


def test_progress_goes_to_standard_error(tmp_path, capfd):
    write(CRYSTALS, tmp_path / "x.json")
    assert len(list(read(tmp_path / "x.json", progress=True))) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert "read 2 crystals" in err


def test_importing_files_loads_no_torch():
    program = (
        "import sys, crystallm_kit.structures.files; sys.exit('torch' in sys.modules or 'ase' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    assert subprocess.run([sys.executable, "-c", program], env=environment, check=False).returncode == 0


def test_reading_can_begin_at_an_entry(tmp_path):
    """What is before it is not parsed: its fault is not reported."""
    frame = '1\nLattice="3 0 0 0 3 0 0 0 3" id={}\n{} 0 0 0\n'
    path = tmp_path / "three.extxyz"
    path.write_text(frame.format("a", "Xx") + frame.format("b", "Po") + frame.format("c", "Fe"))
    failures = []
    assert [c.id for c in read(path, start=1, on_error=failures.append)] == ["b", "c"]
    assert not failures
