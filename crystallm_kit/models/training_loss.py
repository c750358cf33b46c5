"""The training loss of any transformers causal LM, in both layouts of batches.py.

    SummedLoss(model, ...)(inputs, labels, positions, borders) -> sum of the negative log-likelihoods, in
    nats

The model stays what it is: attention is exchanged through transformers' table of attention functions, dropout
on the residual stream is a hook.

Legend: B rows, T positions, V vocabulary.
Not here: the loop (training.py), batches (batches.py).
"""

import inspect
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

from crystallm_kit.models.batches import IGNORED


def attention(
    _module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001 (None: what may be seen follows from the layout)
    scaling: float,
    dropout: float = 0.0,
    borders: torch.Tensor | None = None,
    longest: int = 0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each crystal, in both layouts of batches.py; heads before positions.

    It stands in for transformers' own "sdpa", which builds a mask when it is traced, to look for packed rows,
    and so
    leaves the flash kernel.
    """
    is_grouped = query.shape[1] != key.shape[1]
    if borders is None:
        attended = functional.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, scale=scaling, is_causal=True, enable_gqa=is_grouped
        )
        return attended.transpose(1, 2).contiguous(), None
    if is_grouped:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    if query.device.type == "cuda":
        query, key, value = (x[0].transpose(0, 1).to(torch.bfloat16) for x in (query, key, value))
        return _flash_attention(query, key, value, borders, longest, scaling)[None], None
    positions = torch.arange(query.shape[2], device=query.device)
    crystal = torch.searchsorted(borders, positions, right=True)
    seen = (crystal[:, None] == crystal) & (positions[:, None] >= positions)
    attended = functional.scaled_dot_product_attention(
        query, key, value, seen, dropout_p=dropout, scale=scaling
    )
    return attended.transpose(1, 2).contiguous(), None


def _flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    borders: torch.Tensor,
    longest: int,
    scaling: float,
) -> torch.Tensor:
    """Attend within borders: (positions, heads, width) -> the same."""
    from torch.nn.attention.varlen import varlen_attn

    default = query.shape[-1] ** -0.5
    if scaling != default:
        query = query * (scaling / default)
    # torch 2.11 names causality is_causal or window_size, depending on its build
    is_named = "is_causal" in inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"is_causal": True} if is_named else {"window_size": (-1, 0)}
    attended = varlen_attn(query, key, value, borders, borders, longest, longest, **causal)
    return cast(torch.Tensor, attended)


class SummedLoss(nn.Module):
    """A causal LM with its loss: a batch -> sum of the negative log-likelihoods, in nats."""

    def __init__(self, model: nn.Module, device_type: str, longest: int, *, bfloat16: bool) -> None:
        super().__init__()
        self.model = model
        self.device_type = device_type
        self.longest = longest
        self.is_bfloat16 = bfloat16

    def forward(
        self,
        inputs_BT: torch.Tensor,
        labels_BT: torch.Tensor,
        positions_1T: torch.Tensor,
        borders: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the sum over the labelled positions."""
        packed: dict[str, Any] = {} if borders is None else {"borders": borders, "longest": self.longest}
        with torch.autocast(self.device_type, dtype=torch.bfloat16, enabled=self.is_bfloat16):
            logits_BTV = self.model(
                input_ids=inputs_BT, position_ids=positions_1T, use_cache=False, **packed
            ).logits
        flat = logits_BTV.float().view(-1, logits_BTV.shape[-1])
        return functional.cross_entropy(flat, labels_BT.view(-1), ignore_index=IGNORED, reduction="sum")


def add_residual_dropout(model: nn.Module, probability: float) -> None:
    """Drop out the embedding and what each layer adds to the residual stream, by hooks."""

    def drop(module: nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:
        return functional.dropout(output, probability, training=module.training)

    for name, module in model.named_modules():
        if name.endswith(("embed_tokens", "o_proj", "down_proj")):
            module.register_forward_hook(drop)


def compile_layers(model: Any, *, is_static: bool) -> None:
    """Compile the decoder layers in place; being alike, they share one graph: quick at any depth."""
    names = set(model._no_split_modules or ())
    for module in model.modules():
        if type(module).__name__ in names:
            module.compile(dynamic=not is_static)
