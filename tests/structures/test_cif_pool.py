"""No CIF holds up the others."""

import time
import warnings

import pytest
from pymatgen.core import Lattice, Structure
from pymatgen.io.cif import CifWriter

from crystallm_kit.errors import ReadError
from crystallm_kit.structures.cif_pool import CifPool

ROCK_SALT = Structure.from_spacegroup(
    "Fm-3m", Lattice.cubic(5.6402), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]
)


def cif(structure: Structure, **settings) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # spglib tells pymatgen of a setting that it is to drop
        return str(CifWriter(structure, **settings))


def endless_cif() -> str:
    """Return a CIF that keeps pymatgen's parser busy for many minutes: 1,500 sites under 190 operations."""
    operations = "\n".join(f"  {i}  'x+{i}/997, y, z'" for i in range(190))
    rows = "\n".join(
        f"  V  V{i}  1  {i / 3001:.5f}  {i % 7 / 7:.5f}  {i % 11 / 11:.5f}  1" for i in range(1500)
    )
    return cif(ROCK_SALT).split("loop_")[0] + (
        f"loop_\n _symmetry_equiv_pos_site_id\n _symmetry_equiv_pos_as_xyz\n{operations}\nloop_\n"
        " _atom_site_type_symbol\n _atom_site_label\n _atom_site_symmetry_multiplicity\n"
        f" _atom_site_fract_x\n _atom_site_fract_y\n _atom_site_fract_z\n _atom_site_occupancy\n{rows}\n"
    )


def test_a_cif_that_does_not_end_is_killed_and_the_next_is_read():
    text = cif(ROCK_SALT, symprec=0.1)
    with CifPool(1, timeout_seconds=5.0) as pool:
        started = time.monotonic()
        futures = [pool.submit(one) for one in (text, endless_cif(), text, "data_x\nnothing")]
        assert len(futures[0].result()) == 8
        with pytest.raises(ReadError, match="did not end within 5 s"):
            futures[1].result()
        assert len(futures[2].result()) == 8
        with pytest.raises(ReadError, match="pymatgen reads no structure"):
            futures[3].result()
        assert time.monotonic() - started < 60


def test_disordered_sites_come_back_whole():
    mixed = Structure(Lattice.cubic(4), [{"Na": 0.5, "K": 0.5}, "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    with CifPool(1, timeout_seconds=20) as pool:
        found = pool.submit(cif(mixed)).result()
    assert found.composition == mixed.composition
    assert not found.is_ordered


def test_closing_ends_what_still_runs():
    pool = CifPool(1, timeout_seconds=300)
    started = time.monotonic()
    with pool:
        pool.submit(endless_cif())
        while not pool._processes:
            time.sleep(0.01)
        process = next(iter(pool._processes))
    assert process.poll() is not None
    assert time.monotonic() - started < 60
