"""One recipe from crystal files to a model that can be asked: corpus, training, samples, card.

    result = fine_tune("finetune/llama-lora-compact.yaml", "runs/a", overrides=("data.inputs=[mp.parquet]",))

    runs/a/  corpus/    where the recipe names `data.inputs`: prepared first, kept, and used again
             samples/   what the model wrote every `sample_every` steps, a line for each sample
             model/     the model folder or the adapter's, with its card (README.md)
             metrics.jsonl  checkpoints/ ...    see training/loop.py

Everything goes on where it was interrupted: the same command finishes the corpus, then the training, then the
push. SIGTERM stops either with exit code 0. Under torchrun or accelerate launch, the first process prepares
the corpus and the others wait for it; `runs/a` has to be on a disk that all of them see.

Looking at samples. Every `sample_every` steps the model as it is (averaged weights) is asked what the prompts
of the validation set ask, without constraints, and the samples go through the funnel (scores/funnel.py):

    sample_parse       share of the samples that are a crystal at all
    sample_as_asked    ... and have the composition and space group that the prompt asked for, where it did
    sample_validity    ... and pass all checks of the protocol `kit`
    sample_unique      ... and are no copy of an earlier one

The denominator is always `samples`. The prompts and the seed are the same every time, and the run goes on
with the losses that it would have had without.

Not here: the loop (training/loop.py), corpora (tokens/corpus.py), cards and pushes (models/publishing.py).
"""

import contextlib
import dataclasses
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from crystallm_kit.benchmark import write_facts
from crystallm_kit.engines.engine import Sampling
from crystallm_kit.errors import ParseError, ReadError, RecipeError
from crystallm_kit.generation import Model, stream, write_samples
from crystallm_kit.models.checkpoints import read_manifest as model_manifest
from crystallm_kit.models.publishing import check_push, push_to_hub, write_card
from crystallm_kit.recipes import from_dict, load_recipe
from crystallm_kit.records import Conditions
from crystallm_kit.scores.funnel import Funnel, funnel, mark_duplicates
from crystallm_kit.structures.elements import ELEMENTS
from crystallm_kit.text.prompts import Template, template_named
from crystallm_kit.text.representation import representation
from crystallm_kit.tokens.corpus import MANIFEST, CorpusRecipe, prepare, read_manifest
from crystallm_kit.tokens.parts import PartReport
from crystallm_kit.tokens.tokenizer import format_tokenizer, load_tokenizer
from crystallm_kit.training.batches import TokenSource, open_source
from crystallm_kit.training.curves import check_track
from crystallm_kit.training.loop import TrainingResult, train
from crystallm_kit.training.progress import is_first_process
from crystallm_kit.training.recipe import TrainingRecipe, load_training_recipe

CORPUS, SAMPLES = "corpus", "samples"
_SAMPLES_AT_A_TIME = 64
_SECONDS_BEFORE_A_WORD = 60.0

OnSamples = Callable[[Any, int], dict[str, float]]


def fine_tune(
    recipe: str | Path | TrainingRecipe,
    out: str | Path,
    *,
    overrides: Sequence[str] = (),
    resume: bool = True,
    workers: int = 1,
) -> TrainingResult:
    """Prepare what the recipe trains on, train, look at samples meanwhile, and publish what comes out.

    Args:
        recipe: A file, or a recipe.
        out: Folder of the run.
        overrides: "key=value" that win over a file.
        resume: Go on with what `out` holds; False: begin anew. A corpus of the same recipe is kept.
        workers: Processes that prepare the corpus.

    Raises:
        RecipeError, UnknownName, MissingExtra, ModelError: If the recipe cannot be followed; before any
            weights are loaded.
        ReadError, EmptyInput: If there is nothing to train on.
        TrainingError: If the run cannot go on.
        UserError: If the model cannot be pushed; it is whole in `out/model`.
    """
    if not isinstance(recipe, TrainingRecipe):
        recipe = load_training_recipe(recipe, overrides)
    out = Path(out)
    _check(recipe)
    try:
        with _sigterm_raises():
            recipe = with_corpus(recipe, out, resume=resume, workers=workers)
    except _Terminated:
        _say(f"{out}: stopped by a signal while the corpus was prepared; the same command goes on from there")
        return TrainingResult("signal", 0, None, math.inf, 0.0)
    if not resume and is_first_process():
        shutil.rmtree(out / SAMPLES, ignore_errors=True)
    on_samples = sampler(recipe, out) if recipe.sample_every else None
    result = train(recipe, out, resume=resume, on_samples=on_samples)
    if result.model_folder is not None and is_first_process():
        publish(recipe, result.model_folder)
    return result


def look_ahead(
    recipe: str | Path | TrainingRecipe, out: str | Path, *, overrides: Sequence[str] = (), workers: int = 1
) -> list[str]:
    """Prepare the corpus and return what there is to say before the first step: lengths, memory, warnings.

    No weights are read. Arguments and errors are those of fine_tune.
    """
    from crystallm_kit.training.distribution import Distribution
    from crystallm_kit.training.learner import checked_config, layout_of
    from crystallm_kit.training.preflight import check

    if not isinstance(recipe, TrainingRecipe):
        recipe = load_training_recipe(recipe, overrides)
    _check(recipe)
    recipe = with_corpus(recipe, Path(out), workers=workers)
    source = open_source(recipe.data.corpus or "")
    distribution = Distribution(recipe.sharding)
    config = checked_config(recipe, source.info, distribution.device)
    layout = layout_of(recipe, distribution)
    return check(
        recipe, config, layout, source.examples(0), source.info.vocabulary,
        validation=source.validation(), device=distribution.device,
    )  # fmt: skip


def _say(text: str) -> None:
    if is_first_process():
        print(text, file=sys.stderr, flush=True)


def _check(recipe: TrainingRecipe) -> None:
    """Check what would otherwise fail after hours."""
    check_track(recipe.track)
    if recipe.push_to_hub is not None:
        check_push(recipe.push_to_hub)
    if recipe.sample_every is not None and (recipe.sample_every < 1 or recipe.samples < 1):
        raise RecipeError(
            "'sample_every' and 'samples' must be at least 1, got "
            f"{recipe.sample_every} and {recipe.samples}."
        )
    if recipe.base is not None:
        from crystallm_kit.models.bases import check_base
        from crystallm_kit.training.live_model import device_type

        check_base(recipe.base, device_type=device_type())


# ---------------------------------------------------------------- the corpus


def with_corpus(
    recipe: TrainingRecipe, out: Path, *, resume: bool = True, workers: int = 1
) -> TrainingRecipe:
    """Return the recipe with `data.corpus` set; `data.inputs` are prepared into `out/corpus`.

    Raises:
        RecipeError: If the recipe names neither inputs nor a corpus, or both.
    """
    data, folder = recipe.data, out / CORPUS
    if not data.inputs:
        if data.corpus is None:
            raise RecipeError(
                "data: nothing to train on. Name crystal files (--set 'data.inputs=[mp.parquet, cifs/]') or "
                "a prepared corpus (--set data.corpus=corpus)."
            )
        return recipe
    if data.corpus is not None and data.corpus.resolve() != folder.resolve():
        raise RecipeError(
            f"data: 'inputs' and 'corpus' are both given. Set one to null: {data.corpus} is used as it is, "
            f"inputs are prepared into {folder}."
        )
    corpus_recipe = corpus_recipe_of(recipe)
    if is_first_process():
        if not resume and not _is_finished(folder, corpus_recipe):
            shutil.rmtree(folder, ignore_errors=True)
        inputs = {"train": data.inputs, "validation": data.validation} if data.validation else data.inputs
        report = prepare(inputs, corpus_recipe, folder, workers=workers, on_part=_PartLines())
        rows = ", ".join(f"{n:,} {split}" for split, n in report.n_rows.items() if n)
        lost = ", ".join(f"{reason.replace('_', ' ')} {n:,}" for reason, n in report.dropped.items())
        _say(
            f"corpus {folder}: {report.n_entries:,} entries -> {rows}"
            + (f"; left out: {lost}" if lost else "")
        )
    else:
        _wait_until_finished(folder, corpus_recipe)
    return dataclasses.replace(recipe, data=dataclasses.replace(data, corpus=folder))


def corpus_recipe_of(recipe: TrainingRecipe) -> CorpusRecipe:
    """Return how the corpus is prepared: `data.corpus_recipe`, by default with the base model's tokenizer.

    A base that is a model of the kit and has the format's own tokens needs no other.
    """
    path = recipe.data.corpus_recipe
    found = load_recipe(path, CorpusRecipe, () if path else (f"seed={recipe.seed}",))
    if (
        recipe.base is None
        or found.encoding.tokenizer is not None
        or _has_own_tokens(recipe.base.name, found)
    ):
        return found
    return dataclasses.replace(
        found, encoding=dataclasses.replace(found.encoding, tokenizer=recipe.base.name)
    )


def _has_own_tokens(base: str, recipe: CorpusRecipe) -> bool:
    """Tell whether a base model's tokens are those of the corpus's format, in the same order."""
    from crystallm_kit.models.folders import base_source

    folder = Path(base_source(base))
    if not (folder / "manifest.json").is_file() or not (folder / "tokenizer.json").is_file():
        return False
    own = format_tokenizer(recipe.encoding.format, **recipe.encoding.format_settings)
    return bool(load_tokenizer(folder).get_vocab() == own.get_vocab())


class _PartLines:
    """A line on the screen now and then while a corpus is prepared."""

    def __init__(self, every_seconds: float = 10.0) -> None:
        self.every_seconds, self.n_entries, self._told = every_seconds, 0, time.monotonic()

    def __call__(self, part: PartReport) -> None:
        self.n_entries += part.n_entries
        if time.monotonic() - self._told > self.every_seconds:
            self._told = time.monotonic()
            _say(f"preparing the corpus: {self.n_entries:,} entries")


def _is_finished(folder: Path, recipe: CorpusRecipe) -> bool:
    """Tell whether a folder holds a finished corpus of this recipe."""
    try:
        made_with = read_manifest(folder).get("recipe", {})
        return from_dict(made_with, CorpusRecipe, where=str(folder / MANIFEST)) == recipe
    except (ReadError, RecipeError):
        return False


def _wait_until_finished(folder: Path, recipe: CorpusRecipe) -> None:
    """Wait for the first process; a launcher that loses one ends the others."""
    begun, is_told = time.monotonic(), False
    while not _is_finished(folder, recipe):
        time.sleep(0.5)
        if not is_told and time.monotonic() - begun > _SECONDS_BEFORE_A_WORD:
            is_told = True
            if os.environ.get("LOCAL_RANK") == "0":  # one word from each machine
                print(f"waiting for the first process to prepare {folder}", file=sys.stderr, flush=True)


class _Terminated(BaseException):
    """SIGTERM came while nothing needed saving: what is prepared is on disk."""


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    def terminate(*_: object) -> None:
        raise _Terminated

    try:
        before = signal.signal(signal.SIGTERM, terminate)
    except ValueError:  # not the main thread: whoever owns it handles signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# ---------------------------------------------------------------- samples


def sampler(recipe: TrainingRecipe, out: Path) -> OnSamples:
    """Return what the training loop calls every `sample_every` steps: (model, step) -> shares of the samples.

    Args:
        recipe: With a corpus.
        out: Folder of the run; samples are written to `out/samples/<step>.jsonl`.

    Raises:
        ReadError: If the corpus or its tokenizer cannot be read.
        UnknownName: If the corpus's prompt template is not this version's.
    """
    data = recipe.data
    if data.corpus is None:
        raise RecipeError("data.corpus is not set: name the corpus to train on.")
    source = open_source(data.corpus)
    info = source.info
    tokenizer = _tokenizer(recipe, source)
    form = representation(info.format, **info.format_settings)
    template = template_named(info.template, info.template_sha256)
    requests = validation_requests(source, tokenizer, template, n=recipe.samples)
    # a text longer than any that was learned from counts as cut: an untrained model never ends
    longest = int(max(np.diff(part.offsets).max() for part in (source.examples(0), source.validation())))
    batch_size = min(recipe.samples, _SAMPLES_AT_A_TIME)

    def look(model: Any, step: int) -> dict[str, float]:
        nonlocal batch_size
        while True:
            try:
                samples = draw(model, step)
                break
            except RuntimeError as error:  # beside a training run, a GPU may have little memory to spare
                if "out of memory" not in str(error) or batch_size == 1:
                    raise
                batch_size = -(-batch_size // 2)
        write_samples(samples, out / SAMPLES / f"{step:08d}.jsonl")
        return shares(funnel(samples))

    def draw(model: Any, step: int) -> list[Any]:
        from crystallm_kit.engines.transformers_local import TransformersEngine
        from crystallm_kit.training.live_model import lent

        with lent(model, bfloat16=recipe.precision == "bfloat16") as network:
            engine = TransformersEngine(
                network, tokenizer, batch_size=batch_size, device=network.device, threads=1,
                stop=form.alphabet().stop if tokenizer.eos_token_id is None else "",
            )  # fmt: skip
            asked = Model(f"step {step}", engine, form, template, tuple(ELEMENTS), quantiles={})
            sampling = Sampling(max_new_tokens=longest)
            return mark_duplicates(
                stream(requests, seed=recipe.seed, model=asked, sampling=sampling, constrained=False)
            )

    return look


def shares(counts: Funnel) -> dict[str, float]:
    """Return the curves of a funnel; the denominator is what was requested."""
    return {
        "sample_parse": counts.parsed / counts.requested,
        "sample_as_asked": counts.symmetry / counts.requested,
        "sample_validity": counts.charge / counts.requested,
        "sample_unique": counts.unique / counts.requested,
    }


def validation_requests(
    source: TokenSource, tokenizer: Any, template: Template, *, n: int
) -> list[Conditions]:
    """Return what n examples of the validation set, spread over it evenly, ask for.

    Where the prompt is the beginning of the text, the text's first line is what is asked for. Prompts of
    other tasks than generation are left out; where there are no others, nothing is asked for.
    """
    examples = source.validation()
    found: list[Conditions] = []
    for i in np.linspace(0, len(examples.prompt_lengths) - 1, num=min(4 * n, len(examples.prompt_lengths))):
        ids = examples.tokens[examples.offsets[int(i)] : examples.offsets[int(i) + 1]].tolist()
        if template.begins_the_text:
            text = tokenizer.decode(ids, skip_special_tokens=True)
            prompt = text.partition("\n")[0] + "\n"
        else:
            prompt = tokenizer.decode(ids[: int(examples.prompt_lengths[int(i)])], skip_special_tokens=True)
        with contextlib.suppress(ParseError):
            found.append(template.parse(prompt))
    if not found:
        return [Conditions()] * n
    return [found[i * len(found) // n] for i in range(n)]


def _tokenizer(recipe: TrainingRecipe, source: TokenSource) -> Any:
    folder, info = recipe.data.tokenizer_folder, source.info
    return format_tokenizer(info.format, **info.format_settings) if folder is None else load_tokenizer(folder)


# ---------------------------------------------------------------- what comes out


def publish(recipe: TrainingRecipe, folder: Path) -> None:
    """Write what generation has to know of the training data, and the card; push, if the recipe says so."""
    corpus = recipe.data.corpus
    has_rows = corpus is not None and any(Path(corpus).glob("train-*.parquet"))
    if corpus is not None and has_rows and model_manifest(folder).format == "wyckoff":
        write_facts(corpus, folder)
    write_card(folder, repo=recipe.push_to_hub)
    if recipe.push_to_hub is not None:
        _say(f"pushed to {push_to_hub(folder, recipe.push_to_hub)}")
