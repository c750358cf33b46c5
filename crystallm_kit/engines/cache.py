"""A key-value cache that grows in place, and loses rows that are finished.

transformers' DynamicCache copies everything that it holds at every token; for a small model on a CPU that is
a sixth of the time. Here each layer writes into a buffer with room to spare, doubled when it is full.

Not here: what is asked of the model (transformers_local.py).
"""

import inspect
from functools import lru_cache
from typing import Any

import torch

from crystallm_kit.models.checkpoints import without_adapter

_FIRST_ROOM = 48  # tokens; most crystals of 20 atoms end within it


def growing_cache(config: Any) -> Any:
    """Return an empty cache for a model with this config (a transformers Cache)."""
    from transformers.cache_utils import Cache, DynamicLayer

    class GrowingLayer(DynamicLayer):  # type: ignore[misc]
        """Keys and values of one layer: views, (B, heads, T, width), of buffers with room for more tokens."""

        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            """Append the states of new tokens and return all."""
            del args, kwargs
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                self.buffers: list[torch.Tensor] = []
                self.n_tokens = 0
            begin, end = self.n_tokens, self.n_tokens + key_states.shape[-2]
            if not self.buffers or end > self.buffers[0].shape[-2]:
                room = max(_FIRST_ROOM, 2 * end)
                grown = [_room(states, room) for states in (key_states, value_states)]
                for new, old in zip(grown, self.buffers, strict=False):
                    new[..., :begin, :] = old[..., :begin, :]
                self.buffers = grown
            for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
                buffer[..., begin:end, :] = states
            self.n_tokens = end
            self._expose()
            return self.keys, self.values

        def batch_select_indices(self, indices: torch.Tensor) -> None:
            """Keep these rows of the batch. `indices`: (B',) int64."""
            if self.is_initialized:
                self.buffers = [buffer[indices] for buffer in self.buffers]
                self._expose()

        def _expose(self) -> None:
            self.keys, self.values = (buffer[..., : self.n_tokens, :] for buffer in self.buffers)

    return Cache(layers=[GrowingLayer() for _ in range(config.num_hidden_layers)])


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """Return a cache under the name by which this model takes it: `cache` from transformers 5.24 on."""
    return {_name_of_cache(without_adapter(model).__class__): cache}


@lru_cache(maxsize=64)
def _name_of_cache(kind: type) -> str:
    return "cache" if "cache" in inspect.signature(kind.forward).parameters else "past_key_values"  # type: ignore[attr-defined]


def _room(states: torch.Tensor, n_tokens: int) -> torch.Tensor:
    return states.new_empty((*states.shape[:-2], n_tokens, states.shape[-1]))
