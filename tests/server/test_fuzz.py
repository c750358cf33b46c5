"""Every route of the OpenAPI document under requests that nobody would write: schemathesis, and bodies that
nearly make sense. Whatever comes: no 500, and the answer is one that the document promises.

The `slow` mark asks for many more examples than the everyday suite has time for.
"""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import load_all_checks
from schemathesis.specs.openapi import checks

from crystallm_kit.server.app import create_app

load_all_checks()
FEW, MANY = 8, 150
ROUTES = ["/v1/completions", "/v1/chat/completions", "/v1/crystals"]
# The document cannot say which conditions exist, which names are known, or what belongs together, so a body
# that fits it may still be refused.
LEFT_OUT = [checks.positive_data_acceptance]
# A client would not send these; and the time of an example tells nothing here.
CHECKS = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]


@pytest.fixture(scope="module")
def api(toy_model, serve_app) -> Iterator[Any]:
    """Return the document of a server over a random model of 2 layers, with small limits."""
    from crystallm_kit.server.judging import Judges
    from crystallm_kit.server.serving import Serving, served
    from crystallm_kit.server.state import ServerSettings, new_state

    limits = ServerSettings(max_n=3, max_prompts=3, max_completions=6, max_samples=6, slots=16)
    found = served(Serving(model=str(toy_model), engine="transformers", device="cpu"), limits)
    state = new_state(found.backend, found.model, found.tokenizer, found.settings, judges=Judges(1))
    with serve_app(create_app(state)) as server:
        document = httpx.get(f"{server.url}/openapi.json", trust_env=False).json()
        schema = schemathesis.openapi.from_dict(document)
        schema.config.update(base_url=server.url)
        yield schema


def quick(n: int) -> Any:
    """Return the settings of a run of n examples, the same ones each time."""
    return settings(
        max_examples=n,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=CHECKS,
        phases=[Phase.explicit, Phase.generate],
    )


def fuzz(api: Any, path: str, n: int) -> None:
    """Send n requests that fit the document of a route, and n that do not."""
    for operation in api[path].values():
        # where there is no body, every request fits: a name may be any text
        for mode in GenerationMode if operation.body else [GenerationMode.POSITIVE]:

            @quick(n)
            @given(operation.as_strategy(generation_mode=mode))
            def run(case: Any) -> None:
                case.call_and_validate(excluded_checks=LEFT_OUT, timeout=60)

            run()


PATHS = [*ROUTES, "/v1/models", "/v1/models/{model}", "/healthz", "/readyz", "/metrics"]


def test_every_route_of_the_document_is_asked(api):
    assert {"/"} | set(PATHS) >= set(api)


@pytest.mark.parametrize("path", PATHS)
def test_every_route_answers_as_documented(api, path):
    fuzz(api, path, FEW)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("path", PATHS)
def test_every_route_answers_many_as_documented(api, path):
    fuzz(api, path, MANY)


# ---------------------------------------------------------------- bodies that nearly make sense

JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def mostly(*good: Any) -> Any:
    """Return one of these values most of the time, and junk else."""
    return st.integers(0, 5).flatmap(lambda i: JUNK if i == 0 else st.sampled_from(good))


CONDITIONS = st.fixed_dictionaries(
    {},
    optional={
        "formula": mostly("NaCl", "BaTiO3", "Na1 Cl1", {"Na": 1, "Cl": 1}, "", "Xx2", "H10000", "Na0", "Uuo"),
        "elements": mostly("Li-O", ["Li", "O"], "Na", [], ["Na", "Na"], "Qq"),
        "only_elements": mostly(True, False),
        "spacegroup": mostly("Fm-3m", 225, "P1", 1, 0, 231, -1, "F m -3 m", "no group"),
        "sites": mostly(1, 2, 8, "2-4", [1, 4], 10**9, 0, -3, ">5"),
        "crystal_system": mostly("cubic", "triclinic", "round"),
        "n_elements": mostly(1, 2, 3, 0, 300),
        "anonymous_formula": mostly("AB", "ABC3", "A", "BA", "AB0"),
        "properties": mostly(
            {"band_gap": ">2"},
            {"band_gap": [1, 2]},
            {"bulk_modulus": "high"},
            {"colour": 1},
            {"band_gap": "x"},
        ),
        "colour": mostly("blue"),
    },
)
WORDS = mostly(
    "two cubic perovskites of Ba, Ti and O", "NaCl", "a crystal of Xx", "99999999999999999999 of NaCl",
    "space group 500", "band gap above 2 eV and below 1 eV", "", "\x00\U0001f600 NaCl", "hello", "0 NaCl",
)  # fmt: skip
SHARED = {
    "model": mostly("toy", "toy", "../../etc/passwd", "bulk-modulus", ""),
    "n": mostly(1, 2, 3, 4, 0, -1, 10**9),
    "temperature": mostly(0, 0.5, 1, 100, -1, 1e308, 1e-300),
    "top_p": mostly(1, 0.5, 1e-300, 0, 2),
    "top_k": mostly(0, -1, 1, 5, 10**6, -2, 2**31),
    "seed": mostly(0, 1, -1, 2**63 - 1, -(2**63), 2**63),
    "stream": mostly(True, False),
    "conditions": CONDITIONS,
}
TEXTS = {
    "max_tokens": mostly(1, 2, 40, 10**6, 0),
    "stop": mostly("Na", ["Na", "Cl"], "", [], ["x"] * 17),
    "stream_options": mostly({"include_usage": True}, {}, {"include_usage": 1}),
    "user": mostly("somebody"),
    "presence_penalty": mostly(0, 1),
}
BODIES = {
    "/v1/completions": st.fixed_dictionaries(
        {},
        optional={
            **SHARED, **TEXTS,
            "prompt": mostly(
                "crystal\n", ["crystal\n", "crystal\n"], [1, 2, 3], [[1], [2, 3]], "", [], [[]], "\x00",
                "Na" * 300, [10**6], ["crystal\n"] * 4,
            ),
            "logprobs": mostly(0, 1, 5, 6),
            "echo": mostly(True, False),
            "best_of": mostly(1, 2),
            "suffix": mostly("", "end"),
            "logit_bias": mostly({}, {"5": 1}),
            "return_token_ids": mostly(True, False),
            "vllm_xargs": mostly(
                {}, {"crystal": '{"conditions": {"formula": "NaCl"}}'},
                {"crystal": '{"conditions": {"formula": "NaCl"}}', "crystal_given": 1},
                {"crystal": '{"conditions": {"formula": "NaCl"}}', "crystal_beginning": [1, 2]},
                {"crystal": "{"}, {"crystal": "[]"}, {"crystal": "{}"}, {"crystal": "[" * 50_000},
                {"crystal": '{"conditions": NaN}'}, {"crystal": '{"slots": [[1e999]]}'},
                {"crystal_given": 2}, {"crystal_number_temperature": 0.5},
            ),
        },
    ),
    "/v1/chat/completions": st.fixed_dictionaries(
        {
            "messages": st.lists(
                st.fixed_dictionaries(
                    {"role": mostly("user", "user", "system", "king")},
                    optional={"content": WORDS | st.just([{"type": "text", "text": "NaCl"}])},
                ),
                min_size=1, max_size=2,
            )
        },
        optional={
            **SHARED, **TEXTS,
            "max_samples": mostly(1, 3, 6, 7, 0),
            "unique": mostly(True, False),
            "protocol": mostly("kit", "none-such"),
            "number_temperature": mostly(0, 1),
            "response_format": mostly({"type": "text"}, {"type": "json_object"}, {}),
            "tools": mostly([], [{}]),
        },
    ),
    "/v1/crystals": st.fixed_dictionaries(
        {"max_samples": mostly(1, 3, 6, 7, 0)},
        optional={
            **SHARED,
            "prompt": WORDS,
            "format": mostly("cif", "extxyz", "json", "pdf"),
            "protocol": mostly("kit", "none-such"),
            "unique": mostly(True, False),
            "constrained": mostly(True, False),
            "redraws": mostly(0, 1, 11),
            "include_invalid": mostly(True, False),
            "log_probability": mostly(True, False),
        },
    ),
}  # fmt: skip


# A good body of each route; with another model's name it is a 404. Chance alone may leave either out.
GOOD = {
    "/v1/completions": {"prompt": "crystal\n", "max_tokens": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "NaCl"}], "max_samples": 1},
    "/v1/crystals": {"n": 1, "max_samples": 1},
}


def assert_as_documented(api: Any, path: str, body: Any) -> int:
    """Send a body; assert that the answer is none of our faults and what the document says. Its status."""
    answer = httpx.post(api.config.base_url + path, json=body, timeout=60, trust_env=False)
    assert answer.status_code in (200, 400, 404), answer.text
    api[path]["POST"].validate_response(answer)
    if answer.headers["content-type"].startswith("text/event-stream"):
        events = answer.text.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""], events[-3:]
        data = [json.loads(event.partition("data: ")[2]) for event in events[:-2]]
        assert not [each for each in data if "error" in each]
    elif answer.status_code != 200:
        error = answer.json()["error"]
        assert error["message"]
        assert error["type"] == "invalid_request_error"
    return answer.status_code


@pytest.mark.parametrize("path", ROUTES)
def test_bodies_that_nearly_make_sense_are_answered_or_refused(api, path):
    statuses = _fuzzed(api, path, 40)
    assert statuses == {200, 400, 404}, "the bodies are all good, or all bad"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("path", ROUTES)
def test_many_bodies_that_nearly_make_sense_are_answered_or_refused(api, path):
    assert _fuzzed(api, path, 1000) == {200, 400, 404}


def _fuzzed(api: Any, path: str, n: int) -> set[int]:
    statuses: set[int] = set()

    @quick(n)
    @given(BODIES[path])
    @example(GOOD[path])
    @example({**GOOD[path], "model": "none-such"})
    def run(body: Any) -> None:
        statuses.add(assert_as_documented(api, path, body))

    run()
    return statuses
