"""openai_endpoint.py: this package's server over HTTP, and stand-ins for what servers of others do."""

import math
import threading
import time

import pytest

from crystallm_kit.engines.engine import Prompt, Sampling
from crystallm_kit.engines.openai_endpoint import SAMPLES_PER_REQUEST, OpenAIEngine
from crystallm_kit.errors import MissingExtra, ModelError, UnknownName, UserError
from crystallm_kit.generation import generate, infill, load_model, takes_requests
from crystallm_kit.records import Conditions, Crystal
from crystallm_kit.text.prompts import template_named
from crystallm_kit.text.representation import representation
from crystallm_kit.tokens.requests import compile_request

WYCKOFF = representation("wyckoff").alphabet()
NACL = compile_request(Conditions(formula={"Na": 1, "Cl": 1}, n_sites=2))
TEXT = "Na1 Cl1 225\nNa a\nCl b\n5.64 "
SAMPLING = Sampling(max_new_tokens=60, seed=7)


def models(*cards, **each):
    """Return the rule of /v1/models."""
    data = [{"id": card, "object": "model", "owned_by": "someone", **each} for card in cards]
    return lambda _: (200, {}, {"object": "list", "data": data})


def refusal(message: str, status: int = 400, **more):
    return status, {}, {"error": {"message": message, "type": "invalid_request_error", **more}}


def answers(text: str = TEXT, *, n: int | None = None, reason: str = "stop"):
    """Return the rule of /v1/completions of a server that writes this text n times, as often as is asked."""

    def rule(body):
        many = body.get("n", 1) if n is None else n
        choices = [{"index": i, "text": f"{text}{i}", "finish_reason": reason} for i in range(many)]
        return 200, {}, {"object": "text_completion", "choices": choices[::-1]}

    return rule


def remote(peer, **settings) -> OpenAIEngine:
    return OpenAIEngine(peer.url, retries=settings.pop("retries", 2), **settings)


@pytest.fixture
def hosted(stand_in):
    """Return a hosted server of plain completions, and the engine before it."""
    peer = stand_in({"/v1/models": models("some-model"), "/v1/completions": answers()})
    return peer, remote(peer)


# This package's server


def test_our_server_is_found_to_take_constraints(toy_server):
    engine = OpenAIEngine(toy_server, alphabet=WYCKOFF)
    assert (engine.kind, engine.served_name, engine.steerable) == ("crystallm-kit", "toy", True)
    assert engine.models == ("toy", "toy.adapter")
    assert engine.max_positions == 256


def test_a_server_that_takes_fewer_completions_at_a_time_is_asked_for_fewer(toy_server):
    """The server of the tests takes 8 at most."""
    completions = list(
        OpenAIEngine(toy_server, alphabet=WYCKOFF).complete([Prompt("crystal\n")] * 40, SAMPLING)
    )
    assert len(completions) == 40
    assert len({c.text for c in completions}) > 30


def test_a_model_behind_a_server_needs_no_weights_here(toy_server, toy_model):
    model = load_model(toy_model, engine="openai", url=f"{toy_server}/v1/")
    assert takes_requests(model)
    assert model.sampling.max_new_tokens == 255
    assert model.name == f"toy at {toy_server}/v1"
    samples = generate("NaCl", n=12, seed=1, model=model)
    assert [s.structure.composition.reduced_formula for s in samples] == ["NaCl"] * 12
    assert sum(math.isfinite(s.log_probability) for s in samples) >= 1
    again = generate("NaCl", n=12, seed=1, model=model)
    assert [s.text for s in again] == [s.text for s in samples]
    assert [s.text for s in generate("NaCl", n=12, seed=2, model=model)] != [s.text for s in samples]


def test_an_adapter_of_the_server_is_asked_by_its_name(toy_server, toy_model):
    adapted = load_model(toy_model, engine="openai", url=toy_server, adapter="toy.adapter")
    base = load_model(toy_model, engine="openai", url=toy_server)
    assert adapted.name.startswith("toy.adapter at ")
    texts = [[s.text for s in generate("NaCl", n=6, model=m, redraws=0)] for m in (adapted, base)]
    assert texts[0] != texts[1]


def test_infill_says_that_a_server_gives_no_probabilities(toy_server, toy_model):
    model = load_model(toy_model, engine="openai", url=toy_server)
    crystal = model.representation.decode(TEXT + "end")
    with pytest.raises(UserError, match="how probable a given answer is"):
        infill(Crystal("x", crystal.structure), "Na", model=model)


# Servers of others


def test_a_hosted_model_is_a_black_box(hosted):
    peer, engine = hosted
    assert (engine.kind, engine.served_name, engine.steerable) == ("other", "some-model", False)
    with pytest.raises(UserError, match="does not draw under a constraint"):
        list(engine.complete([Prompt("x", request=NACL)], SAMPLING))
    with pytest.raises(UserError, match="how probable"):
        list(engine.complete([Prompt("x", "y", is_whole=True)], SAMPLING))
    [completion] = engine.complete([Prompt("x", "Na1 ")], SAMPLING)
    assert completion.text == f"Na1 {TEXT}0"
    assert math.isnan(completion.log_probability)
    assert peer.bodies("/v1/completions")[-1] == {
        "model": "some-model", "n": 1, "prompt": "xNa1 ", "temperature": 1.0, "top_p": 1.0,
        "max_tokens": 56, "logprobs": 0, "seed": peer.bodies("/v1/completions")[-1]["seed"],
    }  # fmt: skip


def test_equal_prompts_travel_together_and_come_back_in_order(hosted):
    peer, engine = hosted
    n = 2 * SAMPLES_PER_REQUEST + 3
    prompts = [Prompt("a" if i % 2 else "b") for i in range(2 * n)]
    completions = list(engine.complete(prompts, SAMPLING))
    assert [c.index for c in completions] == list(range(2 * n))
    assert [c.prompt for c in completions] == [p.text for p in prompts]
    sizes = [body["n"] for body in peer.bodies("/v1/completions") if body["prompt"] in "ab"]
    assert sorted(sizes) == [3, 3, 16, 16, 16, 16]
    for prompt in "ab":  # choices come in any order, and belong to rows by their index
        of_prompt = [c.text for c in completions if c.prompt == prompt]
        assert of_prompt[:16] == [f"{TEXT}{i}" for i in range(16)]


def test_every_request_has_a_seed_of_its_own_which_follows_from_the_callers(hosted):
    peer, engine = hosted
    prompts = [Prompt(text) for text in "ab" for _ in range(40)]

    def seeds(seed: int) -> list[int]:
        list(engine.complete(prompts, Sampling(seed=seed)))
        return sorted(body["seed"] for body in peer.bodies("/v1/completions")[-6:])

    first, again, other = seeds(1), seeds(1), seeds(2)
    assert first == again
    assert len({*first, *other}) == 12
    assert max(first) < 2**31


def test_several_requests_are_under_way_at_once_and_no_more_than_allowed(stand_in):
    running, most, lock = 0, 0, threading.Lock()

    def slow(body):
        nonlocal running, most
        with lock:
            running, most = running + 1, max(most, running + 1)
        time.sleep(0.05)
        with lock:
            running -= 1
        return answers()(body)

    peer = stand_in({"/v1/models": models("m"), "/v1/completions": slow})
    prompts = [Prompt(f"{i}") for i in range(24)]
    assert len(list(remote(peer, in_flight=4).complete(prompts, SAMPLING))) == 24
    assert most == 4


def test_a_failure_that_passes_is_asked_again_when_the_server_says(stand_in):
    times = []

    def busy_twice(body):
        times.append(time.monotonic())
        if len(times) in (2, 3):  # the first finds out what the server takes
            return 429 if len(times) == 2 else 503, {"Retry-After": "0.3"}, {"error": {"message": "busy"}}
        return answers()(body)

    peer = stand_in({"/v1/models": models("m"), "/v1/completions": busy_twice})
    [completion] = remote(peer).complete([Prompt("x")], SAMPLING)
    assert completion.stop_reason == "stop"
    assert times[2] - times[1] >= 0.3
    assert times[3] - times[2] >= 0.3


def test_a_failure_that_stays_is_told_in_one_line(stand_in):
    broken = {"/v1/models": models("m"), "/v1/completions": lambda _: refusal("out of\nmemory", 503)}
    with pytest.raises(UserError, match=r"failed \(503\): out of memory"):
        list(remote(stand_in(broken), retries=0).complete([Prompt("x")], SAMPLING))


def test_a_field_that_is_refused_is_left_out_and_told_once(stand_in, capsys):
    def picky(body):
        if "top_k" in body:
            return refusal("Unrecognized request argument supplied: top_k")
        if "logprobs" in body:
            return refusal("no such thing", param="logprobs")
        return answers()(body)

    peer = stand_in({"/v1/models": models("m"), "/v1/completions": picky})
    engine = remote(peer)
    assert len(list(engine.complete([Prompt(f"{i}") for i in range(9)], Sampling(top_k=5)))) == 9
    told = capsys.readouterr().err.splitlines()
    assert sorted(line.split("refuses ")[1] for line in told) == [
        "'logprobs'; it is left out",
        "'top_k'; it is left out",
    ]


@pytest.mark.parametrize("name", ["temperature", "max_tokens"])
def test_what_decides_the_samples_is_not_left_out(stand_in, name):
    def rule(body):
        return refusal(f"'{name}' is out of range") if body["prompt"] == "x" else answers()(body)

    peer = stand_in({"/v1/models": models("m"), "/v1/completions": rule})
    with pytest.raises(UserError, match=f"refused \\(400\\): '{name}' is out of range"):
        list(remote(peer).complete([Prompt("x")], Sampling(temperature=1.7)))


@pytest.mark.parametrize("few", [1, 3])
def test_a_server_that_gives_fewer_than_asked_is_asked_for_the_rest(stand_in, few):
    def some(body):
        return answers(n=min(few, body["n"]))(body)

    peer = stand_in({"/v1/models": models("m"), "/v1/completions": some})
    assert len(list(remote(peer).complete([Prompt("x")] * 10, SAMPLING))) == 10
    seeds = [body["seed"] for body in peer.bodies("/v1/completions")[1:]]
    assert len(set(seeds)) == len(seeds)


def test_a_chat_model_is_asked_in_words_and_its_answer_is_read(stand_in):
    asked = []

    def chat(body):
        asked.append(body)
        crystal = representation("cif").encode(representation("wyckoff").decode(TEXT + "end"))
        said = f"Here it is:\n\n```cif\n{crystal}```\n\nHave fun!"
        message = {"role": "assistant", "content": said}
        logs = {"content": [{"token": "H", "logprob": -0.5}, {"token": "!", "logprob": -0.25}]}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": logs}
        return 200, {}, {"choices": [choice]}

    peer = stand_in({"/v1/models": models("gpt"), "/v1/chat/completions": chat})
    model = load_model(engine="openai", url=peer.url, template="words-1", format="cif")
    samples = generate("NaCl", n=2, model=model)
    assert [s.structure.composition.reduced_formula for s in samples] == ["NaCl", "NaCl"]
    assert [s.log_probability for s in samples] == [-0.75, -0.75]
    [message] = asked[0]["messages"]
    assert message["role"] == "user"
    assert template_named("words-1", format="cif").parse(message["content"]).formula == {"Na": 1, "Cl": 1}
    with pytest.raises(UserError, match="given beginning"):
        list(model.engine.complete([Prompt("x", "data_")], SAMPLING))


def test_newer_models_of_openai_get_the_name_that_they_know(stand_in, capsys):
    def chat(body):
        if "max_tokens" in body:
            return refusal(
                "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
                "'max_completion_tokens' instead.", param="max_tokens",
            )  # fmt: skip
        if "temperature" in body:
            return refusal("Unsupported parameter: 'temperature'", param="temperature")
        message = {"role": "assistant", "content": str(body["max_completion_tokens"])}
        return 200, {}, {"choices": [{"index": 0, "message": message, "finish_reason": "length"}]}

    peer = stand_in({"/v1/models": models("o9"), "/v1/chat/completions": chat})
    [completion] = remote(peer).complete([Prompt("x")], SAMPLING)
    assert (completion.text, completion.stop_reason) == ("60", "length")
    assert capsys.readouterr().err.count("left out") == 1


def test_a_chat_model_is_not_asked_in_a_formats_tokens(stand_in):
    peer = stand_in({"/v1/models": models("gpt"), "/v1/chat/completions": answers()})
    with pytest.raises(UserError, match=r"chat model.*--template words-1"):
        load_model(engine="openai", url=peer.url)


def test_a_vllm_server_without_our_processor_is_not_steerable(stand_in):
    """vLLM takes arguments that nobody reads, and draws as it likes."""
    peer = stand_in(
        {"/v1/models": models("m", owned_by="vllm", max_model_len=512), "/v1/completions": answers()}
    )
    engine = remote(peer, alphabet=WYCKOFF)
    assert (engine.kind, engine.steerable, engine.max_positions) == ("vllm", False, 512)
    assert "crystal" in peer.bodies("/v1/completions")[0]["vllm_xargs"]
    list(engine.complete([Prompt("crystal\n")], SAMPLING))
    sent = peer.bodies("/v1/completions")[-1]
    assert "vllm_xargs" not in sent
    assert sent["skip_special_tokens"] is False
    assert (sent["repetition_penalty"], sent["min_p"], sent["top_k"]) == (1.0, 0.0, 0)


def test_a_base_models_tokenizer_gets_the_formats_grammar(stand_in):
    rules = {"/v1/models": models("7b", owned_by="vllm", max_model_len=2048), "/v1/completions": answers()}
    peer = stand_in(rules)
    spoken = {"template": "crystal-text-llm", "format": "compact"}
    model = load_model(engine="openai", url=peer.url, **spoken)
    generate(n=1, model=model)
    grammar = representation("compact").grammar().lark
    assert peer.bodies("/v1/completions")[-1]["structured_outputs"] == {"grammar": grammar}
    generate(n=1, model=load_model(engine="openai", url=peer.url, constrained=False, **spoken))
    assert "structured_outputs" not in peer.bodies("/v1/completions")[-1]


def test_a_format_without_end_token_is_ended_by_its_stop_string(stand_in):
    peer = stand_in({"/v1/models": models("m"), "/v1/completions": answers("loop_\n")})
    engine = remote(peer, alphabet=representation("cif").alphabet())
    [completion] = engine.complete([Prompt("data_")], SAMPLING)
    assert peer.bodies("/v1/completions")[-1]["stop"] == ["\n\n"]
    assert completion.text == "loop_\n0\n\n"


@pytest.mark.parametrize(
    ("reason", "wanted"), [("length", "length"), ("content_filter", "error"), (None, "error")]
)
def test_what_ended_a_completion_is_kept(stand_in, reason, wanted):
    peer = stand_in({"/v1/models": models("m"), "/v1/completions": answers(reason=reason)})
    [completion] = remote(peer).complete([Prompt("x")], SAMPLING)
    assert completion.stop_reason == wanted


# Which model, and whose


def test_of_several_models_one_must_be_named_and_known(stand_in):
    peer = stand_in({"/v1/models": models("a", "b"), "/v1/completions": answers()})
    with pytest.raises(UserError, match=r"--served-model; the server has a, b"):
        list(remote(peer).complete([Prompt("x")], SAMPLING))
    with pytest.raises(UnknownName, match="Known: a, b"):
        list(remote(peer, served_name="c").complete([Prompt("x")], SAMPLING))
    with pytest.raises(UnknownName, match="Known: a, b"):
        list(remote(peer, served_name="a").complete([Prompt("x", adapter="z")], SAMPLING))
    [_] = remote(peer, served_name="b").complete([Prompt("x", adapter="a")], SAMPLING)
    assert peer.bodies("/v1/completions")[-1]["model"] == "a"


def test_a_server_that_lists_no_models_is_believed(stand_in):
    peer = stand_in({"/v1/completions": answers()})
    with pytest.raises(UserError, match="which model"):
        list(remote(peer).complete([Prompt("x")], SAMPLING))
    assert len(list(remote(peer, served_name="m").complete([Prompt("x")], SAMPLING))) == 1


def test_the_key_is_sent_and_never_shown(stand_in, monkeypatch):
    """Servers repeat a refused key in their message."""

    def rule(_):
        return refusal("Incorrect API key provided: sk-secret.", 403)

    peer = stand_in({"/v1/models": rule})
    monkeypatch.setenv("OPENAI_API_KEY", "sk-from-the-environment")
    for given, sent in (("sk-secret", "sk-secret"), ("", "sk-from-the-environment")):
        with pytest.raises(UserError, match="API key is refused") as caught:
            _ = remote(peer, api_key=given).kind
        assert peer.asked[-1][2]["authorization"] == f"Bearer {sent}"
        assert "sk-" not in str(caught.value)
    peer.rules["/v1/models"] = lambda _: refusal("you said sk-secret", 418)
    with pytest.raises(UserError, match=r"you said \[key\]"):
        _ = remote(peer, api_key="sk-secret").kind


def test_without_a_key_the_refusal_says_how_to_give_one(stand_in, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    peer = stand_in({"/v1/models": lambda _: refusal("no", 401)})
    with pytest.raises(UserError, match=r"an API key is needed\. Give --api-key-file"):
        _ = remote(peer).kind


# What is no server


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x/v1", "http://", "", "file:///etc/passwd"])
def test_what_is_no_address_is_refused_at_once(url):
    with pytest.raises(UserError, match="no web address"):
        OpenAIEngine(url)


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/"])
def test_the_address_is_taken_with_and_without_v1(stand_in, path):
    peer = stand_in({"/v1/models": models("m")})
    assert OpenAIEngine(peer.url + path).models == ("m",)


def test_a_server_that_is_not_there_is_told_soon(stand_in):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    before = time.monotonic()
    with pytest.raises(UserError, match=f"127.0.0.1:{port}/v1: not reached .* Is the server running"):
        _ = OpenAIEngine(f"http://127.0.0.1:{port}").kind
    assert time.monotonic() - before < 10


def test_a_page_that_is_no_model_server_is_told(stand_in):
    peer = stand_in({"/v1/models": lambda _: (200, {}, "<html>It works!</html>")})
    with pytest.raises(UserError, match="no list of models; is this an OpenAI-compatible server"):
        _ = OpenAIEngine(peer.url).kind
    odd = {"/v1/models": models("m"), "/v1/completions": lambda _: (200, {}, "<html>It works!</html>")}
    with pytest.raises(UserError, match="is this an OpenAI-compatible server"):
        list(remote(stand_in(odd)).complete([Prompt("x")], SAMPLING))


def test_without_the_client_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openai", None)
    with pytest.raises(MissingExtra, match=r"crystallm-kit\[serve\]"):
        OpenAIEngine("http://localhost")


def test_what_does_not_go_together_is_refused(toy_model):
    with pytest.raises(UnknownName, match="did you mean 'openai'"):
        load_model(engine="openapi")
    with pytest.raises(UserError, match="needs the server's address"):
        load_model(engine="openai")
    with pytest.raises(UserError, match="goes with the engine 'openai'"):
        load_model(toy_model, url="http://localhost")
    with pytest.raises(ModelError, match="nowhere: no such folder"):
        load_model("nowhere", engine="openai", url="http://localhost")
    with pytest.raises(ModelError, match="give the format"):
        load_model(engine="openai", url="http://localhost", template="words-1")
