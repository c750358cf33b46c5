"""A model that is being trained, lent out to be sampled from.

    with lent(model) as callable_model:
        TransformersEngine(callable_model, tokenizer, device=callable_model.device)

Afterwards nothing tells that it was away: the state of every random generator, training or evaluation mode,
and the attention implementation are as before, so a run logs the same losses with looks at its samples and
without. Meanwhile it is in evaluation mode, attends as transformers' sdpa does (the training loop's own
attention knows no key-value cache), and compiled layers run as they are written: a batch that changes its
shape with every token would be compiled anew with every token.

Not here: drawing tokens (engines/), what is asked of the samples (fine_tuning.py).
"""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from crystallm_kit.models.checkpoints import without_adapter
from crystallm_kit.training.loss import ATTENTION


def device_type() -> str:
    """Return where this process would train: cuda or cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def lent(model: Any, *, bfloat16: bool = False) -> Iterator["LentModel"]:
    """Lend a causal LM, plain or wrapped by peft, and bring it back as it was.

    Args:
        model: Whole on this process: neither sharded nor wrapped for data parallelism.
        bfloat16: Whether it computes in bfloat16 on a GPU (autocast), as in training.
    """
    device = next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]
    attention = model.config._attn_implementation
    generators = (random.getstate(), np.random.get_state())  # noqa: NPY002 - other libraries draw from it
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            model.eval()
            if attention == ATTENTION:
                model.config._attn_implementation = "sdpa"
            with torch.compiler.set_stance("force_eager"):
                yield LentModel(model, device, bfloat16=bfloat16 and device.type == "cuda")
        finally:
            model.config._attn_implementation = attention
            for module, was_training in modes:
                module.training = was_training
            random.setstate(generators[0])
            np.random.set_state(generators[1])  # noqa: NPY002


class LentModel:
    """What an engine needs of a model: its config, and a forward pass. It stays where it is.

    Attributes:
        config: Of the model.
        device: Where its weights are.
    """

    def __init__(self, model: Any, device: torch.device, *, bfloat16: bool) -> None:
        self._model, self._is_bfloat16 = model, bfloat16
        self.config = model.config
        self.device = device

    def get_base_model(self) -> Any:
        """Return the causal LM itself, as peft's models do: its class tells what a forward pass takes."""
        return without_adapter(self._model)

    def to(self, *_: Any) -> "LentModel":
        """Return this: quantised weights cannot be moved, and the others are where they belong."""
        return self

    def eval(self) -> "LentModel":
        """Return this: it is in evaluation mode."""
        return self

    def __call__(self, **inputs: Any) -> Any:
        """Return the model's output; autocast holds for one thread, and engines have threads of their own."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._is_bfloat16):
            return self._model(**inputs)
