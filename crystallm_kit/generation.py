"""From conditions to judged crystals: conditions -> prompts -> engine -> parsing -> verdicts.

The one loop that the command, the server and the benchmarks share.

    >>> for sample in generate(Conditions(formula={"Na": 1, "Cl": 1}), n=20, seed=1):
    ...     print(sample.verdict.reason or "valid", sample.structure.formula)

Every request ends as exactly one Sample, failures included, in the order of the requests.

Not here: how tokens are drawn (engines/), what valid means (scores/validity.py), the shell (cli.py).
"""

import dataclasses
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pymatgen.core import Structure

from crystallm_kit.engines.engine import Engine, Prompt, Sampling
from crystallm_kit.errors import ImpossibleRequest, ModelError, ParseError, UnknownName, UserError
from crystallm_kit.models.folders import (
    SHIPPED,
    adapter_folder,
    has_format_tokens,
    model_folder,
    shipped_model_folder,
    weights_folder,
)
from crystallm_kit.records import Completion, Conditions, Crystal, Sample, Verdict
from crystallm_kit.structures.elements import ELEMENTS
from crystallm_kit.text.conditions import conditions_to_dict
from crystallm_kit.text.parsing import parse_completion
from crystallm_kit.text.prompt_llm import CrystalTextLlmTemplate
from crystallm_kit.text.prompt_words import WordsTemplate
from crystallm_kit.text.prompts import Template, template_named
from crystallm_kit.text.representation import Alphabet, Representation, representation
from crystallm_kit.text.wyckoff import MAX_COUNT

if TYPE_CHECKING:
    from crystallm_kit.models.checkpoints import Manifest

REDRAWS = 3
_SMALL_MODEL_BYTES = 100_000_000
LONGEST = 3000  # tokens of a sample, as in CrystaLLM; fewer where the model has fewer positions
_ENGINES = ("transformers", "vllm", "openai", "template")  # that a model can be loaded behind
CHUNK = 1024  # requests handed to the engine at a time, so that results stream and memory stays bounded


@dataclass(frozen=True)
class Model:
    """A model that is ready to be asked.

    Attributes:
        name: Path or name, as it appears in results.
        engine: What samples.
        representation: The text format that it writes.
        template: How it is spoken to.
        known_elements: Elements of its training data; others are offered only where they are asked for.
        quantiles: Property name -> values at evenly spaced probabilities in its training data.
        max_sites: Atoms in the primitive cell that its texts hold; more only where they are asked for.
        sampling: How tokens are drawn where nothing else is asked for.
        tasks: What it was trained to do (tokens/tasks.py).
        adapter: Name of the adapter that its prompts ask the engine for; "": none.
    """

    name: str
    engine: Engine
    representation: Representation
    template: Template
    known_elements: tuple[str, ...]
    quantiles: dict[str, list[float]]
    max_sites: int = 24
    sampling: Sampling = field(default_factory=Sampling)
    tasks: frozenset[str] = frozenset(("generate",))
    adapter: str = ""


def load_model(
    path: str | Path | None = None,
    *,
    engine: str = "transformers",
    batch_size: int = 256,
    device: str | None = None,
    adapter: str | Path | None = None,
    template: str | None = None,
    format: str | None = None,
    format_settings: Mapping[str, Any] | None = None,
    url: str | None = None,
    served_name: str = "",
    api_key: str = "",
    constrained: bool = True,
    library: str | Path | Sequence[str | Path] = (),
) -> Model:
    """Return a model behind an engine; without a path, the shipped one behind transformers.

    Behind `openai` nothing of the model is here but how it is spoken to: `path` is the local folder whose
    manifest says so, or template and format do.

    Args:
        path: A model folder, an adapter's folder, or a Hugging Face id (owner/name) of either.
        engine: transformers; vllm, in this program; openai, a server elsewhere; or template, which needs no
            model but a library of known crystals.
        batch_size: Samples in a batch; of a server, samples under way at once.
        device: Default: cuda where there is one. For transformers.
        adapter: An adapter's folder, its Hugging Face id, or the name of one that comes with the package.
            `path` is then its base; None: the base that it names. Behind `openai`, its name there.
        template: Name of the prompt template, for a model that has no manifest.
        format: Name of the text format, for such a model.
        format_settings: Its settings.
        url: Of the server; for openai.
        served_name: The model's name there; "": the only one.
        api_key: For the server; "": the environment's OPENAI_API_KEY.
        constrained: Whether engines that take a format's grammar, for models with a base LLM's tokenizer,
            get it.
        library: Files of known crystals; for template.

    Raises:
        UnknownName: If there is no such engine.
        ModelError: If the folder is no whole model folder, or its template is not the kit's.
        UserError: If the server is not reached, or what is given does not go together.
        MissingExtra: If the engine's library is not installed.
    """
    if engine not in _ENGINES:
        raise UnknownName.among("engine", engine, _ENGINES)
    if engine == "openai" and not url:
        raise UserError("engine 'openai' needs the server's address: --url, such as http://localhost:8000/v1")
    if engine != "openai" and (url or served_name):
        raise UserError(f"a server's address goes with the engine 'openai', not with '{engine}'")
    if (engine == "template") != bool(library):
        raise UserError(
            "engine 'template' and a library of known crystals go together: "
            "--engine template --library mp_train.parquet"
        )
    if engine == "template":
        if path is not None or adapter is not None:
            raise UserError("engine 'template' has no model and no adapter; leave --model and --adapter out")
        return template_model(library)
    spoken: dict[str, Any] = {"template": template, "format": format, "format_settings": format_settings}
    if engine == "openai":
        return _behind_server(
            path, str(url), served_name=served_name, api_key=api_key, adapter=str(adapter or ""),
            in_flight=max(1, batch_size // 16), constrained=constrained, spoken=spoken,
        )  # fmt: skip
    if adapter is not None:
        folder, base = adapter_folder(str(adapter)), None if path is None else str(path)
    else:
        folder, base = shipped_model_folder() if path is None else model_folder(str(path)), None
    name = " + ".join(str(part) for part in (path, adapter) if part is not None) or SHIPPED
    _set_threads(weights_folder(folder, base))
    if engine == "vllm":
        from crystallm_kit.engines.vllm_offline import VllmEngine
        from crystallm_kit.models.checkpoints import manifest_of

        manifest = manifest_of(folder, **spoken)
        alphabet, grammar = _tokens_or_grammar(manifest, folder, constrained=constrained)
        stop = alphabet.stop if alphabet is not None and alphabet.end is None else ""
        offline = VllmEngine(folder, base=base, stop=stop, grammar=grammar, max_num_seqs=batch_size)
        return model_of(offline, manifest, folder, base, name=name)
    from crystallm_kit.engines.transformers_local import TransformersEngine
    from crystallm_kit.models.loading import load_model_folder

    network, tokenizer, manifest = load_model_folder(folder, dtype="auto", device=device, base=base, **spoken)
    form = representation(manifest.format, **manifest.format_settings)
    stop = form.alphabet().stop if tokenizer.eos_token_id is None else ""
    local = TransformersEngine(network, tokenizer, stop=stop, batch_size=batch_size, device=device)
    return model_of(local, manifest, folder, base, name=name)


def template_model(library: str | Path | Sequence[str | Path]) -> Model:
    """Return the template engine over some files of known crystals, asked as a model is.

    Raises:
        ReadError, EmptyInput: If there are no crystals in the files.
    """
    from crystallm_kit.engines.template import TemplateEngine
    from crystallm_kit.structures.template_files import load_templates

    templates = load_templates(library)
    return Model(
        name="template",
        engine=TemplateEngine(templates),
        representation=representation("wyckoff"),
        template=template_named("kit-1"),
        known_elements=ELEMENTS,
        quantiles={},
        max_sites=min(templates.max_sites, MAX_COUNT),
    )


def _behind_server(
    path: str | Path | None,
    url: str,
    *,
    served_name: str,
    api_key: str,
    adapter: str,
    in_flight: int,
    constrained: bool,
    spoken: Mapping[str, Any],
) -> Model:
    """Return a model behind a server; of its folder, only what says how it is spoken to is read."""
    from crystallm_kit.engines.openai_endpoint import OpenAIEngine
    from crystallm_kit.models.checkpoints import manifest_of, manifest_of_words

    if path is not None and not Path(path).is_dir():
        raise ModelError(
            f"{path}: no such folder. For a model behind a server, give a local folder with its "
            "manifest.json, or --template and --text-format."
        )
    is_said = path is None and (spoken["template"] is not None or spoken["format"] is not None)
    folder = None if is_said else Path(path or shipped_model_folder())
    manifest = manifest_of_words(**spoken) if folder is None else manifest_of(folder, **spoken)
    alphabet, grammar = _tokens_or_grammar(manifest, folder, constrained=constrained)
    server = OpenAIEngine(
        url,
        served_name=served_name,
        api_key=api_key,
        alphabet=alphabet,
        grammar=grammar,
        in_flight=in_flight,
    )
    name = f"{adapter or server.served_name} at {server.url}"
    return model_of(server, manifest, folder, None, name=name, adapter=adapter)


def _tokens_or_grammar(
    manifest: "Manifest", folder: Path | None, *, constrained: bool
) -> tuple[Alphabet | None, str]:
    """Return what engines without the model's tokenizer go by: a format's tokens, or else its grammar.

    The tokens, if the model's tokenizer is the format's own; the grammar (Lark), if it is a base LLM's.
    """
    form = representation(manifest.format, **manifest.format_settings)
    if folder is not None and has_format_tokens(folder):
        return form.alphabet(), ""
    try:
        return None, form.grammar().lark if constrained else ""
    except UserError:  # a dialect that has none
        return None, ""


def model_of(
    engine: Engine,
    manifest: "Manifest",
    folder: Path | None,
    base: str | None,
    *,
    name: str,
    adapter: str = "",
) -> Model:
    """Return the model that a manifest tells of, behind an engine."""
    facts = {**(_facts_of_base(folder, base) if folder else {}), **manifest.results}
    try:
        template = template_named(manifest.template, manifest.template_sha256)
    except UnknownName as error:
        raise ModelError(f"{folder}: {error}") from error
    positions = int(getattr(engine, "max_positions", LONGEST + 1))
    return Model(
        name=name,
        engine=engine,
        representation=representation(manifest.format, **manifest.format_settings),
        template=template,
        known_elements=tuple(facts.get("elements", ELEMENTS)),
        quantiles=dict(facts.get("quantiles", {})),
        max_sites=int(facts.get("max_sites", 24)),
        sampling=Sampling(**facts.get("sampling", {}), max_new_tokens=max(1, min(positions - 1, LONGEST))),
        tasks=frozenset(facts.get("tasks", template.tasks)),  # published adapters do not say
        adapter=adapter,
    )


def _facts_of_base(folder: Path, base: str | None) -> dict[str, Any]:
    """Return what the base of an adapter says of its training data, if it is a model of the kit."""
    from crystallm_kit.models.checkpoints import MANIFEST, read_manifest

    under = weights_folder(folder, base)
    if under is None or under == folder or not (under / MANIFEST).is_file():
        return {}
    return read_manifest(under).results


def _set_threads(folder: Path | None) -> None:
    """Choose how torch uses the cores, if it is not loaded yet; a variable that is set already wins.

    `folder` holds the weights; None: a model that is not small, or unknown.

    A small model's matrices are too small to share, and threads that wait for a busy core hold up the rest.
    The shipped model on two cores that other work shared (load 1.8 to 4.8), `generate --formula`: SrTiO3
    -n 400 took 18 and 19 s with one thread, 19 and 22 s with two; NaCl -n 20 took 2.5 to 3.6 s with one (five
    runs), 2.3 to 42.5 s with two (four runs).
    """
    if "torch" in sys.modules:
        return
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if folder and sum(file.stat().st_size for file in folder.glob("*.safetensors")) < _SMALL_MODEL_BYTES:
        os.environ.setdefault("OMP_NUM_THREADS", "1")


@lru_cache(maxsize=1)
def _shipped_model() -> Model:
    return load_model()


def generate(
    conditions: Conditions | str | None = None,
    *,
    n: int = 1,
    seed: int = 0,
    model: Model | str | Path | None = None,
    sampling: Sampling | None = None,
    constrained: bool = True,
    protocol: str = "kit",
    unique: bool = True,
    redraws: int = REDRAWS,
) -> list[Sample]:
    """Return n samples, judged; valid copies of earlier ones are marked "duplicate" where `unique` says so.

    Args:
        conditions: What is wanted; plain words are understood (text/words.py); None: anything.
        n: Samples requested; also the length of the result.
        seed: Same seed, same samples.
        model: A Model, a folder, or None for the shipped one.
        sampling: How tokens are drawn, its seed replaced by `seed`; None: the model's own way.
        constrained: Draw only tokens that keep the text well formed and as asked (tokens/masking.py).
        protocol: A name in scores.thresholds.PROTOCOLS.
        unique: Mark copies.
        redraws: How often the numbers (cell, coordinates) of a sample whose atoms overlap, or whose cell or
            density is impossible, are drawn again for the same sites. Only where samples are constrained; a
            sample that needed it says so in its measures ("redraws"), and still counts as one request.

    Raises:
        ImpossibleRequest, UnknownName: If no crystal can meet the conditions.
        UserError: If words cannot be understood.
    """
    from crystallm_kit.scores.funnel import mark_duplicates

    if isinstance(conditions, str):
        from crystallm_kit.text.words import understand

        conditions = understand(conditions).conditions
    samples = list(
        stream([conditions or Conditions()] * n, seed=seed, model=model, sampling=sampling,
               constrained=constrained, protocol=protocol, redraws=redraws)
    )  # fmt: skip
    return mark_duplicates(samples) if unique else samples


def stream(
    requests: Sequence[Conditions],
    *,
    seed: int = 0,
    model: Model | str | Path | None = None,
    sampling: Sampling | None = None,
    constrained: bool = True,
    protocol: str = "kit",
    beginnings: Sequence[str] | None = None,
    redraws: int = REDRAWS,
) -> Iterator[Sample]:
    """Yield one judged sample for each request, in order, as they come.

    Args:
        requests: Conditions, one for each sample.
        seed, model, sampling, constrained, protocol, redraws: As in `generate`.
        beginnings: How each crystal's text begins; None: free.
    """
    asked = model if isinstance(model, Model) else (_shipped_model() if model is None else load_model(model))
    sampling = dataclasses.replace(sampling or asked.sampling, seed=seed)
    is_drawn = getattr(asked.engine, "is_drawn", True)
    constrained = constrained or not is_drawn
    prompts = list(_prompts(requests, asked, seed=seed, constrained=constrained, beginnings=beginnings))
    rounds = redraws if constrained and takes_requests(asked) else 0
    if not is_drawn:  # what was answered in one chunk counts in the next, and would be the same again
        for i, completion in enumerate(asked.engine.complete(prompts, sampling)):
            yield judge(completion, requests[i], asked, index=i, seed=seed, protocol=protocol)
        return
    for start in range(0, len(prompts), CHUNK):
        chunk = prompts[start : start + CHUNK]
        # Draws depend on (seed, position), so every chunk gets a seed of its own, the first the caller's.
        chunk_seed = seed if start == 0 else new_seed(seed, start)
        chunk_sampling = dataclasses.replace(sampling, seed=chunk_seed)

        def judged(completion: Completion, index: int) -> Sample:
            return judge(completion, requests[index], asked, index=index, seed=seed, protocol=protocol)

        samples = [judged(c, start + i) for i, c in enumerate(asked.engine.complete(chunk, chunk_sampling))]
        for attempt in range(1, rounds + 1):
            again = [i for i, sample in enumerate(samples) if sample.verdict.reason in GEOMETRY_REASONS]
            # what was given is kept, even where it goes on into the numbers
            kept = [max(without_numbers(samples[i].text), chunk[i].beginning, key=len) for i in again]
            redrawn = [
                dataclasses.replace(chunk[i], beginning=text) for i, text in zip(again, kept, strict=True)
            ]
            fresh = dataclasses.replace(sampling, seed=new_seed(seed, start, attempt))
            for i, completion in zip(again, asked.engine.complete(redrawn, fresh), strict=True):
                sample = judged(completion, start + i)
                measures = {**sample.measures, "redraws": attempt}
                samples[i] = dataclasses.replace(sample, measures=measures)
        yield from samples


def candidates(
    requests: Sequence[Conditions],
    n: int,
    *,
    seed: int = 0,
    model: Model,
    sampling: Sampling | None = None,
    redraws: int = REDRAWS,
) -> Iterator[list[Sample]]:
    """Yield n judged samples for each request, whatever else is asked for.

    An engine that draws nothing gives the k-th of several equal requests its k-th best answer; here each
    request gets the n best.

    Args:
        requests: One for each list.
        n: Samples of each.
        seed, model, sampling, redraws: As in `stream`.
    """
    if getattr(model.engine, "is_drawn", True):
        every = [conditions for conditions in requests for _ in range(n)]
        samples = stream(every, seed=seed, model=model, sampling=sampling, redraws=redraws)
        yield from (list(islice(samples, n)) for _ in requests)
        return
    for k, conditions in enumerate(requests):
        yield list(stream([conditions] * n, seed=new_seed(seed, k), model=model, sampling=sampling))


# What another cell and other coordinates for the same sites may mend.
GEOMETRY_REASONS = frozenset(("overlap", "density", "cell"))


def without_numbers(text: str) -> str:
    """Return a wyckoff text up to its numbers: composition, space group, sites."""
    return "".join(text.rpartition("\n")[:2])


def new_seed(*parts: int) -> int:
    """Return a seed that follows from others: for a later chunk of a run, or another attempt."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def _prompts(
    requests: Sequence[Conditions],
    model: Model,
    *,
    seed: int,
    constrained: bool,
    beginnings: Sequence[str] | None,
) -> Iterator[Prompt]:
    """Yield the prompts. Values left open by a condition (an interval) are drawn for each sample anew."""
    request = compiler(model) if constrained and takes_requests(model) else None
    for index, conditions in enumerate(requests):
        text = prompt_text(conditions, model, seed=seed, index=index)[0]
        beginning = beginnings[index] if beginnings else ""
        if beginning and model.template.begins_the_text:
            text, beginning = beginning, ""
        yield Prompt(text, beginning, request(conditions) if request else None, adapter=model.adapter)


def check_request(conditions: Conditions, model: Model) -> None:
    """Raise what `stream` would raise for the conditions, before anything is drawn.

    Raises:
        ImpossibleRequest, UnknownName: If no crystal can meet them, or the model cannot be asked for it.
    """
    constrained = takes_requests(model)
    list(_prompts([conditions], model, seed=0, constrained=constrained, beginnings=None))


def prompt_text(conditions: Conditions, model: Model, *, seed: int, index: int) -> tuple[str, bool]:
    """Return the prompt of one sample, and whether anything in it was drawn: if not, all samples share it."""
    rng = np.random.default_rng((seed, index, 1))
    untouched = rng.bit_generator.state
    text = model.template.render(conditions, rng, quantiles=model.quantiles)
    return text, rng.bit_generator.state != untouched


def takes_requests(model: Model) -> bool:
    """Tell whether the samples can be constrained: by a steerable engine, in `wyckoff` text and tokens."""
    has_tokens = getattr(model.engine, "has_wyckoff_ids", True)
    return model.engine.steerable and model.representation.name == "wyckoff" and has_tokens


def compiler(model: Model) -> Any:
    """Return a function from Conditions to the constraint's Request, with a memory."""
    from crystallm_kit.tokens.requests import compile_request

    memory: dict[str, Any] = {}

    def request(conditions: Conditions) -> Any:
        key = repr(conditions)
        if key not in memory:
            memory[key] = compile_request(
                conditions, known_elements=model.known_elements, max_sites=model.max_sites
            )
        return memory[key]

    return request


def judge(
    completion: Completion,
    conditions: Conditions,
    model: Model,
    *,
    index: int,
    seed: int,
    protocol: str = "kit",
) -> Sample:
    """Return the sample of one completion: parsed, validated, measured."""
    return judge_by(Judging.of(model, protocol), completion, conditions, index=index, seed=seed)


@dataclass(frozen=True)
class Judging:
    """What judging a completion needs to know, without an engine, so that other processes can do it.

    Attributes:
        model: Name, as it appears in results.
        representation: The text format.
        begins_the_text: Whether prompts are the beginning of the crystal's text.
        protocol: A name in scores.thresholds.PROTOCOLS.
    """

    model: str
    representation: Representation
    begins_the_text: bool
    protocol: str = "kit"

    @classmethod
    def of(cls, model: Model, protocol: str = "kit") -> "Judging":
        """Return what judging a model's completions needs."""
        return cls(model.name, model.representation, model.template.begins_the_text, protocol)


def judge_by(
    judging: Judging, completion: Completion, conditions: Conditions, *, index: int, seed: int
) -> Sample:
    """Return the sample of one completion, as `judge`."""
    from crystallm_kit.scores.validity import validate_and_measure

    given = completion.prompt if judging.begins_the_text else ""
    text = given + completion.text
    parsed = parse_completion(
        text, judging.representation, stop_reason=completion.stop_reason, n_given=len(given)
    )
    common: dict[str, Any] = {
        "id": f"{seed}-{index}",
        "text": text,
        "conditions": conditions,
        "log_probability": completion.log_probability,
        "seed": seed,
        "model": judging.model,
    }
    if isinstance(parsed, Verdict):
        verdict = dataclasses.replace(parsed, detail=completion.detail or parsed.detail)
        return Sample(structure=None, verdict=verdict, **common)
    stated = parsed.properties.get("spacegroup_number")
    verdict, measures = validate_and_measure(
        parsed,
        conditions=conditions,
        protocol=judging.protocol,
        stated_spacegroup=int(stated) if stated else None,
    )
    return Sample(structure=parsed.structure, verdict=verdict, measures=measures, **common)


def infill(
    crystal: Crystal,
    element: str,
    *,
    model: Model | str | Path | None = None,
    candidates: Iterable[str] | None = None,
) -> list[tuple[str, float]]:
    """Rank the elements that could replace one element of a crystal, most likely first.

    A model that was trained to infill is asked by its template's prompt, which shows the crystal with the
    element masked; each candidate is scored as the answer. Any other model scores the crystal's text once for
    each candidate: its log-probability is the model's belief in the whole crystal with that element in place
    (the candidate's own text, so its canonical order and origin).

    Args:
        crystal: The crystal; its structure stays as it is.
        element: Symbol of the element to replace, everywhere in the crystal.
        model: As in `generate`; the engine must be steerable.
        candidates: Symbols to try; None: all that the model knows, but those of the crystal's other elements.

    Returns:
        (symbol, probability) pairs; the probabilities sum to 1 over the candidates.

    Raises:
        UnknownName: If a candidate is no element.
        ImpossibleRequest: If the crystal does not hold the element or is too long for the model, or if there
            is no candidate or no score to be had.
    """
    asked = model if isinstance(model, Model) else (_shipped_model() if model is None else load_model(model))
    if not isinstance(crystal.structure, Structure):
        raise ImpossibleRequest(f"{crystal.id}: a molecule; the model writes crystals")
    if not asked.engine.steerable:
        raise ImpossibleRequest(
            f"engine '{asked.engine.name}' gives no probabilities of a text; infill needs them"
        )
    present = {str(e.symbol) for e in crystal.structure.composition.elements}
    if element not in present:
        raise ImpossibleRequest(f"{crystal.id}: holds {', '.join(sorted(present))}, not {element}")
    offered = asked.known_elements if candidates is None else candidates
    tried = [c for c in dict.fromkeys(offered) if c == element or c not in present]
    if not tried:
        raise ImpossibleRequest(f"{crystal.id}: no candidate that the crystal does not hold already")
    for candidate in tried:
        if candidate not in ELEMENTS:
            raise UnknownName.among("element", candidate, ELEMENTS)
    sampling = Sampling(max_new_tokens=asked_positions(asked))
    scored = list(asked.engine.complete(_infilled(crystal, element, tried, asked), sampling))
    if any(c.stop_reason != "stop" for c in scored):
        raise ImpossibleRequest(f"{crystal.id}: its text is longer than the model's positions")
    logs = np.array([c.log_probability for c in scored])
    weights = np.exp(logs - logs.max())
    best_first = sorted(zip(tried, weights / weights.sum(), strict=True), key=lambda pair: -pair[1])
    return [(symbol, float(p)) for symbol, p in best_first]


def _infilled(crystal: Crystal, element: str, candidates: Sequence[str], model: Model) -> list[Prompt]:
    """Return for each candidate what the model scores: an answer, or the crystal's whole text."""
    template = model.template
    structure = crystal.structure.copy()
    structure.remove_oxidation_states()  # Na+ would not be found as Na
    if "infill" in model.tasks and isinstance(template, WordsTemplate | CrystalTextLlmTemplate):
        text = model.representation.encode(Crystal(crystal.id, structure))
        question = template.infill_prompt(text, element)
        return [Prompt(question, candidate, is_whole=True, adapter=model.adapter) for candidate in candidates]
    unconditional = template.render(Conditions())
    found = []
    for candidate in candidates:
        replaced = structure.copy()
        replaced.replace_species({element: candidate})
        text = model.representation.encode(Crystal(crystal.id, replaced))
        if template.begins_the_text:
            text = text.removeprefix(unconditional)
        found.append(Prompt(unconditional, text, is_whole=True, adapter=model.adapter))
    return found


def asked_positions(model: Model) -> int:
    """Return how many tokens a completion of the model may have."""
    return int(getattr(model.engine, "max_positions", 512)) - 1


def complete_crystal(
    partial_text: str,
    *,
    n: int = 1,
    seed: int = 0,
    model: Model | str | Path | None = None,
    protocol: str = "kit",
) -> list[Sample]:
    """Return n crystals whose text begins as given: a composition, a space group, the first sites.

    Args:
        partial_text: The beginning of a text in the model's format, such as "Ba1 Ti1 O3 221\\nBa a\\n".
        n, seed, model, protocol: As in `generate`.

    Raises:
        ParseError: If the beginning is no text of the format.
        ImpossibleRequest: If no crystal begins like that.
    """
    from crystallm_kit.text.prompts import completion_prefix

    asked = model if isinstance(model, Model) else (_shipped_model() if model is None else load_model(model))

    is_whole = asked.template.begins_the_text  # CrystaLLM's users bring prompts that end where they want
    beginning = partial_text if is_whole else completion_prefix(partial_text)
    if not beginning:
        raise ParseError("empty", "nothing given to complete")
    # What is given is asked for, be it beyond what the model was trained on.
    given = re.findall(r"([A-Z][a-z]?)([0-9]{1,2}) ", beginning.partition("\n")[0])
    symbols = [symbol for symbol, _ in given if symbol in ELEMENTS]
    asked = dataclasses.replace(
        asked,
        known_elements=tuple(dict.fromkeys((*asked.known_elements, *symbols))),
        max_sites=max(asked.max_sites, min(sum(int(count) for _, count in given), MAX_COUNT)),
    )
    return list(
        stream([Conditions()] * n, seed=seed, model=asked, protocol=protocol, beginnings=[beginning] * n)
    )


def ranked(samples: Iterable[Sample]) -> list[Sample]:
    """Return candidates for one composition, best first: what the model says most often, then most surely.

    Samples that agree in composition, space group and sites are one structure type; types stand in the order
    of their counts, each first with its most probable member. The other members follow, one for each
    different geometry (lengths to 1 angstrom, coordinates to 0.1); the rest, near copies, come last. Unparsed
    samples are left out.
    """
    found = sorted((s for s in samples if s.structure is not None), key=lambda s: -s.log_probability)
    counts = Counter(without_numbers(s.text) for s in found)
    seen: set[str] = set()
    levels: list[list[Sample]] = [[], [], []]
    for sample in sorted(found, key=lambda s: -counts[without_numbers(s.text)]):
        kind, geometry = without_numbers(sample.text), _rough(sample.text)
        levels[0 if kind not in seen else 1 if geometry not in seen else 2].append(sample)
        seen |= {kind, geometry}
    levels[1].sort(key=lambda s: -s.log_probability)
    return [sample for level in levels for sample in level]


def _rough(text: str) -> str:
    numbers = text.rpartition("\n")[2].split(" ")
    return without_numbers(text) + " ".join(w[:2] if w.startswith(".") else w.split(".")[0] for w in numbers)


def sample_to_dict(sample: Sample) -> dict[str, Any]:
    """Return a sample as JSON-ready data: everything but the structure, which its text holds."""
    data: dict[str, Any] = {
        "id": sample.id,
        "valid": sample.verdict.valid,
        "reason": sample.verdict.reason,
        "detail": sample.verdict.detail,
        "checks": dict(sample.verdict.checks),
        "formula": sample.structure.composition.reduced_formula if sample.structure is not None else None,
        "measures": dict(sample.measures),
        "log_probability": sample.log_probability if math.isfinite(sample.log_probability) else None,
        "seed": sample.seed,
        "model": sample.model,
        "text": sample.text,
        "conditions": conditions_to_dict(sample.conditions),
    }
    return data


def write_samples(samples: Iterable[Sample], path: str | Path) -> int:
    """Write one JSON line a sample, failures included, and return how many. Whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    writing = path.with_name(f".{path.name}.writing")
    count = 0
    with writing.open("w", encoding="utf-8") as handle:
        for sample in samples:
            handle.write(json.dumps(sample_to_dict(sample), ensure_ascii=False) + "\n")
            count += 1
    writing.replace(path)
    return count
