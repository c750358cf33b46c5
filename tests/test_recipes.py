"""recipes.py: YAML becomes the dataclass asked for, or is refused; every shipped recipe loads."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from crystallm_kit.errors import RecipeError
from crystallm_kit.recipes import from_dict, load_recipe, recipe_to_dict
from crystallm_kit.tokens.corpus import CorpusRecipe
from crystallm_kit.training.recipe import TrainingRecipe

ROOT = Path(__file__).parents[1]
# Pattern of recipes -> what they are.
SHIPPED = {
    "finetune/llama*.yaml": TrainingRecipe,
    "finetune/shipped-*.yaml": TrainingRecipe,
    "finetune/corpus-*.yaml": CorpusRecipe,
}


@dataclass(frozen=True)
class Optimizer:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    kind: Literal["adamw", "sgd"] = "adamw"


@dataclass(frozen=True)
class Run:
    seed: int
    name: str = ""
    fused: bool = False
    limit: int | None = None
    folder: Path | None = None
    sizes: tuple[int, ...] = ()
    tags: list[str] = field(default_factory=list)
    shares: dict[str, float] = field(default_factory=dict)
    free: Any = None
    optimizer: Optimizer = field(default_factory=Optimizer)

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")


@pytest.fixture
def recipe(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "x.yaml"
        path.write_text(text)
        return path

    return write


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, Run, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("path", "kind"),
    [(p, kind) for pattern, kind in SHIPPED.items() for p in sorted(ROOT.glob(pattern))],
    ids=lambda value: value.name if isinstance(value, Path) else value.__name__,
)
def test_every_shipped_recipe_loads_and_sets_its_seed(path, kind):
    loaded = load_recipe(path, kind)
    assert "seed" in yaml.safe_load(path.read_text())
    assert from_dict(recipe_to_dict(loaded), type(loaded)) == loaded


def test_there_are_shipped_recipes_to_load():
    found = {path for pattern in SHIPPED for path in ROOT.glob(pattern)}
    assert found
    assert found == {path for path in (ROOT / "finetune").glob("*.yaml") if "accelerate" not in path.name}


def test_every_key_of_a_shipped_recipe_has_a_comment():
    for path in (ROOT / "finetune").glob("*.yaml"):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            is_section = line.rstrip().endswith(":")
            assert not line.strip() or "#" in line or is_section, f"{path.name}:{number}: {line}"


def test_values_take_the_types_of_the_fields(recipe):
    run = load_recipe(
        recipe(
            "{seed: 1e2, limit: null, folder: a/b, sizes: [1, 2], tags: [x], shares: {a: 1}, free: {q: [1]}}"
        ),
        Run,
    )
    assert run == Run(100, folder=Path("a/b"), sizes=(1, 2), tags=["x"], shares={"a": 1.0}, free={"q": [1]})
    assert isinstance(run.seed, int)
    assert isinstance(run.shares["a"], float)


def test_a_number_in_scientific_notation_is_a_number(recipe):
    """PyYAML reads 1e-3 as text, after YAML 1.1, which wants 1.0e-3."""
    assert load_recipe(recipe("{seed: 1, optimizer: {lr: 1e-3}}"), Run).optimizer.lr == 1e-3


def test_an_unknown_key_is_refused_with_the_nearest_known_one(recipe):
    path = recipe("seed: 1\noptimizer: {lr_rate: 1}")
    assert refusal(path) == (
        f"{path}: unknown key 'lr_rate' under 'optimizer'; did you mean 'lr'? Known: betas, kind, lr."
    )
    assert "unknown key 'sead'; did you mean 'seed'?" in refusal(recipe("sead: 1"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: one", "key 'seed' must be a whole number, got 'one'"),
        ("seed: 1.5", "key 'seed' must be a whole number, got '1.5'"),
        ("seed: true", "key 'seed' must be a whole number, got true"),
        ("seed:", "key 'seed' must be a whole number, got nothing (null)"),
        ("{seed: 1, name: 3}", "key 'name' must be text, got '3'"),
        ("{seed: 1, fused: 1}", "key 'fused' must be true or false, got '1'"),
        ("{seed: 1, sizes: 3}", "key 'sizes' must be a list, got '3'"),
        ("{seed: 1, sizes: [1, a]}", "key 'sizes[1]' must be a whole number, got 'a'"),
        ("{seed: 1, shares: {a: b}}", "key 'shares.a' must be a number, got 'b'"),
        ("{seed: 1, optimizer: 3}", "key 'optimizer' must be a mapping of keys to values, got '3'"),
        (
            "{seed: 1, optimizer: {betas: [1]}}",
            "key 'optimizer.betas' must be a list of 2 values, got a list of 1",
        ),
        (
            "{seed: 1, optimizer: {kind: adam}}",
            "key 'optimizer.kind' cannot be 'adam'; did you mean 'adamw'?",
        ),
        ("name: x", "key 'seed' is missing"),
        ("seed: -1", "seed must be at least 0, got -1"),
        ("[1, 2]", "a recipe is a mapping of keys to values, got a list of 2"),
        ("seed: 1\nseed: 2", "key 'seed' is given twice"),
        ("seed: [", "not YAML"),
    ],
)
def test_a_wrong_value_is_named_with_its_path(recipe, text, message):
    path = recipe(text)
    assert str(path) in refusal(path)
    assert message in refusal(path)


def test_a_missing_file_is_a_recipe_error(tmp_path):
    assert "No such file" in refusal(tmp_path / "none.yaml")


def test_overrides_win_and_may_make_new_sections(recipe):
    path = recipe("{seed: 1, name: a}")
    run = load_recipe(path, Run, ("optimizer.lr=1e-2", "name=b", "sizes=[3, 4]", "limit=null"))
    assert (run.optimizer.lr, run.name, run.sizes, run.limit) == (1e-2, "b", (3, 4), None)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lrr=1", "unknown key 'lrr' under 'optimizer'"),
        ("seed", "expected key=value"),
        ("=1", "expected key=value"),
        ("seed.x=1", "'seed' is '1', which has no keys"),
        ("sizes.2=1", "'sizes' is a list of 2; name a position of it, 0 to 1, not '2'"),
        ("sizes.first=1", "not 'first'"),
    ],
)
def test_a_wrong_override_is_refused(recipe, override, message):
    assert message in refusal(recipe("{seed: 1, sizes: [1, 2]}"), override)


def test_an_override_reaches_into_a_list_by_position(recipe):
    assert load_recipe(recipe("{seed: 1, sizes: [1, 2]}"), Run, ("sizes.1=7",)).sizes == (1, 7)


@given(
    st.builds(
        Run,
        seed=st.integers(0, 10**9),
        name=st.text(max_size=5),
        fused=st.booleans(),
        limit=st.none() | st.integers(),
        sizes=st.lists(st.integers(), max_size=3).map(tuple),
        shares=st.dictionaries(st.text(max_size=3), st.floats(allow_nan=False), max_size=2),
        optimizer=st.builds(Optimizer, lr=st.floats(allow_nan=False), kind=st.sampled_from(["adamw", "sgd"])),
    )
)
def test_a_recipe_survives_being_written_as_yaml(run):
    text = yaml.safe_dump(recipe_to_dict(run))
    assert from_dict(yaml.safe_load(text), Run) == run
