"""Training: one resumable loop over accelerate, from token arrays to a model folder.

    python -m crystallm_kit.models.training finetune/llama-scratch-wyckoff-mp.yaml --npz corpus.npz --out
    runs/a

On the screen, one line per `log_every` steps:
    step 1,200/10,000  loss 0.7312  validation 0.7420  lr 9.8e-04  2,310,000 tokens/s  MFU 14 %  8:20 left

In `--out`: recipe.yaml (as run), metrics.jsonl (every step's loss), checkpoints/ (the last two and the best),
model/ (the model folder, written at the end). Killed at any moment, the same command goes on from the last
checkpoint with the losses that the uninterrupted run would have had; on one CPU they are equal to the last
digit.

It holds at every checkpoint that all losses before it were finite. SIGTERM saves and returns (exit code 0).
Weights are float32 and the forward pass bfloat16 (autocast) on a GPU; on a CPU everything is float32.

Not here: how a step is cut into rows (batches.py), model folders (checkpoints.py), corpus preparation
(tokens/corpus.py).
"""

import argparse
import contextlib
import dataclasses
import errno
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from torch import nn

from crystallm_kit.errors import RecipeError, TrainingError, UserError
from crystallm_kit.models.batches import DeviceExamples, Layout, Step, TokenSource, open_source
from crystallm_kit.models.checkpoints import (
    Manifest,
    git_commit,
    library_versions,
    new_model,
    replace_folder,
    save_model,
)
from crystallm_kit.models.progress import Screen
from crystallm_kit.models.training_loss import SummedLoss, add_residual_dropout, attention, compile_layers
from crystallm_kit.models.training_recipe import TrainingRecipe, learning_rate
from crystallm_kit.recipes import load_recipe, recipe_to_dict
from crystallm_kit.tokens.drawing import Examples

# Dense bf16 peak in FLOP/s by the vendors' datasheets, for model FLOP utilisation.
_PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
# Keys that may differ between a run and its resumption: they change where it ends, not what a step does.
_FREE_KEYS = frozenset(
    [
        "epochs",
        "steps",
        "eval_every",
        "checkpoint_every",
        "log_every",
        "max_minutes",
        "early_stopping_patience",
        "compile",
        "export",
        "export_dtype",
        "export_shard_mb",
        "micro_tokens",
    ]
)


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended.

    Attributes:
        stopped: done, early (no better validation loss), time (max_minutes), signal (SIGTERM: run it again).
        steps: Optimizer steps done.
        model_folder: The model; None after a signal.
        validation_loss: Best validation loss, in nats per token.
        tokens_per_second: Over this process's steps, validation and checkpoints left out.
    """

    stopped: Literal["done", "early", "time", "signal"]
    steps: int
    model_folder: Path | None
    validation_loss: float
    tokens_per_second: float


def train(
    recipe: TrainingRecipe, out: str | Path, *, source: TokenSource | None = None, resume: bool = True
) -> TrainingResult:
    """Train a model from scratch and write its folder to `out/model`.

    Args:
        recipe: Everything that the run depends on.
        out: Folder of the run.
        source: Examples; None: the recipe's `data.corpus`.
        resume: Go on from the last checkpoint in `out`; False: begin anew, and remove what is there.

    Raises:
        RecipeError: If the recipe does not fit the corpus, or the run that `out` holds.
        ReadError: If the corpus cannot be read.
        TrainingError: If the run cannot go on: a loss that is no number, a full disk, too little memory.
    """
    if source is None:
        if recipe.data.corpus is None:
            raise RecipeError("data.corpus is not set: name the corpus to train on.")
        source = open_source(recipe.data.corpus)
    run = _Run(recipe, Path(out), source, resume)
    try:
        return run.train()
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"{out}: out of GPU memory. Lower micro_tokens (now {recipe.micro_tokens:,}); the batch stays "
            "the same, in more passes. Then run the same command: it resumes."
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise TrainingError(
            f"{out}: the disk is full; the last checkpoint is whole. Free space or raise checkpoint_every "
            "and run the same command: it resumes."
        ) from error


@dataclass
class _Progress:
    """Where a run stands: what a checkpoint carries beside weights."""

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    n_tokens: int = 0
    best_loss: float = math.inf
    best_step: int = 0
    evaluations_since_best: int = 0


class _Run:
    """One process's part of a run."""

    def __init__(self, recipe: TrainingRecipe, out: Path, source: TokenSource, resume: bool) -> None:
        from accelerate import Accelerator  # type: ignore[import-untyped]
        from transformers import AttentionInterface

        self.recipe, self.out, self.source = recipe, out, source
        self.info = source.info
        self.accelerator = Accelerator(
            mixed_precision="no"
        )  # autocast is in SummedLoss, inside the compiled part
        self.device: torch.device = self.accelerator.device
        self.is_main = self.accelerator.is_main_process
        self.world = self.accelerator.num_processes
        self.checkpoints = out / "checkpoints"
        self.layout = Layout(
            recipe.batch_tokens,
            recipe.micro_tokens,
            # the last token is a target only, so that a text may have one token more than positions
            min(recipe.data.max_length or 10**9, recipe.model.max_positions + 1),
            recipe.data.loss_on_prompt,
            packed=self._is_packed(),
            n_processes=self.world,
        )
        if self.is_main:
            if not resume:
                for name in ("checkpoints", "metrics.jsonl", "recipe.yaml", "model"):
                    _remove(out / name)
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        self.accelerator.wait_for_everyone()

        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        AttentionInterface.register("crystallm_kit_training", attention)
        self.model = new_model(recipe.model, self.info.vocabulary, seed=recipe.seed)
        self.model.config._attn_implementation = "crystallm_kit_training"
        self.model.to(self.device).train()
        if recipe.residual_dropout:
            add_residual_dropout(self.model, recipe.residual_dropout)
        self.weights: list[torch.Tensor] = [p for p in self.model.parameters() if p.requires_grad]
        self.averages = [w.detach().clone() for w in self.weights] if recipe.ema_decay else []
        loss = SummedLoss(self.model, self.device.type, self.layout.max_length, bfloat16=self._is_bfloat16())
        if recipe.compile and self.device.type == "cuda":
            compile_layers(self.model, is_static=self.layout.packed)
        self.loss: nn.Module = self.accelerator.prepare_model(loss)
        self.optimizer = self._optimizer()
        self.progress = _Progress()
        torch.manual_seed(recipe.seed + 1_000_003 * self.accelerator.process_index)
        self._data: DeviceExamples
        self._validation: tuple[DeviceExamples, list[Step]] | None = None
        self.n_steps = self._total_steps()
        self._pending: list[tuple[int, torch.Tensor, torch.Tensor, float, int]] = []
        self.screen = Screen(
            self.n_steps, self._flops_per_token(), self._peak_flops(), quiet=not self.is_main
        )

    def train(self) -> TrainingResult:
        """Run to the end, or to a reason to stop."""
        self._restore()
        self._write_recipe()
        stop = _StopSignal()
        stopped: Literal["done", "early", "time", "signal"] = "done"
        begun = time.monotonic()
        recipe, progress = self.recipe, self.progress
        self.screen.start(progress.step, self._describe())
        steps = self._steps()
        with stop:
            while progress.step < self.n_steps:
                self._step(next(steps))
                is_last = progress.step == self.n_steps
                if progress.step % recipe.log_every == 0 or is_last:
                    self._flush()
                is_better = False
                if progress.step % recipe.eval_every == 0 or is_last:
                    is_better = self._evaluate()
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
                if progress.step % recipe.checkpoint_every == 0 or is_last or stopped != "done":
                    self._flush()
                    self._save()
                if stopped != "done":
                    break
        if stopped == "signal":
            self.screen.say(
                f"stopped by a signal at step {progress.step:,}; the same command goes on from there"
            )
            return TrainingResult(stopped, progress.step, None, progress.best_loss, self.screen.mean_rate())
        if progress.best_step == 0:
            self._evaluate()
            self._save_best()
        folder = self._export()
        return TrainingResult(stopped, progress.step, folder, progress.best_loss, self.screen.mean_rate())

    # -- one step

    def _step(self, step: Step) -> None:
        recipe, data = self.recipe, self._data
        rate = learning_rate(self.progress.step, self.n_steps, recipe)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = rate
        total = torch.zeros((), device=self.device)
        groups = self.layout.own(step, self.accelerator.process_index)
        for i, group in enumerate(groups):
            is_last = i == len(groups) - 1
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.loss):
                summed = self.loss(*data.batch(group))
                # DDP takes the mean of the gradients over processes; what is wanted is their sum
                self.accelerator.backward(summed * (self.world / step.n_targets))
            total += summed.detach()
        norm = nn.utils.clip_grad_norm_(self.weights, recipe.optimizer.gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        self.progress.step_in_epoch += 1
        self.progress.n_tokens += step.n_tokens
        if self.averages:
            decay = min(recipe.ema_decay, self.progress.step / (self.progress.step + 10))
            torch._foreach_lerp_(self.averages, self.weights, 1 - decay)
        self._pending.append((self.progress.step, total / step.n_targets, norm, rate, step.n_tokens))

    def _steps(self) -> Iterator[Step]:
        """Yield the steps from where the run stands, epoch after epoch."""
        while True:
            epoch, first = self.progress.epoch, self.progress.step_in_epoch
            examples = self.source.examples(epoch)
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
            self.device,
            pad_token_id=self.info.vocabulary.pad_token_id or 0,  # never a target, never seen: any id does
            loss_on_prompt=self.recipe.data.loss_on_prompt,
        )

    def _total_steps(self) -> int:
        """Return the run's length; an epoch counts as many steps as the first has."""
        if self.recipe.steps is not None:
            return self.recipe.steps
        n = sum(1 for _ in self._plan(self.source.examples(0), 0))
        return max(1, round(n * (self.recipe.epochs or 0)))

    # -- losses

    @torch.no_grad()
    def _evaluate(self) -> bool:
        """Measure the validation loss on the averaged weights; return whether it is the best so far."""
        self._flush()
        if self._validation is None:
            examples = self.source.validation()
            self._validation = (self._put(examples), list(self._plan(examples, None)))
        data, steps = self._validation
        total = torch.zeros((), device=self.device, dtype=torch.float64)
        self.model.eval()
        with self._averaged():
            for step in steps:
                for group in self.layout.own(step, self.accelerator.process_index):
                    total += self.loss(*data.batch(group)).double()
        self.model.train()
        summed = self.accelerator.reduce(total, "sum")
        loss = float(summed) / sum(step.n_targets for step in steps)
        self._check_finite(loss, "validation loss", self.progress.step)
        progress = self.progress
        is_better = loss < progress.best_loss
        progress.evaluations_since_best = 0 if is_better else progress.evaluations_since_best + 1
        if is_better:
            progress.best_loss, progress.best_step = loss, progress.step
        self._write_metrics([{"step": progress.step, "validation_loss": loss}])
        self.screen.validated(progress.step, loss)
        return is_better

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """Exchange the weights for their running mean, in place, and put them back bit by bit."""
        if not self.averages:
            yield
            return
        kept = [weight.detach().clone() for weight in self.weights]
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.averages)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.weights, kept)

    def _flush(self) -> None:
        """Bring the losses since the last call to the host, the only wait for the GPU; check, write them."""
        if not self._pending:
            return
        numbers = torch.stack([torch.stack((loss, norm)) for _, loss, norm, _, _ in self._pending])
        rows: list[list[float]] = self.accelerator.reduce(numbers[:, 0], "sum")[:, None].tolist()
        norms: list[float] = numbers[:, 1].tolist()
        records = []
        for (step, _, _, rate, n_tokens), (loss,), norm in zip(self._pending, rows, norms, strict=True):
            self._check_finite(loss, "loss", step)
            self._check_finite(norm, "gradient", step)
            records.append(
                {"step": step, "loss": loss, "gradient_norm": norm, "lr": rate, "tokens": n_tokens}
            )
        self._pending.clear()
        self._write_metrics(records)
        self.screen.logged(records)

    def _check_finite(self, value: float, what: str, step: int) -> None:
        if math.isfinite(value):
            return
        last = _last_checkpoint(self.checkpoints)
        kept = f"the checkpoint of step {int(last.name):,} is good" if last else "there is no checkpoint yet"
        lr, clip = self.recipe.optimizer.lr, self.recipe.optimizer.gradient_clip
        raise TrainingError(
            f"{self.out}: the {what} is {value} at step {step:,}; {kept}. Lower optimizer.lr (now {lr:g}) or "
            f"optimizer.gradient_clip (now {clip:g}), or raise schedule.warmup_steps "
            f"(now {self.recipe.schedule.warmup_steps}), and begin anew in another folder."
        )

    def _any(self, flag: bool) -> bool:
        """Return whether any process says so. Several processes ask each other only at log steps."""
        if self.world == 1:
            return flag
        if self.progress.step % self.recipe.log_every:
            return False
        told = self.accelerator.reduce(torch.tensor(float(flag), device=self.device), "sum")
        return bool(told > 0)

    # -- checkpoints

    def _save(self) -> None:
        """Write a checkpoint, whole or not at all, and drop all but the last two."""
        from accelerate.utils import gather_object  # type: ignore[import-untyped]

        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        all_random = gather_object([random])
        if self.is_main:
            folder = self.checkpoints / f"{self.progress.step:08d}"
            state = {
                "progress": dataclasses.asdict(self.progress),
                "model": {name: w.detach() for name, w in self.model.named_parameters()},
                "averages": self.averages,
                "optimizer": self.optimizer.state_dict(),
                "random": all_random,
                "recipe": recipe_to_dict(self.recipe),
                "data_sha256": self.source.sha256,
            }
            self._write_folder(folder, {"state.pt": state})
            for old in _checkpoint_folders(self.checkpoints)[:-2]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _save_best(self) -> None:
        if self.is_main:
            with self._averaged():
                weights = {name: w.detach().clone() for name, w in self.model.named_parameters()}
            self._write_folder(
                self.checkpoints / "best",
                {"weights.pt": {"step": self.progress.best_step, "weights": weights}},
            )

    def _write_folder(self, folder: Path, files: dict[str, Any]) -> None:
        writing = folder.with_name(f".{folder.name}.writing")
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir()
        try:
            for name, content in files.items():
                torch.save(content, writing / name)
        except (RuntimeError, OSError) as error:
            shutil.rmtree(writing, ignore_errors=True)
            # torch reports a full disk as a RuntimeError of its zip writer
            if shutil.disk_usage(self.checkpoints).free < 1e8:
                raise OSError(errno.ENOSPC, "no space left") from error
            raise
        replace_folder(writing, folder)

    def _restore(self) -> None:
        """Go to the last whole checkpoint, if there is one."""
        state = None
        for folder in reversed(_checkpoint_folders(self.checkpoints)):
            try:
                state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
                break
            except (OSError, RuntimeError, EOFError, ValueError) as error:
                self.screen.say(f"{folder} cannot be read ({error}); trying the one before")
        if state is None:
            if self.is_main:
                self._trim_metrics(0)
            return
        self._check_same_run(state)
        named = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, saved in state["model"].items():
                named[name].copy_(saved)
            for average, saved in zip(self.averages, state["averages"], strict=True):
                average.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = _Progress(**state["progress"])
        random = state["random"]
        if self.accelerator.process_index < len(random):
            own = random[self.accelerator.process_index]
            torch.set_rng_state(own["cpu"])
            if "cuda" in own and self.device.type == "cuda":
                torch.cuda.set_rng_state(own["cuda"], self.device)
        if self.is_main:
            self._trim_metrics(self.progress.step)
        self.screen.say(f"resuming at step {self.progress.step:,}")

    def _check_same_run(self, state: dict[str, Any]) -> None:
        then, now = state["recipe"], recipe_to_dict(self.recipe)
        changed = [
            f"{key} was {before}, is {_flat(now).get(key)}"
            for key, before in _flat(then).items()
            if key.split(".")[0] not in _FREE_KEYS
            and not key.startswith(("data.corpus", "data.tokenizer"))
            and _flat(now).get(key) != before
        ]
        if state["data_sha256"] != self.source.sha256:
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
        if self.is_main:
            with self._averaged():
                if self.recipe.export == "best":
                    best = torch.load(
                        self.checkpoints / "best" / "weights.pt", map_location="cpu", weights_only=True
                    )["weights"]
                    named = dict(self.model.named_parameters())
                    with torch.no_grad():
                        for name, saved in best.items():
                            named[name].copy_(saved)
                self.model.config._attn_implementation = "sdpa"
                save_model(
                    folder,
                    self.model,
                    self.recipe.data.tokenizer,
                    self._manifest(),
                    dtype=self.recipe.export_dtype,
                    max_shard_mb=self.recipe.export_shard_mb,
                )
        self.accelerator.wait_for_everyone()
        self.screen.say(f"wrote {folder}")
        return folder

    def _manifest(self) -> Manifest:
        progress = self.progress
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
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
            device=f"{self.world} x {device}",
            results={
                "validation_loss": progress.best_loss,
                "validation_loss_step": progress.best_step,
                "steps": progress.step,
                "training_tokens": progress.n_tokens,
                "tokens_per_second": round(self.screen.mean_rate()),
                "parameters": sum(weight.numel() for weight in self.weights),
            },
        )

    def _write_recipe(self) -> None:
        if self.is_main:
            text = yaml.safe_dump(recipe_to_dict(self.recipe), sort_keys=False)
            (self.out / "recipe.yaml").write_text(text, encoding="utf-8")

    def _write_metrics(self, records: list[dict[str, Any]]) -> None:
        if self.is_main:
            with (self.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)

    def _trim_metrics(self, step: int) -> None:
        """Drop the lines after a step, and a half-written one, so that a resumed run logs no step twice."""
        path = self.out / "metrics.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            with contextlib.suppress(ValueError):
                if json.loads(line)["step"] <= step:
                    kept.append(line)
        writing = path.with_suffix(".writing")
        writing.write_text("".join(kept), encoding="utf-8")
        writing.replace(path)

    # -- set-up

    def _is_bfloat16(self) -> bool:
        return self.recipe.precision == "bfloat16" and self.device.type == "cuda"

    def _is_packed(self) -> bool:
        can = self._is_bfloat16() and self.recipe.model.attention_dropout == 0
        if self.recipe.rows == "packed" and self.device.type == "cuda" and not can:
            raise RecipeError("rows: packed needs precision bfloat16 and model.attention_dropout 0 on a GPU.")
        return can if self.recipe.rows == "auto" else self.recipe.rows == "packed"

    def _optimizer(self) -> torch.optim.AdamW:
        recipe = self.recipe.optimizer
        groups = [
            {"params": [w for w in self.weights if w.ndim >= 2], "weight_decay": recipe.weight_decay},
            {"params": [w for w in self.weights if w.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, fused=self.device.type == "cuda"
        )

    def _flops_per_token(self) -> float:
        """Return 6 FLOPs per weight that a token meets; an embedding that is not the head is only looked up.

        Attention over texts of tens of tokens adds a few per cent, left out.
        """
        n = sum(weight.numel() for weight in self.weights)
        if not self.recipe.model.tie_embeddings:
            n -= self.info.vocabulary.size * self.recipe.model.hidden_size
        return 6.0 * n

    def _peak_flops(self) -> float | None:
        if self.device.type != "cuda":
            return None
        name = torch.cuda.get_device_name(self.device)
        return next((peak * self.world for part, peak in _PEAK_FLOPS.items() if part in name), None)

    def _describe(self) -> str:
        n = sum(weight.numel() for weight in self.weights)
        plan = list(self._plan(self.source.examples(0), 0))
        real, padded = (
            sum(step.n_tokens for step in plan),
            sum(group.n_padded for step in plan for group in step.groups),
        )
        lengths = np.diff(self.source.examples(0).offsets)
        dropped = int((lengths > self.layout.max_length).sum())
        return (
            f"{n:,} weights, {self.n_steps:,} steps; epoch 0: {len(lengths):,} examples, {dropped} too long, "
            f"{real:,} tokens, {len(plan)} steps, padding {1 - real / padded:.1%}"
        )


class _StopSignal:
    """SIGTERM, noted and acted on between two steps."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> "_StopSignal":
        with contextlib.suppress(ValueError):  # not the main thread: whoever owns it handles signals
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, *_: object) -> None:
        self.asked = True


def _checkpoint_folders(checkpoints: Path) -> list[Path]:
    """Return the folders of whole checkpoints, oldest first; names of half-written ones begin with a dot."""
    return sorted(f for f in checkpoints.iterdir() if f.name.isdecimal()) if checkpoints.is_dir() else []


def _last_checkpoint(checkpoints: Path) -> Path | None:
    return next(reversed(_checkpoint_folders(checkpoints)), None)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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
        prog="python -m crystallm_kit.models.training", description="Train a model from a recipe."
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--npz", type=Path, help="token arrays; wins over the recipe's data.corpus")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="for example optimizer.lr=1e-3"
    )
    parser.add_argument("--fresh", action="store_true", help="remove the run that --out holds")
    options = parser.parse_args(arguments)
    overrides = list(options.set)
    if options.npz:
        overrides.append(f"data.corpus={json.dumps(os.fspath(options.npz))}")
    try:
        recipe = load_recipe(options.recipe, TrainingRecipe, tuple(overrides))
        result = train(recipe, options.out, resume=not options.fresh)
    except UserError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print(json.dumps(recipe_to_dict(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
