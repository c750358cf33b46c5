"""OpenAI's routes, asked by OpenAI's own client and by LangChain's: tests of server/openai_routes.py."""

import json
import socket
import time

import httpx
import openai
import pytest

from crystallm_kit import decode
from crystallm_kit.engines.engine import Prompt, Sampling
from crystallm_kit.records import Conditions
from crystallm_kit.tokens.requests import compile_request, request_to_json

MODEL, PROMPT = "crystallm-kit", "crystal\n"
SALT = {"formula": "NaCl"}


@pytest.fixture(scope="module")
def client(live_server):
    with live_server.client() as client:
        yield client


def complete(client, **body):
    """Return a completion; what the official client does not know goes into its extra_body."""
    own = {k: body.pop(k) for k in ("conditions", "top_k", "vllm_xargs", "return_token_ids") if k in body}
    return client.completions.create(model=body.pop("model", MODEL), prompt=body.pop("prompt", PROMPT),
                                     extra_body=own or None, **body)  # fmt: skip


def texts(answer) -> list[str]:
    return [choice.text for choice in answer.choices]


def crystal(text: str):
    """Return the crystal of a completion's text: the end is a token, which a text over HTTP does not show."""
    return decode(text + "end")


def idle(server) -> None:
    until = time.monotonic() + 15
    while server.state.backend.n_running() or server.state.backend.n_waiting():
        assert time.monotonic() < until, "work that nobody waits for goes on"
        time.sleep(0.02)


# ---------------------------------------------------------------- models


def test_the_model_and_its_adapters_are_listed_and_told_of(client):
    listed = client.models.list().data
    assert [model.id for model in listed] == [MODEL, "bulk-modulus"]
    assert client.models.retrieve("bulk-modulus").parent == MODEL
    assert client.models.retrieve(MODEL).max_model_len == 512
    with pytest.raises(openai.NotFoundError, match="did you mean 'crystallm-kit'"):
        client.models.retrieve("crystalm-kit")


# ---------------------------------------------------------------- whole answers


def test_a_completion_has_openais_shape_and_counts(client, shipped):
    answer = complete(client, n=2, seed=7, temperature=0.5)
    sampling = Sampling(temperature=0.5, max_new_tokens=511, seed=7)
    expected = list(shipped.engine.complete([Prompt(PROMPT)] * 2, sampling))
    assert texts(answer) == [c.text.removesuffix("end") for c in expected]
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.system_fingerprint.startswith("fp_")
    assert answer.usage.prompt_tokens == 1
    assert answer.usage.completion_tokens == sum(len(c.token_ids) for c in expected)
    assert answer.usage.total_tokens == 1 + answer.usage.completion_tokens
    assert answer._request_id.startswith("req_")


def test_the_same_seed_gives_the_same_answer_and_none_a_new_one(client):
    first, second = (texts(complete(client, n=2, seed=-3, max_tokens=12)) for _ in range(2))
    assert first == second
    assert first[0] != first[1]
    unseeded = [texts(complete(client, max_tokens=12))[0] for _ in range(3)]
    assert len(set(unseeded)) == 3


def test_max_tokens_cuts_with_the_reason_length(client):
    answer = complete(client, max_tokens=4, seed=1)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 4


def test_temperature_zero_and_top_k_one_take_the_likeliest_token(client):
    greedy = texts(complete(client, temperature=0, n=2, max_tokens=20))
    assert greedy[0] == greedy[1]
    assert texts(complete(client, top_k=1, max_tokens=20, seed=9))[0] == greedy[0]
    assert texts(complete(client, top_p=1e-6, max_tokens=20, seed=8))[0] == greedy[0]


def test_stop_takes_a_text_or_several_and_leaves_it_out(client):
    whole = texts(complete(client, seed=4, max_tokens=30))[0]
    line = whole.split("\n")[0]
    for stop in ("\n", ["never", "nor this", "\n", "x"]):
        answer = complete(client, seed=4, stop=stop)
        assert texts(answer) == [line]
        assert answer.choices[0].finish_reason == "stop"


def test_logprobs_are_told_for_every_token_and_add_up(client, shipped):
    answer = complete(client, seed=5, logprobs=2, max_tokens=25)
    told = answer.choices[0].logprobs
    expected = next(shipped.engine.complete([Prompt(PROMPT)], Sampling(max_new_tokens=25, seed=5)))
    assert sum(told.token_logprobs) == pytest.approx(expected.log_probability, abs=1e-3)
    assert len(told.tokens) == len(told.text_offset) == len(told.top_logprobs) == 25
    assert "".join(told.tokens) == answer.choices[0].text
    for token, offset in zip(told.tokens, told.text_offset, strict=True):
        assert answer.choices[0].text.startswith(token, offset)
    assert all(len(top) == 2 for top in told.top_logprobs)
    assert complete(client, seed=5, logprobs=0, max_tokens=3).choices[0].logprobs.top_logprobs is None


def test_echo_puts_the_prompt_before_the_text(client):
    alone = texts(complete(client, seed=5, max_tokens=5))[0]
    assert texts(complete(client, seed=5, max_tokens=5, echo=True))[0] == PROMPT + alone
    ids = complete(client, prompt=[1091], seed=5, max_tokens=5, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in ids) == PROMPT + alone


def test_every_form_of_a_prompt_means_the_same(client, shipped):
    """A text, a list of texts, a list of token ids, a list of lists; choices go prompt by prompt."""
    ids = shipped.engine.tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    forms = (PROMPT, [PROMPT], ids, [ids])
    assert len({texts(complete(client, prompt=form, seed=6, max_tokens=6))[0] for form in forms}) == 1
    two = complete(client, prompt=[PROMPT, PROMPT], n=2, seed=6, max_tokens=6)
    assert [choice.index for choice in two.choices] == [0, 1, 2, 3]
    assert texts(two) == texts(complete(client, n=4, seed=6, max_tokens=6))
    assert two.usage.prompt_tokens == 2


def test_an_adapter_is_asked_for_by_its_name(client, shipped):
    prompt = shipped.template.render(Conditions(formula={"Na": 1, "Cl": 1}), quantiles=shipped.quantiles)
    base, adapted = (complete(client, model=name, prompt=prompt, temperature=0, max_tokens=30, logprobs=0)
                     for name in (MODEL, "bulk-modulus"))  # fmt: skip
    assert adapted.model == "bulk-modulus"
    assert base.choices[0].logprobs.token_logprobs != adapted.choices[0].logprobs.token_logprobs


# ---------------------------------------------------------------- the constraint


def test_conditions_hold_for_every_completion_and_write_the_prompt(live_server):
    body = {"conditions": {"formula": "SrTiO3", "spacegroup": 221}, "n": 6, "return_token_ids": True}
    answer = httpx.post(f"{live_server.url}/v1/completions", json=body, timeout=60).json()
    for choice in answer["choices"]:
        found = crystal(choice["text"])
        assert found.structure.composition.reduced_formula == "SrTiO3"
        assert found.properties["spacegroup_number"] == 221
        assert choice["token_ids"][-1] == 1
        assert len(choice["prompt_token_ids"]) >= 1
    assert answer["usage"]["prompt_tokens"] == len(answer["choices"][0]["prompt_token_ids"])


def test_the_constraint_may_be_written_as_for_a_vllm_server(client, live_server):
    request = compile_request(
        Conditions(formula={"Na": 1, "Cl": 1}),
        known_elements=live_server.state.model.known_elements,
        max_sites=live_server.state.model.max_sites,
    )
    written = [request_to_json(request), json.dumps({"conditions": SALT})]
    answers = [texts(complete(client, seed=3, n=3, vllm_xargs={"crystal": text})) for text in written]
    answers.append(texts(complete(client, seed=3, n=3, conditions=SALT)))
    assert answers[0] == answers[1] == answers[2]
    assert all(crystal(text).structure.composition.reduced_formula == "NaCl" for text in answers[0])


def test_what_the_prompt_holds_of_the_crystal_is_gone_on_with_and_not_repeated(client):
    """crystal_given: the last three tokens of the prompt, "Na", "1 ", "Cl", are the crystal's own."""
    constraint = {"crystal": json.dumps({"conditions": SALT}), "crystal_given": 3}
    arguments = {"prompt": PROMPT + "Na1 Cl", "seed": 3, "n": 2, "vllm_xargs": constraint}
    answer = complete(client, return_token_ids=True, **arguments)
    for choice in answer.choices:
        assert crystal("Na1 Cl" + choice.text).structure.composition.reduced_formula == "NaCl"
        assert len(choice.prompt_token_ids) == 4
    assert answer.usage.prompt_tokens == 4
    assert answer.usage.completion_tokens == sum(len(choice.token_ids) for choice in answer.choices)
    grown = ["", ""]
    n_tokens = 0
    for chunk in complete(client, stream=True, logprobs=0, **arguments):
        for choice in chunk.choices:
            grown[choice.index] += choice.text
            n_tokens += len(choice.logprobs.tokens)
    assert grown == texts(answer)
    assert n_tokens == answer.usage.completion_tokens


def test_a_beginning_of_the_crystal_is_part_of_the_completion(client, shipped):
    ids = shipped.engine.tokenizer("Na1 Cl", add_special_tokens=False)["input_ids"]
    constraint = {"crystal": json.dumps({"conditions": SALT}), "crystal_beginning": ids}
    answer = complete(client, seed=3, n=2, vllm_xargs=constraint, return_token_ids=True)
    for choice in answer.choices:
        assert choice.text.startswith("Na1 Cl")
        assert choice.token_ids[: len(ids)] == ids
        assert crystal(choice.text).structure.composition.reduced_formula == "NaCl"
    streamed = complete(client, seed=3, n=1, vllm_xargs=constraint, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == answer.choices[0].text


def test_the_numbers_may_have_a_temperature_of_their_own(client):
    rocksalt = json.dumps({"conditions": {**SALT, "spacegroup": 225}})
    numbers = {}
    for temperature in (0, 1):
        arguments = {"crystal": rocksalt, "crystal_number_temperature": temperature}
        found = texts(complete(client, seed=1, n=12, vllm_xargs=arguments))
        heads = [text.rpartition("\n")[0] for text in found]
        common = max(set(heads), key=heads.count)
        numbers[temperature] = {text for text in found if text.startswith(common + "\n")}
    assert len(numbers[0]) == 1  # the same sites get the same numbers
    assert len(numbers[1]) > 1


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"conditions": {"formula": "NaXx"}}, "conditions", "Xx"),
        ({"conditions": {"formula": "NaCl", "sites": 3}}, "conditions", "no multiple"),
        ({"conditions": {"flavour": "sweet"}}, "conditions", "no condition 'flavour'"),
        ({"conditions": SALT, "vllm_xargs": {"crystal": "{}"}}, "vllm_xargs", "say the same thing"),
        ({"vllm_xargs": {"crystal": "not json"}}, "vllm_xargs", "no JSON"),
        (
            {"vllm_xargs": {"crystal": '{"elements":[0],"plans":[[3,5]],"n_elements":2}'}},
            "vllm_xargs",
            "2 elements",
        ),
        ({"vllm_xargs": {"crystal_given": 1}}, "vllm_xargs", "needs `crystal`"),
        ({"vllm_xargs": {"crystal_beginning": [8]}}, "vllm_xargs", "needs `crystal`"),
        (
            {"vllm_xargs": {"crystal": '{"conditions":{}}', "crystal_given": 1}},
            "vllm_xargs",
            "of a prompt of 1",
        ),
    ],
)
def test_a_constraint_that_cannot_hold_is_refused_in_words(client, body, param, said):
    with pytest.raises(openai.BadRequestError, match=said) as caught:
        complete(client, **body)
    assert caught.value.param == param


# ---------------------------------------------------------------- streams


def test_a_stream_holds_the_same_as_a_whole_answer(client):
    body = {"prompt": [PROMPT, PROMPT], "n": 2, "seed": 11, "logprobs": 1, "max_tokens": 30}
    whole = complete(client, **body)
    grown, tokens, reasons, usage = [""] * 4, [[] for _ in range(4)], [None] * 4, None
    for chunk in complete(client, stream=True, stream_options={"include_usage": True}, **body):
        usage = chunk.usage
        for choice in chunk.choices:
            assert reasons[choice.index] is None, "text after the end"
            assert choice.logprobs.text_offset[:1] in ([], [sum(map(len, tokens[choice.index]))])
            grown[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens
            reasons[choice.index] = choice.finish_reason
    assert grown == texts(whole)
    assert tokens == [choice.logprobs.tokens for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage


def test_a_stream_ends_with_done_and_tells_usage_only_when_asked(live_server):
    body = {"prompt": PROMPT, "stream": True, "max_tokens": 3, "seed": 1}
    with httpx.stream("POST", f"{live_server.url}/v1/completions", json=body, timeout=60) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert all("usage" not in json.loads(line.removeprefix("data: ")) for line in lines[:-1])


def test_what_is_wrong_from_the_start_has_its_status_in_a_stream_too(client):
    with pytest.raises(openai.BadRequestError, match="no token for 'hello'"):
        complete(client, prompt="hello", stream=True)
    # found only once the engine looks at it: the first of the text rules out what is asked
    with pytest.raises(openai.BadRequestError, match="leaves what was asked for"):
        complete(
            client,
            prompt=PROMPT + "K",
            stream=True,
            vllm_xargs={"crystal": json.dumps({"conditions": SALT}), "crystal_given": 1},
        )


def test_a_client_that_leaves_frees_its_work(live_server):
    body = {"prompt": PROMPT, "n": 400}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{live_server.url}/v1/completions", json=body, timeout=0.7)
    idle(live_server)
    body["stream"] = True
    with httpx.stream("POST", f"{live_server.url}/v1/completions", json=body, timeout=60) as answer:
        next(answer.iter_lines())
    idle(live_server)
    assert live_server.state.admission.n_inside == 0
    assert (
        live_server.state.metrics.registry.get_sample_value(
            "crystallm_kit_clients_gone_total", {"route": "/v1/completions"}
        )
        == 2
    )


def test_a_client_that_does_not_read_stalls_nobody(live_server, client):
    body = json.dumps({"prompt": PROMPT, "n": 100, "stream": True, "logprobs": 5}).encode()
    with socket.create_connection(("127.0.0.1", live_server.port)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        head = ["POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json"]
        head += [f"Content-Length: {len(body)}", "", ""]
        connection.sendall("\r\n".join(head).encode() + body)
        assert connection.recv(12) == b"HTTP/1.1 200"
        began = time.monotonic()
        assert complete(client, conditions=SALT, seed=1).choices[0].finish_reason == "stop"
        assert time.monotonic() - began < 20
    idle(live_server)


# ---------------------------------------------------------------- limits


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"n": 10**9}, "n", "1000000000 completions of a prompt; at most 1000"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 10**30}, "n", "n: got 1000"),
        ({"n": 900, "prompt": [PROMPT] * 3}, "n", "3 prompts times 900 are 2700 completions; at most 2000"),
        ({"prompt": [PROMPT] * 1001}, "prompt", "1001 prompts; at most 1000"),
        ({"prompt": [8] * 512}, "prompt", "512 tokens; the model has 512 positions"),
        ({"prompt": "Na" * 600}, "prompt", "tokens; the model has 512 positions"),
        ({"prompt": [10**6]}, "prompt", "token id 1000000; the model has 1092 tokens"),
        ({"prompt": [-1]}, "prompt", "expected a text, a list of texts"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": []}, "prompt", "expected a text, a list of texts"),
        ({"best_of": 3}, "best_of", "only equal to n"),
        ({"suffix": "end"}, "suffix", "fills in"),
        ({"presence_penalty": 0.5}, "presence_penalty", "only 0"),
        ({"frequency_penalty": -1}, "frequency_penalty", "only 0"),
        ({"logit_bias": {"1": 5}}, "logit_bias", "only an empty one"),
        ({"logprobs": 6}, "logprobs", "less than or equal to 5"),
        ({"echo": True, "logprobs": 1}, "echo", "not computed"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"seed": 2**63}, "seed", ""),
        ({"stop": [""]}, "stop", "a text of 1 to 256 characters, or a list"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "only together with stream"),
    ],
)
def test_what_is_out_of_bounds_is_refused_in_words(client, body, param, said):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, **body)
    assert said in caught.value.message
    assert caught.value.param == param


def test_what_changes_nothing_is_taken(client):
    answer = complete(client, presence_penalty=0, frequency_penalty=0, logit_bias={}, best_of=1, suffix="",
                      user="me", max_tokens=2, logprobs=None, stop=None)  # fmt: skip
    assert answer.usage.completion_tokens == 2


def test_an_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4'") as caught:
        complete(client, model="gpt-4")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_a_full_queue_is_a_rate_limit_with_the_seconds_to_wait(make_state, serve_app):
    from crystallm_kit.server.app import create_app

    state = make_state(slots=1, max_queue=2)
    with serve_app(create_app(state)) as server, server.client() as client:
        with complete(client, n=3, stream=True) as stream:
            next(stream)
            with pytest.raises(openai.RateLimitError, match="are waiting already") as caught:
                complete(client)
            assert 1 <= int(caught.value.response.headers["retry-after"]) <= 120
        idle(server)
        until = time.monotonic() + 5
        while state.admission.n_inside and time.monotonic() < until:
            time.sleep(0.02)
        assert complete(client, max_tokens=3).usage.completion_tokens == 3


# ---------------------------------------------------------------- in front of another server


@pytest.fixture(scope="module")
def front(live_server, shipped, serve_app):
    """Return a server of ours that makes no tokens itself: what it is asked it passes on to the live one."""
    from crystallm_kit.server.app import create_app
    from crystallm_kit.server.state import new_state
    from crystallm_kit.server.upstream import UpstreamBackend
    from crystallm_kit.server.vllm_wire import Wire

    tokenizer = shipped.engine.tokenizer
    wire = Wire(tokenizer, max_positions=512)
    backend = UpstreamBackend([live_server.url], wire, model_name=MODEL, adapters=None)
    with serve_app(create_app(new_state(backend, shipped, tokenizer))) as server:
        yield server


def test_what_is_passed_on_is_answered_as_by_the_server_behind(front, client):
    # the likeliest token: a server behind has draws of its own, which a seed repeats
    n_tokens = 0
    with front.client() as passed:
        assert [m.id for m in passed.models.list()] == [m.id for m in client.models.list()]
        for body in (
            {"top_k": 1, "n": 2, "max_tokens": 12},
            {"top_k": 1, "conditions": SALT, "stop": "\n", "return_token_ids": True},
            {"top_k": 1, "model": "bulk-modulus", "prompt": [1091], "max_tokens": 5, "echo": True},
            {"prompt": [PROMPT, PROMPT], "max_tokens": 7, "temperature": 0, "user": "me"},
        ):
            near, far = complete(client, **body), complete(passed, **body)
            assert [c.model_dump() for c in far.choices] == [c.model_dump() for c in near.choices]
            assert (far.usage, far.model) == (near.usage, near.model)
            chunks = list(complete(passed, stream=True, stream_options={"include_usage": True}, **body))
            assert chunks[-1].usage == near.usage
            n_tokens += 2 * near.usage.completion_tokens
            for choice in near.choices:
                grown = [c.text for chunk in chunks for c in chunk.choices if c.index == choice.index]
                assert "".join(grown) == choice.text
        again = [texts(complete(passed, seed=5, max_tokens=9)) for _ in range(2)]
        assert again[0] == again[1]
        n_tokens += 18
    count, until = front.state.metrics.registry.get_sample_value, time.monotonic() + 5
    while count("crystallm_kit_tokens_total", {"kind": "completion"}) != n_tokens:
        assert time.monotonic() < until  # counted when the last byte has gone
        time.sleep(0.01)


def test_what_is_wrong_is_refused_before_it_is_passed_on(front, client):
    with front.client() as passed:
        for body in (
            {"n": 10**9},
            {"prompt": "hello"},
            {"prompt": [8] * 512},
            {"conditions": {"formula": "Xx"}},
        ):
            with pytest.raises(openai.BadRequestError) as near:
                complete(client, **body)
            with pytest.raises(openai.BadRequestError) as far:
                complete(passed, **body)
            assert far.value.body == near.value.body
        forbidden = {"crystal": json.dumps({"conditions": SALT}), "crystal_given": 1}
        for stream in (False, True):  # what only the engine sees comes back from behind
            with pytest.raises(openai.BadRequestError, match="leaves what was asked for"):
                complete(passed, prompt=PROMPT + "K", vllm_xargs=forbidden, stream=stream)


def test_a_client_that_leaves_the_server_in_front_frees_the_work_behind(front, live_server):
    for stream in (False, True):
        body = {"prompt": PROMPT, "n": 300, "stream": stream}
        with pytest.raises(httpx.ReadTimeout):
            # longer than the first token takes, shorter than the whole
            httpx.post(f"{front.url}/v1/completions", json=body, timeout=httpx.Timeout(60, read=0.05))
        idle(live_server)


def test_a_server_behind_that_is_gone_is_a_503(make_state, serve_app, shipped):
    from crystallm_kit.server.app import create_app
    from crystallm_kit.server.state import new_state
    from crystallm_kit.server.upstream import UpstreamBackend
    from crystallm_kit.server.vllm_wire import Wire

    tokenizer = shipped.engine.tokenizer
    with serve_app(create_app(make_state())) as behind:
        wire = Wire(tokenizer, max_positions=512)
        backend = UpstreamBackend([behind.url], wire, model_name=MODEL)
        front = serve_app(create_app(new_state(backend, shipped, tokenizer)))
        server = front.__enter__()
    try:
        with (
            server.client() as client,
            pytest.raises(openai.InternalServerError, match="no engine") as caught,
        ):
            complete(client)
        assert caught.value.status_code == 503
        assert int(caught.value.response.headers["retry-after"]) >= 1
    finally:
        front.__exit__(None, None, None)


# ---------------------------------------------------------------- off the shelf


def test_langchain_works_unchanged(live_server):
    from langchain_openai import OpenAI

    llm = OpenAI(
        base_url=f"{live_server.url}/v1", api_key="none", model=MODEL, max_retries=0, seed=3, max_tokens=20
    )
    text = llm.invoke(PROMPT)
    assert len(text) > 10
    assert "".join(llm.stream(PROMPT)) == text
    answers = llm.generate([PROMPT, PROMPT])
    assert len(answers.generations) == 2
    assert answers.llm_output["token_usage"]["prompt_tokens"] == 2
    constrained = OpenAI(
        base_url=f"{live_server.url}/v1", api_key="none", model=MODEL, extra_body={"conditions": SALT}
    )
    assert crystal(constrained.invoke(PROMPT)).structure.composition.reduced_formula == "NaCl"


def test_the_asynchronous_client_mixes_nothing_up(live_server):
    """Forty requests at once, each for its own composition: every answer is the one that was asked for."""
    import asyncio

    formulas = ["NaCl", "KBr", "MgO", "CsF", "LiH", "CaS", "BaO", "RbI"] * 5

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{live_server.url}/v1", api_key="none", max_retries=0
        ) as client:
            asked = [
                client.completions.create(
                    model=MODEL, prompt=PROMPT, extra_body={"conditions": {"formula": formula}}
                )
                for formula in formulas
            ]
            answers = await asyncio.gather(*asked)
        return [answer.choices[0].text for answer in answers]

    found = asyncio.run(ask())
    assert [crystal(text).structure.composition.reduced_formula for text in found] == formulas
