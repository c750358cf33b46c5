"""Training: one resumable loop over accelerate, from token arrays to a model folder or an adapter.

    python -m crystallm_kit.training finetune/llama-scratch-wyckoff-mp.yaml --npz corpus.npz --out
    runs/a

On the screen, one line per `log_every` steps:
    step 1,200/10,000  loss 0.7312  validation 0.7420  lr 9.8e-04  2,310,000 tokens/s  MFU 14 %  8:20 left

In `--out`: recipe.yaml (as run), metrics.jsonl (every step's loss), checkpoints/ (the last two and the
best), model/ (the model folder, or the adapter's, written at the end). Killed at any moment, the same command
goes on from the last checkpoint with the losses that the uninterrupted run would have had; on one CPU they
are equal to the last digit.

It holds at every checkpoint that all losses before it were finite. SIGTERM saves and returns (exit code 0).

Not here: the model that learns (learner.py), how a step is cut into rows (batches.py), processes
(distribution.py), checkpoints (run_state.py), corpus preparation (tokens/corpus.py).
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml

from crystallm_kit.errors import RecipeError, TrainingError, UserError
from crystallm_kit.models.checkpoints import Manifest, git_commit, library_versions
from crystallm_kit.recipes import recipe_to_dict
from crystallm_kit.tokens.drawing import Examples
from crystallm_kit.training import preflight
from crystallm_kit.training.batches import DeviceExamples, Step, TokenSource, open_source
from crystallm_kit.training.curves import Curves
from crystallm_kit.training.distribution import Distribution, is_first_to_tell
from crystallm_kit.training.failures import GradientWatch, diverged, explain
from crystallm_kit.training.learner import Learner, checked_config, layout_of
from crystallm_kit.training.progress import Screen, is_first_process, silence_libraries
from crystallm_kit.training.recipe import TrainingRecipe, learning_rate, load_training_recipe
from crystallm_kit.training.run_state import (
    checkpoint_folders,
    last_step,
    read_facts,
    read_tensors,
    read_weights,
    save_checkpoint,
    save_weights,
)

# Looks at the model as it is after some steps: (model in evaluation mode, step) -> numbers by name.
OnSamples = Callable[[Any, int], dict[str, float]]
Stopped = Literal["done", "early", "time", "signal"]

# Keys that may differ between a run and its resumption: they change where it ends and what is seen of it, not
# what a step does.
_FREE_KEYS = frozenset(
    """epochs steps eval_every checkpoint_every log_every max_minutes early_stopping_patience sharding
    compile export export_dtype export_shard_mb micro_tokens overfit_check sample_every samples track
    push_to_hub""".split()
)
_FREE_SUBKEYS = (
    "data.corpus", "data.tokenizer", "data.inputs", "data.validation", "base.gradient_checkpointing",
)  # fmt: skip


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended.

    Attributes:
        stopped: done, early (no better validation loss), time (max_minutes), signal (SIGTERM: run it again).
        steps: Optimizer steps done.
        model_folder: The model or adapter; None after a signal.
        validation_loss: Best validation loss, in nats per token.
        tokens_per_second: Over this process's steps, validation and checkpoints left out.
        peak_memory_gb: Of one GPU, in 1e9 bytes; None on a CPU.
    """

    stopped: Stopped
    steps: int
    model_folder: Path | None
    validation_loss: float
    tokens_per_second: float
    peak_memory_gb: float | None = None


def train(
    recipe: TrainingRecipe,
    out: str | Path,
    *,
    source: TokenSource | None = None,
    resume: bool = True,
    on_samples: OnSamples | None = None,
) -> TrainingResult:
    """Train a model, or fine-tune a base, and write its folder to `out/model`.

    Args:
        recipe: Everything that the run depends on.
        out: Folder of the run.
        source: Examples; None: the recipe's `data.corpus`.
        resume: Go on from the last checkpoint in `out`; False: begin anew, and remove what is there.
        on_samples: Called on the main process every `recipe.sample_every` steps; what it returns joins the
            curves. Not called where weights are sharded, since no process has the model whole.

    Raises:
        RecipeError: If the recipe does not fit the corpus, or the run that `out` holds.
        ReadError: If the corpus cannot be read.
        ModelError: If the base model cannot be had, or is no causal LM.
        TrainingError: If the run cannot go on: a loss that is no number, a full disk, too little memory.
    """
    if source is None:
        if recipe.data.corpus is None:
            raise RecipeError("data.corpus is not set: name the corpus to train on.")
        source = open_source(recipe.data.corpus)
    out = Path(out)
    try:
        return _Run(recipe, out, source, resume, on_samples).train()
    except BaseException as error:  # a full disk is an error of safetensors, or of none of Python's classes
        told = explain(error, recipe, out, last_step=last_step(out / "checkpoints"))
        if told is None:
            raise
        raise told from error


@dataclass
class _Progress:
    """Where a run stands: what a checkpoint carries beside tensors."""

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    n_tokens: int = 0
    best_loss: float = math.inf
    best_step: int = 0
    evaluations_since_best: int = 0


class _Run:
    """One process's part of a run: what happens when."""

    def __init__(
        self,
        recipe: TrainingRecipe,
        out: Path,
        source: TokenSource,
        resume: bool,
        on_samples: OnSamples | None,
    ) -> None:
        self.recipe, self.out, self.source, self.on_samples = recipe, out, source, on_samples
        self.info = source.info
        self.distribution = distribution = Distribution(recipe.sharding)
        self.is_main = distribution.is_main
        self.checkpoints = out / "checkpoints"
        self.layout = layout_of(recipe, distribution)
        if self.is_main:
            if not resume:
                for name in ("checkpoints", "metrics.jsonl", "recipe.yaml", "model", "curves"):
                    _remove(out / name)
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        distribution.wait()
        self.state = self._last_checkpoint()  # another recipe's is refused before weights are read
        self.screen = Screen(quiet=not self.is_main)
        first = source.examples(0)
        self._preflight(first)
        self.learner = Learner(recipe, self.info, self.layout, distribution)
        self.progress = _Progress()
        self._data: DeviceExamples
        self._validation: tuple[DeviceExamples, list[Step]] | None = None
        plan = list(self._plan(first, 0))
        self.n_steps = self._total_steps(len(plan))
        self.description = self._describe(first, plan)
        self._pending: list[tuple[int, torch.Tensor, torch.Tensor, float, int]] = []
        self.curves: Curves | None = None
        self.watch = GradientWatch()

    def train(self) -> TrainingResult:
        """Run to the end, or to a reason to stop."""
        self._restore()
        self._check_overfit()
        self._open()
        stop = _StopSignal(stays=self.distribution.world > 1)
        stopped: Stopped = "done"
        begun = time.monotonic()
        recipe, progress = self.recipe, self.progress
        learner = self.learner
        self.screen.start(
            progress.step, self.n_steps, self.description, learner.flops_per_token, learner.peak_flops
        )
        steps = self._steps()
        with stop, contextlib.closing(self.curves) if self.curves else contextlib.nullcontext():
            while progress.step < self.n_steps:
                self._step(next(steps))
                is_last = progress.step == self.n_steps
                if self._is_due(recipe.log_every) or is_last:
                    self._flush()
                is_better = False
                if self._is_due(recipe.eval_every) or is_last:
                    is_better = self._evaluate()
                if recipe.sample_every and self._is_due(recipe.sample_every):
                    self._look_at_samples()
                out_of_time = recipe.max_minutes and time.monotonic() - begun > 60 * recipe.max_minutes
                if self._any(stop.asked):
                    stopped = "signal"
                elif self._any(bool(out_of_time)) and not is_last:
                    stopped = "time"
                elif (
                    recipe.early_stopping_patience is not None
                    and progress.evaluations_since_best >= recipe.early_stopping_patience
                ):
                    stopped = "early"
                if is_better:
                    self._save_best()
                if self._is_due(recipe.checkpoint_every) or is_last or stopped != "done":
                    self._flush()
                    self._save()
                if stopped != "done":
                    break
            if stopped == "signal":
                self.screen.say(
                    f"stopped by a signal at step {progress.step:,}; the same command goes on from there"
                )
                return self._result(stopped, None)
            if progress.best_step == 0:
                self._evaluate()
                self._save_best()
            return self._result(stopped, self._export())

    def _result(self, stopped: Stopped, folder: Path | None) -> TrainingResult:
        progress, rate = self.progress, self.screen.mean_rate()
        return TrainingResult(
            stopped, progress.step, folder, progress.best_loss, rate, self.screen.peak_memory_gb()
        )

    def _is_due(self, every: int) -> bool:
        return self.progress.step % every == 0

    # -- one step

    def _step(self, step: Step) -> None:
        rate = learning_rate(self.progress.step, self.n_steps, self.recipe)
        groups = self.layout.own(step, self.distribution.rank)
        batches = [self._data.batch(group) for group in groups]
        loss, norm = self.learner.step(batches, step.n_targets, rate)
        self.progress.step += 1
        self.progress.step_in_epoch += 1
        self.progress.n_tokens += step.n_tokens
        self._pending.append((self.progress.step, loss, norm, rate, step.n_tokens))

    def _steps(self) -> Iterator[Step]:
        """Yield the steps from where the run stands, epoch after epoch."""
        # the next epoch is drawn while this one trains: a GPU would wait for tens of thousands of crystals
        with ThreadPoolExecutor(1) as drawing:
            coming = drawing.submit(self.source.examples, self.progress.epoch)
            while True:
                epoch, first = self.progress.epoch, self.progress.step_in_epoch
                examples = coming.result()
                coming = drawing.submit(self.source.examples, epoch + 1)
                self._data = self._put(examples)
                for i, step in enumerate(self._plan(examples, epoch)):
                    if i >= first:
                        yield step
                self.progress.epoch, self.progress.step_in_epoch = epoch + 1, 0

    def _plan(self, examples: Examples, epoch: int | None) -> Iterator[Step]:
        order = None if epoch is None else np.random.default_rng([self.recipe.seed, epoch])
        return self.layout.epoch(examples, order)

    def _put(self, examples: Examples) -> DeviceExamples:
        return DeviceExamples(
            examples,
            self.distribution.device,
            pad_token_id=self.info.vocabulary.pad_token_id or 0,  # never a target, never seen: any id does
            loss_on_prompt=self.recipe.data.loss_on_prompt,
        )

    def _total_steps(self, n_first: int) -> int:
        """Return the run's length; an epoch counts as many steps as the first has."""
        if self.recipe.steps is not None:
            return self.recipe.steps
        return max(1, round(n_first * (self.recipe.epochs or 0)))

    # -- losses

    def _evaluate(self) -> bool:
        """Measure the validation loss on the averaged weights; return whether it is the best so far."""
        self._flush()
        if self._validation is None:
            examples = self.source.validation()
            self._validation = (self._put(examples), list(self._plan(examples, None)))
        data, steps = self._validation
        groups = [g for step in steps for g in self.layout.own(step, self.distribution.rank)]
        with self.learner.averaged():
            total = self.learner.summed_loss(data.batch(group) for group in groups)
        loss = float(self.distribution.sum(total)) / sum(step.n_targets for step in steps)
        self._check_finite(loss, "validation loss", self.progress.step)
        progress = self.progress
        is_better = loss < progress.best_loss
        progress.evaluations_since_best = 0 if is_better else progress.evaluations_since_best + 1
        if is_better:
            progress.best_loss, progress.best_step = loss, progress.step
        self._write([{"step": progress.step, "validation_loss": loss}])
        self.screen.validated(progress.step, loss)
        return is_better

    def _look_at_samples(self) -> None:
        """Let the caller judge samples of the averaged weights; the run goes on as if nobody had looked."""
        if self.on_samples is None or self.distribution.is_sharded:
            return
        self._flush()
        if self.is_main:
            model, device = self.learner.model, self.distribution.device
            devices = [device] if device.type == "cuda" else []
            model.eval()
            with self.learner.averaged(), torch.random.fork_rng(devices=devices):
                numbers = self.on_samples(model, self.progress.step)
            model.train()
            self._write([{"step": self.progress.step, **numbers}])
            self.screen.looked(self.progress.step, numbers)
        self.distribution.wait()

    def _flush(self) -> None:
        """Bring the losses since the last call to the host, the only wait for the GPU; check, write them."""
        if not self._pending:
            return
        losses: list[float] = self.distribution.sum(torch.stack([row[1] for row in self._pending])).tolist()
        norms: list[float] = torch.stack([row[2] for row in self._pending]).tolist()
        records = []
        for (step, _, _, rate, n_tokens), loss, norm in zip(self._pending, losses, norms, strict=True):
            self._check_finite(loss, "loss", step)
            if problem := self.watch.see(step, norm):
                raise self._diverged(problem)
            records.append(
                {"step": step, "loss": loss, "gradient_norm": norm, "lr": rate, "tokens": n_tokens}
            )
        self._pending.clear()
        self._write(records)
        self.screen.logged(records)

    def _check_finite(self, value: float, what: str, step: int) -> None:
        if not math.isfinite(value):
            raise self._diverged(f"the {what} is {value} at step {step:,}")

    def _diverged(self, problem: str) -> TrainingError:
        return diverged(problem, self.recipe, self.out, last_step=last_step(self.checkpoints))

    def _any(self, flag: bool) -> bool:
        """Return whether any process says so. Several processes ask each other only at log steps."""
        if self.distribution.world > 1 and not self._is_due(self.recipe.log_every):
            return False
        return self.distribution.any(flag)

    # -- checkpoints

    def _save(self) -> None:
        device = self.distribution.device
        random = {"cpu": torch.get_rng_state()}
        if device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(device)
        facts = {
            "progress": dataclasses.asdict(self.progress),
            "random": self.distribution.gather(random),
            "recipe": recipe_to_dict(self.recipe),
            "data_sha256": self.source.sha256,
            "template": [self.info.template, self.info.template_sha256],
        }
        folder = self.checkpoints / f"{self.progress.step:08d}"
        save_checkpoint(folder, facts, self.learner.tensors(), self.distribution)

    def _save_best(self) -> None:
        with self.learner.averaged():
            save_weights(
                self.checkpoints / "best", self.progress.best_step, self.learner.weights, self.distribution
            )

    def _last_checkpoint(self) -> tuple[Path, dict[str, Any]] | None:
        """Return the last checkpoint that can be read.

        Raises:
            RecipeError: If it is another run's.
        """
        for folder in reversed(checkpoint_folders(self.checkpoints)):
            try:
                facts = read_facts(folder)
            except (OSError, RuntimeError, EOFError, ValueError) as error:
                print(f"{folder} cannot be read ({error}); trying the one before", file=sys.stderr)
                continue
            self._check_same_run(facts)
            return folder, facts
        return None

    def _restore(self) -> None:
        """Go to the last whole checkpoint, if there is one."""
        if self.state is None:
            return
        folder, facts = self.state
        self.state = None
        try:
            tensors = self.learner.tensors()
            read_tensors(folder, facts, tensors)
        except KeyError as error:
            raise RecipeError(
                f"{folder}: holds other weights than this recipe trains: no {error}. Name another folder."
            ) from error
        self.progress = _Progress(**facts["progress"])
        self.learner.filled(tensors, self.progress.step)
        random = facts["random"]
        rank, device = self.distribution.rank, self.distribution.device
        if rank < len(random):
            torch.set_rng_state(random[rank]["cpu"])
            if "cuda" in random[rank] and device.type == "cuda":
                torch.cuda.set_rng_state(random[rank]["cuda"], device)
        self.screen.say(f"resuming at step {self.progress.step:,}")

    def _check_same_run(self, state: dict[str, Any]) -> None:
        then, now = _flat(state["recipe"]), _flat(recipe_to_dict(self.recipe))
        changed = [
            f"{key} was {then.get(key)}, is {now.get(key)}"
            for key in sorted(then.keys() | now.keys())
            if key.split(".")[0] not in _FREE_KEYS
            and not key.startswith(_FREE_SUBKEYS)
            and now.get(key) != then.get(key)
        ]
        template = [self.info.template, self.info.template_sha256]
        if state["template"] != template:
            changed.append(
                f"the prompt template was {_template(state['template'])}, is {_template(template)}"
            )
        elif state["data_sha256"] != self.source.sha256:
            changed.append("the corpus has another content")
        if changed:
            raise RecipeError(
                f"{self.out}: holds a run with other settings: {'; '.join(changed)}. "
                "Name another folder, or begin anew with --fresh, which removes that run."
            )

    # -- output

    def _export(self) -> Path:
        """Write out/model from the best or the last weights."""
        folder = self.out / "model"
        with self.learner.averaged():
            if self.recipe.export == "best":
                self.learner.copy_weights(read_weights(self.checkpoints / "best"))
            self.learner.export(folder, self.recipe.data.tokenizer_folder, self._manifest())
        self.distribution.wait()
        self.screen.say(f"wrote {folder}")
        return folder

    def _manifest(self) -> Manifest:
        progress, device, base = self.progress, self.distribution.device, self.recipe.base
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        counted = "trained_weights" if base and base.method == "lora" else "parameters"
        return Manifest(
            recipe=recipe_to_dict(self.recipe),
            format=self.info.format,
            format_settings=dict(self.info.format_settings),
            template=self.info.template,
            template_sha256=self.info.template_sha256,
            data_sha256=self.source.sha256,
            seed=self.recipe.seed,
            git_commit=git_commit(),
            versions=library_versions(),
            device=f"{self.distribution.world} x {name}",
            results={
                "validation_loss": progress.best_loss,
                "validation_loss_step": progress.best_step,
                "steps": progress.step,
                "training_tokens": progress.n_tokens,
                "tokens_per_second": round(self.screen.mean_rate()),
                counted: self.learner.n_trainable,
                "tasks": sorted(name for name, share in self.source.tasks.items() if share),
            },
            base={} if base is None else {
                "name": base.name, "revision": base.revision, "method": base.method,
                "quantisation": base.quantisation,
            },
        )  # fmt: skip

    def _open(self) -> None:
        """Write the recipe, and open the curves where they end at the step that the run goes on from."""
        if self.is_main:
            plain = recipe_to_dict(self.recipe)
            (self.out / "recipe.yaml").write_text(yaml.safe_dump(plain, sort_keys=False), encoding="utf-8")
            self.curves = Curves(self.out, self.recipe.track, plain, resume_step=self.progress.step)

    def _write(self, records: list[dict[str, Any]]) -> None:
        if self.curves is not None:
            self.curves.write(records)

    def _preflight(self, first: Examples) -> None:
        """Look at the data and at the memory that the run needs, before any weights are read."""
        device = self.distribution.device
        config = checked_config(self.recipe, self.info, device)
        if self.is_main:
            lines = preflight.check(
                self.recipe,
                config,
                self.layout,
                first,
                self.info.vocabulary,
                validation=self.source.validation(),
                device=device,
            )
            for line in lines:
                self.screen.say(line)

    def _check_overfit(self) -> None:
        """Where the recipe asks for it, learn one batch by heart, and forget it again.

        Raises:
            TrainingError: If its loss does not fall as it must.
        """
        n, progress = self.recipe.overfit_check, self.progress
        if not n or progress.step:
            return
        learner = self.learner
        before = {name: tensor.clone() for name, tensor in learner.tensors().items()}
        random = torch.get_rng_state()
        examples = self.source.examples(0)
        step = next(self._plan(examples, 0))
        data = self._put(examples)
        groups = self.layout.own(step, self.distribution.rank)
        losses = []
        for _ in range(n):
            loss, _norm = learner.step(
                [data.batch(g) for g in groups], step.n_targets, self.recipe.optimizer.lr
            )
            losses.append(float(self.distribution.sum(loss)))
        with torch.no_grad():
            for name, tensor in (tensors := learner.tensors()).items():
                tensor.copy_(before[name])
        learner.filled(tensors, 0)
        torch.set_rng_state(random)
        if problem := preflight.judge_overfit(losses, self.recipe):
            raise TrainingError(f"{self.out}: {problem}")
        self.screen.say(f"overfit check: one batch, {n} steps, loss {losses[0]:.3f} -> {losses[-1]:.3f}")

    def _describe(self, first: Examples, plan: list[Step]) -> str:
        real, padded = (
            sum(step.n_tokens for step in plan),
            sum(group.n_padded for step in plan for group in step.groups),
        )
        lengths = np.diff(first.offsets)
        dropped = int((lengths > self.layout.max_length).sum())
        return (
            f"{self.learner.n_trainable:,} weights train, {self.n_steps:,} steps; epoch 0: {len(lengths):,} "
            f"examples, {dropped} too long, {real:,} tokens, {len(plan)} steps, "
            f"padding {1 - real / padded:.1%}"
        )


class _StopSignal:
    """SIGTERM, noted and acted on between two steps.

    Attributes:
        asked: Whether it came.
        stays: Whether it is noted on after an error: a launcher that has lost one process sends it to the
            others, which would end before they have told what happened.
    """

    def __init__(self, *, stays: bool) -> None:
        self.asked, self.stays = False, stays
        self._before: Any = None

    def __enter__(self) -> "_StopSignal":
        with contextlib.suppress(ValueError):  # not the main thread: whoever owns it handles signals
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if self._before is not None and not (error and self.stays):
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, *_: object) -> None:
        self.asked = True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _template(named: list[str]) -> str:
    return f"'{named[0]}' ({named[1][:12]})"


def _flat(data: dict[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{before}{key}."))
        else:
            flat[f"{before}{key}"] = value
    return flat


def main(arguments: list[str] | None = None) -> int:
    """Run a recipe from the command line; return the exit code (2 for a user's mistake)."""
    parser = argparse.ArgumentParser(
        prog="python -m crystallm_kit.training", description="Train a model from a recipe."
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--npz", type=Path, help="token arrays; wins over the recipe's data.corpus")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="for example optimizer.lr=1e-3"
    )
    parser.add_argument("--fresh", action="store_true", help="remove the run that --out holds")
    options = parser.parse_args(arguments)
    silence_libraries()
    overrides = list(options.set)
    if options.npz:
        overrides.append(f"data.corpus={json.dumps(os.fspath(options.npz))}")
    try:
        recipe = load_training_recipe(options.recipe, overrides)
        result = train(recipe, options.out, resume=not options.fresh)
    except UserError as error:
        if is_first_to_tell():
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 2
    if is_first_process():
        print(json.dumps(recipe_to_dict(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
