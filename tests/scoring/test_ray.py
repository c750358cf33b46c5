"""--ray: the same rows over a Ray cluster, one that is started here."""

import pyarrow.parquet as pq
import pytest
from pymatgen.core import Lattice, Structure

from crystallm_kit.errors import MissingExtra, UserError
from crystallm_kit.records import Crystal
from crystallm_kit.scoring import pool
from crystallm_kit.scoring.run import score
from crystallm_kit.structures.files import write


@pytest.fixture
def salts(tmp_path):
    path = tmp_path / "salts.extxyz"
    pairs = [(a, b, x) for a in ("Li", "Na", "K") for b in ("F", "Cl") for x in (5.4, 5.6)]
    cells = [
        Structure.from_spacegroup("Fm-3m", Lattice.cubic(x), [a, b], [[0, 0, 0], [0.5] * 3])
        for a, b, x in pairs
    ]
    write([Crystal(f"s{i}", cell) for i, cell in enumerate(cells)], path)
    return path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_local_cluster_gives_the_same_rows(tmp_path, salts):
    pytest.importorskip("ray")
    for name, options in (("here", {"workers": 1}), ("there", {"ray": "local"})):
        score(salts, reference=salts, out=tmp_path / name, protocols=["kit"], **options)
    here, there = (pq.read_table(tmp_path / n / "rows" / "salts.parquet") for n in ("here", "there"))
    assert here.num_rows == 12
    assert here.equals(there)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_structure_that_kills_its_process_is_skipped_there_too(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    (tmp_path / "ray_jobs.py").write_text(
        "import os, signal\n"
        "def work(task, marks):\n"
        "    found = []\n"
        "    for i in range(3):\n"
        "        if f'x:{i}' in task['skip']:\n"
        "            found.append(task['skip'][f'x:{i}'])\n"
        "            continue\n"
        "        with marks.item('x', i, 5.0):\n"
        "            if i == 1: os.kill(os.getpid(), signal.SIGKILL)\n"
        "            found.append(i)\n"
        "    return found\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    with pool.ray_pool("local") as running:
        assert running.submit({"job": "ray_jobs:work"}).result() == [0, "its process ended with code -9", 2]
    assert not ray.is_initialized()


@pytest.mark.slow
def test_a_cluster_that_is_not_there_is_told(tmp_path, salts):
    pytest.importorskip("ray")
    with pytest.raises(UserError, match="--ray auto: no cluster"):
        score(salts, out=tmp_path / "x", ray="auto")


def test_without_ray_the_extra_is_named(tmp_path, salts, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"crystallm-kit\[ray\]"):
        score(salts, out=tmp_path / "x", ray="local")
