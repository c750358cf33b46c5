"""Every recipe of eval/ is understood, names tables that are there, and says what it is measured on."""

from pathlib import Path

import pytest

from crystallm_kit.benchmarks.recipe import BenchmarkRecipe, check_files
from crystallm_kit.errors import RecipeError
from crystallm_kit.recipes import load_recipe
from crystallm_kit.scoring.published import published_table
from crystallm_kit.text.conditions import conditions_from_dict

ROOT = Path(__file__).parents[2]
RECIPES = [
    path
    for path in sorted((ROOT / "eval").glob("*.yaml"))
    if path.name not in ("data.yaml", "published.yaml")
]
FILES = ("generators.1.library=[x.cif]",)


def loaded(path: Path) -> BenchmarkRecipe:
    has_template = "engine: template" in path.read_text(encoding="utf-8")
    return load_recipe(path, BenchmarkRecipe, FILES if has_template else ())


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_is_understood_and_its_published_tables_are_there(path):
    recipe = loaded(path)
    for name in recipe.published:
        assert any(column.beside for column in published_table(name).columns.values()), name
    for conditions in recipe.asked.values():
        conditions_from_dict(conditions)
    assert all(generator.about for generator in recipe.generators)
    if recipe.task == "structure-prediction":
        assert "train" in recipe.targets.about, "what the generators were trained on is said"


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_the_command_of_a_recipe_names_the_recipe(path):
    comment = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert any(f"crystallm-kit benchmark eval/{path.name}" in line for line in comment)


def test_there_is_a_recipe_for_each_task():
    assert {loaded(path).task for path in RECIPES} == {"structure-prediction", "de-novo", "conditional"}


def test_files_that_are_not_there_are_named_before_anything_is_drawn(tmp_path):
    recipe = loaded(ROOT / "eval" / "csp-perov5.yaml")
    with pytest.raises(RecipeError, match=r"x\.yaml: no targets; name their files: --set 'targets\.files"):
        check_files(recipe, "x.yaml")
    missing = load_recipe(ROOT / "eval" / "csp-perov5.yaml", BenchmarkRecipe, ("targets.files=[none.cif]",))
    with pytest.raises(RecipeError, match=r"targets\.files: no file none\.cif"):
        check_files(missing, "x.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("k=[5, 1]", "k: increasing numbers"),
        ("given=[spacegroup]", "the composition at least"),
        ("generators.0.drawn=3", "3 drawn, 20 looked at"),
        ("asked={x: {formula: NaCl}}", "for the task 'conditional'"),
        ("generators=[]", "at least one expected"),
        ("generators.0.engine=template", "needs a library"),
        ("given=[composition, wyckoff]", "wyckoff"),
    ],
)
def test_a_recipe_that_cannot_be_meant_is_refused_by_name(override, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(ROOT / "eval" / "csp-perov5.yaml", BenchmarkRecipe, (override,))
