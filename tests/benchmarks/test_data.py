"""eval/data.yaml: the files behind the numbers are named, and are those at hand."""

import os
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from crystallm_kit.scores.novelty.reference_index import content_hash

ROOT = Path(__file__).parents[2]
FILES = yaml.safe_load((ROOT / "eval" / "data.yaml").read_text(encoding="utf-8"))
FOLDERS = [
    Path(os.environ[name]) for name in ("CRYSTALLM_KIT_DATA", "CRYSTALLM_KIT_SAMPLES") if name in os.environ
]
AT_HAND = {path.name: path for folder in FOLDERS for path in folder.glob("*") if path.name in FILES}


def test_every_file_of_the_commands_is_described():
    named: set[str] = set()
    for place in ("README.md", "eval/README.md", "crystallm_kit/pretrained/README.md", "eval/*.yaml"):
        for path in ROOT.glob(place):
            named |= set(
                re.findall(r"\b((?:mp|wbm|perov|carbon|aflow)\w*\.parquet|\w+_mp_20\.pt)\b", path.read_text())
            )
    assert len(named) > 5
    assert named <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_an_entry_says_what_a_file_is_and_where_it_is_from(name):
    assert set(FILES[name]) == {"rows", "sha256", "what", "from", "licence"}
    assert re.fullmatch("[0-9a-f]{64}", FILES[name]["sha256"])


@pytest.mark.real_data
@pytest.mark.skipif(not AT_HAND, reason="CRYSTALLM_KIT_DATA and CRYSTALLM_KIT_SAMPLES are not set")
def test_the_files_at_hand_are_those():
    for name, path in AT_HAND.items():
        assert content_hash(path) == FILES[name]["sha256"], name
        if path.suffix == ".parquet":
            assert pq.read_metadata(path).num_rows == FILES[name]["rows"], name
