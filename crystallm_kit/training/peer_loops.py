"""How others train, for the speed table: the loops of Crystal-text-LLM and CrystaLLM at published settings.

    crystal_text_llm_loop(model, examples, on_step, ...)   one crystal a step, Hugging Face's Trainer
    crystallm_loop(examples, vocabulary, on_step, ...)     windows of 1,024 tokens of one stream, GPT-2 of 26M

Both run until `on_step(tokens, crystals)`, called after every optimizer step, says that it has seen enough.

Written from their settings and descriptions; no code is theirs. Where the published code would only be slower
they are given the faster way: texts are tokenised beforehand (Crystal-text-LLM reads a CIF with pymatgen at
every access), and attention is PyTorch's fused kernel.

Sources: Crystal-text-LLM (Gruver et al. 2024, arXiv:2402.04379; llama_finetune.py at 6c97730). CrystaLLM
(Antunes et al. 2024, Nat. Commun. 15, 10570; bin/train.py and config/crystallm_v1_small.yaml at 9554e1b).
Not here: the kit's own loop (loop.py), what is measured (speed.py).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from crystallm_kit.tokens.drawing import Examples
from crystallm_kit.training.batches import IGNORED

OnStep = Callable[[int, float], bool]  # (tokens, crystals) of a step -> whether to stop

# ---------------------------------------------------------------- Crystal-text-LLM


def crystal_text_llm_loop(
    model: Any, examples: Examples, on_step: OnStep, *, folder: Path, pad_token_id: int, n_workers: int = 8
) -> None:
    """Train a LoRA model as Crystal-text-LLM does: AdamW, 1e-4, cosine, 100 steps of warm-up, batch 1.

    Every token of a row is a target, the prompt's too. Rows are padded to the longest of a batch, so at the
    published batch of 1 nothing is padded. No autocast; LoRA's weights are float32.

    Args:
        model: With LoRA on it, on its device.
        examples: Each is cut at 2,048 tokens.
        on_step: See above.
        folder: For what the Trainer writes.
        pad_token_id: Of the rows' ends.
        n_workers: Processes that make batches.
    """
    from transformers import Trainer, TrainerCallback, TrainingArguments

    seen = {"tokens": 0}

    class CountingTrainer(Trainer):  # type: ignore[misc]
        def training_step(self, model: nn.Module, inputs: dict[str, Any], *rest: Any) -> torch.Tensor:
            seen["tokens"] += inputs["input_ids"].numel()
            loss: torch.Tensor = super().training_step(model, inputs, *rest)
            return loss

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            control.should_training_stop = on_step(seen["tokens"], 1)
            seen["tokens"] = 0

    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=1_000_000,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        learning_rate=1e-4,
        lr_scheduler_type="cosine",
        warmup_steps=100,
        weight_decay=0.0,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        dataloader_num_workers=n_workers,
        use_cpu=next(model.parameters()).device.type == "cpu",
        disable_tqdm=True,
    )
    trainer = CountingTrainer(
        model=model,
        args=arguments,
        train_dataset=_Rows(examples),
        data_collator=_Padding(pad_token_id),
        callbacks=[Watch()],
    )
    trainer.train()


class _Rows(torch.utils.data.Dataset[torch.Tensor]):
    def __init__(self, examples: Examples, longest: int = 2_048) -> None:
        self.examples, self.longest = examples, longest

    def __len__(self) -> int:
        return len(self.examples.offsets) - 1

    def __getitem__(self, index: int) -> torch.Tensor:
        start, end = self.examples.offsets[index : index + 2]
        return torch.from_numpy(self.examples.tokens[start:end][: self.longest].astype(np.int64))


@dataclass(frozen=True)
class _Padding:
    """Rows -> a batch, padded to its longest."""

    pad_token_id: int

    def __call__(self, rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        pad = nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(rows, batch_first=True, padding_value=self.pad_token_id),
            "labels": pad(rows, batch_first=True, padding_value=IGNORED),
            "attention_mask": pad([torch.ones_like(row) for row in rows], batch_first=True),
        }


# ---------------------------------------------------------------- CrystaLLM


@dataclass(frozen=True)
class CrystallmSettings:
    """CrystaLLM's small model and how it is trained.

    Attributes:
        n_layers, n_heads, width: Of a GPT-2 without biases, output and input embedding tied.
        window: Tokens of a row.
        rows: Of a forward pass.
        accumulation: Passes of a step.
        dropout: Probability, on the embedding, in attention and on what layers add.
        lr, betas, weight_decay, gradient_clip: AdamW's; matrices decay.
    """

    n_layers: int = 8
    n_heads: int = 8
    width: int = 512
    window: int = 1_024
    rows: int = 32
    accumulation: int = 40
    dropout: float = 0.1
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.1
    gradient_clip: float = 1.0


def crystallm_loop(
    examples: Examples, vocabulary: int, on_step: OnStep, *, settings: CrystallmSettings, device: torch.device
) -> float:
    """Train CrystaLLM's model as CrystaLLM does; return the last loss, in nats per token.

    Args:
        examples: CIF texts; joined they are the stream of tokens of which windows begin anywhere.
        vocabulary: Size.
        on_step: See above.
        settings: Published: the defaults.
        device: On a GPU: bfloat16 autocast and torch.compile.
    """
    is_gpu = device.type == "cuda"
    if is_gpu:
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(1337)
    plain = Gpt(vocabulary, settings).to(device)
    model = cast(nn.Module, torch.compile(plain)) if is_gpu else plain
    decays = [w for w in plain.parameters() if w.ndim >= 2]
    others = [w for w in plain.parameters() if w.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decays, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=settings.lr,
        betas=settings.betas,
    )
    stream = examples.tokens.astype(np.uint16)
    tokens_per_crystal = len(stream) / (len(examples.offsets) - 1)
    n_tokens = settings.rows * settings.window * settings.accumulation
    loss = math.inf
    inputs, labels = _windows(stream, settings, device)
    is_enough = False
    while not is_enough:
        for _ in range(settings.accumulation):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_gpu):
                mean = model(inputs, labels)
            inputs, labels = _windows(stream, settings, device)  # while the GPU is at work
            mean.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), settings.gradient_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss = float(mean.detach())  # printed at every step, so waited for
        is_enough = on_step(n_tokens, n_tokens / tokens_per_crystal)
    return loss


def _windows(
    stream: np.ndarray, settings: CrystallmSettings, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return windows that begin anywhere in the stream, and their next tokens: (rows, window) each."""
    starts = torch.randint(len(stream) - settings.window, (settings.rows,)).tolist()
    pieces = [torch.from_numpy(stream[s : s + settings.window + 1].astype(np.int64)) for s in starts]
    inputs, labels = torch.stack([p[:-1] for p in pieces]), torch.stack([p[1:] for p in pieces])
    if device.type != "cuda":
        return inputs, labels
    return (
        inputs.pin_memory().to(device, non_blocking=True),
        labels.pin_memory().to(device, non_blocking=True),
    )


class Gpt(nn.Module):
    """GPT-2 without biases; its loss is the mean over all positions."""

    def __init__(self, vocabulary: int, settings: CrystallmSettings) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, settings.width)
        self.positions = nn.Embedding(settings.window, settings.width)
        self.dropout = nn.Dropout(settings.dropout)
        self.blocks = nn.ModuleList(_Block(settings) for _ in range(settings.n_layers))
        self.norm = nn.LayerNorm(settings.width, bias=False)
        for weight in self.parameters():
            if weight.ndim >= 2:
                nn.init.normal_(weight, std=0.02)

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of (rows, window) int64 inputs and labels."""
        places = torch.arange(inputs.shape[1], device=inputs.device)
        x = self.dropout(self.embedding(inputs) + self.positions(places))
        for block in self.blocks:
            x = block(x)
        logits = functional.linear(self.norm(x), self.embedding.weight)
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


class _Block(nn.Module):
    def __init__(self, settings: CrystallmSettings) -> None:
        super().__init__()
        width = settings.width
        self.n_heads, self.dropout = settings.n_heads, settings.dropout
        self.norms = nn.ModuleList(nn.LayerNorm(width, bias=False) for _ in range(2))
        self.attention = nn.Linear(width, 3 * width, bias=False)
        self.attended = nn.Linear(width, width, bias=False)
        self.wide = nn.Linear(width, 4 * width, bias=False)
        self.narrow = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n_rows, n_positions, width = x.shape
        shape = (n_rows, n_positions, 3, self.n_heads, width // self.n_heads)
        query, key, value = self.attention(self.norms[0](x)).view(shape).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(
            query, key, value, dropout_p=self.dropout if self.training else 0.0, is_causal=True
        )
        joined = seen.transpose(1, 2).reshape(n_rows, n_positions, width)
        x = x + functional.dropout(self.attended(joined), self.dropout, self.training)
        inner = functional.gelu(self.wide(self.norms[1](x)), approximate="tanh")
        return x + functional.dropout(self.narrow(inner), self.dropout, self.training)
