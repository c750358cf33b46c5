"""What each verb of the command does: options in, one call into the package, tables or JSON out.

Every function here takes the parsed options of its verb (cli.py) and returns the exit code. What was read and
judged goes to standard output, what could not be read to standard error, entry by entry.

Not here: the options themselves, exit codes of errors (cli.py), tables (screen.py), the folder of a
generation (results.py).
"""

import argparse
import importlib.util
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crystallm_kit.errors import EncodeError, MissingExtra, ParseError, UnknownName, UserError
from crystallm_kit.records import Conditions, Crystal, Sample, Verdict

if TYPE_CHECKING:
    from crystallm_kit.generation import Model
    from crystallm_kit.structures.files import ReadFailure
    from crystallm_kit.text.words import Understood

# Format -> the prompt template that its models are spoken to in.
_TEMPLATES = {"wyckoff": "kit-1", "compact": "crystal-text-llm", "cif": "cif-crystallm"}
_TEMPLATES_OF_BASES = {**dict.fromkeys(("wyckoff", "cif", "xyz"), "words-1"), "compact": "crystal-text-llm"}


# ---------------------------------------------------------------- verbs


def generate(options: argparse.Namespace) -> int:
    """Generate crystals from words and conditions; judge, write and show them."""
    from crystallm_kit.generation import stream
    from crystallm_kit.results import check_folder
    from crystallm_kit.scores.thresholds import PROTOCOLS

    understood, conditions = _asked(options)
    n = _n_requested(options, understood)
    _known("protocol", options.protocol, PROTOCOLS)
    given = _sampling(options)
    check_folder(options.out)
    _tell_of_adapters(options, conditions)
    with _opened(options) as model:
        samples = stream(
            [conditions] * n, seed=options.seed, model=model, sampling=replace(model.sampling, **given),
            constrained=not options.unconstrained, protocol=options.protocol,
        )  # fmt: skip
        return _finish(options, samples, n, understood=understood, conditions=conditions)


def predict(options: argparse.Namespace) -> int:
    """Generate candidates for a composition, relax them, and show the polymorphs by energy."""
    from crystallm_kit.prediction import predict
    from crystallm_kit.structures.relaxation_workers import RelaxSettings

    understood, conditions = _asked(options)
    if not conditions.formula:
        raise UserError("nothing to predict: give a formula, such as Sn5S4Cl2")
    n = 50 if options.n is None and (understood is None or understood.n is None) else None
    n = n or _n_requested(options, understood)
    given = _sampling(options)
    formula = "".join(f"{e}{k if k > 1 else ''}" for e, k in conditions.formula.items())
    out = options.out or Path("predictions") / formula
    hull, references = (None, None) if options.no_relax else _hull(options, conditions)
    with _opened(options) as model:
        prediction = predict(
            conditions, n=n, seed=options.seed, model=model, sampling=replace(model.sampling, **given),
            protocol=options.protocol, relaxes=not options.no_relax, hull=hull, references=references,
            relaxation=RelaxSettings(potential=options.potential, max_steps=options.max_steps), out=out,
            workers=options.workers, say=_progress if sys.stderr.isatty() else None,
        )  # fmt: skip
    if options.json:
        _print_json({**prediction.as_dict(), "out": str(out)})
        return 0
    from crystallm_kit.screen import console, polymorphs_table

    print()
    console().print(polymorphs_table(prediction))
    for line in prediction.lines():
        print(line)
    print(f"files: {out}")
    return 0


def _hull(options: argparse.Namespace, conditions: Conditions) -> Any:
    """Return the hull and the references that are asked for; None where they are not."""
    from crystallm_kit.scores.stability.element_references import read_references, shipped_references
    from crystallm_kit.scores.stability.hull_sources import materials_project_hull, read_hull

    if options.hull is None:
        return None, None
    references = (
        read_references(options.references) if options.references else shipped_references(options.potential)
    )
    if options.hull == "materials-project":
        return materials_project_hull(conditions.formula or ()), references
    return read_hull(options.hull), references


def _progress(what: str, done: int, n: int) -> None:
    print(f"\r{what} {done:,} of {n:,} ", end="\n" if done == n else "", file=sys.stderr, flush=True)


def complete(options: argparse.Namespace) -> int:
    """Go on with the beginning of a crystal's text; judge, write and show what comes."""
    from crystallm_kit.generation import complete_crystal
    from crystallm_kit.results import check_folder

    text = _text_from(options.text).replace("\\n", "\n")
    if not text.strip():
        raise ParseError("empty", "nothing is given to complete")
    check_folder(options.out)
    n = _n_requested(options, None)
    with _opened(options) as model:
        samples = complete_crystal(text, n=n, seed=options.seed, model=model, protocol=options.protocol)
    return _finish(options, iter(samples), n)


def infill(options: argparse.Namespace) -> int:
    """Rank the elements that could replace one element of a crystal."""
    from crystallm_kit.generation import infill
    from crystallm_kit.text.conditions import parse_elements

    candidates = parse_elements(options.candidates)[0] if options.candidates else None
    crystal = _one_crystal(options.file)
    with _opened(options) as model:
        ranked = infill(crystal, options.element, model=model, candidates=candidates)
    if options.json:
        _print_json({"id": crystal.id, "element": options.element, "probabilities": dict(ranked)})
        return 0
    print(f"{options.element} in {crystal.structure.composition.reduced_formula} ({crystal.id})")
    for symbol, probability in ranked[: options.top]:
        print(f"{symbol:<3} {probability:8.4f}")
    return 0


def serve(options: argparse.Namespace) -> int:
    """Serve a model over HTTP until a signal comes."""
    for library in ("fastapi", "uvicorn", "httpx", "prometheus_client"):
        if importlib.util.find_spec(library) is None:
            raise MissingExtra.of("serve", library, "serve")
    adapters = [entry.partition("=")[2] or entry for entry in options.adapter]
    is_here = options.model is None or (Path(options.model) / "config.json").exists()
    if is_here and all("/" not in path or Path(path).is_dir() for path in adapters):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is looked for on the network
    from crystallm_kit.server.run import serve
    from crystallm_kit.server.serving import Serving
    from crystallm_kit.server.state import ServerSettings
    from crystallm_kit.server.vllm_jobs import split_arguments

    limits = ("max_queue", "max_n", "max_samples", "max_body_bytes", "slots", "judges", "drain_seconds")
    settings = ServerSettings(
        host=options.host, port=options.port, api_key_file=options.api_key_file,
        **{name: getattr(options, name) for name in limits if getattr(options, name) is not None},
    )  # fmt: skip
    state = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "crystallm-kit"
    what = Serving(
        model=options.model, name=options.name, adapters=tuple(options.adapter),
        adapter_folder=options.adapter_folder, template=options.template, text_format=options.text_format,
        engine=options.engine, device=options.device, upstream=tuple(options.upstream),
        upstream_key=_key(options.upstream_key_file, "--upstream-key-file"), engines=options.engines,
        vllm_arguments=tuple(split_arguments(options.vllm_args)), vllm_python=options.vllm_python,
        kv_cache_gb=options.kv_cache_gb,
        state_folder=options.state_folder or state / f"serve-{options.port}",
    )  # fmt: skip
    return serve(what, settings, allow_public_without_key=options.allow_public_without_key)


def validate(options: argparse.Namespace) -> int:
    """Judge the crystals of files; an entry that cannot be read counts as not valid."""
    from crystallm_kit.scores.funnel import funnel, mark_duplicates
    from crystallm_kit.scores.thresholds import PROTOCOLS
    from crystallm_kit.scores.validity import validate_and_measure
    from crystallm_kit.structures.files import read

    _known("protocol", options.protocol, PROTOCOLS)
    conditions = _conditions(options)
    samples: list[Sample] = []

    def add(name: str, structure: Any, verdict: Verdict, measures: Any) -> None:
        samples.append(Sample(name, "", structure, verdict, conditions, float("nan"), 0, "", measures))

    def unreadable(failure: "ReadFailure") -> None:
        add(f"{failure.file}:{failure.entry}", None, Verdict(False, "parse:unreadable", failure.reason), {})

    for crystal in read(options.inputs, on_error=unreadable, allow_disordered=True):
        verdict, measures = validate_and_measure(crystal, conditions=conditions, protocol=options.protocol)
        add(crystal.id, crystal.structure, verdict, measures)
    judged = samples if options.keep_duplicates else mark_duplicates(samples)
    _show(options, judged, {"protocol": options.protocol}, names="crystal")
    if not options.json:
        print(f"protocol {options.protocol}: {funnel(judged).unique:,} of {len(judged):,} are valid")
    return 0


def score(options: argparse.Namespace) -> int:
    """Score sample sets side by side; write rows and report, show the scores."""
    from crystallm_kit.scoring.request import Request
    from crystallm_kit.scoring.run import run
    from crystallm_kit.scoring.sample_sets import named_sets
    from crystallm_kit.scoring.terminal import print_report

    sets = named_sets(options.samples, requested=options.requested, limit=options.limit)
    request = Request(
        tuple(sets), options.out, tuple(map(Path, options.reference)),
        (Path(options.targets),) if options.targets else (), options.pairing,
        tuple(options.protocol) if options.protocol else None,
        **{name: getattr(options, name) for name in (
            "fingerprints", "relax", "hull", "potential", "element_references", "cutoffs", "workers", "ray",
            "fresh",
        )},
        published=None if options.published is None else tuple(options.published),
    )  # fmt: skip
    report = run(request, progress=True, command=shlex.join(["crystallm-kit", *sys.argv[1:]])).report
    if options.json:
        _print_json(report)
        return 0
    print_report(report)
    for name in ("report.html", "report.json", "rows"):
        if (options.out / name).exists():
            print(f"{options.out / name}")
    return 0


def report(options: argparse.Namespace) -> int:
    """Write the page of a scoring run, or one that compares several."""
    from crystallm_kit.scoring.comparison import compare_runs
    from crystallm_kit.scoring.report import write_report

    if len(options.folders) == 1 and options.out is None:
        print(write_report(options.folders[0]))
    else:
        print(compare_runs(options.folders, options.out or Path("comparison.html")))
    return 0


def encode(options: argparse.Namespace) -> int:
    """Write crystals as text; the exit code is 2 if the format could not carry one of them."""
    from crystallm_kit.structures.files import read
    from crystallm_kit.text.representation import representation

    form = representation(options.format, **_settings(options.set))
    n_failed = 0

    def lines() -> Iterator[str]:
        nonlocal n_failed
        for crystal in read(options.inputs, on_error=_say_failure):
            try:
                text = form.encode(crystal)
            except EncodeError as error:
                n_failed += 1
                print(f"not encoded: {crystal.id}: {error}", file=sys.stderr)
                continue
            yield json.dumps({"id": crystal.id, "text": text}) if options.json else text + "\n"

    _print_lines(lines(), options.out)
    return 2 if n_failed else 0


def decode(options: argparse.Namespace) -> int:
    """Read crystals from their texts; the exit code is 2 if one of them is no crystal."""
    from crystallm_kit.structures.writing import text_of, write
    from crystallm_kit.text.parsing import parse_completion
    from crystallm_kit.text.representation import representation

    form = representation(options.format, **_settings(options.set))
    n_failed = 0

    def crystals() -> Iterator[Crystal]:
        nonlocal n_failed
        for name, text in _texts(options.input):
            found = parse_completion(text, form)
            if isinstance(found, Verdict):
                n_failed += 1
                print(f"not decoded: {name}: {found.reason}: {found.detail}", file=sys.stderr)
                continue
            yield replace(found, id=name)

    if options.out is not None:
        n_written = write(crystals(), options.out)
        print(f"{n_written:,} written to {options.out}", file=sys.stderr)
    else:
        found = list(crystals())
        if len(found) > 1:
            raise UserError(f"{options.input} holds {len(found)} crystals; name a place for them with --out")
        for crystal in found:
            print(text_of(crystal, "cif"), end="")
    if n_failed and options.out is None and not found:
        raise ParseError("nothing_decoded", f"{options.input}: no text of it is a crystal")
    return 2 if n_failed else 0


def convert(options: argparse.Namespace) -> int:
    """Read crystals of one kind of file and write another."""
    from crystallm_kit.structures.files import read, write

    crystals = read(
        options.inputs,
        on_error=_say_failure,
        allow_disordered=options.allow_disordered,
        progress=sys.stderr.isatty(),
    )
    n_written = write(crystals, options.out, format=options.format_out)
    print(f"{n_written:,} written to {options.out}", file=sys.stderr)
    return 0


def prepare(options: argparse.Namespace) -> int:
    """Prepare a corpus, or finish one that was interrupted."""
    from crystallm_kit.recipes import load_recipe
    from crystallm_kit.tokens.corpus import CorpusRecipe, prepare, print_report

    overrides = []
    if options.recipe is None:
        overrides.append(f"seed={options.seed or 0}")
    elif options.seed is not None:
        overrides.append(f"seed={options.seed}")
    if options.format is not None:
        from crystallm_kit.text.representation import REPRESENTATIONS

        _known("representation", options.format, REPRESENTATIONS)
        overrides.append(f"encoding.format={options.format}")
        templates = _TEMPLATES if options.tokenizer is None else _TEMPLATES_OF_BASES
        if options.format in templates:
            overrides.append(f"encoding.template={templates[options.format]}")
    elif options.tokenizer is not None and options.recipe is None:
        overrides.append("encoding.template=words-1")
    if options.tokenizer is not None:
        overrides.append(f"encoding.tokenizer={json.dumps(options.tokenizer)}")
    recipe = load_recipe(options.recipe, CorpusRecipe, (*overrides, *options.set))
    given = {"validation": options.validation, "test": options.test}
    inputs = {"train": options.inputs, **{split: paths for split, paths in given.items() if paths}}
    report = prepare(
        inputs if len(inputs) > 1 else options.inputs, recipe, options.out,
        workers=options.workers, executor=options.executor,
    )  # fmt: skip
    if options.json:
        _print_json(asdict(report))
    else:
        print_report(report)
    return 0


def train(options: argparse.Namespace) -> int:
    """Train by a recipe, or go on with a run that was interrupted: corpus, steps, samples, card, push."""
    from crystallm_kit.fine_tuning import fine_tune, look_ahead
    from crystallm_kit.recipes import recipe_to_dict
    from crystallm_kit.training.progress import is_first_process

    out = options.out or Path("runs") / options.recipe.stem
    given: dict[str, Any] = {"overrides": options.set, "workers": options.workers}
    if options.preflight:
        lines = look_ahead(options.recipe, out, **given)
        if is_first_process():
            print("\n".join(lines))
        return 0
    result = fine_tune(options.recipe, out, resume=not options.fresh, **given)
    if is_first_process():
        plain = recipe_to_dict(result)
        finite = {k: None if v in (math.inf, -math.inf) else v for k, v in plain.items()}  # JSON has no inf
        _print_json(finite)
    return 0


def merge(options: argparse.Namespace) -> int:
    """Write the base model with an adapter merged into it as a model folder of its own."""
    from crystallm_kit.models.adapters import merge_adapter
    from crystallm_kit.models.publishing import write_card

    folder = merge_adapter(options.adapter, options.out, dtype=options.dtype, base=options.base)
    write_card(folder)
    print(f"{folder}: crystallm-kit generate --model {folder}")
    return 0


def push(options: argparse.Namespace) -> int:
    """Send a model folder to Hugging Face."""
    from crystallm_kit.models.publishing import push_to_hub

    address = push_to_hub(
        options.folder, options.repository, private=not options.public, revision=options.revision,
        license=options.license,
    )  # fmt: skip
    print(address)
    return 0


def import_(options: argparse.Namespace) -> int:
    """Turn another system's checkpoint into a model folder."""
    from crystallm_kit.models.importing import import_model

    made = import_model(options.system, options.checkpoint, options.out)
    facts = "".join(f"; {name} {value}" for name, value in made.facts.items() if name != "source_sha256")
    print(f"{made.folder}: {made.n_parameters:,} parameters{facts}")
    for note in made.notes:
        print(f"note: {note}")
    print(f"crystallm-kit generate --model {made.folder}")
    return 0


def benchmark(options: argparse.Namespace) -> int:
    """Run a benchmark by its recipe, or finish one that was interrupted."""
    from crystallm_kit.benchmarks.recipe import BenchmarkRecipe
    from crystallm_kit.benchmarks.run import run_benchmark
    from crystallm_kit.benchmarks.table import as_json, own_table
    from crystallm_kit.recipes import load_recipe

    recipe = load_recipe(options.recipe, BenchmarkRecipe, tuple(options.set))
    out = options.out or Path("runs") / options.recipe.stem
    settings = [word for entry in options.set for word in ("--set", entry)]
    command = shlex.join(["crystallm-kit", "benchmark", str(options.recipe), *settings])
    rows = run_benchmark(
        recipe, out, where=str(options.recipe), command=command, processes=options.workers,
        batch_size=options.batch_size, say=lambda line: print(line, file=sys.stderr),
    )  # fmt: skip
    if options.json:
        _print_json(as_json(recipe.title, rows, []))
    else:
        print("\n".join(own_table(rows)))
        print(f"{out / 'table.md'}: with the published rows beside")
    return 0


def tokenizer(options: argparse.Namespace) -> int:
    """Build tokenizers from their recipes."""
    from crystallm_kit.tokens.tokenizer import main as build

    build(["--build", "--folder", str(options.folder), *options.names])
    return 0


# ---------------------------------------------------------------- what is asked for


def _asked(options: argparse.Namespace) -> tuple["Understood | None", Conditions]:
    """Return what the words and the options ask for together; show it before anything is generated."""
    from crystallm_kit.text.conditions import check_conditions, combined, describe

    given = _conditions(options)
    understood = None
    conditions = given
    if options.prompt is not None:
        from crystallm_kit.text.words import understand

        understood = understand(options.prompt)
        if not understood.understood:
            hints = " ".join(f"({note})" for note in understood.notes)
            raise UserError(
                f"prompt '{options.prompt}': nothing of it was understood {hints}".rstrip()
                + "; say it with formulas, elements, space groups, properties, or use the options (--help)."
            )
        conditions = combined(understood.conditions, given)
        check_conditions(conditions)
        print(understood.report(), file=_notes(options))
    if conditions != (understood.conditions if understood else None):
        print(
            f"asked for{', with the options' if understood else ''}: {describe(conditions)}",
            file=_notes(options),
        )
    return understood, conditions


def _conditions(options: argparse.Namespace) -> Conditions:
    from crystallm_kit.text.conditions import parse_conditions

    return parse_conditions(
        options.formula, options.elements, spacegroup=options.spacegroup, sites=options.sites,
        properties=options.condition,
    )  # fmt: skip


def _n_requested(options: argparse.Namespace, understood: "Understood | None") -> int:
    n = options.n if options.n is not None else (understood.n if understood else None)
    if n is not None and n < 1:
        raise UserError(f"-n {n}: 1 or more expected")
    return 1 if n is None else int(n)


def _sampling(options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of the sampling that are given; the model's own hold for the others."""
    from crystallm_kit.engines.engine import Sampling

    names = ("temperature", "number_temperature", "top_p", "top_k")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    Sampling(seed=options.seed, **given)  # refused before the model is loaded
    return given


def _model(options: argparse.Namespace) -> "Model":
    """Return the model; a whole one in a folder is never looked for on the network."""
    folder = Path(options.model) if options.model is not None else Path(__file__).parent / "pretrained"
    if (folder / "config.json").exists():  # an adapter has none, and its base may have to be fetched
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from crystallm_kit.generation import load_model

    if options.batch_size < 1:
        raise UserError(f"--batch-size {options.batch_size}: 1 or more expected")
    return load_model(
        options.model, adapter=options.adapter, template=options.template, format=options.text_format,
        batch_size=options.batch_size, constrained=not getattr(options, "unconstrained", False),
        **_server(options),
    )  # fmt: skip


@contextmanager
def _opened(options: argparse.Namespace) -> Iterator["Model"]:
    """Give the model, and stop what its engine has started."""
    model = _model(options)
    try:
        yield model
    finally:
        getattr(model.engine, "close", lambda: None)()


def _server(options: argparse.Namespace) -> dict[str, Any]:
    """Return where the model runs; an address alone says that it is a server."""
    engine = options.engine or ("transformers" if options.url is None else "openai")
    key = _key(options.api_key_file, "--api-key-file")
    return {
        "engine": engine, "url": options.url, "served_name": options.served_model, "api_key": key,
        "library": options.library,
    }  # fmt: skip


def _key(file: Path | None, option: str) -> str:
    """Return the first line of a key's file; "" without one. Raises UserError; it never holds the key."""
    if file is None:
        return ""
    try:
        key = file.read_text(encoding="utf-8").partition("\n")[0].strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option} {file}: cannot be read") from error
    if not key:
        raise UserError(f"{option} {file}: its first line is empty")
    return key


def _tell_of_adapters(options: argparse.Namespace, conditions: Conditions) -> None:
    """Say which adapter has learned a property that is asked of the shipped model, which has not."""
    from crystallm_kit.models.folders import adapter_for

    if options.model is not None or options.adapter is not None or options.url is not None:
        return
    if options.engine == "template":
        return
    for name in conditions.properties:
        adapter = adapter_for(name)
        if adapter is not None:
            print(f"note: the shipped model has not learned {name}; add --adapter {adapter}", file=sys.stderr)


def _known(kind: str, name: str, known: Any) -> None:

    if name not in known:
        raise UnknownName.among(kind, name, known)


def _settings(pairs: Sequence[str]) -> dict[str, Any]:
    """Return a text format's settings from "decimals=4"."""
    import yaml

    settings = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"--set '{pair}': expected name=value, such as decimals=4")
        settings[name.strip()] = yaml.safe_load(value)
    return settings


# ---------------------------------------------------------------- input


def _one_crystal(path: str) -> Crystal:
    from crystallm_kit.structures.files import read

    crystals = read(path, on_error=_say_failure)
    first = next(crystals, None)
    if first is None or next(crystals, None) is not None:
        raise UserError(f"{path}: expected one crystal, found {'none' if first is None else 'more'}")
    return first


def _text_from(source: str) -> str:
    """Return a text that is given as it is, in a file, or on standard input ("-")."""
    if source == "-":
        return sys.stdin.read()
    return (
        Path(source).read_text(encoding="utf-8") if len(source) < 255 and Path(source).is_file() else source
    )


def _texts(source: str) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of a JSON Lines file with "text" and perhaps "id", or of a file with one text."""
    if source != "-" and not Path(source).is_file():
        raise UserError(
            f"{source}: no such file; give a file with a crystal's text, .jsonl, or - for standard input"
        )
    whole = _text_from(source)
    if not whole.lstrip().startswith("{"):
        yield ("crystal" if source == "-" else Path(source).stem), whole.strip("\n")
        return
    for number, line in enumerate(whole.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            text = entry["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{source}: line {number}: expected a JSON object with the key 'text'") from error
        yield str(entry.get("id", number)), text


def _say_failure(failure: "ReadFailure") -> None:
    print(f"not read: {failure}", file=sys.stderr)


# ---------------------------------------------------------------- output


def _finish(
    options: argparse.Namespace,
    samples: Iterator[Sample],
    n: int,
    *,
    understood: "Understood | None" = None,
    conditions: Conditions | None = None,
) -> int:
    """Draw the samples, write them, show them. What was finished before an interruption is kept."""

    from crystallm_kit.results import write_results
    from crystallm_kit.scores.funnel import mark_duplicates
    from crystallm_kit.screen import with_progress
    from crystallm_kit.text.conditions import conditions_to_dict

    started = time.monotonic()
    done: list[Sample] = []
    interrupted = False
    try:
        for sample in with_progress(samples, n, what="generating"):
            done.append(sample)  # noqa: PERF402 - what is done before an interruption is kept
    except KeyboardInterrupt:
        interrupted = True
    if not done:
        raise KeyboardInterrupt
    judged = done if options.keep_duplicates else mark_duplicates(done)
    seconds = time.monotonic() - started
    written = write_results(judged, options.out, format=options.format_out)
    facts: dict[str, Any] = {
        "requested": n,
        "seed": options.seed,
        "model": judged[0].model,
        "protocol": options.protocol,
        "seconds": round(seconds, 2),
        "files": {
            "samples": str(written.samples),
            "structures": None if written.structures is None else str(written.structures),
        },
    }
    if conditions is not None:
        facts["conditions"] = conditions_to_dict(conditions)
    if understood is not None:
        facts["understood"] = {
            "n": understood.n,
            "phrases": [list(pair) for pair in understood.understood],
            "not_understood": list(understood.not_understood),
            "notes": list(understood.notes),
        }
    _show(options, judged, facts)
    if not options.json:
        took = f"{_count(len(judged), 'sample')} in {seconds:.1f} s"
        print(f"\n{took}; seed {options.seed}, protocol {options.protocol}")
        if written.structures is None:
            print("no valid crystal")
        else:
            print(f"{written.n_structures:,} valid: {written.structures}")
        print(f"every text and verdict: {written.samples}")
    if interrupted:
        print(f"interrupted after {len(judged):,} of {n:,} samples, which are kept", file=sys.stderr)
        return 130
    return 0


def _show(
    options: argparse.Namespace, samples: Sequence[Sample], facts: dict[str, Any], *, names: str = "sample"
) -> None:
    """Print the samples and the funnel: as one JSON document, or as tables."""
    from crystallm_kit.generation import sample_to_dict
    from crystallm_kit.scores.funnel import funnel
    from crystallm_kit.screen import SHOWN, console, funnel_table, samples_table

    counts = funnel(samples)
    if options.json:
        _print_json({**facts, "funnel": counts.as_dict(), "samples": [sample_to_dict(s) for s in samples]})
        return
    screen = console()
    print()
    screen.print(samples_table(samples, names=names))
    if len(samples) > SHOWN:
        print(f"... and {len(samples) - SHOWN:,} more")
    print()
    screen.print(funnel_table(counts))


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _notes(options: argparse.Namespace) -> Any:
    """Return where notes go: with --json, standard output is for the document alone."""
    return sys.stderr if options.json else sys.stdout


def _print_json(data: dict[str, Any]) -> None:
    print(json.dumps(data, ensure_ascii=False, indent=2))


def _print_lines(lines: Iterator[str], out: Path | None) -> None:
    if out is None:
        for line in lines:
            print(line)
        return
    with out.open("w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)
