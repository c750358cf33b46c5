"""Recording what a GPU does at every step, so that it is asked for once a step and not once an operation.

    graph = record(compute, changes=[state], pool=None)     compute() works in place, on tensors that stay
    graph.replay()                                          the same work, one call

A step of a constraint is some four hundred operations on a few thousand numbers each: asking for them takes
the CPU longer than doing them takes the GPU.

Not here: what is recorded (slots.py, vllm_constraint.py).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

_TRIALS = 2  # libraries set themselves up on the first calls


def record(compute: Callable[[], None], *, changes: Sequence[torch.Tensor], pool: Any = None) -> Any:
    """Return a CUDA graph of a computation.

    Args:
        compute: Waits for nothing, and reads and writes tensors that live as long as the graph.
        changes: The tensors that it writes to and that count: what the trial runs change is put back.
        pool: Memory of earlier graphs (`graph.pool()`); None: its own.
    """
    kept = [tensor.clone() for tensor in changes]
    now = torch.cuda.current_stream()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(now)
    with torch.cuda.stream(stream):
        for _ in range(_TRIALS):
            compute()
    now.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # other threads may go on using the GPU: only this one's work is recorded
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        compute()
    for tensor, before in zip(changes, kept, strict=True):
        tensor.copy_(before)
    return graph
