"""The rows of the speed table: what is trained, for how long, and the numbers that come of it.

    numbers = ROWS["lora"].measure("lora", Place(data, out, seconds=20))
    {"tokens_per_second": ..., "crystals_per_second": ..., "mfu": ..., "peak_memory_gb": ..., ...}

The kit's rows are runs of the kit's own loop on a recipe. They are watched through what every run writes,
metrics.jsonl, and ended as Slurm would end them, with SIGTERM. Their lines come when the GPU has been waited
for, so the time between two of them is that of the steps between.

Not here: running rows one after the other, the table, and what its columns mean (speed.py).
"""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml

from crystallm_kit.models.bases import BaseRecipe, LoraRecipe, load_base
from crystallm_kit.models.checkpoints import ModelRecipe
from crystallm_kit.recipes import recipe_to_dict
from crystallm_kit.training.batches import TokenSource, open_source
from crystallm_kit.training.learner import PEAK_FLOPS
from crystallm_kit.training.loop import train
from crystallm_kit.training.peer_loops import CrystallmSettings, crystal_text_llm_loop, crystallm_loop
from crystallm_kit.training.progress import is_first_process
from crystallm_kit.training.recipe import DataRecipe, OptimizerRecipe, ScheduleRecipe, TrainingRecipe

# As its config.json states it.
LLAMA_3_1_8B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
_TOY_BASE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_TOY_PEER = {"n_layers": 2, "n_heads": 2, "width": 64, "window": 64, "rows": 2, "accumulation": 2}
_SCRATCH = ModelRecipe(hidden_size=512, n_heads=8, intermediate_size=1408)
_TOY_SCRATCH = ModelRecipe(hidden_size=64, n_layers=2, n_heads=2)
_NEVER = 10**9  # steps
Sharding = Literal["none", "fsdp"]
Quantisation = Literal["none", "nf4", "int8"]


@dataclass(frozen=True)
class Place:
    """Where and how a row is measured.

    Attributes:
        data: Folder that speed_data.build wrote.
        out: Folder of the results.
        seconds: Of timed steps.
        is_toy: Two layers instead of the real shapes.
    """

    data: Path
    out: Path
    seconds: float
    is_toy: bool = False

    @property
    def device(self) -> torch.device:
        """Return where models are."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        what: For people.
        measure: (row's name, place) -> numbers.
        n_gpus: That it sees.
        n_processes: That measure it together.
    """

    what: str
    measure: Callable[[str, Place], dict[str, Any]]
    n_gpus: int = 1
    n_processes: int = 1


# ---------------------------------------------------------------- time


class Clock:
    """Times steps after a warm-up, and says when that was enough."""

    def __init__(self, seconds: float, n_warm: int) -> None:
        """Times from the end of the n_warm-th step on, for `seconds`."""
        self.seconds, self.n_warm = seconds, n_warm
        self._began = time.perf_counter()
        self._warm: float | None = None  # seconds until timing began
        self._elapsed = 0.0  # timed seconds
        self._n_seen = self._n_steps = self._n_tokens = 0
        self._n_crystals = 0.0

    def stepped(self, n_tokens: int, n_crystals: float, n_steps: int = 1) -> bool:
        """Note steps that have just ended, the GPU waited for; return whether it was enough."""
        self._n_seen += n_steps
        now = time.perf_counter() - self._began
        if self._warm is None:
            if self._n_seen >= self.n_warm:
                self._warm = now
            return False
        self._n_steps += n_steps
        self._n_tokens += n_tokens
        self._n_crystals += n_crystals
        self._elapsed = now - self._warm
        return self._elapsed >= self.seconds

    def numbers(self) -> dict[str, Any]:
        """Return rates and what they come from; empty if no step was timed."""
        if not self._n_steps:
            return {}
        return {
            "tokens_per_second": self._n_tokens / self._elapsed,
            "crystals_per_second": self._n_crystals / self._elapsed,
            "timed_steps": self._n_steps,
            "timed_tokens": self._n_tokens,
            "timed_seconds": self._elapsed,
            "warm_up_seconds": self._warm,
        }


class Watch(threading.Thread):
    """Follows the metrics.jsonl of a run in this process, and sends it SIGTERM when the clock has enough."""

    def __init__(self, run: Path, clock: Clock, tokens_per_crystal: float) -> None:
        super().__init__(daemon=True)
        self.path, self.clock, self.tokens_per_crystal = run / "metrics.jsonl", clock, tokens_per_crystal
        self.is_over = threading.Event()
        self._n_read = 0  # characters

    def run(self) -> None:
        """Look every 5 ms until the run is over."""
        while not self.is_over.wait(0.005):
            new = self._new_steps()
            n_tokens = sum(record["tokens"] for record in new)
            if new and self.clock.stepped(n_tokens, n_tokens / self.tokens_per_crystal, len(new)):
                os.kill(os.getpid(), signal.SIGTERM)
                return

    def _new_steps(self) -> list[dict[str, Any]]:
        try:
            with self.path.open(encoding="utf-8") as file:
                file.seek(self._n_read)
                whole, newline, _ = file.read().rpartition("\n")
        except FileNotFoundError:
            return []
        self._n_read += len(whole) + len(newline)  # the file is ASCII
        return [record for record in map(json.loads, whole.splitlines()) if "tokens" in record]


def logged_losses(run: Path) -> dict[int, float]:
    """Return the losses that a run has logged, by step."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {record["step"]: record["loss"] for record in map(json.loads, lines) if "tokens" in record}


# ---------------------------------------------------------------- the kit's rows


def lora_recipe(
    name: str,
    place: Place,
    *,
    micro_tokens: int = 16_384,
    sharding: Sharding = "none",
    quantisation: Quantisation = "none",
    gradient_checkpointing: bool = False,
) -> TrainingRecipe:
    """Return the recipe of a LoRA row: rank 16 on all linear layers, packed, crystals of up to 2,048 tokens.

    A step has two passes on each GPU.
    """
    micro_tokens = 512 if place.is_toy else micro_tokens
    base = BaseRecipe(
        str(base_folder(place)),
        weights="random",
        quantisation=quantisation,
        gradient_checkpointing=gradient_checkpointing,
        lora=LoraRecipe(rank=16, alpha=32.0, dropout=0.0),
    )
    return TrainingRecipe(
        base=base,
        batch_tokens=2 * micro_tokens * ROWS[name].n_processes,
        micro_tokens=micro_tokens,
        sharding=sharding,
        ema_decay=0.0,
        optimizer=OptimizerRecipe(lr=1e-4, weight_decay=0.0),
        data=DataRecipe(corpus=place.data / "compact.npz", max_length=512 if place.is_toy else 2_048),
        **_endless(place, log_every=2),
    )


def scratch_recipe(name: str, place: Place, *, corpus: str = "wyckoff.npz") -> TrainingRecipe:
    """Return the recipe of a row from scratch: the shipped model's, at 26M weights."""
    micro_tokens = 512 if place.is_toy else 65_536
    shape = _TOY_SCRATCH if place.is_toy else _SCRATCH
    if corpus == "cif.npz":
        shape = dataclasses.replace(shape, max_positions=1_024)
    return TrainingRecipe(
        model=shape,
        residual_dropout=0.1,
        batch_tokens=micro_tokens * ROWS[name].n_gpus,
        micro_tokens=micro_tokens,
        optimizer=OptimizerRecipe(lr=1.2e-3),
        data=DataRecipe(corpus=place.data / corpus),
        **_endless(place, log_every=20),
    )


def _endless(place: Place, log_every: int) -> dict[str, Any]:
    return {
        "seed": 1,
        "steps": 10**6,
        "eval_every": _NEVER,
        "checkpoint_every": _NEVER,
        "log_every": 1 if place.is_toy else log_every,
        "rows": "packed",
        "max_minutes": (place.seconds + 150) / 60,  # where the warm-up takes too long
        "schedule": ScheduleRecipe(kind="constant", warmup_steps=20),
    }


def base_folder(place: Place) -> Path:
    """Return a folder with the config of the base model, without weights."""
    from transformers import LlamaConfig

    folder = place.out / ("toy-base" if place.is_toy else "llama-3.1-8b")
    if folder.exists():
        return folder
    vocabulary = open_source(place.data / "compact.npz").info.vocabulary.size
    shape = {**LLAMA_3_1_8B, **(_TOY_BASE if place.is_toy else {}), "vocab_size": vocabulary}
    writing = folder.with_name(f".{folder.name}.{os.getpid()}")
    LlamaConfig(**shape, architectures=["LlamaForCausalLM"], dtype="bfloat16").save_pretrained(writing)
    try:
        writing.rename(folder)
    except OSError:  # another process of the row was first
        shutil.rmtree(writing)
    return folder


def _kit_row(
    recipe: Callable[..., TrainingRecipe], **settings: Any
) -> Callable[[str, Place], dict[str, Any]]:
    """Return the measurement of a recipe by the kit's own loop."""

    def measure(name: str, place: Place) -> dict[str, Any]:
        chosen = recipe(name, place, **settings)
        run = place.out / "runs" / name
        source = open_source(str(chosen.data.corpus))
        mean_length = _mean_tokens(source)
        clock = Clock(place.seconds, n_warm=2 * chosen.log_every)
        is_main = is_first_process()
        watch = Watch(run, clock, mean_length)
        if is_main:
            shutil.rmtree(run, ignore_errors=True)
            watch.start()
        try:
            train(chosen, run, source=source)
        finally:
            watch.is_over.set()
        if not is_main:
            return {}
        losses = list(logged_losses(run).values())
        return {
            **_with_mfu(clock.numbers(), _kit_flops(chosen, source)),
            "tokens_per_crystal": mean_length,
            "first_loss": losses[0],
            "last_loss": losses[-1],
            "batch_tokens": chosen.batch_tokens,
            "micro_tokens": chosen.micro_tokens,
        }

    return measure


# ---------------------------------------------------------------- the peers' rows


def _crystal_text_llm_row(quantisation: Quantisation) -> Callable[[str, Place], dict[str, Any]]:
    def measure(name: str, place: Place) -> dict[str, Any]:
        source = open_source(place.data / "compact.npz")
        vocabulary = source.info.vocabulary
        folder = base_folder(place)
        lora = LoraRecipe(rank=8, alpha=32.0, dropout=0.05, target_modules=("q_proj", "v_proj"))
        recipe = BaseRecipe(str(folder), weights="random", quantisation=quantisation, lora=lora)
        model = load_base(recipe, vocabulary, device=place.device, seed=1)
        model.config._attn_implementation = "sdpa"
        clock = Clock(place.seconds, n_warm=2 if place.is_toy else 20)
        crystal_text_llm_loop(
            model,
            source.examples(0),
            _waited_for(clock, every=1 if place.is_toy else 10),
            folder=place.out / "runs" / name,
            pad_token_id=vocabulary.pad_token_id or 0,
            n_workers=0 if place.is_toy else 8,
        )
        flops = llama_flops(folder, rank=8, adapted=("q_proj", "v_proj"))
        return {**_with_mfu(clock.numbers(), flops), "batch": "1 crystal"}

    return measure


def _waited_for(clock: Clock, every: int) -> Callable[[int, float], bool]:
    """Return what tells the clock of steps, `every` of them at a time, after waiting for the GPU."""
    since = {"steps": 0, "tokens": 0, "crystals": 0.0}

    def stepped(n_tokens: int, n_crystals: float) -> bool:
        since["steps"] += 1
        since["tokens"] += n_tokens
        since["crystals"] += n_crystals
        if since["steps"] < every:
            return False
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        is_enough = clock.stepped(int(since["tokens"]), since["crystals"], int(since["steps"]))
        since.update(steps=0, tokens=0, crystals=0.0)
        return is_enough

    return stepped


def _crystallm_row(_: str, place: Place) -> dict[str, Any]:
    source = open_source(place.data / "cif.npz")
    settings = CrystallmSettings(**_TOY_PEER) if place.is_toy else CrystallmSettings()  # type: ignore[arg-type]
    clock = Clock(place.seconds, n_warm=1 if place.is_toy else 3)
    vocabulary = source.info.vocabulary.size
    loss = crystallm_loop(
        source.examples(0), vocabulary, clock.stepped, settings=settings, device=place.device
    )
    n = settings.width * (12 * settings.n_layers * settings.width + vocabulary)
    return {
        **_with_mfu(clock.numbers(), Flops(6.0 * n, 6.0 * n)),
        "last_loss": loss,
        "batch_tokens": settings.rows * settings.window * settings.accumulation,
        "micro_tokens": settings.rows * settings.window,
    }


# ---------------------------------------------------------------- FLOPs


@dataclass(frozen=True)
class Flops:
    """FLOPs of training on one token.

    Attributes:
        model: By the formula that speed.py states.
        six_n: 6 for every weight of a matrix.
    """

    model: float
    six_n: float


def llama_flops(
    folder: Path, *, rank: int, adapted: tuple[str, ...] | None = None, labelled: float = 1.0
) -> Flops:
    """Return the FLOPs of LoRA on a Llama.

    Args:
        folder: With its config.json.
        rank: Of LoRA.
        adapted: Names of the adapted layers; None: all but the head.
        labelled: Share of the positions at which the head is computed.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    width, inner, n_layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    keys = width * config["num_key_value_heads"] // config["num_attention_heads"]
    shapes = {
        "q_proj": (width, width),
        "k_proj": (width, keys),
        "v_proj": (width, keys),
        "o_proj": (width, width),
        "gate_proj": (width, inner),
        "up_proj": (width, inner),
        "down_proj": (inner, width),
    }
    body = n_layers * sum(rows * columns for rows, columns in shapes.values())
    trained = n_layers * rank * sum(sum(shapes[name]) for name in adapted or shapes)
    head = width * config["vocab_size"]
    return Flops(4.0 * (body + labelled * head) + 6.0 * trained, 6.0 * (body + head + trained))


def _kit_flops(recipe: TrainingRecipe, source: TokenSource) -> Flops:
    if recipe.base is not None:
        lora = recipe.base.lora
        return llama_flops(Path(recipe.base.name), rank=lora.rank, labelled=labelled_share(source))
    shape = recipe.model or _SCRATCH
    inner = shape.intermediate_size or -(-shape.hidden_size * 8 // (3 * 64)) * 64
    body = shape.n_layers * shape.hidden_size * (4 * shape.hidden_size + 3 * inner)
    n = body + shape.hidden_size * source.info.vocabulary.size
    return Flops(6.0 * n, 6.0 * n)


def labelled_share(source: TokenSource) -> float:
    """Return the share of positions with a loss, when prompts have none."""
    examples = source.examples(0)
    n_inputs = np.diff(examples.offsets) - 1
    unpaid = np.maximum(examples.prompt_lengths.astype(np.int64) - 1, 0)
    return float((n_inputs - unpaid).sum() / n_inputs.sum())


def _mean_tokens(source: TokenSource) -> float:
    """Return the input tokens of a crystal."""
    return float((np.diff(source.examples(0).offsets) - 1).mean())


def _with_mfu(numbers: Mapping[str, Any], flops: Flops) -> dict[str, Any]:
    found = dict(numbers)
    if not found:
        return found
    found["flops_per_token"] = flops.model
    if torch.cuda.is_available():
        peak = PEAK_FLOPS["H200"] * int(os.environ.get("WORLD_SIZE", "1"))
        found["mfu"] = found["tokens_per_second"] * flops.model / peak
        found["mfu_6n"] = found["tokens_per_second"] * flops.six_n / peak
        found["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return found


# ---------------------------------------------------------------- saved on two, resumed on one

_RESUMED_AFTER = 6  # steps; as many follow


def _resume_row(sharding: Sharding) -> Callable[[str, Place], dict[str, Any]]:
    """Return the check that a run of two processes goes on in one, with the losses of two."""

    def measure(name: str, place: Place) -> dict[str, Any]:
        two, one = (place.out / "runs" / f"{name}-{where}" for where in ("two", "one"))
        for run in (two, one):
            shutil.rmtree(run, ignore_errors=True)
        n = _RESUMED_AFTER
        _train_apart(two, place, sharding, steps=n, n_processes=2)
        shutil.copytree(two, one)
        _train_apart(one, place, sharding, steps=2 * n, n_processes=1)
        _train_apart(two, place, sharding, steps=2 * n, n_processes=2)
        on_two, on_one = logged_losses(two), logged_losses(one)
        later = range(n + 1, 2 * n + 1)
        return {
            "saved_at_step": n,
            "losses_on_two": [on_two[step] for step in later],
            "losses_on_one": [on_one[step] for step in later],
            "largest_relative_difference": max(abs(on_one[s] / on_two[s] - 1) for s in later),
        }

    return measure


def _train_apart(run: Path, place: Place, sharding: Sharding, *, steps: int, n_processes: int) -> None:
    recipe = dataclasses.replace(
        scratch_recipe("resume", place),
        steps=steps,
        sharding=sharding,
        compile=False,
        log_every=1,
        checkpoint_every=steps,
        residual_dropout=0.0,  # its draws depend on the number of processes
    )
    run.parent.mkdir(parents=True, exist_ok=True)
    path = run.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe_to_dict(recipe)), encoding="utf-8")
    command = [*launcher(n_processes), "-m", "crystallm_kit.training.loop", str(path), "--out", str(run)]
    subprocess.run(command, env=environment(n_processes), check=True)


def launcher(n_processes: int) -> list[str]:
    """Return the beginning of a command that starts Python in as many processes."""
    if n_processes == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_processes}"]


def environment(n_gpus: int) -> dict[str, str]:
    """Return this process's environment with so many GPUs in it; a Trainer would take all that it sees."""
    found = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    if n_gpus == 1:
        found["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    if not torch.cuda.is_available():
        found["ACCELERATE_USE_CPU"] = "true"  # or each process of several takes itself for the only one
    return found


# ---------------------------------------------------------------- all rows

ROWS: dict[str, Row] = {
    "lora": Row("Llama-3.1-8B, LoRA r=16, packed, bf16", _kit_row(lora_recipe)),
    "lora-8k": Row("lora, passes of 8,192 positions", _kit_row(lora_recipe, micro_tokens=8_192)),
    "lora-20k": Row("lora, passes of 20,480 positions", _kit_row(lora_recipe, micro_tokens=20_480)),
    "lora-checkpointing": Row(
        "lora, passes of 32,768 positions, gradient checkpointing",
        _kit_row(lora_recipe, micro_tokens=32_768, gradient_checkpointing=True),
    ),
    "qlora": Row("lora, base in nf4 with double quantisation", _kit_row(lora_recipe, quantisation="nf4")),
    "qlora-checkpointing": Row(
        "qlora, passes of 8,192 positions, gradient checkpointing",
        _kit_row(lora_recipe, micro_tokens=8_192, quantisation="nf4", gradient_checkpointing=True),
    ),
    "crystal-text-llm": Row(
        "model and texts of lora, trained as Crystal-text-LLM does, base in bf16",
        _crystal_text_llm_row("none"),
    ),
    "crystal-text-llm-int8": Row("the same, base in 8 bits as published", _crystal_text_llm_row("int8")),
    "scratch": Row("Llama of 26M from scratch, wyckoff texts", _kit_row(scratch_recipe)),
    "scratch-cif": Row("scratch on CrystaLLM's CIF texts", _kit_row(scratch_recipe, corpus="cif.npz")),
    "crystallm": Row("CrystaLLM's GPT-2 of 26M in its loop, its CIF texts", _crystallm_row),
    "lora-2gpu": Row("lora on two GPUs, DDP", _kit_row(lora_recipe), 2, 2),
    "lora-fsdp-2gpu": Row("lora on two GPUs, FSDP2", _kit_row(lora_recipe, sharding="fsdp"), 2, 2),
    "scratch-2gpu": Row("scratch on two GPUs, DDP", _kit_row(scratch_recipe), 2, 2),
    "resume": Row("saved on two GPUs (DDP), resumed on one", _resume_row("none"), 2),
    "resume-fsdp": Row("saved on two GPUs (FSDP2), resumed on one", _resume_row("fsdp"), 2),
}
# (row, row that it is compared with, rate): printed as a ratio where both are measured.
RATIOS = (
    ("lora", "crystal-text-llm", "crystals_per_second"),
    ("lora", "crystal-text-llm-int8", "crystals_per_second"),
    ("qlora", "lora", "tokens_per_second"),
    ("scratch", "crystallm", "tokens_per_second"),
    ("scratch", "crystallm", "crystals_per_second"),
    ("scratch-cif", "crystallm", "tokens_per_second"),
    ("lora-2gpu", "lora", "tokens_per_second"),
    ("lora-fsdp-2gpu", "lora", "tokens_per_second"),
    ("scratch-2gpu", "scratch", "tokens_per_second"),
)
