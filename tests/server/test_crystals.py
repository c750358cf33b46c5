"""POST /v1/crystals: what comes is valid, counted, reproducible; what cannot be asked is refused in words."""

import asyncio
import json
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from pymatgen.core import Structure

from crystallm_kit.generation import generate, sample_to_dict
from crystallm_kit.records import Conditions
from crystallm_kit.scores.funnel import STAGES
from crystallm_kit.scores.validity import validate

ROUTE = "/v1/crystals"
SMALL = {"elements": "Na-Cl", "sites": 2}  # few tokens, so quickly drawn


@pytest.fixture(scope="module")
def client(live_server):
    with httpx.Client(base_url=live_server.url, timeout=120) as client:
        yield client


def ask(client, **body):
    answer = client.post(ROUTE, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def events_of(client, **body):
    """Return (name, data) of each event of a streamed answer."""
    with client.stream("POST", ROUTE, json={**body, "stream": True}) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        blocks = "".join(answer.iter_text()).strip().split("\n\n")
    found = []
    for block in blocks:
        *names, data = block.split("\n")
        data = data.removeprefix("data: ")
        found.append(
            (
                names[0].removeprefix("event: ") if names else "",
                data if data == "[DONE]" else json.loads(data),
            )
        )
    return found


def idle(live_server):
    """Tell whether nothing is drawn or waits, after a moment in which cancelled work may go."""
    state, until = live_server.state, time.monotonic() + 10
    while time.monotonic() < until:
        if not (state.backend.n_running() or state.backend.n_waiting() or state.admission.n_inside):
            return True
        time.sleep(0.05)
    return False


# ---------------------------------------------------------------- what comes


def test_every_crystal_is_valid_and_as_asked(client):
    answer = ask(client, conditions={"formula": "BaTiO3"}, n=3, seed=1)
    assert (answer["object"], answer["model"], answer["finish_reason"]) == ("crystals", "crystallm-kit", "n")
    assert answer["conditions"] == {"formula": {"Ba": 1, "Ti": 1, "O": 3}}
    assert len(answer["crystals"]) == 3
    for crystal in answer["crystals"]:
        structure = Structure.from_str(crystal["structure"], fmt="cif")
        assert structure.composition.reduced_formula == crystal["formula"] == "BaTiO3"
        assert validate(structure, conditions=Conditions(formula={"Ba": 1, "Ti": 1, "O": 3})).valid
        assert crystal["verdict"]["valid"]
        assert crystal["verdict"]["checks"]["unique"]
        assert crystal["id"] == f"1-{crystal['index']}"
        assert crystal["log_probability"] < 0


def test_the_funnel_counts_the_samples_up_to_the_last_that_was_needed(client):
    answer = ask(client, conditions={"n_elements": 2, "sites": 2}, n=5, seed=4)
    funnel, last = answer["funnel"], answer["crystals"][-1]["index"]
    assert funnel["requested"] == answer["usage"]["n_samples"] == last + 1
    assert funnel["unique"] == 5
    assert sum(funnel["reasons"].values()) == funnel["requested"] - 5
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["completion_tokens"] > 5 * 8


def test_the_same_seed_gives_the_same_crystals_whatever_else_runs(client):
    body = {"conditions": {"sites": 3}, "n": 4, "seed": 9}
    alone = ask(client, **body)
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(ask, client, conditions=SMALL, n=2, seed=100 + i) for i in range(3)]
        again = ask(client, **body)
        assert all(len(other.result()["crystals"]) == 2 for other in others)
    assert [c["text"] for c in again["crystals"]] == [c["text"] for c in alone["crystals"]]
    assert again["funnel"] == alone["funnel"]


def test_without_a_seed_two_answers_differ_and_say_their_seeds(client):
    first, second = (ask(client, conditions={"sites": 2}, n=2) for _ in range(2))
    assert first["seed"] != second["seed"]
    assert [c["text"] for c in first["crystals"]] != [c["text"] for c in second["crystals"]]


def test_a_budget_that_is_spent_ends_with_the_same_samples_as_the_library(client, shipped):
    """Without redraws, sample by sample what generation.generate gives, copies marked alike."""
    n = 12
    answer = ask(
        client, conditions={"formula": "NaCl"}, n=n, max_samples=n, seed=5, redraws=0, include_invalid=True
    )
    expected = generate(Conditions(formula={"Na": 1, "Cl": 1}), n=n, seed=5, model=shipped, redraws=0)
    assert answer["funnel"]["requested"] == n
    assert [c["index"] for c in answer["crystals"]] == list(range(n))
    for crystal, sample in zip(answer["crystals"], map(sample_to_dict, expected), strict=True):
        assert (crystal["id"], crystal["text"]) == (sample["id"], sample["text"])
        assert crystal["verdict"]["reason"] == sample["reason"]
        assert crystal["verdict"]["checks"] == sample["checks"]
    assert answer["finish_reason"] == (
        "n" if all(c["verdict"]["valid"] for c in answer["crystals"]) else "budget"
    )


def test_copies_count_as_duplicates_unless_they_are_wanted(client):
    body = {
        "conditions": {"formula": "NaCl", "spacegroup": 225, "sites": 2},
        "n": 5,
        "max_samples": 12,
        "seed": 3,
    }
    unique = ask(client, **body)
    assert unique["finish_reason"] == "budget"
    assert unique["funnel"]["reasons"]["duplicate"] >= 5
    assert len(unique["crystals"]) == unique["funnel"]["unique"] < 5
    kept = ask(client, **body, unique=False)
    assert (len(kept["crystals"]), kept["finish_reason"]) == (5, "n")
    assert "unique" not in kept["crystals"][0]["verdict"]["checks"]


def test_numbers_that_do_not_fit_are_drawn_again_without_counting_twice(client):
    body = {
        "conditions": {"spacegroup": 12, "sites": 6},
        "n": 20,
        "max_samples": 20,
        "seed": 6,
        "include_invalid": True,
    }
    before, after = ask(client, **body, redraws=0), ask(client, **body, redraws=3)
    assert before["funnel"]["requested"] == after["funnel"]["requested"] == 20
    assert after["funnel"]["unique"] > before["funnel"]["unique"]
    mended = 0
    for old, new in zip(before["crystals"], after["crystals"], strict=True):
        if old["verdict"]["reason"] not in ("overlap", "density", "cell"):
            assert old["text"] == new["text"]
            continue
        assert old["text"].rpartition("\n")[0] == new["text"].rpartition("\n")[0]
        assert 1 <= new["measures"]["redraws"] <= 3
        mended += new["verdict"]["valid"]
    assert mended


@pytest.mark.parametrize("form", ["cif", "json"])
def test_structures_come_in_the_format_asked_for(client, form):
    crystal = ask(client, conditions={"formula": "NaCl"}, n=1, format=form)["crystals"][0]
    assert Structure.from_str(crystal["structure"], fmt=form).composition.reduced_formula == "NaCl"


def test_a_stream_holds_what_the_whole_answer_does(client):
    body = {"prompt": "two oxides of barium with 2 atoms", "unique": False, "n": 2, "seed": 11}
    whole, events = ask(client, **body), events_of(client, **body)
    assert [name for name, _ in events] == ["request", "crystal", "crystal", "funnel", ""]
    streamed = [data for name, data in events if name == "crystal"]
    for one, other in zip(streamed, whole["crystals"], strict=True):
        # the last digits depend on what else is in the batch
        assert one.pop("log_probability") == pytest.approx(other.pop("log_probability"), abs=1e-3)
        assert one == other
    assert {k: events[0][1][k] for k in ("understood", "conditions", "seed")} == {
        k: whole[k] for k in ("understood", "conditions", "seed")
    }
    assert events[-2][1] == {k: whole[k] for k in ("funnel", "usage", "finish_reason")}
    assert events[-1][1] == "[DONE]"


def test_words_and_conditions_are_combined_and_conditions_win(client):
    answer = ask(
        client,
        prompt="three cubic crystals of Na and Cl",
        conditions={"crystal_system": "tetragonal"},
        max_samples=60,
    )
    assert answer["understood"]["n"] == 3
    assert ["cubic", "cubic"] in answer["understood"]["understood"]
    assert answer["conditions"]["crystal_system"] == "tetragonal"
    assert sorted(answer["conditions"]["elements"]) == ["Cl", "Na"]
    assert len(answer["crystals"]) <= 3


def test_an_adapter_is_asked_by_its_name(client, live_server):
    if not live_server.state.backend.adapters:
        pytest.skip("this server has no adapter")
    name = live_server.state.backend.adapters[0]
    assert ask(client, model=name, conditions={"properties": {"bulk_modulus": 150}}, n=1)["model"] == name


def test_unconstrained_samples_are_judged_as_what_they_are(client):
    answer = ask(
        client,
        conditions={"formula": "NaCl"},
        n=6,
        max_samples=6,
        constrained=False,
        include_invalid=True,
        seed=2,
    )
    assert answer["funnel"]["requested"] == 6 == len(answer["crystals"])


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"conditions": {"formula": "NaXx"}}, "did you mean"),
        ({"conditions": {"formula": "NaCl", "spacegroup": 225, "sites": 3}}, "no multiple"),
        ({"conditions": {"formula": "Na3Cl", "spacegroup": 225, "sites": 4096}}, "sites"),
        ({"conditions": {"formla": "NaCl"}}, "did you mean 'formula'"),
        ({"conditions": {"formula": 7}}, "formula"),
        ({"conditions": []}, "conditions"),
        ({"n": 0}, "greater than or equal to 1"),
        ({"n": -3}, "greater than or equal to 1"),
        ({"n": 10**9}, "at most 1000"),
        ({"n": 2.5}, "n:"),
        ({"n": 9, "max_samples": 8}, "cannot give 9"),
        ({"n": 9, "max_samples": 10**9}, "at most 10000"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"format": "ciff"}, "did you mean 'cif'"),
        ({"protocol": "kitt"}, "did you mean 'kit'"),
        ({"prompt": "hello there"}, "nothing of it was understood"),
        ({"prompt": "x" * 5000}, "at most 1000 are read"),
        ({"prompt": "NaXx2"}, "did you mean"),
        ({"prompt": "cubic", "conditions": {"spacegroup": 1}}, "triclinic"),
        ({"redraws": 99}, "redraws"),
        ({"constraned": True}, "did you mean 'constrained'"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_words(client, body, words):
    answer = client.post(ROUTE, json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"
    assert error["param"]


def test_nan_is_no_temperature(client):
    answer = client.post(ROUTE, content='{"temperature": NaN}', headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert "error" in answer.json()


def test_an_unknown_model_is_not_found(client):
    answer = client.post(ROUTE, json={"model": "crystallm"})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"


# ---------------------------------------------------------------- clients that leave


def test_a_client_that_leaves_a_stream_ends_its_work(client, live_server):
    with client.stream(
        "POST", ROUTE, json={"n": 60, "stream": True, "conditions": {"sites": 3}, "unique": False}
    ) as answer:
        assert next(answer.iter_text())
    assert idle(live_server)


def test_a_client_that_leaves_while_it_waits_ends_its_work(live_server):
    async def leave():
        async with httpx.AsyncClient(base_url=live_server.url) as client:
            asking = asyncio.create_task(client.post(ROUTE, json={"n": 500, "seed": 1}, timeout=60))
            await asyncio.sleep(1)
            assert live_server.state.backend.n_running()
            asking.cancel()

    asyncio.run(leave())
    assert idle(live_server)


def test_what_was_drawn_ahead_is_given_up_when_enough_was_found(client, live_server):
    assert len(ask(client, conditions={"sites": 2}, n=3)["crystals"]) == 3
    assert idle(live_server)


def test_the_metrics_count_every_decided_sample(client):
    def counted():
        lines = client.get("/metrics").text.splitlines()
        return sum(
            float(line.split()[-1]) for line in lines if line.startswith("crystallm_kit_crystals_total")
        )

    before = counted()
    n_samples = ask(client, conditions=SMALL, n=2)["usage"]["n_samples"]
    assert counted() - before == n_samples


def test_stages_of_the_funnel_never_grow(client):
    funnel = ask(client, conditions=SMALL, n=4, max_samples=20)["funnel"]
    counts = [funnel[stage] for stage in STAGES]
    assert counts == sorted(counts, reverse=True)
