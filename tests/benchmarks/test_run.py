"""Benchmarks run from their recipe on two targets; killed runs go on; other settings are refused."""

import json
import shutil

import pytest
from pymatgen.core import Lattice, Structure

from crystallm_kit.benchmarks.recipe import BenchmarkRecipe
from crystallm_kit.benchmarks.run import run_benchmark
from crystallm_kit.cli import main
from crystallm_kit.errors import EmptyInput, RecipeError, UnknownName, UserError
from crystallm_kit.recipes import from_dict
from crystallm_kit.records import Crystal
from crystallm_kit.structures.files import write

ROCK_SALT = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5] * 3])
PEROVSKITE = Structure(  # SrTiO3, mp-5229
    Lattice.cubic(3.9), ["Sr", "Ti", "O", "O", "O"],
    [[0, 0, 0], [0.5] * 3, [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]],
)  # fmt: skip
TRUTHS = [ROCK_SALT.get_primitive_structure(), PEROVSKITE]


@pytest.fixture
def targets(tmp_path):
    path = tmp_path / "targets.json"
    write([Crystal(f"target-{i}", truth) for i, truth in enumerate(TRUTHS)], path)
    return path


def recipe_of(path, *generators, **settings) -> BenchmarkRecipe:
    data = {
        "title": "Toy", "task": "structure-prediction", "seed": 3, "k": [1, 2],
        "targets": {"files": [str(path)], "about": "two textbook structures"},
        "published": ["csp_comp_mp20", "csp_comp_ungated_mp20"], "generators": list(generators), **settings,
    }  # fmt: skip
    return from_dict(data, BenchmarkRecipe)


def from_file(tmp_path, structures, name="others"):
    """Return a generator whose candidates stand in a file."""
    path = tmp_path / f"{name}.json"
    write([Crystal(str(i), s) for i, s in enumerate(structures)], path)
    return {"name": name, "samples": str(path)}


def test_rates_count_what_matches_and_stand_beside_the_published_ones(tmp_path, targets):
    squeezed = PEROVSKITE.copy()
    squeezed.apply_strain([0, 0, 1.6])
    others = from_file(tmp_path, [TRUTHS[0], TRUTHS[0], squeezed, PEROVSKITE])
    (row,) = run_benchmark(recipe_of(targets, others), tmp_path / "out", command="as typed", processes=1)
    rate = {name: (s.numerator, s.denominator) for name, s in row.scores.items() if s.unit == "share"}
    assert rate["kit.match_rate@1"] == (1, 2)
    assert rate["kit.match_rate@2"] == rate["diffcsp.match_rate@2"] == (2, 2)
    assert row.scores["kit.rmse@2"].value == pytest.approx(0, abs=1e-6)
    table = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert "| **others** | 50.00 (9.5 to 90.5; 1/2) |" in table
    assert "| DiffCSP (2023) | 51.49 | 0.0631 | 77.93 | 0.0492 |" in table
    assert "two textbook structures" in table
    assert "command: `as typed`" in table


def test_a_model_is_a_row_for_each_order_and_a_second_run_draws_nothing(tmp_path, targets, toy_model):
    model = {"name": "toy", "model": str(toy_model), "drawn": 3, "orders": ["drawn", "ranked"]}
    recipe = recipe_of(targets, model, targets_per_block=1)
    rows = run_benchmark(recipe, tmp_path / "out", processes=1)
    assert [row.name for row in rows] == ["toy, drawn", "toy, ranked"]
    blocks = sorted((tmp_path / "out").rglob("block-*"))
    assert len(blocks) == 2
    times = [block.stat().st_mtime_ns for block in blocks]
    (tmp_path / "out" / "1-toy" / "scores.json").unlink()  # killed while it scored
    again = run_benchmark(recipe, tmp_path / "out", processes=1)
    assert [r.scores for r in again] == [r.scores for r in rows]
    assert [block.stat().st_mtime_ns for block in blocks] == times


def test_candidates_of_templates_and_of_a_model_can_stand_in_one_row(
    tmp_path, targets, toy_model, monkeypatch
):
    """The library holds both truths, and the toy model writes noise: what is first is the template's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    both = {"name": "both", "pooled": ["template", "toy"]}
    makers = [
        {"name": "toy", "model": str(toy_model)},
        {"name": "template", "engine": "template", "library": [str(targets)]},
        both,
    ]
    rows = run_benchmark(recipe_of(targets, *makers), tmp_path / "out", processes=1)
    assert [row.name for row in rows] == ["toy", "template", "both"]
    assert rows[2].scores["kit.match_rate@1"].numerator == rows[1].scores["kit.match_rate@1"].numerator == 2
    for wrong in (["toy", "template"], ["template"], ["template", "nobody"]):
        with pytest.raises(RecipeError, match="pooled"):
            recipe_of(targets, *makers[:2], {**both, "pooled": wrong})


def test_a_target_that_cannot_be_asked_for_counts_as_missed_and_the_row_says_so(tmp_path, targets, toy_model):
    long = Crystal("long", ROCK_SALT * (4, 4, 4))  # 512 atoms: more than the model writes
    write([*(Crystal(f"target-{i}", truth) for i, truth in enumerate(TRUTHS)), long], targets)
    (row,) = run_benchmark(
        recipe_of(targets, {"name": "toy", "model": str(toy_model)}), tmp_path / "out", processes=1
    )
    assert row.scores["kit.match_rate@1"].denominator == 3
    assert row.about == "targets that it could not be asked for, counted as missed: 1"


def test_a_folder_of_other_settings_is_refused_by_their_name(tmp_path, targets):
    others = from_file(tmp_path, [TRUTHS[0], TRUTHS[0], PEROVSKITE, PEROVSKITE])
    run_benchmark(recipe_of(targets, others), tmp_path / "out", processes=1)
    with pytest.raises(UserError, match=r"out: holds a benchmark of other settings \(seed\)"):
        run_benchmark(recipe_of(targets, others, seed=4), tmp_path / "out", processes=1)
    shutil.copy(targets, tmp_path / "kept.json")
    write([Crystal("other", PEROVSKITE), Crystal("more", PEROVSKITE)], targets)
    with pytest.raises(UserError, match=r"other settings \(inputs\)"):
        run_benchmark(recipe_of(targets, others), tmp_path / "out", processes=1)


def test_candidates_of_other_targets_are_refused(tmp_path, targets):
    few = from_file(tmp_path, TRUTHS, "few")
    with pytest.raises(UserError, match=r"few: 2 crystals for 2 targets; 2 a target are expected \(4\)"):
        run_benchmark(recipe_of(targets, few), tmp_path / "out", processes=1)
    swapped = from_file(tmp_path, [PEROVSKITE, PEROVSKITE, TRUTHS[0], TRUTHS[0]], "swapped")
    with pytest.raises(UserError, match=r"candidates of target-0 \(NaCl\) are SrTiO3"):
        run_benchmark(recipe_of(targets, swapped), tmp_path / "out-2", processes=1)


def test_what_is_missing_is_said_before_anything_is_done(tmp_path, targets):
    others = from_file(tmp_path, TRUTHS)
    with pytest.raises(RecipeError, match="no file nowhere"):
        run_benchmark(recipe_of("nowhere.json", others), tmp_path / "out")
    with pytest.raises(UnknownName, match="did you mean 'csp_comp_mp20'"):
        run_benchmark(recipe_of(targets, others, published=["csp_comp_mp2"]), tmp_path / "out")
    nothing = recipe_of(targets, others, targets={"files": [str(targets)], "first": 0})
    with pytest.raises(EmptyInput, match="no targets, so no rate"):
        run_benchmark(nothing, tmp_path / "out")


def test_the_command_runs_a_recipe_and_prints_our_rows(tmp_path, targets, capsys):
    others = from_file(tmp_path, [TRUTHS[0], TRUTHS[0], PEROVSKITE, PEROVSKITE])
    recipe = tmp_path / "toy.yaml"
    plain = {"title": "Toy", "task": "structure-prediction", "seed": 3, "k": [1, 2], "generators": [others]}
    recipe.write_text(json.dumps(plain))
    wanted = ["benchmark", str(recipe), "--set", f"targets.files=[{targets}]", "--out", str(tmp_path / "out")]
    assert main([*wanted, "--workers", "1"]) == 0
    assert "| `kit.match_rate@1` | 100.00 (34.2 to 100.0; 2/2) |" in capsys.readouterr().out
    assert main([*wanted, "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)["rows"][0]["scores"]
    assert {"kit.match_rate@1", "diffcsp.match_rate@1", "kit.metre@1"} <= {s["name"] for s in scores}


# a model of random weights is fond of neon
@pytest.mark.filterwarnings("ignore:No Pauling electronegativity")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "asked"), [("de-novo", {}), ("conditional", {"rock salt": {"formula": "NaCl"}})]
)
def test_samples_without_a_target_are_drawn_and_scored(tmp_path, toy_model, task, asked):
    write([Crystal(str(i), s) for i, s in enumerate(TRUTHS)], tmp_path / "known.json")
    data = {
        "title": "Toy", "task": task, "seed": 3, "n": 12, "asked": asked,
        "scoring": {"reference": [str(tmp_path / "known.json")]},
        "generators": [{"name": "toy", "model": str(toy_model)}],
    }  # fmt: skip
    (row,) = run_benchmark(from_dict(data, BenchmarkRecipe), tmp_path / "out", processes=1)
    assert row.name == ("toy, rock salt" if asked else "toy")
    assert row.scores["cdvae.structure_valid"].denominator == 12
    assert any(name.startswith("kit.novel") for name in row.scores)
    assert any(name.startswith("kit.hit_rate") for name in row.scores) == bool(asked)
