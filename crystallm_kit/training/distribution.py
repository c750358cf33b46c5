"""How a run is spread over processes: one, data parallel (DDP), sharded (FSDP2), or under DeepSpeed (ZeRO).

    distribution = Distribution(sharding="fsdp")          # under torchrun, srun or accelerate launch
    loss = distribution.spread(SummedLoss(model, ...), layers)
    distribution.backward(loss(*batch), loss, n_targets, is_last=True)
    norm = distribution.update(optimizer, weights, largest=1.0)

DDP keeps all weights on every GPU and adds up gradients. FSDP2 keeps a share of each weight on every GPU and
gathers a layer when it is computed, so that a model larger than one GPU trains; the main process alone holds
it whole, in CPU memory, while it is dealt out, and the others begin with shapes (meta tensors). A step's
gradient is the sum over its targets, whoever computed them, so a run is the same run on any number of GPUs up
to rounding.

Not here: which process computes what (batches.Layout), checkpoints (run_state.py).
"""

import contextlib
import itertools
import os
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any, Literal

import torch
from torch import nn

from crystallm_kit.errors import ModelError
from crystallm_kit.training.progress import is_first_process
from crystallm_kit.training.zero import Zero

Sharding = Literal["none", "fsdp"]


class Distribution:
    """The processes of a run; accelerate starts them.

    Attributes:
        device: Of this process.
        rank, world: Number of this process, and of all.
        is_main: Whether this process writes files and the screen.
        is_sharded: Whether weights are spread (FSDP2).
    """

    def __init__(self, sharding: Sharding = "none") -> None:
        from accelerate import Accelerator  # type: ignore[import-untyped]
        from accelerate.utils import DistributedType  # type: ignore[import-untyped]

        # autocast is in SummedLoss, inside the compiled part
        self.accelerator = Accelerator(mixed_precision="no", cpu=not torch.cuda.is_available())
        self.device: torch.device = self.accelerator.device
        self.rank: int = self.accelerator.process_index
        self.world: int = self.accelerator.num_processes
        self.is_main: bool = self.accelerator.is_main_process
        # accelerate launch says it so; accelerate itself hears it on GPUs alone
        wanted = sharding == "fsdp" or os.environ.get("ACCELERATE_USE_FSDP") == "true"
        self.is_sharded = wanted and self.world > 1
        self._is_zero = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        self.zero: Zero | None = None

    def spread(self, loss: nn.Module, layers: Iterable[nn.Module], *, bfloat16: bool) -> nn.Module:
        """Return the loss module for this process; call it before the optimizer takes the weights.

        Args:
            loss: On this process's device; with frozen and trainable weights. To be sharded, it is on the CPU
                or on its device in the main process, whose weights count, and may be on "meta" in the others.
            layers: The decoder layers, which FSDP2 gathers one at a time.
            bfloat16: Whether FSDP2 gathers and computes in bfloat16; gradients are added in float32.

        Raises:
            ModelError: If processes hold models of other shapes.
        """
        if self._is_zero:
            return loss
        if not self.is_sharded:
            return self.accelerator.prepare_model(loss) if self.world > 1 else loss
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        settings: dict[str, Any] = {"mesh": init_device_mesh(self.device.type, (self.world,))}
        if bfloat16:
            settings["mp_policy"] = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
        self._check_alike(loss)
        for module in (*layers, loss):
            self._deal_out(module)
            fully_shard(module, **settings)
        return loss

    def take_optimizer(self, loss: nn.Module, optimizer: torch.optim.Optimizer, largest: float) -> nn.Module:
        """Return the loss module to call, after DeepSpeed, where it is used, has taken the optimizer.

        Args:
            loss: What `spread` returned.
            optimizer: Of its weights.
            largest: Norm of the gradient; `update` is given the same.
        """
        if not self._is_zero:
            return loss
        settings = self.accelerator.state.deepspeed_plugin.deepspeed_config
        self.zero = Zero(loss, optimizer, settings, largest)
        engine: nn.Module = self.zero.engine
        return engine

    def _check_alike(self, loss: nn.Module) -> None:
        shapes = [(name, tuple(w.shape), str(w.dtype)) for name, w in _tensors(loss)]
        here, main = shapes, self.gather(shapes)[0]
        other = next((pair for pair in zip(main, here, strict=False) if pair[0] != pair[1]), None)
        if other or len(main) != len(here):
            raise ModelError(
                f"the main process has other weights than process {self.rank}: "
                f"{other or (len(main), len(here))}. The base's files do not agree with its config; train it "
                "without sharding."
            )

    @torch.no_grad()
    def _deal_out(self, module: nn.Module) -> None:
        """Put a module's tensors on this process's device, with the values of the main process."""
        for _, tensor in _tensors(module):
            if self.is_main:
                whole = tensor.detach().to(self.device).contiguous()
            else:
                whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
            torch.distributed.broadcast(whole, src=0)
            is_parameter = isinstance(tensor, nn.Parameter)
            # of the same memory, but new: who sent it may hold it a while, and then it cannot be swapped
            new = nn.Parameter(whole, tensor.requires_grad) if is_parameter else whole.detach()
            torch.utils.swap_tensors(tensor, new)  # type: ignore[no-untyped-call] # wherever it is shared

    def backward(self, summed: torch.Tensor, loss: nn.Module, n_targets: int, *, is_last: bool) -> None:
        """Add one pass's share of the step's gradient; processes exchange gradients in the last pass alone.

        FSDP2 exchanges in each pass: until then it keeps whole gradients, 32 GB of 8 billion weights.

        Args:
            summed: Sum of the negative log-likelihoods of this pass.
            loss: What `take_optimizer` returned.
            n_targets: Of the whole step, over all processes.
            is_last: Whether this is the step's last pass.
        """
        share = summed * (self.world / n_targets)  # processes take the mean; what is wanted is the sum
        if self.zero:
            self.zero.backward(share, is_last=is_last)
            return
        waits = self.world == 1 or self.is_sharded or is_last
        with contextlib.nullcontext() if waits else self.accelerator.no_sync(loss):
            share.backward()  # type: ignore[no-untyped-call]

    def forget_gathered(self, loss: nn.Module) -> None:
        """Let go of weights that a forward pass without a backward pass has left whole.

        FSDP2 keeps those of no layer (the embeddings), and the next pass would not see what changed since.
        """
        if self.is_sharded:
            loss.reshard()  # type: ignore[operator]

    def update(
        self, optimizer: torch.optim.Optimizer, weights: list[torch.Tensor], largest: float
    ) -> torch.Tensor:
        """Scale the gradient to a norm of at most `largest`, step, forget it; return the norm that it had."""
        if self.zero:
            return self.zero.step()
        norm = full(nn.utils.clip_grad_norm_(weights, largest))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum over processes."""
        if self.world == 1:
            return tensor
        found: torch.Tensor = self.accelerator.reduce(tensor, "sum")
        return found

    def any(self, flag: bool) -> bool:
        """Return whether any process says so."""
        if self.world == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)) > 0)

    def gather(self, value: Any) -> list[Any]:
        """Return the value of every process."""
        from accelerate.utils import gather_object

        found: list[Any] = gather_object([value])
        return found

    def wait(self) -> None:
        """Wait for all processes."""
        self.accelerator.wait_for_everyone()

    def end(self) -> None:
        """Leave the group of processes, if this object's accelerator opened one."""
        if self.world > 1:
            self.accelerator.end_training()


def is_first_to_tell() -> bool:
    """Return whether this process is the first of its run to tell of an error: one message, not one of each.

    Processes ask the store through which they met. Before they have met, the main process tells.
    """
    processes = torch.distributed
    if not processes.is_available() or not processes.is_initialized():
        return is_first_process()
    try:
        store = processes.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=timedelta(seconds=5)
        )
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return int(store.add(f"crystallm_kit/told/{attempt}", 1)) == 1
    except (RuntimeError, KeyError):  # it went with the process that kept it
        return True


def _tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Return the parameters and buffers of a module that are not yet spread, each once."""
    from torch.distributed.tensor import DTensor

    named = itertools.chain(module.named_parameters(), module.named_buffers())
    return [(name, tensor) for name, tensor in named if not isinstance(tensor, DTensor)]


def full(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor whole, where it is spread over processes; every process has to call it."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return this process's parts of tensors, sharing their memory."""
    from torch.distributed.tensor import DTensor

    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors.values()]
