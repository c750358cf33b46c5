"""A benchmark from its recipe to its table: draw, score, write; killed, the same command goes on.

Given several times at once, the command draws in as many processes, say one for each GPU; one of them scores.

    out/
      settings.json       the recipe that the folder is of; another one is refused
      1-name/samples/     what the first generator drew, block by block
      1-name/scores.json  its rows, of structure prediction
      scored/             the scoring run of samples without targets, with its report.html
      table.md table.json ours, with the published rows beside

Not here: the verb's options (cli.py).
"""

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from filelock import FileLock
from pymatgen.core import Structure

from crystallm_kit.benchmarks.candidates import Asked, asked_of, candidates_of, draw_candidates
from crystallm_kit.benchmarks.recipe import BenchmarkRecipe, Generator, check_files
from crystallm_kit.benchmarks.structure_prediction import (
    Prediction,
    candidates_from_file,
    in_order,
    prediction_scores,
)
from crystallm_kit.benchmarks.table import OwnRow, as_json, markdown
from crystallm_kit.errors import EmptyInput, UserError
from crystallm_kit.generation import Model, load_model
from crystallm_kit.recipes import recipe_to_dict
from crystallm_kit.records import Conditions, Crystal
from crystallm_kit.scores.pooled import pooled
from crystallm_kit.scores.score import Score
from crystallm_kit.scoring.published import published_table
from crystallm_kit.scoring.sample_sets import content_hash
from crystallm_kit.structures.files import read
from crystallm_kit.text.conditions import conditions_from_dict

Say = Callable[[str], None]
_UNASKED_PER_BLOCK = 20  # samples de novo in the place of one target's candidates
_VERSIONS = ("crystallm-kit", "pymatgen", "torch", "transformers", "moyopy")


def run_benchmark(
    recipe: BenchmarkRecipe,
    out: str | Path,
    *,
    where: str = "recipe",
    command: str = "",
    processes: int | None = None,
    batch_size: int = 256,
    say: Say = lambda _: None,
) -> list[OwnRow]:
    """Run a benchmark, or finish one that was interrupted; write its table and return our rows.

    Args:
        recipe: What to do.
        out: Folder of samples, scores and table.
        where: Name of the recipe's file, for messages.
        command: That asked for it; printed under the table.
        processes: For scoring; None: one per usable core.
        batch_size: Of the engine.
        say: Told of progress.

    Raises:
        RecipeError: If a file that it names is not there.
        UnknownName: If it names a published table that is not there.
        UserError: If the folder is of another recipe.
        EmptyInput: If there are no targets.
    """
    check_files(recipe, where)
    tables = [published_table(name) for name in recipe.published]
    out = Path(out)
    _check_folder(recipe, out)
    begun = time.perf_counter()
    targets: list[Crystal] = []
    rows: list[OwnRow] = []
    if recipe.task == "structure-prediction":
        targets = _targets(recipe, say)
        for number, generator in enumerate(recipe.generators, start=1):
            folder = _folder(out, number, generator)
            rows += _rows_of(recipe, generator, folder, targets, processes, batch_size, say)
    else:
        rows = _rows_without_targets(recipe, out, processes, batch_size, say)
    about = [*_about(recipe, targets), f"command: `{command}`" if command else "command: from Python"]
    _write(out / "table.md", markdown(recipe.title, rows, tables, about))
    _write(out / "table.json", json.dumps(as_json(recipe.title, rows, about), indent=1, ensure_ascii=False))
    say(f"{time.perf_counter() - begun:.0f} s; {out / 'table.md'}")
    return rows


def _folder(out: Path, number: int, generator: Generator) -> Path:
    """Return where a generator's samples and scores go."""
    return out / f"{number}-{re.sub(r'[^A-Za-z0-9.-]+', '_', generator.name)[:60]}"


def _targets(recipe: BenchmarkRecipe, say: Say) -> list[Crystal]:
    found = list(
        islice(
            read(list(recipe.targets.files), on_error=lambda f: say(f"not a target: {f.file}: {f.reason}")),
            recipe.targets.first,
        )
    )
    if not found:
        raise EmptyInput(f"{', '.join(recipe.targets.files)}: no targets, so no rate")
    return found


def _rows_of(
    recipe: BenchmarkRecipe, generator: Generator, folder: Path, targets: list[Crystal],
    processes: int | None, batch_size: int, say: Say,
) -> list[OwnRow]:  # fmt: skip
    """Return the rows of one generator, from its file where they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "scores.json"
    model = None
    if not kept.exists() and not generator.pooled and generator.samples is None:
        model, n_drawn = _model(generator, batch_size), generator.drawn or max(recipe.k)
        _draw(recipe, generator, _asked(recipe, targets), model, folder, n_drawn, say)
    with FileLock(folder / ".scoring.lock"):  # of several processes that drew together, one scores
        if kept.exists():
            return [_own_row(row) for row in json.loads(kept.read_text(encoding="utf-8"))["rows"]]
        truths = [t.structure for t in targets if isinstance(t.structure, Structure)]
        rows = []
        for one in _predictions(recipe, generator, folder, targets, model):
            say(f"{one.name}: matching {len(truths):,} targets")
            scores = prediction_scores(one, truths, recipe.k, processes=processes)
            rows.append(OwnRow(one.name, scores, one.about))
        _write(kept, json.dumps(as_json(generator.name, rows, []), indent=1, ensure_ascii=False))
    return rows


def _asked(recipe: BenchmarkRecipe, targets: Sequence[Crystal]) -> list[Asked]:
    return [asked_of(target, recipe.given) for target in targets]


def _predictions(
    recipe: BenchmarkRecipe, generator: Generator, folder: Path, targets: list[Crystal], model: Model | None
) -> Iterator[Prediction]:
    """Yield the rows of one generator, whose samples are there; `model`: what drew them."""
    k = max(recipe.k)
    if generator.pooled:
        rows = _pooled(recipe, generator, folder.parent, targets, k)
        yield Prediction(generator.name, rows, generator.about)
        return
    if model is None:
        crystals = read(str(generator.samples))
        yield Prediction(
            generator.name, candidates_from_file(crystals, targets, k, generator.name), generator.about
        )
        return
    asked = _asked(recipe, targets)
    found = dict(candidates_of(folder / "samples", model.representation))
    for order in generator.orders:
        name = generator.name if len(generator.orders) == 1 else f"{generator.name}, {order}"
        rows = [in_order(order, found[one.target], k) for one in asked]
        none = sum(not found[one.target] for one in asked)
        about = f"{generator.about}; targets that it could not be asked for, counted as missed: {none:,}"
        yield Prediction(name, rows, about.removeprefix("; ") if none else generator.about)


def _pooled(
    recipe: BenchmarkRecipe, generator: Generator, out: Path, targets: Sequence[Crystal], k: int
) -> list[list[Structure | None]]:
    """Return the candidates of two generators of the run in one order."""
    by_template, by_model = (
        dict(candidates_of(_folder(out, number, one) / "samples", _model(one).representation))
        for name in generator.pooled
        for number, one in enumerate(recipe.generators, start=1)
        if one.name == name
    )
    both = ((by_template[target.id], by_model[target.id]) for target in targets)
    return [in_order("drawn", pooled(*samples), k) for samples in both]


def _draw(
    recipe: BenchmarkRecipe, generator: Generator, asked: Sequence[Asked], model: Model, folder: Path,
    n_drawn: int, say: Say, per_block: int = 1,
) -> None:  # fmt: skip
    draw_candidates(
        asked, model, folder / "samples", n_drawn=n_drawn, seed=recipe.seed,
        targets_per_block=recipe.targets_per_block * per_block,
        say=lambda done, of: say(f"{generator.name}: {done:,} of {of:,} drawn"),
    )  # fmt: skip


def _model(generator: Generator, batch_size: int = 256) -> Model:
    if generator.engine == "template":
        return load_model(engine="template", library=generator.library)
    return load_model(
        generator.model, adapter=generator.adapter, engine=generator.engine, batch_size=batch_size
    )


def _rows_without_targets(
    recipe: BenchmarkRecipe, out: Path, processes: int | None, batch_size: int, say: Say
) -> list[OwnRow]:
    """Draw what nothing, or each condition, is asked of, and score all as `crystallm-kit score` does."""
    from crystallm_kit.scoring.run import score

    asked = {name: conditions_from_dict(data) for name, data in recipe.asked.items()} or {"": Conditions()}
    sets: dict[str, tuple[OwnRow, Path]] = {}
    for number, generator in enumerate(recipe.generators, start=1):
        model = None if generator.samples else _model(generator, batch_size)
        for k, (what, conditions) in enumerate(asked.items(), start=1):
            place = _folder(out, number, generator) / (f"asked-{k}" if what else "")
            name = f"{generator.name}, {what}" if what else generator.name
            samples = Path(str(generator.samples))
            if model is not None:
                requests = [Asked(str(i), conditions) for i in range(recipe.n)]
                _draw(
                    recipe, replace(generator, name=name), requests, model, place, 1, say, _UNASKED_PER_BLOCK
                )
                samples = _joined(place)
            sets[re.sub(r"[/=]", "-", name).lstrip(".")] = OwnRow(name, {}, generator.about), samples
    say(f"scoring {recipe.n:,} samples of each of {len(sets)} sets")
    with FileLock(out / ".scoring.lock"):
        found = score(
            [f"{name}={path}" for name, (_, path) in sets.items()], reference=recipe.scoring.reference,
            out=out / "scored", limit=recipe.n, workers=processes, **_scoring_options(recipe),
        )  # fmt: skip
    return [replace(row, scores={s.name: s for s in found[name]}) for name, (row, _) in sets.items()]


def _scoring_options(recipe: BenchmarkRecipe) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if recipe.scoring.hull is not None:
        options["hull"] = recipe.scoring.hull
        options |= {"relax": recipe.scoring.relax, "potential": recipe.scoring.potential}
    if recipe.scoring.fingerprints:
        options["fingerprints"] = True
    return options


def _joined(place: Path) -> Path:
    """Return the blocks as one file: gzip files joined are one."""
    together = place / "samples.jsonl.gz"
    blocks = sorted((place / "samples").glob("*.gz"))
    partial = place / f".samples.{os.getpid()}.writing"
    partial.write_bytes(b"".join(block.read_bytes() for block in blocks))
    partial.replace(together)
    return together


def _own_row(data: dict[str, Any]) -> OwnRow:
    scores = map(Score.from_dict, data["scores"])
    return OwnRow(data["name"], {s.name: s for s in scores}, data["about"])


def _about(recipe: BenchmarkRecipe, targets: Sequence[Crystal]) -> list[str]:
    versions = ", ".join(f"{name} {version(name)}" for name in _VERSIONS)
    lines = [f"seed {recipe.seed}; {versions}"]
    if targets:
        told = " and ".join(recipe.given)
        lines.insert(0, f"{len(targets):,} targets, {told} given. {recipe.targets.about}".rstrip())
    else:
        what = f"of each of {len(recipe.asked)} conditions" if recipe.asked else "nothing asked"
        lines.insert(0, f"{recipe.n:,} samples of each generator, {what}")
    return lines


def _check_folder(recipe: BenchmarkRecipe, out: Path) -> None:
    """Write down what the folder is of. Raises UserError if it is of another recipe."""
    settings = json.loads(
        json.dumps({**recipe_to_dict(replace(recipe, published=())), "inputs": _hashes(recipe)})
    )
    path = out / "settings.json"
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: a file, expected a folder for the results; name another with --out")
    if path.exists():
        known = json.loads(path.read_text(encoding="utf-8"))
        if known != settings:
            differing = sorted(k for k in {*known, *settings} if known.get(k) != settings.get(k))
            raise UserError(
                f"{out}: holds a benchmark of other settings ({', '.join(differing)}); "
                "name another folder with --out, or remove this one"
            )
        return
    out.mkdir(parents=True, exist_ok=True)
    _write(path, json.dumps(settings, indent=1, ensure_ascii=False))


def _hashes(recipe: BenchmarkRecipe) -> dict[str, str]:
    """Return the hash of each file that decides over the numbers."""
    named = [*recipe.targets.files, *recipe.scoring.reference, *filter(None, [recipe.scoring.hull])]
    for generator in recipe.generators:
        named += [*generator.library, *filter(None, [generator.samples])]
    return {name: content_hash([Path(name)]) for name in named}


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.writing")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
