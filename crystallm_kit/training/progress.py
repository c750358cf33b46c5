"""Progress of a training run, for people.

    step 1,200/10,000  loss 0.73  validation 0.74  lr 9.8e-04  1,690,000 tokens/s  MFU 15%  12.1 GB  8:20 left

Tokens are those of crystals and prompts, padding left out; time of validation and checkpoints counts for no
step. MFU (model FLOP utilisation): tokens/s x FLOPs per token (Learner.flops_per_token) over the GPUs' peak.
Memory is the most that the main process's GPU has held so far.

Not here: metrics.jsonl, for programs (curves.py).
"""

import logging
import os
import sys
import time
import warnings
from typing import Any


def is_first_process() -> bool:
    """Tell whether this process is the first of its run, or the only one (torchrun sets RANK)."""
    return int(os.environ.get("RANK", "0")) == 0


def silence_libraries() -> None:
    """Keep what libraries say to their developers off the screen; a variable that is set already wins.

    For a command's start, before transformers is loaded, which reads the variables once.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # also transformers' "Loading weights"
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # tells of every attempt at a connection
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # moyo tells of every tolerance that it tries, bitsandbytes of kernels that a CPU could have
    for name in ("moyo", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.warnoptions:  # python -W shows them
        warnings.simplefilter("ignore")


class Screen:
    """Progress for people: a live line on a terminal, plain lines elsewhere."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet
        self.n_steps = 0
        self.flops_per_token = 0.0
        self.peak_flops: float | None = None
        self.validation = ""
        self.seconds = 0.0
        self.n_tokens = 0
        self.is_terminal = sys.stderr.isatty()
        self._mark = time.perf_counter()

    def start(
        self, step: int, n_steps: int, description: str, flops_per_token: float, peak_flops: float | None
    ) -> None:
        """Print what is about to run, and start the clock.

        Args:
            step: Where the run stands.
            n_steps: Its length.
            description: Of model and data.
            flops_per_token: What a token costs.
            peak_flops: Of all GPUs together, in FLOP/s; None: not known.
        """
        self.n_steps, self.flops_per_token, self.peak_flops = n_steps, flops_per_token, peak_flops
        self.say(f"{description}{f', from step {step:,}' if step else ''}")
        self._mark = time.perf_counter()

    def logged(self, records: list[dict[str, Any]]) -> None:
        """Print the mean loss of some steps, which have just ended, and the rate at which they ran."""
        now = time.perf_counter()
        seconds, n_tokens = now - self._mark, sum(record["tokens"] for record in records)
        self._mark = now
        self.seconds += seconds
        self.n_tokens += n_tokens
        rate = n_tokens / seconds
        step, loss = records[-1]["step"], sum(record["loss"] for record in records) / len(records)
        left = (self.n_steps - step) * seconds / len(records)
        used = f"  MFU {rate * self.flops_per_token / self.peak_flops:.0%}" if self.peak_flops else ""
        memory = self.peak_memory_gb()
        held = "" if memory is None else f"  {memory:.1f} GB"
        self.say(
            f"step {step:,}/{self.n_steps:,}  loss {loss:.4f}{self.validation}  lr {records[-1]['lr']:.1e}  "
            f"{rate:,.0f} tokens/s{used}{held}  {int(left) // 60}:{int(left) % 60:02d} left",
            live=True,
        )

    def validated(self, step: int, loss: float) -> None:
        """Note a validation loss; the time that it took counts for no step."""
        self.validation = f"  validation {loss:.4f}"
        self.say(f"step {step:,}  validation loss {loss:.4f}")
        self._mark = time.perf_counter()

    def looked(self, step: int, numbers: dict[str, float]) -> None:
        """Print what samples were like; the time that they took counts for no step."""
        shown = "  ".join(f"{name.replace('_', ' ')} {number:.3g}" for name, number in numbers.items())
        self.say(f"step {step:,}  {shown}")
        self._mark = time.perf_counter()

    def peak_memory_gb(self) -> float | None:
        """Return the most memory that tensors had on this process's GPU, in 1e9 bytes; None without a GPU."""
        import torch

        return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None

    def say(self, text: str, *, live: bool = False) -> None:
        """Print a line to stderr; a live one is overwritten by the next on a terminal."""
        if self.quiet:
            return
        if self.is_terminal:
            sys.stderr.write(f"\r\x1b[2K{text}" + ("" if live else "\n"))
            sys.stderr.flush()
        else:
            print(text, file=sys.stderr, flush=True)

    def mean_rate(self) -> float:
        """Return tokens per second over all steps so far."""
        return self.n_tokens / self.seconds if self.seconds else 0.0
