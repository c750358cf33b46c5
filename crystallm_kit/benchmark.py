"""What a model is worth, measured: the numbers of the model card, each by one command.

    python -m crystallm_kit.benchmark predict TARGETS.parquet --targets 500 --samples 60
    python -m crystallm_kit.benchmark predict TARGETS.parquet --condition e_above_hull=0
    python -m crystallm_kit.benchmark predict TARGETS.parquet --engine template --library KNOWN.parquet
    python -m crystallm_kit.benchmark predict TARGETS.parquet --with-template --library KNOWN.parquet
    python -m crystallm_kit.benchmark unconditional -n 2000
    python -m crystallm_kit.benchmark constrained TARGETS.parquet -n 10000
    python -m crystallm_kit.benchmark obeyed TARGETS.parquet --targets 500
    python -m crystallm_kit.benchmark bulk-modulus KNOWN.parquet -n 100
    python -m crystallm_kit.benchmark conditioned --adapter bulk-modulus --targets 50,150,300 -n 200 --out DIR
    python -m crystallm_kit.benchmark facts corpus/ MODEL

`predict` asks for each target's composition (atoms of its primitive cell, and what --condition adds for all)
and matches the candidates with the truth, in the order in which they were drawn and in the order of
`generation.ranked`; with templates, the templates' candidates too, and those of both (scores/pooled.py).

Not here: what matches (scores/matching.py), what is valid (scores/validity.py); conditioned generation, step
by step (conditioned.py).
"""

import argparse
import dataclasses
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from pymatgen.core import Composition, Structure

from crystallm_kit.conditioned import calibration, conditioned, known_crystals
from crystallm_kit.engines.engine import Sampling
from crystallm_kit.errors import EmptyInput, ImpossibleRequest, UserError
from crystallm_kit.generation import Model, candidates, load_model, ranked, stream
from crystallm_kit.records import Conditions, Crystal, Range, Sample
from crystallm_kit.scores.funnel import Funnel, funnel, mark_duplicates
from crystallm_kit.scores.hits import is_ordered, lines
from crystallm_kit.scores.matching import MatchRate, match_rate, rms_distances
from crystallm_kit.scores.pooled import pooled
from crystallm_kit.structures.files import read
from crystallm_kit.structures.relaxation import load_potential
from crystallm_kit.structures.symmetry import spacegroup_number
from crystallm_kit.text.conditions import parse_conditions

KS = (1, 5, 20)
_JOBS_OF_A_TASK = 4


def predict(
    targets: Sequence[Crystal],
    model: Model,
    *,
    n_samples: int,
    seed: int = 0,
    sampling: Sampling | None = None,
    properties: Mapping[str, Range] | None = None,
    template: Model | None = None,
) -> dict[str, list[MatchRate]]:
    """Return match rates given the composition alone, for candidates as drawn and as ranked.

    Args:
        targets: With their true structures in primitive cells.
        model: What predicts.
        n_samples: Candidates drawn for each target; rankings choose among these.
        seed: Of the draws.
        sampling: How tokens are drawn.
        properties: Asked of every target's candidates besides the composition.
        template: The template engine as a model, asked for as many candidates.

    Returns:
        "as drawn" and "ranked" -> match rates for each k of KS that n_samples reaches; for a model that draws
        nothing, "as drawn" alone. With templates also "template" and "template + model".

    Raises:
        EmptyInput: Without targets or samples.
    """
    if not targets or n_samples < 1:
        raise EmptyInput(f"predict: {len(targets)} targets, {n_samples} samples each, so no rate")
    asked = [dataclasses.replace(composition_of(t), properties=properties or {}) for t in targets]

    def candidates_of(model: Model) -> list[list[Sample]]:
        return list(candidates(asked, n_samples, seed=seed, model=model, sampling=sampling))

    drawn = candidates_of(model)
    kinds = {"as drawn": drawn}
    if getattr(model.engine, "is_drawn", True):  # templates stand in their order already
        kinds["ranked"] = [ranked(samples) for samples in drawn]
    if template is not None:
        kinds["template"] = candidates_of(template)
        kinds["template + model"] = [pooled(*both) for both in zip(kinds["template"], drawn, strict=True)]
    jobs = [
        ([s.structure for s in samples[: max(KS)]], target.structure)
        for rows in kinds.values()
        for samples, target in zip(rows, targets, strict=True)
    ]
    workers = min(os.cpu_count() or 1, -(-len(jobs) // _JOBS_OF_A_TASK))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        distances = list(pool.map(_distances, jobs, chunksize=_JOBS_OF_A_TASK))
    reached = [k for k in KS if k <= n_samples]
    n = len(targets)
    return {
        kind: [match_rate(distances[i * n : (i + 1) * n], k) for k in reached] for i, kind in enumerate(kinds)
    }


def _distances(job: tuple[list[Structure], Structure]) -> list[float | None]:
    return rms_distances(*job)


def composition_of(crystal: Crystal) -> Conditions:
    """Return the conditions that ask for the atoms of a crystal's cell, and nothing else."""
    counts = _atoms(crystal.structure.composition)
    return Conditions(formula=counts, n_sites=sum(counts.values()))


def _atoms(composition: Composition) -> dict[str, int]:
    return {str(element): round(n) for element, n in composition.get_el_amt_dict().items()}


def constrained_run(targets: Iterable[Crystal], model: Model, *, n: int, seed: int = 0) -> dict[str, int]:
    """Return counts over n constrained samples, one composition after the other: finished, parsed, as asked.

    Raises:
        EmptyInput: Without targets.
    """
    wanted = [composition_of(t) for t in targets]
    if not wanted:
        raise EmptyInput("constrained: no targets, so nothing to ask for")
    requests = [wanted[i % len(wanted)] for i in range(n)]
    counts = {"requested": n, "finished": 0, "parsed": 0, "composition as asked": 0}
    for request, sample in zip(requests, stream(requests, seed=seed, model=model, redraws=0), strict=True):
        counts["finished"] += sample.verdict.reason != "truncated"
        if sample.structure is None:
            continue
        counts["parsed"] += 1
        counts["composition as asked"] += _atoms(sample.structure.composition) == dict(request.formula or {})
    return counts


def obeyed(targets: Iterable[Crystal], model: Model, *, seed: int = 0) -> dict[str, int]:
    """Return how often composition and space group, asked together, are found in the sample.

    Raises:
        ImpossibleRequest: If a target is a molecule.
    """
    requests = []
    for target in targets:
        asked = composition_of(target)
        if not isinstance(target.structure, Structure):
            raise ImpossibleRequest(f"{target.id}: a molecule; only crystals have a space group")
        requests.append(dataclasses.replace(asked, spacegroup_number=spacegroup_number(target.structure)))
    samples = list(stream(requests, seed=seed, model=model))
    return {
        "requested": len(samples),
        "composition found": sum(bool(s.verdict.checks.get("formula")) for s in samples),
        "space group found": sum(bool(s.verdict.checks.get("spacegroup")) for s in samples),
        "valid": sum(s.verdict.valid for s in samples),
    }


def unconditional(model: Model, *, n: int, seed: int = 0, redraws: int = 3) -> tuple[Funnel, float]:
    """Return the funnel of n unconditional samples, and the seconds from first request to last verdict."""
    begun = time.perf_counter()
    drawn = stream([Conditions()] * n, seed=seed, model=model, redraws=redraws)
    samples: list[Sample] = mark_duplicates(drawn)
    return funnel(samples), time.perf_counter() - begun


def write_facts(corpus: str | Path, model: str | Path, *, max_sites: int | None = None) -> dict[str, object]:
    """Write into a model's manifest what generation has to know of its training data, and return it.

    Args:
        corpus: What it was trained on.
        model: Its folder.
        max_sites: Atoms of the primitive cell at most, where a request leaves them open; None: as in
            training.
    """
    import pyarrow.parquet as pq

    seen: set[str] = set()
    largest = 0
    for shard in sorted(Path(corpus).glob("train-*.parquet")):
        for text in pq.read_table(shard, columns=["text"])["text"].to_pylist():
            counts = re.findall(r"([A-Z][a-z]?)(\d+)", text.partition("\n")[0])
            seen.update(element for element, _ in counts)
            largest = max(largest, sum(int(n) for _, n in counts))
    if not seen:
        raise EmptyInput(f"{corpus}: no training crystals; expected a corpus of the format 'wyckoff'")
    path = Path(model) / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    max_sites = max_sites or largest
    manifest["results"] |= {"elements": sorted(seen), "max_sites": max_sites}
    plain = json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(plain + "\n", encoding="utf-8")
    return {"elements": len(seen), "max_sites": max_sites}


def main(arguments: list[str] | None = None) -> int:
    """Run one benchmark and print its numbers."""
    parser = argparse.ArgumentParser(prog="python -m crystallm_kit.benchmark", description=main.__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name in ("predict", "constrained", "obeyed"):
        verb = verbs.add_parser(name)
        verb.add_argument("data", help="crystals with their true structures")
    for name in ("predict", "obeyed"):
        verbs.choices[name].add_argument("--targets", type=int, default=500, help="the first of the file")
    verbs.choices["predict"].add_argument("--samples", type=int, default=60, help="drawn for each target")
    verbs.choices["predict"].add_argument("--number-temperature", type=float, default=None)
    verbs.choices["predict"].add_argument(
        "--condition", action="append", default=[], metavar="NAME=VALUE",
        help="a property asked of every candidate, such as e_above_hull=0; may be repeated",
    )  # fmt: skip
    verbs.choices["predict"].add_argument(
        "--with-template",
        action="store_true",
        help="the templates' candidates too, and both together",
    )
    verbs.choices["constrained"].add_argument("-n", type=int, default=10_000)
    verb = verbs.add_parser("unconditional")
    verb.add_argument("-n", type=int, default=2000)
    verb.add_argument("--redraws", type=int, default=3)
    for verb in verbs.choices.values():
        verb.add_argument("--model", default=None, help="model folder; default: the shipped one")
        verb.add_argument("--seed", type=int, default=0)
        verb.add_argument("--batch-size", type=int, default=256)
        verb.add_argument("--engine", default="transformers", help="transformers, vllm or template")
        verb.add_argument("--library", nargs="+", default=[], help="known crystals, for templates")
    _add_bulk_modulus_verbs(verbs)
    verb = verbs.add_parser("facts")
    verb.add_argument(
        "--max-sites", type=int, default=None, help="of the primitive cell; default: as in training"
    )
    verb.add_argument("corpus")
    verb.add_argument("folder", help="model folder")
    options = parser.parse_args(arguments)
    if options.verb == "facts":
        print(json.dumps(write_facts(options.corpus, options.folder, max_sites=options.max_sites)))
        return 0
    if options.verb in ("bulk-modulus", "conditioned"):
        return _bulk_modulus(options) if options.verb == "bulk-modulus" else _conditioned(options)
    properties = _properties(options.condition) if options.verb == "predict" else {}
    with_template = options.verb == "predict" and options.with_template
    template = load_model(engine="template", library=options.library) if with_template else None
    library = () if with_template else options.library
    model = load_model(options.model, engine=options.engine, batch_size=options.batch_size, library=library)
    begun = time.perf_counter()
    if options.verb == "predict":
        targets = list(islice(read(options.data), options.targets))
        sampling = Sampling(number_temperature=options.number_temperature)
        found = predict(
            targets, model, n_samples=options.samples, seed=options.seed, sampling=sampling,
            properties=properties, template=template,
        )  # fmt: skip
        for order, rates in found.items():
            for rate in rates:
                print(f"n={rate.k:<3} {order:<16} {rate}")
    elif options.verb == "constrained":
        print(json.dumps(constrained_run(read(options.data), model, n=options.n, seed=options.seed)))
    elif options.verb == "obeyed":
        print(json.dumps(obeyed(islice(read(options.data), options.targets), model, seed=options.seed)))
    else:
        counts, seconds = unconditional(model, n=options.n, seed=options.seed, redraws=options.redraws)
        print("\n".join(counts.lines()))
        speeds = (counts.requested / seconds, counts.charge / seconds)
        print(f"{speeds[0]:.1f} samples/s, {speeds[1]:.1f} valid/s, {seconds:.1f} s")
    print(f"{time.perf_counter() - begun:.0f} s", file=sys.stderr)
    return 0


def _add_bulk_modulus_verbs(verbs: Any) -> None:
    known = verbs.add_parser("bulk-modulus", help="how measured bulk moduli agree with known ones")
    known.add_argument("data", help="crystals with their bulk moduli")
    known.add_argument("-n", type=int, default=100, help="the first of the file")
    targets = verbs.add_parser("conditioned", help="what crystals turn out to have that were asked for")
    targets.add_argument("--model", default=None, help="the base's folder; default: the shipped one")
    targets.add_argument("--adapter", required=True, help="a folder, or a shipped one's name")
    targets.add_argument("--targets", default="50,150,300", metavar="GPA,GPA")
    targets.add_argument("-n", type=int, default=200, help="samples for each target, and without one")
    targets.add_argument("--out", required=True, metavar="DIR", help="of the rows; the same one resumes")
    targets.add_argument("--reference", action="append", default=[], help="training data; tells what is new")
    targets.add_argument("--seed", type=int, default=0)
    targets.add_argument("--batch-size", type=int, default=256)
    for verb in (known, targets):
        verb.add_argument("--potential", default="chgnet", help="or an ASE calculator as module:factory")
        verb.add_argument("--device", default=None, help="of the potential: cpu, cuda")


def _bulk_modulus(options: argparse.Namespace) -> int:
    potential = load_potential(options.potential, device=options.device)
    found = calibration(list(islice(read(options.data), options.n)), potential)
    print(json.dumps({"potential": potential.name, **found}))
    return 0


def _conditioned(options: argparse.Namespace) -> int:
    try:
        targets = [float(word) for word in options.targets.split(",")]
    except ValueError as error:
        raise UserError(f"--targets '{options.targets}': expected numbers such as 50,150,300") from error
    base = load_model(options.model, batch_size=options.batch_size)
    adapter = load_model(options.model, adapter=options.adapter, batch_size=options.batch_size)
    results = conditioned(
        base, adapter, options.out, targets=targets, n=options.n, seed=options.seed,
        potential=load_potential(options.potential, device=options.device),
        known=known_crystals(read(options.reference)) if options.reference else None,
        say=lambda line: print(line, file=sys.stderr),
    )  # fmt: skip
    print("\n".join(lines(results)))
    print(f"medians in the order of the targets: {'yes' if is_ordered([r for _, r in results]) else 'no'}")
    return 0


def _properties(entries: Sequence[str]) -> Mapping[str, Range]:
    """Return the properties that "name=value" entries ask for. Raises UserError if one is no property."""
    conditions = parse_conditions(properties=entries)
    if conditions != Conditions(properties=conditions.properties):
        raise UserError(f"--condition {' '.join(entries)}: only properties can be asked of every target")
    return conditions.properties


if __name__ == "__main__":
    raise SystemExit(main())
