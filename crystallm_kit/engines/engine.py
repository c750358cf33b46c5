"""What an engine is, and the table of engines.

An engine turns prompts into completions. There are two kinds. A steerable one shows its logits, so that every
token is drawn from what the constraint lets through (tokens/masking.py): its samples are well formed by
construction. A black box is asked, and its answer is checked afterwards.

Contract, tested for every entry of the table:
    one completion for each prompt, in the order of the prompts
    the same prompts, sampling and seed give the same completions, whatever the batch size (of a server
        elsewhere, as far as it keeps to seeds)
    a steerable engine's completions that end ("stop") satisfy the request of their prompt

Not here: how prompts are made and completions judged (generation.py).
"""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from crystallm_kit.errors import UnknownName, UserError
from crystallm_kit.records import Completion

if TYPE_CHECKING:
    from crystallm_kit.tokens.requests import Request

ENGINES: dict[str, str] = {
    "transformers": "crystallm_kit.engines.transformers_local:TransformersEngine",
    "vllm": "crystallm_kit.engines.vllm_offline:VllmEngine",
    "openai": "crystallm_kit.engines.openai_endpoint:OpenAIEngine",
    "template": "crystallm_kit.engines.template:TemplateEngine",
    "scripted": "crystallm_kit.engines.engine:ScriptedEngine",
}


@dataclass(frozen=True)
class Prompt:
    """One text to go on with.

    Attributes:
        text: What stands before the crystal.
        beginning: How the crystal's own text must begin; "" leaves it free. Part of the completion.
        request: What must hold for every token; None: unconstrained. Only steerable engines take one.
        is_whole: Whether nothing but the end follows the beginning, so that the completion's probability is
            that of this answer. Only engines that see the logits know it.
        adapter: Name of the adapter to draw with; "": the model itself.
    """

    text: str
    beginning: str = ""
    request: "Request | None" = None
    is_whole: bool = False
    adapter: str = ""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: Logits are divided by it; 0 takes the most likely token.
        number_temperature: The same for tokens of numbers (cell, coordinates) under a constraint, which knows
            them; None: as `temperature`. What crystal to make can stay open while its geometry is made sharp.
        top_p: Smallest set of tokens with at least this probability; 1 keeps all.
        top_k: This many of the most likely tokens; 0 keeps all.
        max_new_tokens: A completion is cut there ("length").
        seed: Together with a prompt's position it determines every draw.
    """

    temperature: float = 1.0
    number_temperature: float | None = None
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 480
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges. Raises UserError."""
        for name, fits, expected in (
            ("temperature", self.temperature >= 0, "0 or more"),
            ("number_temperature", (self.number_temperature or 0) >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("seed", self.seed >= 0, "0 or more"),
        ):
            if not fits:
                raise UserError(f"{name} {getattr(self, name)}: {expected} expected")


class Engine(Protocol):
    """What samples. `steerable` tells whether it takes requests."""

    name: str

    @property
    def steerable(self) -> bool:
        """Return whether requests are obeyed token by token."""

    def complete(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Completion]:
        """Yield one completion for each prompt, in order."""


class ScriptedEngine:
    """Answers from a script: prompt text -> completions, taken in turn. For tests and demonstrations.

    Args:
        answers: Completion texts by prompt text; a completion that does not end with `end` counts as cut.
        end: What a finished completion ends with.
    """

    name = "scripted"
    steerable = False

    def __init__(self, answers: Mapping[str, Sequence[str]], end: str = "end") -> None:
        self.answers = answers
        self.end = end

    def complete(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Completion]:
        """Yield the scripted answers. Raises UserError for a prompt that is not in the script."""
        taken: dict[str, int] = {}
        for index, prompt in enumerate(prompts):
            if prompt.text not in self.answers:
                raise UserError(f"the script has no answer to {prompt.text!r}")
            turn = taken.get(prompt.text, 0)
            taken[prompt.text] = turn + 1
            text = self.answers[prompt.text][turn % len(self.answers[prompt.text])]
            stopped = text.endswith(self.end)
            yield Completion(
                prompt.text, text, (), "stop" if stopped else "length", float("nan"), sampling.seed, index
            )


def engine(name: str, *arguments: Any, **settings: Any) -> Engine:
    """Return the engine called `name`. Raises UnknownName."""
    if name not in ENGINES:
        raise UnknownName.among("engine", name, ENGINES)
    module, _, attribute = ENGINES[name].partition(":")
    found: Engine = getattr(importlib.import_module(module), attribute)(*arguments, **settings)
    return found
