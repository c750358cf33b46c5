"""What learns in a run: a model with its loss, its optimizer and the running mean of its weights.

    learner = Learner(recipe, info, layout, distribution)
    loss, norm = learner.step(batches, n_targets, rate)      # one optimizer step
    with learner.averaged(): learner.summed_loss(batches)    # validation

Only weights that train are the optimizer's, the mean's and the checkpoint's: all of a model from scratch,
LoRA's of a fine-tuned one. They are float32; the forward pass is bfloat16 (autocast) on a GPU.

Not here: when to step, validate, save and stop (loop.py); what a base is (models/bases.py).
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from crystallm_kit.errors import RecipeError
from crystallm_kit.models import bases
from crystallm_kit.models.checkpoints import Manifest, new_model, save_model
from crystallm_kit.tokens.drawing import StoredInfo
from crystallm_kit.training.batches import Batch, Layout
from crystallm_kit.training.distribution import Distribution, local
from crystallm_kit.training.loss import (
    ATTENTION,
    SummedLoss,
    add_noise,
    add_residual_dropout,
    attention,
    compile_layers,
    decoder_layers,
)
from crystallm_kit.training.memory import scratch_config
from crystallm_kit.training.recipe import TrainingRecipe
from crystallm_kit.training.run_state import copy_whole, whole_on_main

# Dense bf16 peak in FLOP/s by the vendors' datasheets, for model FLOP utilisation.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
# Longest example of a fine-tuned base, in tokens, unless the recipe says otherwise.
BASE_MAX_LENGTH = 2_048


def layout_of(recipe: TrainingRecipe, distribution: Distribution) -> Layout:
    """Return how examples become steps, by what the model can take.

    Raises:
        RecipeError: If the rows that the recipe asks for cannot be, or quantised weights shall be sharded.
        ModelError, MissingExtra: If the base model is none that can be trained here; no weights are read.
    """
    if distribution.is_sharded and recipe.base and recipe.base.quantisation != "none":
        raise RecipeError(
            f"base.quantisation {recipe.base.quantisation}: quantised weights cannot be sharded. Set "
            "sharding: none (each GPU holds them whole: nf4 is a quarter of bfloat16), or quantisation: none."
        )
    problem = _packing_problem(recipe, distribution.device)
    if recipe.rows == "packed" and problem and distribution.device.type == "cuda":
        raise RecipeError(f"rows: packed: {problem}. Set rows: padded.")
    is_packed = recipe.rows == "packed" or (recipe.rows == "auto" and not problem)
    if recipe.model:
        positions, longest = recipe.model.max_positions, recipe.data.max_length or 10**9
    else:
        positions = bases.max_positions(_base_config(recipe, distribution.device))
        longest = recipe.data.max_length or BASE_MAX_LENGTH
    return Layout(
        recipe.batch_tokens,
        recipe.micro_tokens,
        min(longest, positions + 1),  # the last token is a target only: one token more than positions
        recipe.data.loss_on_prompt,
        packed=is_packed,
        n_processes=distribution.world,
    )


class Learner:
    """The part of a run that holds weights.

    Attributes:
        model: A causal LM of transformers, LoRA around it where the recipe asks for that.
        weights: Name -> what trains.
        averages: Name -> its running mean; empty where the recipe asks for none.
    """

    def __init__(
        self, recipe: TrainingRecipe, info: StoredInfo, layout: Layout, distribution: Distribution
    ) -> None:
        from transformers import AttentionInterface

        self.recipe, self.info, self.distribution = recipe, info, distribution
        self.device = distribution.device
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        AttentionInterface.register(ATTENTION, attention)
        self.model = self._model(layout)
        self.parameters_met = matrix_weights(self.model)
        layers = decoder_layers(self.model)
        if recipe.residual_dropout:
            add_residual_dropout(self.model, recipe.residual_dropout)
        is_bfloat16 = _is_bfloat16(recipe, self.device)
        loss = SummedLoss(self.model, self.device.type, bfloat16=is_bfloat16)
        if recipe.neftune_alpha:
            add_noise(loss, recipe.neftune_alpha)
        is_quantised = recipe.base is not None and recipe.base.quantisation != "none"
        if recipe.compile and self.device.type == "cuda" and not is_quantised:
            if recipe.base is not None:
                # else the first layer, which nothing before it asks for a gradient, gets a graph of its own
                self.model.enable_input_require_grads()
            compile_layers(self.model, is_static=layout.packed)
        self.loss = distribution.spread(loss, layers, bfloat16=is_bfloat16)
        self.weights = {name: w for name, w in self.model.named_parameters() if w.requires_grad}
        decay = recipe.ema_decay
        self.averages = {n: w.detach().clone() for n, w in self.weights.items()} if decay else {}
        self.optimizer = self._optimizer()
        self.loss = distribution.take_optimizer(self.loss, self.optimizer, recipe.optimizer.gradient_clip)
        self._n_steps = 0
        torch.manual_seed(recipe.seed + 1_000_003 * distribution.rank)

    def step(
        self, batches: Sequence[Batch], n_targets: int, rate: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Do one optimizer step.

        Args:
            batches: This process's passes.
            n_targets: Positions with a loss, of all processes.
            rate: Learning rate.

        Returns:
            This process's part of the loss in nats per target, and the norm of the whole gradient before it
            was clipped: both () and still on the device.
        """
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = rate
        total = torch.zeros((), device=self.device)
        for i, batch in enumerate(batches):
            summed = self.loss(*batch)
            self.distribution.backward(summed, self.loss, n_targets, is_last=i == len(batches) - 1)
            total += summed.detach()
        clip = self.recipe.optimizer.gradient_clip
        norm = self.distribution.update(self.optimizer, list(self.weights.values()), clip)
        self._n_steps += 1
        if self.averages:
            decay = min(self.recipe.ema_decay, self._n_steps / (self._n_steps + 10))
            with torch.no_grad():
                torch._foreach_lerp_(local(self.averages), local(self.weights), 1 - decay)
        return total / n_targets, norm

    @torch.no_grad()
    def summed_loss(self, batches: Iterable[Batch]) -> torch.Tensor:
        """Return the sum of the negative log-likelihoods of batches, without dropout: () float64."""
        self.model.eval()
        total = torch.zeros((), device=self.device, dtype=torch.float64)
        for batch in batches:
            total += self.loss(*batch).double()
        self.distribution.forget_gathered(self.loss)
        self.model.train()
        return total

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Exchange the weights for their running mean, in place, and put them back bit by bit."""
        if not self.averages:
            yield
            return
        weights = local(self.weights)
        kept = [weight.detach().clone() for weight in weights]
        with torch.no_grad():
            torch._foreach_copy_(weights, local(self.averages))
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(weights, kept)

    # -- checkpoints

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return everything that a resumed run needs, by name, to read or to fill; `filled` follows.

        Under DeepSpeed moments are copies, put together from all processes; every process has to call it.
        """
        found = {f"weight {name}": weight.detach() for name, weight in self.weights.items()}
        found |= {f"average {name}": average for name, average in self.averages.items()}
        for name, weight in self.weights.items():
            for key, value in self._moments(weight).items():
                found[f"{key} {name}"] = value
        return found

    def filled(self, tensors: Mapping[str, torch.Tensor], n_steps: int) -> None:
        """Go on from what was filled into `tensors`, the state after so many steps."""
        self._n_steps = n_steps
        if self.distribution.zero:
            for name, weight in self.weights.items():
                moments = {key: tensors[f"{key} {name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
                self.distribution.zero.restore(weight, moments)

    def _moments(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return AdamW's state of a weight, as zeros before its first step."""
        if self.distribution.zero:
            return self.distribution.zero.moments(weight)
        state: dict[str, torch.Tensor] = self.optimizer.state[weight]
        if not state:
            place = self.device if self.optimizer.defaults["fused"] else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=place)
            state["exp_avg"] = torch.zeros_like(weight, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(weight, memory_format=torch.preserve_format)
        return state

    # -- what comes out

    def export(self, folder: Path, tokenizer: Path | None, manifest: Manifest) -> None:
        """Write the model folder, or the adapter's, from the weights as they are. Every process calls it."""
        recipe = self.recipe
        whole: dict[str, torch.Tensor] | None = None
        if self.distribution.is_sharded:
            whole = whole_on_main(dict(self.model.state_dict(keep_vars=True)), self.distribution)
        if not self.distribution.is_main:
            return
        before = self.model.config._attn_implementation
        self.model.config._attn_implementation = "sdpa"
        if recipe.base is not None and recipe.base.method == "lora":
            bases.save_adapter(folder, self.model, tokenizer, manifest, weights=whole)
        else:
            save_model(
                folder,
                self.model,
                tokenizer,
                manifest,
                dtype=recipe.export_dtype,
                max_shard_mb=recipe.export_shard_mb,
                weights=whole,
            )
        self.model.config._attn_implementation = before

    def copy_weights(self, saved: dict[str, torch.Tensor]) -> None:
        """Take over whole weights, by name."""
        for name, weight in saved.items():
            copy_whole(self.weights[name].detach(), weight)

    # -- numbers

    @property
    def n_trainable(self) -> int:
        """Number of weights that train."""
        return sum(weight.numel() for weight in self.weights.values())

    @property
    def flops_per_token(self) -> float:
        """FLOPs of a token: for each weight of a matrix 2 forward, 2 backward, and 2 more where it trains.

        Attention over texts of tens to hundreds of tokens adds a few per cent, left out; so is what gradient
        checkpointing computes again.
        """
        frozen, trained = self.parameters_met
        return 4.0 * frozen + 6.0 * trained

    @property
    def peak_flops(self) -> float | None:
        """Dense bfloat16 peak of all GPUs together, in FLOP/s; None where it is not known."""
        if self.device.type != "cuda":
            return None
        name = torch.cuda.get_device_name(self.device)
        n = self.distribution.world
        return next((peak * n for part, peak in PEAK_FLOPS.items() if part in name), None)

    # -- set-up

    def _model(self, layout: Layout) -> Any:
        recipe, vocabulary = self.recipe, self.info.vocabulary
        if recipe.base is None:
            if recipe.model is None:
                raise RecipeError("give one of 'model' (from scratch) and 'base' (fine-tuning).")
            model = new_model(recipe.model, vocabulary, seed=recipe.seed).to(self.device)
            model.config._attn_implementation = ATTENTION
            return model.train()
        config = _base_config(recipe, self.device)
        place = self.device
        if self.distribution.is_sharded:
            # a GPU may not hold it whole; the CPU's memory does once, not once for each process
            is_drawn = recipe.base.weights == "random"  # the GPU draws 8 billion numbers in a moment
            main = self.device if is_drawn else torch.device("cpu")
            place = main if self.distribution.is_main else torch.device("meta")
        model = bases.load_base(recipe.base, vocabulary, device=place, seed=recipe.seed, runs_on=self.device)
        packable = bases.packing_problem(config, layout.max_length) is None
        model.config._attn_implementation = ATTENTION if packable else "eager"
        return model.train()

    def _optimizer(self) -> torch.optim.AdamW:
        recipe = self.recipe.optimizer
        weights = self.weights.values()
        groups = [
            {"params": [w for w in weights if w.ndim >= 2], "weight_decay": recipe.weight_decay},
            {"params": [w for w in weights if w.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=recipe.lr,
            betas=recipe.betas,
            eps=recipe.eps,
            fused=self.device.type == "cuda",
        )


def matrix_weights(model: nn.Module) -> tuple[int, int]:
    """Return the weights of all matrices that a token is multiplied with: frozen ones and trainable ones.

    A quantised matrix counts by its shape. An embedding counts where it is the output head too.
    """
    frozen = trained = 0
    for module in model.modules():
        shape = _matrix_shape(module)
        weight = getattr(module, "weight", None)
        if shape is None or weight is None:
            continue
        n = math.prod(shape)
        if weight.requires_grad:
            trained += n
        else:
            frozen += n
    return frozen, trained


def _matrix_shape(module: nn.Module) -> tuple[int, int] | None:
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D):
        return tuple(module.weight.shape)
    if isinstance(module, nn.Linear):  # bitsandbytes' layers are Linear too, with packed weights
        return module.in_features, module.out_features
    return None


def checked_config(recipe: TrainingRecipe, info: StoredInfo, device: torch.device) -> Any:
    """Return the config of the model that a run trains, after checks that it and the corpus fit together.

    No weights are read.

    Raises:
        ModelError: If the base cannot be had, is no causal LM, or was trained in another template or format.
        RecipeError, MissingExtra: If it cannot be trained as the recipe says.
    """
    if recipe.base is None:
        return scratch_config(recipe, info.vocabulary.size)
    bases.check_same_template(recipe.base.name, info)
    config = _base_config(recipe, device)
    bases.check_same_tokens(recipe.base, config, info.vocabulary, recipe.data.tokenizer_folder)
    return config


def _base_config(recipe: TrainingRecipe, device: torch.device) -> Any:
    if recipe.base is None:
        raise RecipeError("the recipe names no base model.")
    return bases.check_base(recipe.base, device_type=device.type)


def _packing_problem(recipe: TrainingRecipe, device: torch.device) -> str | None:
    """Return why rows cannot be packed, or None; a CPU packs, slowly, when it is asked to."""
    if not _is_bfloat16(recipe, device):
        return "the flash kernel wants a GPU and precision bfloat16"
    if recipe.model:
        return "attention_dropout must be 0" if recipe.model.attention_dropout else None
    longest = recipe.data.max_length or BASE_MAX_LENGTH
    return bases.packing_problem(_base_config(recipe, device), longest)


def _is_bfloat16(recipe: TrainingRecipe, device: torch.device) -> bool:
    return recipe.precision == "bfloat16" and device.type == "cuda"
