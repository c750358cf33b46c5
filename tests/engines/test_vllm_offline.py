"""The vllm engine on the real vLLM, which is held against the transformers engine token for token."""

import math
import multiprocessing
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from crystallm_kit.engines.engine import Prompt, Sampling, engine
from crystallm_kit.engines.transformers_local import TransformersEngine
from crystallm_kit.engines.vllm_offline import VllmEngine, _check_installed
from crystallm_kit.errors import ImpossibleRequest, MissingExtra, ModelError, UnknownName, UserError
from crystallm_kit.models.folders import adapter_folder, shipped_model_folder
from crystallm_kit.models.loading import load_model_folder
from crystallm_kit.records import Completion, Conditions
from crystallm_kit.structures.elements import SYMBOL
from crystallm_kit.text.representation import representation
from crystallm_kit.text.wyckoff import text_to_symmetric
from crystallm_kit.tokens.requests import Request, compile_request

try:
    _check_installed()
    HAS_VLLM = True
except MissingExtra:
    HAS_VLLM = False
needs_vllm = pytest.mark.skipif(
    not HAS_VLLM, reason="vllm is not installed: an environment of its own, see serve/README.md"
)
# vLLM and what it loads warn of each other
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]

FORMULAS = (
    {"Na": 1, "Cl": 1}, {"Sr": 1, "Ti": 1, "O": 3}, {"Li": 1, "Fe": 1, "P": 1, "O": 4}, {"Mg": 2, "Si": 1},
    {"Ca": 1, "F": 2}, {"Al": 2, "O": 3}, {"Cs": 1, "Pb": 1, "I": 3}, {"Ga": 1, "As": 1},
)  # fmt: skip


def asked(formula: dict[str, int]) -> Request:
    return compile_request(Conditions(formula=formula), max_sites=24)


NACL, PEROVSKITE = asked(FORMULAS[0]), asked(FORMULAS[1])


def mixed_prompts(text: str = "crystal\n") -> list[Prompt]:
    """Prompts with and without requests and beginnings, and whole ones, side by side."""
    whole = "Na1 Cl1 225\nNa a\nCl b\n5.69 end"
    kinds = [
        Prompt(text, request=NACL), Prompt(text), Prompt(text, request=PEROVSKITE), Prompt(text),
        Prompt(text, "Na2 Cl2 ", NACL), Prompt(text, "Sr1 Ti1 O3 221\nSr a\n", PEROVSKITE),
        Prompt(text, "Ba1 Ti1 O3 "), Prompt(text, whole, is_whole=True), Prompt(text, whole, NACL, True),
    ]  # fmt: skip
    return [kinds[i % len(kinds)] for i in range(36)]


def local(folder: Path, **settings: object) -> TransformersEngine:
    model, tokenizer, _ = load_model_folder(folder)
    return TransformersEngine(model, tokenizer, device="cpu", **settings)


def assert_same(found: list[Completion], wanted: list[Completion]) -> None:
    assert [c.token_ids for c in found] == [c.token_ids for c in wanted]
    for a, b in zip(found, wanted, strict=True):
        assert (a.prompt, a.text, a.stop_reason, a.seed, a.index) == (
            b.prompt, b.text, b.stop_reason, b.seed, b.index,
        )  # fmt: skip
        assert math.isclose(a.log_probability, b.log_probability, abs_tol=2e-3, rel_tol=1e-4)


# Without vLLM


@pytest.mark.skipif(HAS_VLLM, reason="vllm is installed here")
def test_where_vllm_is_absent_the_error_says_what_to_install():
    with pytest.raises(MissingExtra, match=r"pip install 'crystallm-kit\[vllm\]'"):
        engine("vllm", shipped_model_folder())


# The shipped model


@pytest.fixture(scope="module")
def shipped() -> Iterator[VllmEngine]:
    with VllmEngine(shipped_model_folder(), max_num_seqs=64) as found:
        yield found


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(seed=3),
        Sampling(temperature=0),
        Sampling(seed=4, temperature=0.8, number_temperature=0.5, top_p=0.9, top_k=50),
        Sampling(seed=5, number_temperature=0, max_new_tokens=20),
        Sampling(seed=6, temperature=0, number_temperature=1.0),
    ],
    ids=["drawn", "greedy", "cut", "short", "numbers"],
)
def test_samples_are_those_of_the_transformers_engine(shipped, sampling):
    wanted = list(local(shipped_model_folder()).complete(mixed_prompts(), sampling))
    assert_same(list(shipped.complete(mixed_prompts(), sampling)), wanted)


@needs_vllm
@pytest.mark.slow
def test_constrained_samples_parse_and_have_the_composition_asked_for(shipped):
    requests = [FORMULAS[i % len(FORMULAS)] for i in range(400)]
    prompts = [Prompt("crystal\n", request=asked(formula)) for formula in requests]
    for formula, completion in zip(requests, shipped.complete(prompts, Sampling(seed=1)), strict=True):
        assert completion.stop_reason == "stop"
        counts = {SYMBOL[z]: n for z, n in text_to_symmetric(completion.text).counts.items()}
        unit = math.gcd(*counts.values())
        assert {symbol: n // unit for symbol, n in counts.items()} == formula


@needs_vllm
@pytest.mark.slow
def test_vllms_own_draws_obey_the_constraint_too_and_leave_other_rows_alone(shipped):
    """As over HTTP: temperature, top_p and seed are vLLM's, and some requests have no arguments."""
    from vllm import SamplingParams

    from crystallm_kit.engines.vllm_offline import _served

    extra = {"crystal": '{"conditions": {"formula": "SrTiO3"}}', "crystal_number_temperature": 0.5}
    prompt = {"prompt_token_ids": shipped.tokenizer.encode("crystal\n")}
    params = []
    for i in range(40):
        params.append(SamplingParams(temperature=0, max_tokens=60, detokenize=False))
        drawn = {"temperature": 0.9, "top_p": 0.95, "seed": i, "max_tokens": 400, "detokenize": False}
        params.append(SamplingParams(**drawn, extra_args=dict(extra)))
    with _served(shipped.folder):
        outputs = shipped._llm.generate([prompt] * 80, params, use_tqdm=False)
    greedy = next(local(shipped_model_folder()).complete([Prompt("crystal\n")], Sampling(temperature=0)))
    for free, bound in zip(outputs[::2], outputs[1::2], strict=True):
        assert tuple(free.outputs[0].token_ids) == greedy.token_ids
        text = shipped.tokenizer.decode(bound.outputs[0].token_ids)
        counts = {SYMBOL[z]: n for z, n in text_to_symmetric(text).counts.items()}
        assert counts["O"] == 3 * counts["Sr"] == 3 * counts["Ti"]
    assert len({tuple(o.outputs[0].token_ids) for o in outputs[1::2]}) > 20


@needs_vllm
@pytest.mark.slow
def test_what_cannot_be_is_refused_and_the_engine_goes_on(shipped):
    from vllm import SamplingParams

    from crystallm_kit.engines.vllm_offline import _served

    with pytest.raises(UserError, match="an empty prompt"):
        list(shipped.complete([Prompt("")], Sampling()))
    with pytest.raises(UserError, match="the model has 512 positions"):
        list(shipped.complete([Prompt("crystal\n" * 600)], Sampling()))
    with pytest.raises(UnknownName, match="no adapter 'x'"):
        list(shipped.complete([Prompt("crystal\n", adapter="x")], Sampling()))
    with pytest.raises(ImpossibleRequest, match="'Na1 ': at 'Na' it leaves what was asked for"):
        list(shipped.complete([Prompt("crystal\n", "Na1 ", PEROVSKITE)], Sampling()))
    with (
        _served(shipped.folder),
        pytest.raises(Exception, match="3 atoms are no multiple of the 2"),
    ):
        shipped._llm.generate(
            [{"prompt_token_ids": [9]}],
            SamplingParams(extra_args={"crystal": '{"conditions": {"formula": "NaCl", "n_sites": 3}}'}),
            use_tqdm=False,
        )
    assert list(shipped.complete([], Sampling())) == []
    completion = next(shipped.complete([Prompt("crystal\n", request=NACL)], Sampling(seed=1)))
    assert completion.stop_reason == "stop"


# A model of two layers, with adapters, little memory, and no log-probabilities


@pytest.fixture(scope="module")
def lora_folders(toy_model, tmp_path_factory) -> dict[str, Path]:
    """Return two adapters of the toy model whose weights are random and large."""
    import torch
    from peft import LoraConfig, get_peft_model

    found = {}
    for seed, rank in ((1, 4), (2, 8)):
        model, _, _ = load_model_folder(toy_model)
        targets = ["q_proj", "v_proj", "up_proj", "down_proj"]
        adapted = get_peft_model(model, LoraConfig(r=rank, lora_alpha=16, target_modules=targets))
        generator = torch.Generator().manual_seed(seed)
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.data = torch.randn(weight.shape, generator=generator) * 0.2
        path = tmp_path_factory.mktemp("adapters") / f"a{seed}"
        adapted.save_pretrained(path)
        found[f"a{seed}"] = path
    return found


@pytest.fixture(scope="module")
def toy(toy_model, lora_folders) -> Iterator[VllmEngine]:
    """An engine whose memory holds a few of its sequences at a time, so that some have to wait and return."""
    settings = {"num_gpu_blocks_override": 24, "block_size": 32, "disable_log_stats": False}
    with VllmEngine(toy_model, adapters=lora_folders, max_num_seqs=16, **settings) as found:
        yield found


@needs_vllm
@pytest.mark.slow
def test_each_prompt_is_answered_by_its_own_adapter(toy, toy_model, lora_folders):
    import dataclasses

    prompts = [
        dataclasses.replace(prompt, adapter=("", "a1", "a2")[i % 3])
        for i, prompt in enumerate(mixed_prompts())
    ]
    sampling = Sampling(seed=2, max_new_tokens=40)
    wanted = list(local(toy_model, adapters=lora_folders).complete(prompts, sampling))
    found = list(toy.complete(prompts, sampling))
    assert_same(found, wanted)
    without = list(toy.complete(mixed_prompts(), sampling))
    changed = [a.token_ids != b.token_ids for a, b in zip(found, without, strict=True)]
    assert sum(changed) > 12
    assert not any(changed[::3])


@needs_vllm
@pytest.mark.slow
def test_sequences_that_have_to_wait_and_return_are_the_same(toy, toy_model):
    def n_put_aside() -> float:
        return sum(m.value for m in toy._llm.get_metrics() if m.name == "vllm:num_preemptions")

    before = n_put_aside()
    prompts = [Prompt("crystal\n", request=asked(FORMULAS[i % 8])) for i in range(24)]
    prompts += [Prompt("crystal\n") for _ in range(8)]
    sampling = Sampling(seed=8, max_new_tokens=200)
    found = list(toy.complete(prompts, sampling))
    assert n_put_aside() > before
    assert_same(found, list(local(toy_model).complete(prompts, sampling)))


@needs_vllm
@pytest.mark.slow
def test_an_adapter_with_more_than_lora_matrices_is_refused_in_words():
    with pytest.raises(
        ModelError, match=r"adapter 'k' has weights of its own for .*embed_tokens.*vLLM takes"
    ):
        VllmEngine(shipped_model_folder(), adapters={"k": adapter_folder("bulk-modulus")})


@needs_vllm
@pytest.mark.slow
def test_an_adapters_folder_is_served_merged_into_its_base_and_nothing_is_left_behind():
    folder = adapter_folder("bulk-modulus")
    prompts = mixed_prompts()
    sampling = Sampling(seed=1, max_new_tokens=60)
    wanted = list(local(folder).complete(prompts, sampling))
    before = set(multiprocessing.active_children())
    merged = VllmEngine(folder, has_log_probabilities=False, max_num_seqs=16)
    try:
        found = list(merged.complete(prompts, sampling))
        assert [c.token_ids for c in found] == [c.token_ids for c in wanted]
        assert all(math.isnan(c.log_probability) for c in found)
        assert merged.folder.is_dir()
    finally:
        merged.close()
    assert not merged.folder.exists()
    assert set(multiprocessing.active_children()) <= before
    with pytest.raises(UserError, match="this engine is closed"):
        list(merged.complete(prompts, sampling))


# A base LLM with its own tokenizer


@pytest.fixture(scope="module")
def base_model(base_folder, tmp_path_factory) -> Path:
    """Return a random Llama with a tokenizer of Llama 2's kind; vLLM's CPU kernels want heads 32 wide."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("models") / "base"
    tokenizer = AutoTokenizer.from_pretrained(base_folder("llama"))
    config = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=512, initializer_range=0.05, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id, pad_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@needs_vllm
@pytest.mark.slow
def test_a_base_models_texts_obey_the_formats_grammar(base_model):
    form = representation("compact")
    with VllmEngine(base_model, grammar=form.grammar().lark, max_num_seqs=64) as base:
        with pytest.raises(UserError, match="ids are those of the wyckoff format"):
            list(base.complete([Prompt("NaCl", request=NACL)], Sampling()))
        completions = list(base.complete([Prompt("NaCl\n")] * 64, Sampling(seed=1, max_new_tokens=400)))
    ended = [c for c in completions if c.stop_reason == "stop"]
    assert {c.stop_reason for c in completions} <= {"stop", "length"}
    assert len(ended) >= 8
    for completion in ended:
        assert re.fullmatch(form.grammar().regex, completion.text)


# In the program's own process

PROGRAM = """
from crystallm_kit.engines.engine import Prompt, Sampling, engine
from crystallm_kit.records import Conditions
from crystallm_kit.tokens.requests import compile_request
import sys

if __name__ == "__main__":
    request = compile_request(Conditions(formula={"Na": 1, "Cl": 1}), max_sites=24)
    vllm = engine("vllm", sys.argv[1], max_num_seqs=8)
    for completion in vllm.complete([Prompt("crystal\\n", request=request)] * 4, Sampling(seed=3)):
        print(completion.token_ids)
    vllm.close()
    vllm.close()
"""


@needs_vllm
@pytest.mark.slow
def test_one_process_does_as_well(tmp_path, monkeypatch):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    done = subprocess.run(
        [sys.executable, program, shipped_model_folder()], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    wanted = local(shipped_model_folder()).complete([Prompt("crystal\n", request=NACL)] * 4, Sampling(seed=3))
    assert done.stdout.split("\n")[:-1] == [str(c.token_ids) for c in wanted]
