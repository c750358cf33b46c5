"""Drawing tokens: one uniform number a token, through the inverse of the cumulative probability.

Every draw has a number of its own, made from (seed, position of the prompt, position of the token). So a
sample does not depend on what shares its batch, up to rounding of the logits.

Not here: which tokens may come next (tokens/masking.py); the loops (transformers_local.py, slots.py).
"""

# Shape legend: B samples, V vocabulary, T tokens.

import numpy as np
import numpy.typing as npt
import torch


def uniform_numbers(seed: int, index: int, n_tokens: int) -> npt.NDArray[np.float32]:
    """Return (T,) numbers in [0, 1): those of one sample's draws."""
    return np.random.default_rng((seed, index)).random(n_tokens, dtype=np.float32)


def draw(
    logits_BV: torch.Tensor,
    uniform_B: torch.Tensor,
    temperature: torch.Tensor | float,
    *,
    top_p: torch.Tensor | float = 1.0,
    top_k: torch.Tensor | int = 0,
) -> torch.Tensor:
    """Return (B,) ids.

    Args:
        logits_BV: What the model says; -inf where a token must not come.
        uniform_B: Numbers in [0, 1).
        temperature: One, or (B,); 0 takes the most likely token.
        top_p: One, or (B,): smallest set of tokens with at least this probability; 1 keeps all.
        top_k: One, or (B,): this many of the most likely tokens; 0 keeps all.
    """
    temperature_B = torch.as_tensor(temperature, device=logits_BV.device).expand(len(logits_BV))
    # Dividing by almost nothing leaves the most likely token alone.
    probability = torch.softmax(logits_BV.double() / temperature_B.clamp(min=1e-6)[:, None], -1)
    if not (isinstance(top_k, int) and top_k == 0 and isinstance(top_p, float | int) and top_p == 1):
        probability = _cut(probability, top_p, top_k)
    cumulative = probability.cumsum(-1)
    point = uniform_B.double()[:, None] * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, point, right=True).squeeze(1)
    # Rounding may put the point beyond the last token of positive probability.
    last = probability.shape[1] - 1 - (probability > 0).flip(1).long().argmax(-1)
    return torch.minimum(token, last)


def _cut(probability: torch.Tensor, top_p: torch.Tensor | float, top_k: torch.Tensor | int) -> torch.Tensor:
    """Return the probabilities with those of unlikely tokens set to 0."""
    size, n_tokens = probability.shape
    p_B1 = torch.as_tensor(top_p, dtype=torch.double, device=probability.device).expand(size)[:, None]
    k_B1 = torch.as_tensor(top_k, device=probability.device).expand(size)[:, None]
    ordered, index = probability.sort(stable=True, dim=-1, descending=True)
    places = torch.arange(n_tokens, device=probability.device)
    ordered = ordered.masked_fill((places >= k_B1) & (k_B1 > 0), 0)
    before = ordered.cumsum(-1) - ordered
    ordered = ordered.masked_fill((before >= p_B1 * ordered.sum(-1, keepdim=True)) & (p_B1 < 1), 0)
    return torch.zeros_like(probability).scatter_(1, index, ordered)
