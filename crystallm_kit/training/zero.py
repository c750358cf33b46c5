"""DeepSpeed's ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054), stages 1 and 2, behind the training loop.

    accelerate launch --config_file finetune/accelerate-deepspeed-zero2.yaml -m crystallm_kit.training
    RECIPE.yaml --out runs/a

Each GPU holds all weights, and its share of AdamW's moments and of the float32 weights that they change
(stage 2: of the gradients too). The loss, the learning rate, when to step and what a checkpoint holds stay
the loop's: the engine runs in float32, with the loop's own autocast, and whole tensors go into checkpoints,
which runs without DeepSpeed read as well.

Not here: sharded weights, which are `sharding: fsdp` (distribution.py); stage 3 is refused with that advice.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from crystallm_kit.errors import MissingExtra, RecipeError

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Zero:
    """A loss module and its optimizer under DeepSpeed.

    Attributes:
        engine: Called like the loss module.
    """

    def __init__(
        self, loss: nn.Module, optimizer: torch.optim.Optimizer, settings: Mapping[str, Any], clip: float
    ) -> None:
        """Give module and optimizer to DeepSpeed.

        Args:
            loss: On this process's device.
            optimizer: AdamW of its weights; its learning rate stays the caller's to set.
            settings: The section that accelerate made of its config file.
            clip: Largest norm of the gradient.

        Raises:
            MissingExtra: If deepspeed is not installed.
            RecipeError: If the stage or a setting is one that the loop cannot follow.
        """
        try:
            import deepspeed
        except ImportError as error:
            raise MissingExtra.of("ZeRO", "deepspeed", "deepspeed") from error
        self._weights = [weight for weight in loss.parameters() if weight.requires_grad]
        self._adamw = optimizer
        self.engine, self._sharded, _, _ = deepspeed.initialize(
            model=loss, optimizer=optimizer, config=engine_config(settings, clip)
        )
        # DeepSpeed makes the moments in the first step; a resumed run fills them before it
        for part in self._sharded.single_partition_of_fp32_groups:
            optimizer.state[part] = {name: torch.zeros_like(part) for name in _MOMENTS}
            place = part.device if optimizer.defaults["fused"] else "cpu"
            optimizer.state[part]["step"] = torch.zeros((), dtype=torch.float32, device=place)
        self._sharded._lazy_init_hp_params_optimizer_state()

    def backward(self, loss: torch.Tensor, *, is_last: bool) -> None:
        """Add one pass's share of the gradient; processes take the mean of theirs."""
        self.engine.set_gradient_accumulation_boundary(is_last)
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> torch.Tensor:
        """Clip the gradient, step, forget the gradient; return the norm that it had."""
        self.engine.step()
        return torch.as_tensor(self.engine.get_global_grad_norm(), device=self._weights[0].device)

    def moments(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return whole copies of AdamW's state of a weight. Every process calls it."""
        from deepspeed.utils import safe_get_full_optimizer_state

        state = {name: safe_get_full_optimizer_state(weight, name).clone() for name in _MOMENTS}
        steps = [state["step"] for state in self._adamw.state.values()]
        return {"step": steps[0].clone(), **state}

    def restore(self, weight: torch.Tensor, moments: Mapping[str, torch.Tensor]) -> None:
        """Take over a weight as it is now, and AdamW's state of it. Every process calls it."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        safe_set_full_fp32_param(weight, weight.detach())
        for name in _MOMENTS:
            safe_set_full_optimizer_state(weight, moments[name], name)
        for state in self._adamw.state.values():
            state["step"].copy_(moments["step"])


def engine_config(settings: Mapping[str, Any], clip: float) -> dict[str, Any]:
    """Return DeepSpeed's config for a run of the loop.

    Args:
        settings: The section that accelerate made of its config file.
        clip: Largest norm of the gradient.

    Raises:
        RecipeError: If they ask for what the loop does otherwise.
    """
    zero = {key: value for key, value in settings.get("zero_optimization", {}).items() if value != "auto"}
    stage = zero.get("stage")
    if stage not in (1, 2):
        raise RecipeError(
            f"DeepSpeed: zero_stage {stage}: stages 1 and 2 are supported. To shard the weights too (stage "
            "3), set sharding: fsdp in the recipe and launch without DeepSpeed."
        )
    for part in ("offload_optimizer", "offload_param"):
        if zero.pop(part, {}).get("device", "none") not in ("none", None):
            raise RecipeError(f"DeepSpeed: {part}: offloading is not supported. Set {part}_device: none.")
    for precision in ("fp16", "bf16"):
        if settings.get(precision, {}).get("enabled") is True:
            raise RecipeError(
                f"DeepSpeed: {precision}: precision is the recipe's (precision: bfloat16). Set "
                "mixed_precision: 'no' in the config file."
            )
    for stage_3 in [key for key in zero if key.startswith("stage3_")]:
        del zero[stage_3]
    return {
        "train_micro_batch_size_per_gpu": 1,  # a step's passes are the loop's
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # torch's own AdamW
        "steps_per_print": 10**12,
    }
