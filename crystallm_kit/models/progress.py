"""Progress of a training run, for people.

    step 1,200/10,000  loss 0.7312  validation 0.7420  lr 9.8e-04  1,690,000 tokens/s  MFU 15%  8:20 left

Tokens are those of crystals and prompts, padding left out; time of validation and checkpoints counts for no
step. MFU (model FLOP utilisation): tokens/s x 6 FLOPs per weight over the device's peak.

Not here: metrics.jsonl, for programs (training.py).
"""

import sys
import time
from typing import Any


class Screen:
    """Progress for people: a live line on a terminal, plain lines elsewhere."""

    def __init__(
        self, n_steps: int, flops_per_token: float, peak_flops: float | None, *, quiet: bool
    ) -> None:
        self.n_steps, self.flops_per_token, self.peak_flops, self.quiet = (
            n_steps,
            flops_per_token,
            peak_flops,
            quiet,
        )
        self.validation = ""
        self.seconds = 0.0
        self.n_tokens = 0
        self.is_terminal = sys.stderr.isatty()
        self._mark = time.perf_counter()

    def start(self, step: int, description: str) -> None:
        """Print what is about to run, and start the clock."""
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
        self.say(
            f"step {step:,}/{self.n_steps:,}  loss {loss:.4f}{self.validation}  lr {records[-1]['lr']:.1e}  "
            f"{rate:,.0f} tokens/s{used}  {int(left) // 60}:{int(left) % 60:02d} left",
            live=True,
        )

    def validated(self, step: int, loss: float) -> None:
        """Note a validation loss; the time that it took counts for no step."""
        self.validation = f"  validation {loss:.4f}"
        self.say(f"step {step:,}  validation loss {loss:.4f}")
        self._mark = time.perf_counter()

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
