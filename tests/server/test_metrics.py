"""What is counted: tests of server/metrics.py and of the route /metrics."""

from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from crystallm_kit.server.app import create_app
from crystallm_kit.server.metrics import Metrics

BODY = {"conditions": {"formula": "NaCl"}, "n": 3, "seed": 1}


def values(text: str) -> dict[tuple[str, ...], float]:
    """Return {(name, label values ...): value} of an exposition, as Prometheus' own reader has it."""
    return {
        (sample.name.removeprefix("crystallm_kit_"), *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_requests_tokens_and_completions_are_counted(make_state):
    with TestClient(create_app(make_state())) as client:
        answer = client.post("/v1/completions", json=BODY).json()
        assert client.post("/v1/completions", json={"prompt": "crystal\n", "n": 0}).status_code == 400
        client.get("/nothing/of/the/kind")
        found = values(client.get("/metrics").text)
    usage = answer["usage"]
    assert found["tokens_total", "completion"] == usage["completion_tokens"] > 20
    assert found["tokens_total", "prompt"] == usage["prompt_tokens"] > 0
    assert found["completions_total", "stop"] == 3
    assert found["requests_total", "POST", "/v1/completions", "200"] == 1
    assert found["requests_total", "POST", "/v1/completions", "400"] == 1
    # what a client wrote never becomes a label: there would be no end of them
    assert found["requests_total", "GET", "other", "404"] == 1
    assert found["request_seconds_count", "/v1/completions"] == 2
    assert found["requests_in_flight",] == 1  # this one
    assert found["completions_inside",] == 0
    assert found["completions_per_second",] > 0
    assert found["ready",] == 1


def test_two_apps_do_not_count_for_each_other():
    one, other = Metrics(), Metrics()
    one.crystals.labels("overlap").inc()
    assert values(one.exposition().decode())["crystals_total", "overlap"] == 1
    assert ("crystals_total", "overlap") not in values(other.exposition().decode())


def test_the_first_token_of_a_stream_is_timed(make_state):
    with TestClient(create_app(make_state())) as client:
        assert client.post("/v1/completions", json={**BODY, "stream": True}).status_code == 200
        found = values(client.get("/metrics").text)
    assert found["first_token_seconds_count", "/v1/completions"] == 1
    assert found["completions_total", "stop"] == 3
