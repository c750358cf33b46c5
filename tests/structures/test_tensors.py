"""Tensors files are read without running what they pickle."""

import argparse
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from pymatgen.core import Lattice

from crystallm_kit.errors import ReadError
from crystallm_kit.structures.files import read


def two_crystals() -> dict[str, torch.Tensor]:
    """Return CsCl and bcc Fe, in the layout of one evaluation."""
    return {
        "frac_coords": torch.tensor([[0, 0, 0], [0.5, 0.5, 1.5], [0, 0, 0]]),
        "atom_types": torch.tensor([55, 17, 26]),
        "num_atoms": torch.tensor([2, 1]),
        "lengths": torch.tensor([[4.1, 4.1, 4.1], [2.5, 2.5, 2.5]]),
        "angles": torch.tensor([[90.0, 90, 90], [109.47, 109.47, 109.47]]),
    }


def test_one_evaluation_gives_its_crystals(tmp_path):
    torch.save(two_crystals(), tmp_path / "gen.pt")
    first, second = read(tmp_path / "gen.pt")
    assert (first.id, second.id) == ("gen.pt:0", "gen.pt:1")
    assert [s.species_string for s in first.structure] == ["Cs", "Cl"]
    assert first.structure.frac_coords.tolist() == [[0, 0, 0], [0.5, 0.5, 0.5]]
    expected = Lattice.from_parameters(2.5, 2.5, 2.5, 109.47, 109.47, 109.47)
    assert np.allclose(second.structure.lattice.matrix, expected.matrix, atol=1e-5)


def test_a_leading_dimension_counts_evaluations(tmp_path):
    held = {key: torch.stack([tensor] * 3) for key, tensor in two_crystals().items()}
    torch.save(held | {"eval_setting": argparse.Namespace(seed=1), "time": 3.5}, tmp_path / "gen.pt")
    found = list(read(tmp_path / "gen.pt"))
    assert [crystal.id for crystal in found] == [f"gen.pt:{e}:{i}" for e in range(3) for i in range(2)]
    assert [crystal.properties["evaluation"] for crystal in found] == [0, 0, 1, 1, 2, 2]


class Batch:
    """Stands for a class of another library that a file pickles."""

    def __init__(self) -> None:
        self.x = torch.zeros(2)


class Trap:
    """Writes a file when it is unpickled the ordinary way."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return spring, (str(self.path),)


def spring(path: str) -> None:
    Path(path).touch()


class Command:
    """Runs a command when it is unpickled the ordinary way."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_foreign_objects_are_passed_over_and_never_run(tmp_path):
    sprung = tmp_path / "sprung"
    held = two_crystals() | {"input_data_batch": Batch(), "trap": Trap(sprung)}
    torch.save(held, tmp_path / "gen.pt")
    assert len(list(read(tmp_path / "gen.pt"))) == 2
    assert not sprung.exists()
    torch.load(tmp_path / "gen.pt", weights_only=False)
    assert sprung.exists()  # the trap is a real one


def test_a_file_that_would_run_a_command_is_refused(tmp_path):
    torch.save(two_crystals() | {"x": Command(tmp_path / "sprung")}, tmp_path / "gen.pt")
    with pytest.raises(ReadError, match="without executing what it pickles"):
        list(read(tmp_path / "gen.pt"))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("num_atoms", torch.tensor([2, 2]), r"frac_coords has shape \(3, 3\), \(4, 3\) expected"),
        ("lengths", torch.ones(3, 3), "lengths has shape"),
        ("angles", None, "tensors frac_coords, atom_types, num_atoms, lengths, angles expected, got"),
        ("num_atoms", torch.tensor([4, -1]), "negative"),
    ],
)
def test_shapes_that_contradict_one_another_are_refused(tmp_path, key, value, reason):
    torch.save(two_crystals() | {key: value}, tmp_path / "gen.pt")
    with pytest.raises(ReadError, match=reason):
        list(read(tmp_path / "gen.pt"))


def test_an_impossible_crystal_is_reported_and_the_rest_goes_on(tmp_path):
    held = two_crystals()
    held["atom_types"][0] = 0
    torch.save(held, tmp_path / "gen.pt")
    failures = []
    (found,) = read(tmp_path / "gen.pt", on_error=failures.append)
    assert found.id == "gen.pt:1"
    assert (failures[0].entry, failures[0].reason) == ("crystal 0", "atomic number 0: 1 to 118 expected")


@pytest.mark.real_data
def test_published_samples_are_all_read():
    data = os.environ.get("CRYSTALLM_KIT_DATA")
    path = Path(data or ".").parent / "samples" / "DiffCSP_mp_20.pt"
    if not data or not path.exists():
        pytest.skip("CRYSTALLM_KIT_DATA names no folder with samples/ beside it")
    import itertools

    found = list(itertools.islice(read(path), 500))
    assert len(found) == 500
    assert max(len(crystal.structure) for crystal in found) == 20
