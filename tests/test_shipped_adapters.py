"""Adapters that come with the package: they load by name, and have learned the property that they name."""

import json
from pathlib import Path

import pytest

from crystallm_kit.cli import main
from crystallm_kit.engines.engine import Prompt, Sampling
from crystallm_kit.generation import load_model, shipped_model_folder
from crystallm_kit.models.folders import adapter_for
from crystallm_kit.records import PROPERTIES, Conditions, Range

ADAPTERS = sorted((shipped_model_folder() / "adapters").iterdir())
# Soft and stiff crystals with their measured bulk moduli, GPa. Alkali halides: Kittel, Introduction to Solid
# State Physics; Os: Takemura 2004, doi:10.1103/PhysRevB.70.012101; TiC: Gilman and Roberts 1961.
SOFT = {"NaCl": (24, "Na1 Cl1 225\nNa a\nCl b\n5.64 end"), "KCl": (18, "K1 Cl1 225\nK a\nCl b\n6.29 end")}
STIFF = {"Os": (395, "Os2 194\nOs c\n2.73 4.32 end"), "TiC": (240, "Ti1 C1 225\nTi a\nC b\n4.33 end")}


@pytest.fixture(scope="module")
def adapted():
    return load_model(adapter="bulk-modulus", device="cpu")


def log_probability(model, text: str, gpa: float) -> float:
    asked = Conditions(properties={"bulk_modulus_gpa": Range.exactly(gpa)})
    prompt = Prompt(model.template.render(asked), text)
    (scored,) = model.engine.complete([prompt], Sampling(max_new_tokens=200))
    return scored.log_probability


@pytest.mark.parametrize("folder", ADAPTERS, ids=lambda path: path.name)
def test_an_adapter_is_small_names_its_base_and_its_property(folder: Path):
    assert sum(file.stat().st_size for file in folder.iterdir()) < 3_000_000
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "shipped"
    results = json.loads((folder / "manifest.json").read_text())["results"]
    assert results["property"] in PROPERTIES
    assert adapter_for(results["property"]) == folder.name


def test_no_adapter_is_named_for_what_the_model_knows_anyway():
    assert adapter_for("density_g_cm3") is None


@pytest.mark.parametrize("name", [*SOFT, *STIFF])
def test_soft_crystals_are_likelier_where_soft_ones_are_asked_for(adapted, name):
    """At their own bulk modulus by more than twice against the other end of the scale."""
    gpa, text = {**SOFT, **STIFF}[name]
    other = 300.0 if name in SOFT else 25.0
    assert log_probability(adapted, text, gpa) > log_probability(adapted, text, other) + 0.7


def test_an_adapter_knows_what_its_base_knows(adapted):
    base = load_model(device="cpu")
    assert (adapted.known_elements, adapted.max_sites) == (base.known_elements, base.max_sites)
    assert adapted.name != base.name


def test_who_asks_the_shipped_model_for_a_bulk_modulus_is_told_of_the_adapter(tmp_path, capsys):
    asked = ["generate", "--condition", "bulk_modulus=150", "--out", str(tmp_path / "a"), "--seed", "1"]
    assert main(asked) == 0
    assert "add --adapter bulk-modulus" in capsys.readouterr().err
    assert main([*asked, "--adapter", "bulk-modulus"]) == 0
    assert "add --adapter" not in capsys.readouterr().err
    row = json.loads((tmp_path / "a" / "samples.jsonl").read_text())
    assert row["model"] == "bulk-modulus"
