"""What a benchmark recipe holds: the targets, what is told of them, who generates, which published rows stand
beside.

    crystallm-kit benchmark eval/csp-mp20.yaml --set 'targets.files=[mp_test.parquet]' --out runs/csp

A generator is the kit's model, an adapter of it, the template engine with its library, or a file of samples
that another system made. `orders` says how the candidates of a target are put in a row: as they were drawn,
or by generation.ranked (what the model says most often, then most surely); each is a row of the table.

Not here: drawing (candidates.py), tables (table.py).
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from crystallm_kit.errors import RecipeError

Order = Literal["drawn", "ranked"]
Given = Literal["composition", "spacegroup"]
Task = Literal["structure-prediction", "de-novo", "conditional"]


@dataclass(frozen=True)
class Targets:
    """Crystals whose structure is to be predicted.

    Attributes:
        files: Crystal files, in order.
        first: How many of them; None: all.
        about: What they are, and what of them the generators' training data hold: printed under every table.
    """

    files: tuple[str, ...] = ()
    first: int | None = None
    about: str = ""


@dataclass(frozen=True)
class Generator:
    """Who makes the candidates.

    Attributes:
        name: In the tables.
        model: A model folder; None: the shipped one.
        adapter: Of it.
        engine: "transformers" or another of ENGINES; "template": no model, nearest known prototypes.
        library: Crystal files that the template engine takes its prototypes from.
        samples: A file of crystals made elsewhere, in the order of the targets, n a target; nothing is drawn.
        pooled: Names of two generators before it, a template engine's first: the candidates of both in one
            order (scores/pooled.py); nothing is drawn.
        drawn: Candidates drawn for each target; None: as many as are looked at. Rankings choose among them.
        orders: A row of the table each.
        about: Training data and settings: printed with the row.
    """

    name: str
    model: str | None = None
    adapter: str | None = None
    engine: str = "transformers"
    library: tuple[str, ...] = ()
    samples: str | None = None
    pooled: tuple[str, ...] = ()
    drawn: int | None = None
    orders: tuple[Order, ...] = ("drawn",)
    about: str = ""


@dataclass(frozen=True)
class Scoring:
    """How samples without a target are scored: as by `crystallm-kit score`.

    Attributes:
        reference: Crystal files: what is known.
        hull: A file of formation energies, or None: no stability.
        relax: Whether samples are relaxed by the potential first.
        potential: As in `score --potential`.
        fingerprints: Whether coverage is measured (slow).
    """

    reference: tuple[str, ...] = ()
    hull: str | None = None
    relax: bool = False
    potential: str = "chgnet"
    fingerprints: bool = False


@dataclass(frozen=True)
class BenchmarkRecipe:
    """A benchmark.

    Attributes:
        title: Of its table.
        task: Predict the structures of targets, generate without being asked for anything, or generate what
            has a property.
        seed: Of the draws.
        generators: Rows of the table, in order.
        targets: Of structure prediction.
        given: What the generators are told of a target.
        k: Candidates that are looked at, increasing: rates at each.
        n: Samples of each generator, de novo, or of each generator and each condition.
        asked: Conditions of conditional generation, each by a name: keys as in `records.Conditions`.
        scoring: Of samples without a target.
        published: Tables of eval/published.yaml that stand beside.
        targets_per_block: What is lost at most when the run is killed (de novo: as many samples, times 20).
    """

    title: str
    task: Task
    seed: int
    generators: tuple[Generator, ...]
    targets: Targets = field(default_factory=Targets)
    given: tuple[Given, ...] = ("composition",)
    k: tuple[int, ...] = (1, 5, 20)
    n: int = 1000
    asked: dict[str, dict[str, Any]] = field(default_factory=dict)
    scoring: Scoring = field(default_factory=Scoring)
    published: tuple[str, ...] = ()
    targets_per_block: int = 50

    def __post_init__(self) -> None:
        """Check what the types do not say. Raises ValueError."""
        if not self.generators:
            raise ValueError("generators: at least one expected")
        names = [g.name for g in self.generators]
        if len(set(names)) < len(names):
            raise ValueError(f"generators: each needs a name of its own, got {names}")
        if list(self.k) != sorted(set(self.k)) or not self.k or self.k[0] < 1:
            raise ValueError(f"k: increasing numbers from 1 on expected, got {list(self.k)}")
        if (self.task == "conditional") != bool(self.asked):
            raise ValueError("asked: conditions by name, for the task 'conditional' and no other")
        if self.task == "structure-prediction" and "composition" not in self.given:
            raise ValueError(f"given: the composition at least, got {list(self.given)}")
        for i, generator in enumerate(self.generators):
            if generator.pooled:
                self._check_pooled(generator, self.generators[:i])
            if generator.engine == "template" and not generator.library and not generator.samples:
                raise ValueError(
                    f"generator '{generator.name}': the template engine needs a library of known crystals; "
                    f"name yours: --set 'generators.{i}.library=[FILE]'"
                )
            if generator.drawn is not None and generator.drawn < max(self.k):
                raise ValueError(
                    f"generator '{generator.name}': {generator.drawn} drawn, {max(self.k)} looked at"
                )

    def _check_pooled(self, generator: Generator, before: tuple[Generator, ...]) -> None:
        both = [one for name in generator.pooled for one in before if one.name == name]
        if len(generator.pooled) != 2 or len(both) != 2 or any(one.samples or one.pooled for one in both):
            raise ValueError(
                f"generator '{generator.name}': pooled: names of two generators before it that draw, "
                f"got {list(generator.pooled)}; before it: {', '.join(one.name for one in before) or 'none'}"
            )
        if [one.engine == "template" for one in both] != [True, False]:
            raise ValueError(f"generator '{generator.name}': pooled: a template engine first, then a model")
        if self.task != "structure-prediction":
            raise ValueError(
                f"generator '{generator.name}': pooled: only for the task 'structure-prediction'"
            )


def check_files(recipe: BenchmarkRecipe, where: str) -> None:
    """Raise RecipeError if the recipe names files that are not there, before anything is drawn."""
    needed = {"targets.files": recipe.targets.files, "scoring.reference": recipe.scoring.reference}
    if recipe.scoring.hull:
        needed["scoring.hull"] = (recipe.scoring.hull,)
    for i, generator in enumerate(recipe.generators):
        needed[f"generators.{i}.library"] = generator.library
        if generator.samples:
            needed[f"generators.{i}.samples"] = (generator.samples,)
    if recipe.task == "structure-prediction" and not recipe.targets.files:
        raise RecipeError(f"{where}: no targets; name their files: --set 'targets.files=[FILE]'")
    for key, paths in needed.items():
        for path in paths:
            if not Path(path).exists():
                raise RecipeError(f"{where}: {key}: no file {path}; name yours: --set '{key}=[FILE]'")
