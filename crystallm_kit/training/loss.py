"""The training loss of any transformers causal LM, in both layouts of batches.py.

    SummedLoss(model, ...)(*batch) -> sum of the negative log-likelihoods, in nats

The model stays what it is: attention is exchanged through transformers' table of attention functions, dropout
on the residual stream is a hook.

Legend: B rows, T positions, V vocabulary.
Not here: the loop (loop.py), batches (batches.py).
"""

import inspect
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from crystallm_kit.errors import RecipeError
from crystallm_kit.models.checkpoints import without_adapter
from crystallm_kit.training.batches import IGNORED

ATTENTION = "crystallm_kit_training"  # key of `attention` in transformers' table of attention functions


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
    """A causal LM with its loss: a batch -> sum of the negative log-likelihoods, in nats.

    Of a large vocabulary, logits are made at labelled positions alone: 16,000 positions of Llama 3's 128,256
    tokens are 8 GB in float32, of which a prompt's are never looked at.

    Attributes:
        borders: Of the batch under way; for hooks (add_noise).
    """

    def __init__(self, model: nn.Module, device_type: str, *, bfloat16: bool) -> None:
        super().__init__()
        self.model = model
        self.device_type = device_type
        self.is_bfloat16 = bfloat16
        self.borders: torch.Tensor | None = None
        if bfloat16:
            for module in model.modules():
                if hasattr(module, "cast_input_dtype_enabled"):
                    # peft would write every input out in float32, for autocast to read it back in bfloat16
                    module.cast_input_dtype_enabled = False  # type: ignore[assignment]
        self.is_large = model.config.get_text_config().vocab_size > _LARGE_VOCABULARY  # type: ignore[operator,union-attr]

    def forward(
        self,
        inputs_BT: torch.Tensor,
        labels_BT: torch.Tensor,
        positions_1T: torch.Tensor,
        borders: torch.Tensor | None,
        longest: int = 0,
    ) -> torch.Tensor:
        """Return the sum over the labelled positions; the arguments are those of batches.Batch."""
        self.borders = borders
        given: dict[str, Any] = {} if borders is None else {"borders": borders, "longest": longest}
        if self.is_large:
            kept_K = (labels_BT != IGNORED).any(0).nonzero().squeeze(1)
            given["logits_to_keep"] = kept_K
            labels_BT = labels_BT[:, kept_K]
        with torch.autocast(self.device_type, dtype=torch.bfloat16, enabled=self.is_bfloat16):
            logits_BTV = self.model(
                input_ids=inputs_BT, position_ids=positions_1T, use_cache=False, **given
            ).logits
        flat, labels = logits_BTV.view(-1, logits_BTV.shape[-1]), labels_BT.reshape(-1)
        if not self.is_large:
            return _cross_entropy(flat, labels)
        # the float32 copy lives for one piece at a time, forward and backward
        pieces = [
            checkpoint(_cross_entropy, part, part_labels, use_reentrant=False)
            for part, part_labels in zip(torch.split(flat, _PIECE), torch.split(labels, _PIECE), strict=True)
        ]
        return torch.stack(pieces).sum() if pieces else flat.sum()


# Rows of logits whose loss is computed together, and the size from which a vocabulary is worth the trouble.
_PIECE, _LARGE_VOCABULARY = 4_096, 8_192


def _cross_entropy(logits_NV: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits_NV.float(), labels_N, ignore_index=IGNORED, reduction="sum")


# Embeddings, and what layers add to the residual stream, in Llama's and in GPT-2's names.
_RESIDUAL = ("embed_tokens", "o_proj", "down_proj", "wte", "c_proj")


def add_residual_dropout(model: nn.Module, probability: float) -> None:
    """Drop out the embedding and what each layer adds to the residual stream, by hooks.

    Raises:
        RecipeError: If the model has no layers of a known name.
    """

    def drop(module: nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:
        return functional.dropout(output, probability, training=module.training)

    found = [module for name, module in model.named_modules() if name.endswith(_RESIDUAL)]
    if not found:
        raise RecipeError(
            f"residual_dropout: no layer of {type(model).__name__} is called {', '.join(_RESIDUAL)}. "
            "Set it to 0."
        )
    for module in found:
        module.register_forward_hook(drop)


def add_noise(loss: SummedLoss, alpha: float) -> None:
    """Add uniform noise to the embedded tokens in training (NEFTune, Jain et al. 2023, arXiv:2310.05914).

    Its size is alpha / sqrt(length x width), with the length of each crystal by itself where rows are packed.
    """

    def disturb(module: nn.Module, _: Any, embedded_BTE: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return embedded_BTE
        n_positions, width = embedded_BTE.shape[1:]
        if loss.borders is None:
            lengths_T = torch.full((n_positions,), n_positions, device=embedded_BTE.device)
        else:
            positions = torch.arange(n_positions, device=embedded_BTE.device)
            crystal_T = torch.searchsorted(loss.borders, positions, right=True)
            lengths_T = loss.borders.diff()[crystal_T - 1]
        size_T1 = alpha * (lengths_T * width).float().rsqrt()[:, None]
        return embedded_BTE + torch.empty_like(embedded_BTE).uniform_(-1, 1) * size_T1.to(embedded_BTE.dtype)

    loss.model.get_input_embeddings().register_forward_hook(disturb)  # type: ignore[operator]


def decoder_layers(model: Any) -> list[nn.Module]:
    """Return the layers of a causal LM, in order; peft's wrapping is looked through."""
    names = set(getattr(without_adapter(model), "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def compile_layers(model: Any, *, is_static: bool) -> None:
    """Compile the decoder layers in place; being alike, they share one graph: quick at any depth."""
    for module in decoder_layers(model):
        module.compile(dynamic=not is_static)
