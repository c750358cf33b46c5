"""Sampling with vLLM in this program: for many samples, on a GPU, and for models that one GPU cannot hold.

    with VllmEngine("runs/25m/model") as engine:
        completions = list(engine.complete(prompts, Sampling(seed=1)))

Constraints, beginnings, temperatures and draws are those of the `transformers` engine, applied beside the
model (vllm_constraint.py): the same seed gives the same samples, up to rounding of the logits, and
log-probabilities are those of the distribution that tokens were drawn from, before temperature. Beginnings
are written token by token.

A base LLM's own tokenizer takes the grammar of its text format instead, through vLLM's structured outputs
with the guidance backend: xgrammar, vLLM's usual one, counts in characters and may end where no token goes
on.

vLLM starts processes: close the engine, or use it in a `with`. A program must make it under
`if __name__ == "__main__":`.

Not here: vLLM behind HTTP (openai_endpoint.py, server/).
"""

import contextlib
import importlib.metadata
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from crystallm_kit.engines.engine import Prompt, Sampling
from crystallm_kit.engines.texts import Texts
from crystallm_kit.engines.vllm_arguments import SERVED_MODEL
from crystallm_kit.errors import ImpossibleRequest, MissingExtra, ModelError, UnknownName, UserError
from crystallm_kit.models.adapters import adapter_settings, merge_adapter, weight_names
from crystallm_kit.models.bases import max_positions, read_config
from crystallm_kit.models.checkpoints import is_adapter
from crystallm_kit.records import Completion, StopReason
from crystallm_kit.tokens.requests import Request, request_to_json
from crystallm_kit.tokens.tokenizer import load_tokenizer

CONSTRAINT = "crystallm_kit.engines.vllm_constraint:CrystalConstraint"
_ENVIRONMENT = {
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the one that takes processors of the V1 interface
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; left alone, vLLM takes what it finds free
}
_GRACE_SECONDS = 20  # for vLLM's processes to end by themselves
_WAVES = 16  # of as many prompts as vLLM takes at a time are handed over together, and their results wait
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM's LoRA comes in


class VllmEngine:
    """A model folder behind vLLM.

    Args:
        folder: A model's folder, or an adapter's: it is then merged into its base, in a temporary folder.
        base: Of an adapter: where its base is now; None: where the adapter says.
        stop: Text that ends a sample too, where the model wrote all of it; "": none. Part of the completion.
        grammar: Lark grammar that every text of a prompt without request obeys; "": none. For base LLMs.
        adapters: Name -> folder of LoRA adapters over the model, for prompts that name one.
        has_log_probabilities: Whether completions carry theirs (NaN otherwise).
        settings: More for vllm.LLM: max_num_seqs, tensor_parallel_size, gpu_memory_utilization ...

    Raises:
        MissingExtra: If vllm is not installed.
        ModelError: If the folder is no model's, or an adapter cannot be served by vLLM.
    """

    name = "vllm"
    steerable = True

    def __init__(
        self,
        folder: str | Path,
        *,
        base: str | None = None,
        stop: str = "",
        grammar: str = "",
        adapters: Mapping[str, str | Path] | None = None,
        has_log_probabilities: bool = True,
        **settings: Any,
    ) -> None:
        _check_installed()
        self._llm: Any = None
        self._merged = tempfile.TemporaryDirectory(prefix="crystallm-kit-") if is_adapter(folder) else None
        if self._merged is not None:
            folder = merge_adapter(folder, Path(self._merged.name) / "model", dtype="float32", base=base)
        self.folder = Path(folder)
        self.tokenizer = load_tokenizer(self.folder)
        self.stop = stop
        self.grammar = grammar
        self.has_log_probabilities = has_log_probabilities
        self._texts = Texts(self.tokenizer)
        self._positions = max_positions(read_config(str(self.folder), str(self.folder)))
        adapters = adapters or {}
        self._adapters = {name: (i, Path(path)) for i, (name, path) in enumerate(adapters.items(), start=1)}
        ranks = [_checked_rank(name, path) for name, (_, path) in self._adapters.items()]
        settings = {**_defaults(), **settings}
        if self._adapters:
            settings |= {
                "enable_lora": True,
                "max_loras": _lora_slots(len(ranks)),
                "max_cpu_loras": len(ranks) + 1,
                "max_lora_rank": next(rank for rank in _RANKS if rank >= max(ranks)),
            }
        self._piece = _WAVES * int(settings.setdefault("max_num_seqs", 256))
        if grammar:
            settings["structured_outputs_config"] = {"backend": "guidance"}
        self._positions = min(self._positions, settings.pop("max_model_len", self._positions))
        with _served(self.folder):
            from vllm import LLM

            self._llm = LLM(
                str(self.folder),
                max_model_len=self._positions,
                logits_processors=[CONSTRAINT],
                logprobs_mode="processed_logits",  # the processor leaves log-probabilities there
                generation_config="vllm",
                **settings,
            )

    def complete(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Completion]:
        """Yield one completion for each prompt, in order.

        Raises:
            ImpossibleRequest: If a beginning is not what its prompt's request lets through.
            UnknownName: If a prompt names an adapter that is not there.
            UserError: If a prompt is empty or leaves no room for a completion, or a constraint is asked of a
                model whose token ids are not those of the `wyckoff` format.
        """
        if self._llm is None:
            raise UserError("this engine is closed")
        for name in {p.adapter for p in prompts}:
            if name and name not in self._adapters:
                raise UnknownName.among("adapter", name, self._adapters)
        ids = [self._texts.prompt_ids(p.text) for p in prompts]
        for prompt, prompt_ids in zip(prompts, ids, strict=True):
            self._texts.check_prompt(prompt_ids, self._positions)
            self._texts.check_request(prompt)
        from vllm.exceptions import VLLMValidationError

        given = [self._texts.given_ids(p) for p in prompts]
        requests: dict[Request, str] = {
            p.request: request_to_json(p.request) for p in prompts if p.request is not None
        }
        params = [
            self._params(i, prompt, given[i], self._positions - len(ids[i]), sampling, requests)
            for i, prompt in enumerate(prompts)
        ]
        for start in range(0, len(prompts), self._piece):
            piece = slice(start, start + self._piece)
            adapters = [self._lora(p.adapter) for p in prompts[piece]] if self._adapters else None
            with _served(self.folder):
                try:
                    outputs = self._llm.generate(
                        [{"prompt_token_ids": prompt_ids} for prompt_ids in ids[piece]],
                        params[piece],
                        lora_request=adapters,
                        use_tqdm=False,
                    )
                except (ValueError, VLLMValidationError) as error:
                    raise UserError(f"vLLM refuses this: {error}") from error
                except BaseException:
                    self.close()  # what was under way would come among the next results
                    raise
            for i, output in enumerate(outputs, start=start):
                yield self._completion(i, prompts[i], ids[i], given[i], output.outputs[0], sampling.seed)

    @property
    def has_wyckoff_ids(self) -> bool:
        """Whether the tokenizer's ids are those that constraints are made of."""
        return self._texts.has_wyckoff_ids

    @property
    def max_positions(self) -> int:
        """Return how many tokens prompt and completion may have together."""
        return self._positions

    def close(self) -> None:
        """Stop vLLM and its processes."""
        llm, self._llm = self._llm, None
        if llm is not None:
            llm.llm_engine.engine_core.shutdown(timeout=_GRACE_SECONDS)
        if self._merged is not None:
            self._merged.cleanup()
            self._merged = None

    def __enter__(self) -> "VllmEngine":
        """Return the engine."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close it."""
        self.close()

    def _params(
        self,
        index: int,
        prompt: Prompt,
        given: list[int],
        room: int,
        sampling: Sampling,
        requests: Mapping[Request, str],
    ) -> Any:
        """Return vllm.SamplingParams of one prompt; `room`: positions left behind it."""
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        extra: dict[str, Any] = {
            "crystal_seed": [sampling.seed, index],
            "crystal_temperature": sampling.temperature,
            "crystal_top_p": sampling.top_p,
            "crystal_top_k": sampling.top_k,
        }
        if prompt.request is not None:
            extra["crystal"] = requests[prompt.request]
            if sampling.number_temperature is not None:
                extra["crystal_number_temperature"] = sampling.number_temperature
        limit = min(sampling.max_new_tokens, room)
        if given:
            extra["crystal_beginning"] = given[:limit]
        grammar = self.grammar if prompt.request is None and not prompt.is_whole else ""
        return SamplingParams(
            temperature=0,  # the processor draws, and leaves one token
            max_tokens=limit,
            logprobs=0 if self.has_log_probabilities else None,
            flat_logprobs=True,
            stop=[self.stop] if self.stop else None,
            include_stop_str_in_output=True,
            detokenize=bool(self.stop),
            skip_special_tokens=False,
            structured_outputs=StructuredOutputsParams(grammar=grammar) if grammar else None,
            extra_args=extra,
        )

    def _lora(self, name: str) -> Any:
        if not name:
            return None
        from vllm.lora.request import LoRARequest

        number, folder = self._adapters[name]
        return LoRARequest(name, number, str(folder))

    def _completion(
        self, index: int, prompt: Prompt, prompt_ids: list[int], given: list[int], output: Any, seed: int
    ) -> Completion:
        ids = tuple(output.token_ids)
        if ids[: len(given)] != tuple(given[: len(ids)]) and prompt.request is not None:
            at = next((i for i, (a, b) in enumerate(zip(ids, given, strict=False)) if a != b), len(ids) - 1)
            token = self.tokenizer.convert_ids_to_tokens(given[at])
            raise ImpossibleRequest(
                f"beginning {prompt.beginning!r}: at {token!r} it leaves what was asked for, or no crystal "
                "goes on from there."
            )
        reasons: dict[str | None, StopReason] = {"stop": "stop", "length": "length"}
        log_probability = output.cumulative_logprob
        return Completion(
            prompt.text,
            self._texts.text_of(prompt_ids, ids),
            ids,
            reasons.get(output.finish_reason, "error"),
            float("nan") if log_probability is None else float(log_probability),
            seed,
            index,
        )


@contextlib.contextmanager
def _served(folder: Path) -> Iterator[None]:
    """Set what vLLM and its processes read from the environment, while it starts or takes requests."""
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    usual = {**_ENVIRONMENT, "VLLM_CPU_OMP_THREADS_BIND": cores}
    wanted = {name: os.environ.get(name, value) for name, value in usual.items()}
    wanted[SERVED_MODEL] = str(folder.resolve())
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _check_installed() -> None:
    """Raise MissingExtra where vllm is absent; its build for CPUs goes by another name."""
    for name in ("vllm", "vllm-cpu"):
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return
    raise MissingExtra.of("engine 'vllm'", "vllm", "vllm")


def _defaults() -> dict[str, Any]:
    """Return settings of vllm.LLM that fit this machine."""
    import torch

    if torch.cuda.is_available():
        return {"dtype": "bfloat16", "max_num_seqs": 1024}
    # bfloat16 was half as fast as float32 on a CPU with AVX-512; compiling takes a minute at the first start
    return {"dtype": "float32", "max_num_seqs": 256, "enforce_eager": True}


def _lora_slots(n_adapters: int) -> int:
    """Return how many adapters vLLM holds ready at a time."""
    import torch

    if torch.cuda.is_available():
        return min(8, n_adapters)
    # On CPUs vLLM 0.32 reads the last slot's matrices for rows without adapter where others of the batch have
    # one (it looks up index -1): that slot has to stay empty.
    return n_adapters + 1


def _checked_rank(name: str, folder: Path) -> int:
    """Return an adapter's rank. Raises ModelError if it holds what vLLM's LoRA does not take."""
    settings = adapter_settings(folder)
    others = sorted({n.rpartition(".")[0] for n in weight_names(folder) if ".lora_" not in n})
    if others or settings.get("use_dora") or settings.get("bias", "none") != "none":
        what = f"weights of its own for {', '.join(others[:2])}" if others else "DoRA or biases"
        raise ModelError(
            f"{folder}: adapter '{name}' has {what}; vLLM takes LoRA matrices alone. Give it as the model "
            "itself (it is merged into its base), or use the transformers engine."
        )
    return int(settings.get("r", 8))
