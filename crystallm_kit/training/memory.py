"""GPU memory of a training run, estimated before any weights are loaded.

    estimate = memory_estimate(config, recipe, layout, vocabulary=info.vocabulary)
    print("\n".join(estimate.table(80e9)))

    memory of each GPU, estimated             GB
    frozen weights (bfloat16)              16.06
    trained weights (float32)               0.17
    ...

What stays from step to step is counted on the model's shapes (meta tensors: 70 billion weights take a
second). What a pass needs is followed, not calculated: the training loss itself runs forward and backward on
one and on two layers of the model, with tensors that have shapes and no content, and the bytes that are alive
are counted at each operation. The rest of the layers is the difference between the two times their number. So
it holds for any architecture, LoRA, dropout and gradient checkpointing alike. Korthikanti et al. (2022,
arXiv:2205.05198) count by hand for one GPT layer what comes out here too.

Quantised weights: nf4 has 4 bits and one float32 scale for 64 weights, 4.5 bits; double quantisation stores
the scales in 8 bits, with one float32 for 256 of them, 4.127 bits (Dettmers et al. 2023, arXiv:2305.14314,
section 3). It is for linear layers alone; embeddings and head stay in bfloat16.

Taken as they are: sizes of the CUDA context, of NCCL's buffers, and what torch.compile's recomputing saves.
Not in it: memory that the allocator holds without using it.

Legend: B rows, T positions, S sequence, H heads.
Not here: what to do about it (preflight.py), the run (loop.py).
"""

import copy
import dataclasses
import functools
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from crystallm_kit.models import bases
from crystallm_kit.models.checkpoints import without_adapter
from crystallm_kit.tokens.drawing import VocabularyInfo
from crystallm_kit.training.batches import LENGTH_MULTIPLE, Layout
from crystallm_kit.training.loss import SummedLoss, add_residual_dropout, decoder_layers
from crystallm_kit.training.recipe import TrainingRecipe

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Sharding = Literal["none", "fsdp", "zero1", "zero2", "zero3"]

# CUDA context, cuBLAS workspaces: what nvidia-smi shows on an H200 for a process with one small tensor.
CONTEXT_BYTES = 0.6e9
# NCCL's channels and buffers, on GPUs of one host.
_NCCL_BYTES = 0.4e9
# DeepSpeed's default bucket, in weights, of float32.
_ZERO_BUCKET = 5e8
# Compiled layers compute element-wise steps again in the backward pass instead of keeping their results. What
# the partitioner of torch 2.13 left of what autograd keeps, on Llama layers; less yet of LoRA with dropout.
_COMPILED_LORA, _COMPILED = 0.76, 0.61
_BITS = {"nf4, double": 4 + 8 / 64 + 32 / (64 * 256), "nf4": 4 + 32 / 64, "int8": 8.0}


@dataclass(frozen=True)
class Item:
    """One line of the estimate.

    Attributes:
        name: What it is.
        n_bytes: On one GPU.
    """

    name: str
    n_bytes: float


@dataclass(frozen=True)
class MemoryEstimate:
    """The memory of one GPU at the highest point of a step.

    Attributes:
        items: Its parts.
        n_weights, n_trained: Of the whole model, LoRA included.
        n_positions: Of one forward pass on one GPU.
    """

    items: tuple[Item, ...]
    n_weights: int
    n_trained: int
    n_positions: int

    @property
    def total(self) -> float:
        """Return the sum, in bytes."""
        return sum(item.n_bytes for item in self.items)

    @property
    def allocated(self) -> float:
        """Return the part that torch.cuda.max_memory_allocated sees, in bytes."""
        return sum(item.n_bytes for item in self.items if item.name not in (_CONTEXT, _NCCL))

    def table(self, capacity: float | None = None) -> list[str]:
        """Return lines for people, in units of 1e9 bytes, against a GPU's memory in bytes."""
        items = [item for item in self.items if item.n_bytes >= 5e6]
        width = max(len(item.name) for item in self.items) + 2
        lines = [f"{'memory of each GPU, estimated':{width}} {'GB':>8}"]
        lines += [f"{item.name:{width}} {item.n_bytes / 1e9:8.2f}" for item in items]
        lines.append(f"{'total':{width}} {self.total / 1e9:8.2f}")
        if capacity:
            share = self.total / capacity
            lines.append(f"{'of the GPU':{width}} {capacity / 1e9:8.2f}   {share:.0%}")
        lines.append(
            f"{self.n_weights:,} weights, {self.n_trained:,} of them trained; "
            f"{self.n_positions:,} positions in a pass"
        )
        return lines


_CONTEXT, _NCCL = "CUDA context, libraries", "NCCL buffers"


def memory_estimate(
    config: "PretrainedConfig",
    recipe: TrainingRecipe,
    layout: Layout,
    *,
    vocabulary: VocabularyInfo,
    sharding: Sharding | None = None,
    labelled_share: float = 1.0,
    n_data_tokens: int = 0,
    attention: Literal["flash", "eager"] = "flash",
    device_type: str = "cuda",
) -> MemoryEstimate:
    """Return the memory that one GPU needs for a training run; no weights are read.

    Args:
        config: Of the model, as published (base) or as `scratch_config` gives it.
        recipe: The run.
        layout: How examples become passes.
        vocabulary: Of the corpus; rows of tokens that are new to the base train.
        sharding: none (DDP: each GPU has all), fsdp (FSDP2), zero1 to zero3 (DeepSpeed, float32); None:
            the recipe's.
        labelled_share: Of the positions of a pass; the logits of a large vocabulary are made for those alone.
        n_data_tokens: Tokens of the epoch and the validation set, which lie on the GPU.
        attention: flash: nothing of size T x T is kept; eager: transformers' own, for odd architectures.
        device_type: cuda; cpu: everything float32, nothing compiled.
    """
    facts = _Facts.of(config, recipe, vocabulary, device_type)
    counts = _Counts.of_whole(facts)
    kind, frozen_bytes = facts.frozen(counts)
    n_weights = counts.trained + counts.packable + counts.other
    # the layer at work and the next one, and all that is in no layer, in bfloat16
    gathered = 2.0 * (2 * counts.largest_layer + n_weights - counts.in_layers)
    sharding, n_processes = sharding or recipe.sharding, layout.n_processes
    is_gathered = sharding in ("fsdp", "zero3") and n_processes > 1
    whole = n_processes if is_gathered else 1
    ranks = n_processes if sharding != "none" else 1
    traced = _Pass.traced(
        facts, layout, labelled_share=labelled_share, attention=attention, is_cast=is_gathered
    )
    trained = 4.0 * counts.trained
    gradients = trained / (ranks if sharding in ("fsdp", "zero2", "zero3") else 1)
    passes = layout.groups_per_step // layout.n_processes
    compiled = _COMPILED_LORA if facts.is_lora else _COMPILED
    kept = traced.kept * (compiled if facts.is_compiled else 1.0)
    if passes == 1 and layout.packed:
        gradients = max(0.0, gradients - kept)  # they grow while activations go
    items = [
        Item(f"frozen weights ({kind})", frozen_bytes / whole),
        Item("trained weights (float32)", trained / whole),
        Item("gradients", gradients),
        Item("AdamW's two moments", 2 * trained / ranks),
        Item("running mean of the weights", trained / whole if recipe.ema_decay else 0.0),
        Item("bfloat16 copies of trained weights", traced.copies),
        Item("activations kept for the backward pass", kept),
        Item("logits and work of the widest moment", traced.work),
        Item("largest layer, dequantised", 2.0 * counts.largest_matrix if facts.is_quantised else 0.0),
        Item("layers gathered from other GPUs", gathered if is_gathered else 0.0),
        Item("buckets for exchanged gradients", _bucket_bytes(sharding, counts.trained, n_processes)),
        Item("data", 4.0 * n_data_tokens),
        Item(_NCCL, _NCCL_BYTES if n_processes > 1 and device_type == "cuda" else 0.0),
        Item(_CONTEXT, CONTEXT_BYTES if device_type == "cuda" else 0.0),
    ]
    rows, positions = shape_of_pass(layout)
    return MemoryEstimate(tuple(items), n_weights, counts.trained, rows * positions)


def shape_of_pass(layout: Layout) -> tuple[int, int]:
    """Return rows and positions of the largest forward pass on one GPU."""
    if layout.packed:
        return 1, layout.pack_positions
    width = (
        -(-(layout.max_length - 1) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    )  # the last token is a target only
    return max(1, layout.micro_tokens // width), width


def _bucket_bytes(sharding: Sharding, n_trained: int, n_processes: int) -> float:
    if n_processes == 1:
        return 0.0
    if sharding == "none":
        return 4.0 * n_trained  # DDP's buckets hold a copy of all gradients
    if sharding.startswith("zero"):
        return 4.0 * min(_ZERO_BUCKET, n_trained)
    return 0.0


# ---------------------------------------------------------------- what stays: counted on shapes


@dataclass(frozen=True)
class _Counts:
    """Weights of a model by kind.

    Attributes:
        trained: Those that train.
        packable: Frozen ones of linear layers other than the head, which quantisation packs.
        other: The other frozen ones.
        in_layers: Of all kinds, in decoder layers.
        largest_layer, largest_matrix: Of all kinds; of the packable.
    """

    trained: int
    packable: int
    other: int
    in_layers: int
    largest_layer: int
    largest_matrix: int

    @classmethod
    def of(cls, model: Any) -> "_Counts":
        head = without_adapter(model).get_output_embeddings()
        matrices = {
            id(module.weight): module.weight.numel()
            for module in model.modules()
            if _is_matrix(module) and module is not head and not module.weight.requires_grad
        }
        layers = [sum(p.numel() for p in layer.parameters()) for layer in decoder_layers(model)]
        frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
        packable = sum(matrices.values())
        return cls(
            trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
            packable=packable,
            other=frozen - packable,
            in_layers=sum(layers),
            largest_layer=max(layers, default=0),
            largest_matrix=max(matrices.values(), default=0),
        )

    @classmethod
    def of_whole(cls, facts: "_Facts") -> "_Counts":
        """Count two shallow models and go on in a straight line, if all layers are alike: LoRA is slow."""
        n = facts.config.get_text_config().num_hidden_layers
        one, two = (cls.of(facts.shapes(n_layers)) for n_layers in (1, 2))
        sums = {
            key: getattr(one, key) + (n - 1) * (getattr(two, key) - getattr(one, key))
            for key in ("trained", "packable", "other", "in_layers")
        }
        whole = dataclasses.replace(two, **sums)
        without_lora = cls.of(facts.shapes(n, is_plain=True))
        known = whole.packable + whole.other + (0 if facts.is_lora else whole.trained)
        is_even = known == without_lora.trained
        return whole if is_even else cls.of(facts.shapes(n))


@dataclass(frozen=True)
class _Facts:
    """A model and what is done with it."""

    config: Any
    recipe: TrainingRecipe
    vocabulary: VocabularyInfo
    device_type: str

    @classmethod
    def of(
        cls, config: Any, recipe: TrainingRecipe, vocabulary: VocabularyInfo, device_type: str
    ) -> "_Facts":
        config = copy.deepcopy(config)
        text = config.get_text_config()
        text.vocab_size = max(text.vocab_size, vocabulary.size)
        return cls(config, recipe, vocabulary, device_type)

    def shapes(self, n_layers: int, *, is_plain: bool = False) -> Any:
        """Return the model to train as meta tensors in training's dtypes, cut to `n_layers`.

        Args:
            n_layers: The first so many.
            is_plain: Without LoRA, all weights trained.
        """
        from transformers import AutoModelForCausalLM

        config = copy.deepcopy(self.config)
        text = config.get_text_config()
        text.num_hidden_layers = n_layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:n_layers]
        dtype = torch.bfloat16 if self.is_lora and self.device_type == "cuda" else torch.float32
        with torch.device("meta"), _quiet():  # peft reads names that transformers has deprecated
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
            if self.is_lora and not is_plain and self.recipe.base is not None:
                model = bases.with_lora(model, self.recipe.base, self.vocabulary)
        return model

    def frozen(self, counts: _Counts) -> tuple[str, float]:
        """Return what frozen weights are kept as, and their bytes."""
        base = self.recipe.base
        width = 2 if self.device_type == "cuda" else 4
        if base is None or base.quantisation == "none":
            kind = "bfloat16" if width == 2 else "float32"
            return kind, width * (counts.packable + counts.other)
        kind = base.quantisation
        if kind == "nf4" and base.double_quantisation:
            kind = "nf4, double"
        return kind, _BITS[kind] / 8 * counts.packable + width * counts.other

    @property
    def is_lora(self) -> bool:
        return self.recipe.base is not None and self.recipe.base.method == "lora"

    @property
    def is_quantised(self) -> bool:
        return self.recipe.base is not None and self.recipe.base.quantisation != "none"

    @property
    def is_compiled(self) -> bool:
        # loop.py compiles no quantised layers; checkpointed ones keep their inputs, compiled or not
        is_checkpointed = self.recipe.base is not None and self.recipe.base.gradient_checkpointing
        return (
            self.recipe.compile
            and self.device_type == "cuda"
            and not self.is_quantised
            and not is_checkpointed
        )


def scratch_config(recipe: TrainingRecipe, vocabulary_size: int) -> "PretrainedConfig":
    """Return the config of the model that a recipe from scratch (`model:`) makes."""
    from crystallm_kit.models.checkpoints import new_model

    if recipe.model is None:
        raise ValueError("the recipe has no 'model'")
    shape = dataclasses.replace(recipe.model, element_embedding="random")
    with torch.device("meta"):
        model = new_model(shape, VocabularyInfo(vocabulary_size, None, None), seed=0)
    found: PretrainedConfig = model.config
    return found


def _is_matrix(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


# ---------------------------------------------------------------- what a pass needs: followed


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that are alive, at each operation; fake ones count as real ones.

    Attributes:
        now, peak: Bytes, tensors made before left out.
        copies: Bytes of casts of known tensors, of those that are alive now.
    """

    def __init__(self, known: Sequence[torch.Tensor] = (), labelled_share: float = 1.0) -> None:
        """Start at 0.

        Args:
            known: Tensors that do not count, although operations may return them.
            labelled_share: Of positions; where fake tensors are asked which of them have a label.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = self.copies = 0
        self._labelled_share = labelled_share
        self._known: weakref.WeakSet[Any] = weakref.WeakSet(tensor.untyped_storage() for tensor in known)
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, function: Any, _types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        from torch._subclasses.fake_tensor import FakeTensor

        if function is torch.ops.aten.nonzero.default and isinstance(args[0], FakeTensor):
            n = max(1, round(args[0].numel() * self._labelled_share))
            out = torch.zeros((n, args[0].ndim), dtype=torch.int64)
        else:
            out = function(*args, **(kwargs or {}))
        is_cast = function is torch.ops.aten._to_copy.default and args[0].untyped_storage() in self._known
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor):
                self._add(value.untyped_storage(), is_cast=is_cast)
        return out

    def _add(self, storage: Any, *, is_cast: bool) -> None:
        if storage in self._seen or storage in self._known:
            return
        self._seen.add(storage)
        n = storage.nbytes()
        self._change(n, n if is_cast else 0)
        weakref.finalize(storage, self._change, -n, -n if is_cast else 0).atexit = False

    def _change(self, n: int, n_copied: int) -> None:
        self.now += n
        self.copies += n_copied
        self.peak = max(self.peak, self.now)


def _dropout(
    values: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> torch.Tensor:
    """Drop out as a GPU does, which keeps a mask of one byte a value; a CPU keeps a float."""
    del inplace
    return torch.native_dropout(values, p, True)[0] if training and p else values


@contextmanager
def _gpu_dropout() -> Iterator[None]:
    """Exchange torch's dropout; a mode of torch functions would not see what checkpoints compute again."""
    before = nn.functional.dropout
    nn.functional.dropout = _dropout  # type: ignore[assignment]
    try:
        yield
    finally:
        nn.functional.dropout = before


class _Flash(torch.autograd.Function):
    """What the flash kernel keeps: queries, keys, values, output, and a float32 number for each query."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return an output of the queries' shape: (B, T, H, width)."""
        out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
        ctx.save_for_backward(query, key, value, out, torch.empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *_gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return gradients of the inputs' shapes."""
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _flash(
    _module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _mask: torch.Tensor | None,
    *,
    is_packed: bool,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    if is_packed and key.shape[1] != query.shape[1]:  # as loss.attention does for the flash kernel
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    return cast(torch.Tensor, _Flash.apply(query, key, value)), None  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class _Pass:
    """Bytes that one forward and backward pass needs.

    Attributes:
        kept: Alive when the last layer is done: what the backward pass waits for.
        copies: Of it, bfloat16 copies of float32 weights (autocast).
        work: What is needed beyond at the highest point: logits, or a layer's gradients.
    """

    kept: float
    copies: float
    work: float

    @classmethod
    def traced(
        cls,
        facts: _Facts,
        layout: Layout,
        *,
        labelled_share: float,
        attention: Literal["flash", "eager"],
        is_cast: bool,
    ) -> "_Pass":
        """Return the bytes of the whole model, from one and from two of its layers."""
        shape = shape_of_pass(layout)
        follow = functools.partial(
            _follow, facts, layout, labelled_share=labelled_share, attention=attention, is_cast=is_cast
        )
        one, two = follow(1, shape), follow(2, shape)
        n = facts.config.get_text_config().num_hidden_layers
        kept, copies, peak = (a + (n - 1) * (b - a) for a, b in zip(one, two, strict=True))
        return cls(kept - copies, copies, peak - kept)


def _follow(
    facts: _Facts,
    layout: Layout,
    n_layers: int,
    shape: tuple[int, int],
    *,
    labelled_share: float,
    attention: str,
    is_cast: bool,
) -> tuple[float, float, float]:
    """Run the loss forward and backward on fake tensors; return bytes kept, copies among them, peak."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AttentionInterface

    recipe, model = facts.recipe, facts.shapes(n_layers)
    is_bfloat16 = facts.device_type == "cuda" and recipe.precision == "bfloat16"
    name = f"crystallm_kit_counted_{'packed' if layout.packed else 'padded'}"
    AttentionInterface.register(name, functools.partial(_flash, is_packed=layout.packed))
    model.config._attn_implementation = name if attention == "flash" else "eager"
    if recipe.residual_dropout:
        add_residual_dropout(model, recipe.residual_dropout)
    if recipe.base is not None and recipe.base.gradient_checkpointing:
        with _quiet():
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
    with FakeTensorMode():
        _fill(model, torch.bfloat16 if is_cast and is_bfloat16 else None)
        model.train()
        known = [*model.parameters(), *model.buffers()]
        known += [p.grad for p in model.parameters() if p.grad is not None]
        loss = SummedLoss(model, "cpu", bfloat16=is_bfloat16)
        inputs = torch.zeros(shape, dtype=torch.int64)
        positions = torch.arange(shape[1])[None]
        live = LiveBytes(known, labelled_share)
        kept: list[tuple[int, int]] = []
        decoder = without_adapter(model).get_decoder()
        decoder.register_forward_hook(lambda *_: kept.append((live.now, live.copies)))
        with ExitStack() as stack:
            stack.enter_context(_quiet())
            if facts.device_type == "cuda":
                stack.enter_context(_gpu_dropout())
            stack.enter_context(live)
            loss(inputs, inputs, positions, None).backward()
    return (*kept[0], live.peak)


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _fill(model: nn.Module, trained_dtype: torch.dtype | None) -> None:
    """Exchange meta tensors for fake ones, with gradients where they train: they are there in a run."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is None:
                continue
            if id(old) not in made:
                dtype = trained_dtype if trained_dtype and old.requires_grad else old.dtype
                new = nn.Parameter(torch.empty(old.shape, dtype=dtype), old.requires_grad)
                if old.requires_grad:
                    new.grad = torch.empty_like(new)
                made[id(old)] = new
            module._parameters[name] = made[id(old)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
