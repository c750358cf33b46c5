"""The training recipe: every key of a finetune/*.yaml, with its meaning and unit.

    recipe = load_training_recipe("finetune/llama-scratch-wyckoff-mp.yaml", ("optimizer.lr=5e-4",))

Not here: reading YAML (recipes.py), the loop that follows it (loop.py).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from crystallm_kit.errors import RecipeError
from crystallm_kit.models.bases import BaseRecipe
from crystallm_kit.models.checkpoints import ModelRecipe
from crystallm_kit.recipes import load_recipe


@dataclass(frozen=True)
class DataRecipe:
    """What is learned from.

    Attributes:
        corpus: A prepared corpus: its folder or its .npz file (batches.open_source).
        inputs: Crystal files and folders to prepare a corpus from, into the run's folder; instead of
            `corpus`.
        validation: The same for the validation set; none: a share of the inputs, as the corpus recipe says.
        corpus_recipe: How to prepare them: a finetune/corpus-*.yaml; None: the defaults of CorpusRecipe.
        tokenizer: Folder whose tokenizer goes into the model folder; None: the corpus folder's own.
        loss_on_prompt: Whether the tokens of the prompt are targets too.
        max_length: Longer examples, in tokens, are left out; None: model.max_positions, and 2,048 for a base.
    """

    corpus: Path | None = None
    inputs: tuple[Path, ...] = ()
    validation: tuple[Path, ...] = ()
    corpus_recipe: Path | None = None
    tokenizer: Path | None = None
    loss_on_prompt: bool = False
    max_length: int | None = None

    @property
    def tokenizer_folder(self) -> Path | None:
        """Return the folder of the tokenizer: the recipe's, else the corpus's own, if it has one."""
        if self.tokenizer is not None or self.corpus is None:
            return self.tokenizer
        own = (self.corpus if self.corpus.is_dir() else self.corpus.parent) / "tokenizer"
        return own if own.is_dir() else None


@dataclass(frozen=True)
class OptimizerRecipe:
    """AdamW.

    Attributes:
        lr: Peak learning rate.
        betas: Decay of the two moments, per step.
        eps: Added to the root of the second moment.
        weight_decay: On matrices only (not on norms and biases), times the learning rate, per step.
        gradient_clip: Largest norm of the gradient of all weights.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    gradient_clip: float = 1.0


@dataclass(frozen=True)
class ScheduleRecipe:
    """The learning rate over the run.

    Attributes:
        kind: cosine (to the end), wsd (warm up, stay, decay as 1 - sqrt), constant.
        warmup_steps: Linear from 0.
        final_lr_ratio: Last learning rate over the peak.
        decay_fraction: wsd: share of the steps that decay.
    """

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = 200
    final_lr_ratio: float = 0.05
    decay_fraction: float = 0.2


@dataclass(frozen=True)
class TrainingRecipe:
    """One training run.

    Attributes:
        seed: Of weights, order and dropout.
        epochs: Passes over the data; or steps.
        steps: Optimizer steps; or epochs. (One of the two.)
        batch_tokens: Tokens of one optimizer step, over all GPUs.
        micro_tokens: Positions of one forward pass on one GPU at most: what fits into memory.
        eval_every: Steps between validation losses.
        checkpoint_every: Steps between checkpoints.
        log_every: Steps between lines on the screen.
        ema_decay: Of the running mean of the weights, per step; 0: none. Validation and the model folder use
            it.
        residual_dropout: Probability, on embeddings and on what layers add to the residual stream. Training
            only.
        precision: bfloat16 (autocast, on a GPU) or float32.
        rows: Layout (batches.py); auto: packed on a GPU in bfloat16, else padded.
        sharding: fsdp: weights, gradients and moments are spread over the GPUs (FSDP2); none: each has all.
        compile: torch.compile of the layers, on a GPU.
        early_stopping_patience: Validations without a better loss after which to stop; None: never.
        max_minutes: Stop after this time, save and export; None: never.
        export: Weights of the model folder: of the best validation, or the last.
        export_dtype: Of the weights on disk.
        export_shard_mb: Largest weights file, in 1e6 bytes.
        neftune_alpha: Noise on the embeddings in training, uniform, of size alpha / sqrt(tokens x width)
            (Jain et al. 2023, arXiv:2310.05914); 0: none.
        overfit_check: Steps on one batch before the run, which must bring its loss down; 0: none.
        sample_every: Steps between looks at samples: `samples` of them are generated and judged; None: never.
        samples: How many.
        track: Where curves go beside metrics.jsonl: tensorboard, wandb.
        push_to_hub: Hugging Face repository that the finished model is sent to; None: none.
        model: A model from scratch; or base.
        base: A model to fine-tune; or model.
        data, optimizer, schedule: See there.
    """

    seed: int
    epochs: float | None = None
    steps: int | None = None
    batch_tokens: int = 65_536
    micro_tokens: int = 65_536
    eval_every: int = 250
    checkpoint_every: int = 1_000
    log_every: int = 50
    ema_decay: float = 0.999
    residual_dropout: float = 0.0
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    rows: Literal["auto", "packed", "padded"] = "auto"
    sharding: Literal["none", "fsdp"] = "none"
    compile: bool = True
    early_stopping_patience: int | None = None
    max_minutes: float | None = None
    export: Literal["best", "last"] = "best"
    export_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    export_shard_mb: float = 5_000.0
    neftune_alpha: float = 0.0
    overfit_check: int = 0
    sample_every: int | None = None
    samples: int = 48
    track: tuple[Literal["tensorboard", "wandb"], ...] = ()
    push_to_hub: str | None = None
    model: ModelRecipe | None = None
    base: BaseRecipe | None = None
    data: DataRecipe = field(default_factory=DataRecipe)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    schedule: ScheduleRecipe = field(default_factory=ScheduleRecipe)

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(
                f"give one of 'epochs' and 'steps', and null for the other; got epochs {self.epochs} and "
                f"steps {self.steps}"
            )
        if (self.model is None) == (self.base is None):
            raise ValueError("give one of 'model' (from scratch) and 'base' (fine-tuning)")
        for name in ("batch_tokens", "micro_tokens", "eval_every", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"'{name}' must be at least 1, got {getattr(self, name)}")
        for name in ("ema_decay", "residual_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"'{name}' must be in [0, 1), got {getattr(self, name)}")


def load_training_recipe(path: str | Path, overrides: Sequence[str] = ()) -> TrainingRecipe:
    """Return the training recipe in a YAML file, with what it names found.

    `data.corpus_recipe` and `data.tokenizer` may be named from here, from the recipe's folder or from the
    folder above that, so that shipped recipes can be followed from anywhere.

    Raises:
        RecipeError: As load_recipe; or if the tokenizer, or the corpus recipe that is needed, is not there.
    """
    recipe = load_recipe(path, TrainingRecipe, tuple(overrides))
    data, folder = recipe.data, Path(path).parent
    found = {}
    for name, inside in (("corpus_recipe", ""), ("tokenizer", "tokenizer.json")):
        given = getattr(data, name)
        if given is None:
            continue
        tried = [given, folder / given, folder / ".." / given]
        there = next((place for place in tried if (place / inside).is_file()), None)
        if there is not None:
            found[name] = there
        elif name == "tokenizer":
            raise RecipeError(
                f"{path}: data.tokenizer '{given}': no tokenizer.json there. Name a tokenizer's folder, or "
                "null for the one in the corpus's folder."
            )
        elif data.inputs:
            raise RecipeError(
                f"{path}: data.corpus_recipe '{given}': no such file, from here or beside the recipe. Copy "
                "it too, or name one of the kit's finetune/corpus-*.yaml."
            )
    return replace(recipe, data=replace(data, **found))


def learning_rate(step: int, n_steps: int, recipe: TrainingRecipe) -> float:
    """Return the learning rate of a step (0-based) of a run of n_steps."""
    schedule, peak = recipe.schedule, recipe.optimizer.lr
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    low = schedule.final_lr_ratio
    if schedule.kind == "cosine":
        done = (step - schedule.warmup_steps) / max(1, n_steps - schedule.warmup_steps)
        return peak * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))
    decaying = schedule.decay_fraction * n_steps
    done = (step - (n_steps - decaying)) / max(1.0, decaying)
    if schedule.kind == "constant" or done <= 0:
        return peak
    return peak * (low + (1 - low) * (1 - math.sqrt(min(1.0, done))))
