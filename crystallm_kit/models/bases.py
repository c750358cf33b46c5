"""Base models: what is fine-tuned, and how (LoRA, QLoRA, full).

    base:
      name: meta-llama/Llama-3.1-8B
      method: lora
      quantisation: nf4

Any causal LM that transformers knows is a base: a folder, a Hugging Face id, or `shipped` for the kit's own
model. LoRA leaves its weights as they are and trains small matrices beside them (Hu et al. 2021,
arXiv:2106.09685); QLoRA keeps them in 4 bits meanwhile (Dettmers et al. 2023, arXiv:2305.14314).

Not here: models from scratch (checkpoints.py), the loop (training.py), tokenizers (tokens/tokenizer.py).
"""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class LoraRecipe:
    """Low-rank adaptation.

    Attributes:
        rank: Of the update of each matrix.
        alpha: The update is scaled by alpha / rank (rslora: alpha / sqrt(rank)).
        dropout: Probability, on the input of the update.
        target_modules: Names of the linear layers that get an update; all-linear: all but the output head.
        dora: Direction and size of each weight apart (Liu et al. 2024, arXiv:2402.09353).
        rslora: Rank-stabilised scaling (Kalajdzievski 2023, arXiv:2312.03732).
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    dora: bool = False
    rslora: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"'rank' must be at least 1, got {self.rank}; method: full trains all weights")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"'dropout' must be in [0, 1), got {self.dropout}")
        if self.alpha <= 0 or not self.target_modules:
            raise ValueError("'alpha' must be positive, and 'target_modules' name at least one layer")


@dataclass(frozen=True)
class BaseRecipe:
    """A base model and how it is fine-tuned.

    Attributes:
        name: A folder, a Hugging Face id, or `shipped`.
        revision: Commit or tag of a Hugging Face id; None: the newest.
        weights: pretrained; random: as the architecture draws them, for speed measurements and tests.
        method: lora (small matrices beside frozen weights) or full (all weights).
        quantisation: Of frozen weights in memory: none (bfloat16 on a GPU), nf4 or int8 (bitsandbytes).
        double_quantisation: nf4: the scales of the blocks are quantised too.
        gradient_checkpointing: Layers' activations are computed again in the backward pass: less memory, a
            third more work.
        lora: Of method lora.
    """

    name: str
    revision: str | None = None
    weights: Literal["pretrained", "random"] = "pretrained"
    method: Literal["lora", "full"] = "lora"
    quantisation: Literal["none", "nf4", "int8"] = "none"
    double_quantisation: bool = True
    gradient_checkpointing: bool = False
    lora: LoraRecipe = field(default_factory=LoraRecipe)

    def __post_init__(self) -> None:
        if self.method == "full" and self.quantisation != "none":
            raise ValueError(f"quantisation {self.quantisation} freezes the weights; 'method' must be lora")
