"""What is looked at before a training run's first step: lengths, labels, memory, and one batch by heart.

    python -m crystallm_kit.training.preflight finetune/llama-70b-qlora.yaml --gpu-gb 80 --gpus 1

    memory of each GPU, estimated                 GB
    frozen weights (nf4, double)               39.52
    ...
    total                                      50.33
    of the GPU                                 80.00   63%
    it fits.

The command needs no GPU and reads no weights; the config comes from the base's folder or id, or from --config
(a folder or a config.json). Exit code 1: it does not fit.

What cannot work raises before weights are loaded; what may be a mistake is a line that begins with
"warning:".

Not here: how memory is estimated (memory.py), what ends a run later (failures.py).
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from crystallm_kit.errors import EmptyInput, RecipeError, TrainingError, UserError
from crystallm_kit.models.bases import check_base, max_positions, packing_problem
from crystallm_kit.tokens.drawing import Examples, VocabularyInfo
from crystallm_kit.training.batches import Layout, open_source
from crystallm_kit.training.learner import BASE_MAX_LENGTH
from crystallm_kit.training.memory import (
    CONTEXT_BYTES,
    MemoryEstimate,
    memory_estimate,
    scratch_config,
    shape_of_pass,
)
from crystallm_kit.training.recipe import TrainingRecipe, load_training_recipe

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Of a GPU's memory: from the first on it is tight (the estimate may be 15 % off), beyond the second hopeless.
TIGHT, HOPELESS = 0.9, 1.3
_BARS = " ▁▂▃▄▅▆▇█"
_HISTOGRAM_BINS = 24


# ---------------------------------------------------------------- lengths and labels


@dataclass(frozen=True)
class Lengths:
    """Lengths of examples, in tokens.

    Attributes:
        n: Examples.
        median, p95, longest: Tokens; p95: 95 % of the examples have at most so many.
        max_length: Longer ones are left out.
        n_too_long: How many that are.
        n_too_short: Of less than two tokens, which teach nothing.
        labelled_share: Of the input positions of those that stay, without prompts.
        histogram: Counts in bins of equal width from 0 to the longest.
    """

    n: int
    median: float
    p95: float
    longest: int
    max_length: int
    n_too_long: int
    n_too_short: int
    labelled_share: float
    histogram: tuple[int, ...]

    @property
    def share_too_long(self) -> float:
        """Return the share that is left out for its length."""
        return self.n_too_long / self.n if self.n else 0.0

    def lines(self) -> list[str]:
        """Return lines for people."""
        most = max(self.histogram, default=0) or 1
        bars = "".join(_BARS[-(-(len(_BARS) - 1) * count // most)] for count in self.histogram)
        lines = [
            f"lengths: {self.n:,} examples, median {self.median:.0f} tokens, 95 % up to {self.p95:.0f}, "
            f"longest {self.longest:,}; {self.labelled_share:.0%} of the positions come after prompts",
            f"lengths: 0 |{bars}| {self.longest:,}",
        ]
        if self.n_too_long:
            many = "warning: " if self.share_too_long > 0.5 else ""
            lines.append(
                f"{many}{self.n_too_long:,} examples ({self.share_too_long:.1%}) have more than "
                f"{self.max_length:,} tokens and are left out whole: a crystal cut off would teach texts "
                f"without an end. data.max_length: {self.longest:,} would keep all."
            )
        return lines


def lengths_report(examples: Examples, max_length: int) -> Lengths:
    """Return the lengths of examples, and how many are longer than `max_length` tokens.

    Raises:
        EmptyInput: If there are no examples.
    """
    lengths = np.diff(examples.offsets)
    if not len(lengths):
        raise EmptyInput("no examples.")
    stays = (lengths <= max_length) & (lengths > 1)
    n_inputs = lengths[stays] - 1
    n_prompt = np.maximum(examples.prompt_lengths[stays].astype(np.int64) - 1, 0)
    labelled = np.maximum(n_inputs - n_prompt, 0).sum() / max(1, n_inputs.sum())
    histogram, _ = np.histogram(lengths, bins=_HISTOGRAM_BINS, range=(0, int(lengths.max()) + 1))
    return Lengths(
        n=len(lengths),
        median=float(np.median(lengths)),
        p95=float(np.percentile(lengths, 95)),
        longest=int(lengths.max()),
        max_length=max_length,
        n_too_long=int((lengths > max_length).sum()),
        n_too_short=int((lengths < 2).sum()),
        labelled_share=float(labelled),
        histogram=tuple(histogram.tolist()),
    )


def check_examples(
    examples: Examples, layout: Layout, vocabulary: VocabularyInfo, *, name: str = "training set"
) -> Lengths:
    """Return the lengths of examples that a run can learn from.

    Raises:
        EmptyInput: If there is none, or none is short enough.
        RecipeError: If no position has a loss, or a token id lies outside the vocabulary.
    """
    if len(examples.offsets) < 2:
        raise EmptyInput(f"{name}: no examples. Prepare the corpus from more crystals.")
    lengths = lengths_report(examples, layout.max_length)
    if lengths.n_too_long + lengths.n_too_short == lengths.n:
        raise EmptyInput(
            f"{name}: none of {lengths.n:,} examples has 2 to {layout.max_length:,} tokens (the shortest has "
            f"{int(np.diff(examples.offsets).min()):,}). Raise data.max_length, up to the model's positions, "
            "or prepare the corpus in a shorter format (compact, wyckoff)."
        )
    if lengths.labelled_share == 0 and not layout.loss_on_prompt:
        raise RecipeError(
            f"{name}: no position has a loss: each example is prompt alone (prompt_lengths reach the end). "
            "Prepare the corpus again, or set data.loss_on_prompt: true."
        )
    largest = int(examples.tokens.max())
    if largest >= vocabulary.size:
        raise RecipeError(
            f"{name}: token id {largest:,} lies outside the vocabulary of {vocabulary.size:,}. The corpus "
            "was prepared with another tokenizer: prepare it again with the model's."
        )
    return lengths


def check_stated(stated: Mapping[str, int], n: int) -> list[str]:
    """Return warnings about conditions that are asked for and rarely there.

    Args:
        stated: Condition or property that the template or the tasks name -> training crystals that have it.
        n: Training crystals.

    Raises:
        RecipeError: If one is in no crystal: prompts with it would teach nothing.
    """
    missing = [name for name, count in stated.items() if not count]
    if missing:
        there = [name for name, count in stated.items() if count]
        raise RecipeError(
            f"the data have no {', '.join(missing)}, which the template names, in any of {n:,} crystals. "
            f"Has: {', '.join(there) or 'none of them'}. Check the column's name in the data, or take it out "
            "of the corpus recipe."
        )
    return [
        f"warning: {name} is known of {count:,} of {n:,} crystals ({count / n:.1%}) only."
        for name, count in stated.items()
        if count < 0.05 * n
    ]


# ---------------------------------------------------------------- memory


def gpu_capacity(device: torch.device) -> float | None:
    """Return the bytes of a GPU that this process can have; None for a CPU."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return float(free) + torch.cuda.memory_reserved(device) + CONTEXT_BYTES


def check_memory(
    config: "PretrainedConfig", recipe: TrainingRecipe, layout: Layout, capacity: float, **settings: Any
) -> tuple[MemoryEstimate, list[str]]:
    """Return the estimate of a run, and it as lines with a verdict on a GPU of `capacity` bytes.

    Args:
        config, recipe, layout: Of the run.
        capacity: Bytes of one GPU.
        settings: Of `memory_estimate`.

    Raises:
        TrainingError: If it needs far more than there is: `HOPELESS` times.
    """
    estimate = memory_estimate(config, recipe, layout, **settings)
    lines, share = estimate.table(capacity), estimate.total / capacity
    if share < TIGHT:
        return estimate, [*lines, "it fits."]
    changes = memory_changes(config, recipe, layout, capacity, **settings)
    advice = f"set {'; or '.join(changes)}" if changes else "take a smaller base, or lower data.max_length"
    if share > HOPELESS:
        text = "\n  ".join(lines)
        raise TrainingError(f"the run does not fit into the GPU's memory: {advice}.\n  {text}")
    verdict = "warning: it may not fit" if share > 1 else "warning: it fits tightly"
    return estimate, [*lines, f"{verdict} (the estimate may be 15 % off). If memory runs out, {advice}."]


def memory_changes(
    config: "PretrainedConfig", recipe: TrainingRecipe, layout: Layout, capacity: float, **settings: Any
) -> list[str]:
    """Return changes of a recipe that make it fit into `capacity` bytes: single ones, or else the first pair.

    Arguments are those of `check_memory`.
    """

    def total(new: TrainingRecipe, new_layout: Layout = layout) -> float:
        return memory_estimate(config, new, new_layout, **settings).total

    fits = TIGHT * capacity
    found = []
    micro = largest_micro_tokens(recipe, layout, fits, total)
    if micro:
        found.append(f"micro_tokens: {micro:,} (now {recipe.micro_tokens:,})")
    lean = _lean(recipe)
    for text, new in lean:
        if (n := total(new)) < fits:
            found.append(f"{text} ({n / 1e9:.1f} GB)")
    if not found:
        for text, new in lean:
            if micro := largest_micro_tokens(new, layout, fits, total):
                found.append(f"{text} and micro_tokens: {micro:,}")
                break
    is_quantised = recipe.base is not None and recipe.base.quantisation != "none"
    for n_gpus in () if is_quantised or settings.get("sharding") else _MORE_GPUS:
        new = dataclasses.replace(recipe, sharding="fsdp")
        spread = dataclasses.replace(layout, n_processes=n_gpus)
        if n_gpus > layout.n_processes and (n := total(new, spread)) < fits:
            found.append(f"sharding: fsdp on {n_gpus} GPUs ({n / 1e9:.1f} GB each)")
            break
    return found


_MORE_GPUS = (2, 4, 8, 16, 32)


def _lean(recipe: TrainingRecipe) -> list[tuple[str, TrainingRecipe]]:
    """Return recipes of a base that need less memory, with the keys that differ."""
    if recipe.base is None:
        return []
    found = []
    changes: dict[str, Any] = {}
    if not recipe.base.gradient_checkpointing:
        changes["gradient_checkpointing"] = True
        found.append(dict(changes))
    if recipe.base.method == "full":
        changes["method"] = "lora"
        found.append(dict(changes))
    if recipe.base.quantisation == "none":
        if recipe.base.method == "lora":
            found.append({"quantisation": "nf4"})
        if changes:
            found.append({**changes, "quantisation": "nf4"})
    said = {True: "true"}
    return [
        (
            " and ".join(f"base.{key}: {said.get(value, value)}" for key, value in change.items()),
            dataclasses.replace(recipe, base=dataclasses.replace(recipe.base, **change)),
        )
        for change in found
    ]


def largest_micro_tokens(
    recipe: TrainingRecipe, layout: Layout, limit: float, total: Callable[[TrainingRecipe, Layout], float]
) -> int | None:
    """Return the largest micro_tokens below the present one with which a run fits, or None.

    Args:
        recipe, layout: Of the run.
        limit: Bytes.
        total: Bytes that a run needs.
    """

    def at(micro_tokens: int) -> tuple[Layout, int]:
        new = dataclasses.replace(layout, micro_tokens=micro_tokens)
        rows, positions = shape_of_pass(new)
        return new, rows * positions

    per_process = -(-layout.batch_tokens // layout.n_processes)
    smallest, n_smallest = at(-(-layout.max_length // 128) * 128)
    _, n_now = at(layout.micro_tokens)
    least, most = total(recipe, smallest), total(recipe, layout)
    if least > limit or n_smallest >= n_now:
        return None
    # what a pass needs grows evenly with its positions, nearly
    wanted = n_smallest + (limit - least) / max(1.0, most - least) * (n_now - n_smallest)
    for passes in range(max(1, math.ceil(per_process / wanted)), -(-per_process // n_smallest) + 1):
        micro = max(smallest.micro_tokens, -(-per_process // (128 * passes)) * 128)
        new, n = at(micro)
        if n < n_now and total(recipe, new) < limit:
            return micro
    return smallest.micro_tokens


# ---------------------------------------------------------------- one batch by heart


def judge_overfit(losses: Sequence[float], recipe: TrainingRecipe | None = None) -> str | None:
    """Return what is wrong with a model that was trained on one batch over and over, or None.

    Args:
        losses: Of each step, in nats per token; dropout may make them noisy.
        recipe: Names its values in the text.
    """
    if len(losses) < 2:
        return "too few steps to judge: set overfit_check to 20 or more"
    lr = f" (now {recipe.optimizer.lr:g})" if recipe else ""
    if not all(math.isfinite(loss) for loss in losses):
        at = next(i for i, loss in enumerate(losses) if not math.isfinite(loss))
        return f"the loss on one batch is {losses[at]} at step {at + 1}: lower optimizer.lr{lr}"
    few = max(1, len(losses) // 10)
    first, last = fmean(losses[:few]), fmean(losses[-few:])
    if max(losses) == 0:
        return (
            "the loss on one batch is 0 from the start: all labels are masked; set data.loss_on_prompt: true"
        )
    if max(losses) - min(losses) < 1e-6 * abs(first):
        return (
            f"the loss on one batch stays {first:.4f} to the last digit: nothing trains. Check that weights "
            f"are not all frozen (base.method, base.lora.target_modules) and that optimizer.lr is not 0{lr}"
        )
    if last > first:
        return f"the loss on one batch rose from {first:.4f} to {last:.4f}: lower optimizer.lr{lr}"
    if last > _OVERFIT_FALL * first:
        return (
            f"the loss on one batch fell only from {first:.4f} to {last:.4f} in {len(losses)} steps. Raise "
            f"optimizer.lr{lr} or overfit_check (more steps); if it stays, look whether prompts or labels "
            "are what they should be (data.loss_on_prompt) and whether too much is frozen (base.lora.rank)"
        )
    return None


# A batch learned by heart loses more than this share of its loss.
_OVERFIT_FALL = 0.8


# ---------------------------------------------------------------- all of it


def check(
    recipe: TrainingRecipe,
    config: "PretrainedConfig",
    layout: Layout,
    examples: Examples,
    vocabulary: VocabularyInfo,
    *,
    validation: Examples | None = None,
    stated: Mapping[str, int] | None = None,
    device: torch.device | None = None,
    capacity: float | None = None,
) -> list[str]:
    """Return what there is to say before a run; call it on the main process, before weights are loaded.

    Args:
        recipe: The run.
        config: Of the base, or of `scratch_config`.
        layout: How examples become passes.
        examples: Of the first epoch.
        vocabulary: Of the corpus.
        validation: Examples of the validation set.
        stated: Condition that the template or the tasks name -> training crystals that have it.
        device: Where it trains. Memory is estimated for a GPU alone.
        capacity: Bytes of one GPU; None: what `device` has.

    Raises:
        EmptyInput: If no example is short enough.
        RecipeError: If no position has a loss, a token id lies outside the vocabulary, or no crystal has a
            property that the template names.
        TrainingError: If the run needs far more memory than the GPU has.
    """
    lengths = check_examples(examples, layout, vocabulary)
    lines = lengths.lines()
    if validation is not None:
        left_out = check_examples(validation, layout, vocabulary, name="validation set").share_too_long
        if left_out > 0.5:
            lines.append(f"warning: {left_out:.0%} of the validation set is too long and left out.")
    if stated:
        lines += check_stated(stated, lengths.n)
    if capacity is None and device is not None:
        capacity = gpu_capacity(device)
    if capacity is not None:
        n_tokens = len(examples.tokens) + (len(validation.tokens) if validation is not None else 0)
        _, said = check_memory(
            config,
            recipe,
            layout,
            capacity,
            vocabulary=vocabulary,
            # packed: logits are made at positions that have a loss; padded: where one row has one, so at most
            labelled_share=lengths.labelled_share if layout.packed and not layout.loss_on_prompt else 1.0,
            n_data_tokens=n_tokens,
            attention="eager" if recipe.base and packing_problem(config, layout.max_length) else "flash",
        )
        lines += said
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Show what memory a recipe needs; return the exit code (1: it does not fit; 2: a user's mistake)."""
    parser = argparse.ArgumentParser(
        prog="python -m crystallm_kit.training.preflight", description="Estimate the GPU memory of a recipe."
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument(
        "--gpu-gb", type=float, help="memory of one GPU, in 1e9 bytes; default: this machine's"
    )
    parser.add_argument("--gpus", type=int, default=1, help="how many train together")
    parser.add_argument("--config", type=Path, help="the base's folder or config.json, instead of its id")
    parser.add_argument("--vocabulary", type=int, help="tokens; default: the corpus's, else the base's")
    parser.add_argument(
        "--sharding", choices=["none", "fsdp", "zero1", "zero2", "zero3"], help="wins over the recipe's"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args(arguments)
    try:
        recipe = load_training_recipe(options.recipe, options.set)
        capacity = 1e9 * options.gpu_gb if options.gpu_gb else _own_capacity()
        vocabulary = _vocabulary(recipe, options.vocabulary)
        config = _config(recipe, options.config, vocabulary)
        vocabulary = vocabulary or VocabularyInfo(config.get_text_config().vocab_size, None, None)
        _, lines = check_memory(
            config,
            recipe,
            planned_layout(recipe, config, options.gpus),
            capacity,
            vocabulary=vocabulary,
            sharding=options.sharding,
        )
    except UserError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1 if isinstance(error, TrainingError) else 2
    print("\n".join(lines))
    return 0


def planned_layout(recipe: TrainingRecipe, config: "PretrainedConfig", n_gpus: int) -> Layout:
    """Return the layout that a run on GPUs will have."""
    longest = recipe.data.max_length or (10**9 if recipe.model else BASE_MAX_LENGTH)
    longest = min(longest, max_positions(config) + 1)
    is_odd = recipe.model.attention_dropout if recipe.model else packing_problem(config, longest)
    return Layout(
        recipe.batch_tokens,
        recipe.micro_tokens,
        longest,
        recipe.data.loss_on_prompt,
        packed=recipe.rows != "padded" and recipe.precision == "bfloat16" and not is_odd,
        n_processes=n_gpus,
    )


def _own_capacity() -> float:
    if not torch.cuda.is_available():
        raise RecipeError("there is no GPU here: say how much memory one has, for example --gpu-gb 80.")
    capacity = gpu_capacity(torch.device("cuda"))
    return capacity or 0.0


def _vocabulary(recipe: TrainingRecipe, n_tokens: int | None) -> VocabularyInfo | None:
    if n_tokens:
        return VocabularyInfo(n_tokens, None, None)
    if recipe.data.corpus and recipe.data.corpus.exists():
        return open_source(recipe.data.corpus).info.vocabulary
    if recipe.base:
        return None
    raise RecipeError("the corpus is not there to say how many tokens there are: name --vocabulary.")


def _config(
    recipe: TrainingRecipe, path: Path | None, vocabulary: VocabularyInfo | None
) -> "PretrainedConfig":
    if recipe.base is None:
        return scratch_config(recipe, vocabulary.size if vocabulary else 0)
    if path is None:
        found: PretrainedConfig = check_base(recipe.base, device_type="cuda")
        return found
    from transformers import AutoConfig

    file = path / "config.json" if path.is_dir() else path
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        made: PretrainedConfig = AutoConfig.for_model(**data)
    except (OSError, ValueError, TypeError) as error:
        raise RecipeError(f"{file}: not a model's config.json: {error}.") from error
    return made


if __name__ == "__main__":
    sys.exit(main())
