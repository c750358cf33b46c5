"""Attention of one new token a sample to what its slot holds, and to no more.

Samples that share a batch are of different lengths. Attention under a mask reads every slot up to the
longest; this kernel reads each up to its own position: of 4,096 slots, half of them shorter than 20 tokens
and a few longer than 200, that is a tenth. On a GPU only, where Triton comes with torch: nothing else imports
this module. Calls that are no step of the slots go to torch's scaled_dot_product_attention.

    model.set_attn_implementation(register())
    model(..., slot_positions=positions_B)

Not here: the slots (slots.py). The sums over blocks of keys are those of Milakov and Gimelshein 2018
(arXiv:1805.02867), as in FlashAttention.
"""

# ruff: noqa: ANN001 - Triton reads annotations of a kernel as its own types
# Shape legend: B slots, H heads of the queries, T tokens, D width of a head.

from typing import Any

import torch
import triton
from triton import language as tl

NAME = "crystallm_kit_slots"
_BLOCK = 32  # keys at a time; most texts have fewer


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    query, key, value, out, positions,
    query_row, query_head, key_row, key_head, key_token, value_row, value_head, value_token,
    n_heads, n_shared, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    length = tl.load(positions + row) + 1
    d = tl.arange(0, BLOCK_D)
    in_head = d < D
    q = tl.load(query + row * query_row + head * query_head + d, mask=in_head, other=0.0).to(tl.float32)
    keys = key + row * key_row + (head // n_shared) * key_head
    values = value + row * value_row + (head // n_shared) * value_head
    largest = -float("inf")
    total = 0.0
    sums = tl.zeros([BLOCK_D], dtype=tl.float32)
    for start in range(0, length, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        here = (t < length)[:, None] & in_head[None, :]
        k = tl.load(keys + t[:, None] * key_token + d[None, :], mask=here, other=0.0).to(tl.float32)
        score = tl.where(t < length, tl.sum(k * q[None, :], 1) * scale, -float("inf"))
        now = tl.maximum(largest, tl.max(score, 0))
        weight = tl.exp(score - now)
        v = tl.load(values + t[:, None] * value_token + d[None, :], mask=here, other=0.0).to(tl.float32)
        shrink = tl.exp(largest - now)
        sums = sums * shrink + tl.sum(weight[:, None] * v, 0)
        total = total * shrink + tl.sum(weight, 0)
        largest = now
    result = (sums / total).to(out.dtype.element_ty)
    tl.store(out + (row * n_heads + head) * D + d, result, mask=in_head)


def register() -> str:
    """Make the attention known to transformers, and return its name."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attention(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **settings: Any
    ) -> tuple[torch.Tensor, Any]:
        positions = settings.pop("slot_positions", None)
        if positions is None:
            return sdpa_attention_forward(module, query, key, value, mask, **settings)  # type: ignore[no-any-return]
        scale = settings.get("scaling")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return slot_attention(query, key, value, positions, float(scale)), None

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def slot_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor, scale: float
) -> torch.Tensor:
    """Return (B, 1, H, D): each query's attention to the keys up to its position.

    Args:
        query: (B, H, 1, D).
        key, value: (B, heads, T, D); H is a multiple of their heads. The last axis is contiguous.
        positions: (B,) of the queries; less than T.
        scale: Of the scores.
    """
    n_slots, n_heads, _, width = query.shape
    out = torch.empty((n_slots, 1, n_heads, width), dtype=query.dtype, device=query.device)
    _kernel[(n_slots, n_heads)](
        query, key, value, out, positions,
        query.stride(0), query.stride(1), key.stride(0), key.stride(1), key.stride(2),
        value.stride(0), value.stride(1), value.stride(2),
        n_heads, n_heads // key.shape[1], scale,
        D=width, BLOCK_D=1 << (width - 1).bit_length(), BLOCK_T=_BLOCK, num_warps=1,
    )  # fmt: skip
    return out
