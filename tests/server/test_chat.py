"""POST /v1/chat/completions: the clients that people have, plain words, crystals in the answer."""

import json

import pytest
from pymatgen.core import Structure

WORDS = "two crystals of Na and Cl with 2 atoms"


@pytest.fixture(scope="module")
def client(live_server):
    with live_server.client() as client:
        yield client


def say(client, words=WORDS, extra=None, **settings):
    settings.setdefault("seed", 3)
    return client.chat.completions.create(
        model="crystallm-kit", messages=[{"role": "user", "content": words}], extra_body=extra, **settings
    )


def cifs_of(text):
    return [part.partition("```")[0] for part in text.split("```cif\n")[1:]]


def test_an_answer_holds_sentences_and_crystals_as_cif(client):
    answer = say(client)
    (choice,) = answer.choices
    assert (answer.object, choice.message.role, choice.finish_reason) == (
        "chat.completion",
        "assistant",
        "stop",
    )
    assert choice.message.content.startswith("Asked for: 2 x only Na, Cl")
    assert "valid by the protocol kit" in choice.message.content
    structures = [Structure.from_str(text, fmt="cif") for text in cifs_of(choice.message.content)]
    crystals = choice.message.model_extra["crystals"]
    assert len(structures) == len(crystals) == 2
    for structure, crystal in zip(structures, crystals, strict=True):
        assert set(structure.composition.as_dict()) == {"Na", "Cl"}
        assert structure.composition.reduced_formula == crystal["formula"]
        assert crystal["verdict"]["valid"]
    ours = answer.model_extra["crystals"]
    assert ours["funnel"]["unique"] == 2
    assert sorted(ours["conditions"]["elements"]) == ["Cl", "Na"]
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens > 20


def test_choices_have_crystals_of_their_own(client):
    answer = say(client, "a crystal with 2 atoms", n=3)
    formulas = [choice.message.model_extra["crystals"] for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [len(crystals) for crystals in formulas] == [1, 1, 1]
    assert len({crystals[0]["id"] for crystals in formulas}) == 3


@pytest.mark.parametrize("n", [1, 2])
def test_a_stream_says_what_the_whole_answer_says(client, n):
    whole = say(client, n=n, extra={"unique": False})
    roles, texts, crystals, reasons, usage = {}, {}, {}, {}, None
    for chunk in say(
        client, n=n, extra={"unique": False}, stream=True, stream_options={"include_usage": True}
    ):
        assert chunk.object == "chat.completion.chunk"
        usage = chunk.usage or usage
        for choice in chunk.choices:
            if choice.index not in roles:
                roles[choice.index] = choice.delta.role
            assert choice.index not in reasons  # nothing after the last
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            crystals[choice.index] = (choice.delta.model_extra or {}).get("crystals")
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert roles == dict.fromkeys(range(n), "assistant")
    assert reasons == dict.fromkeys(range(n), "stop")
    for choice in whole.choices:
        assert texts[choice.index] == choice.message.content
        expected = choice.message.model_extra["crystals"]
        assert [c["text"] for c in crystals[choice.index]] == [c["text"] for c in expected]
    assert usage == whole.usage


def test_langchain_talks_to_it_unchanged(live_server):
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(
        model="crystallm-kit",
        base_url=f"{live_server.url}/v1",
        api_key="none-is-asked-for",
        max_retries=0,
        seed=3,
    )
    answer = model.invoke(WORDS)
    assert len(cifs_of(answer.content)) == 2
    assert answer.usage_metadata["output_tokens"] > 0
    streamed = "".join(chunk.content for chunk in model.stream(WORDS))
    assert streamed == answer.content


def test_words_that_say_nothing_get_help_and_no_error(client):
    for settings in ({}, {"n": 2}):
        answer = say(client, "hello, who are you?", **settings)
        for choice in answer.choices:
            assert "for example" in choice.message.content
            assert choice.finish_reason == "stop"
            assert choice.message.model_extra["crystals"] == []
        assert answer.usage.total_tokens == 0


def test_only_the_last_message_of_the_user_is_read(client):
    answer = client.chat.completions.create(
        model="crystallm-kit",
        seed=3,
        messages=[
            {"role": "system", "content": "You know crystals of Fe."},
            {"role": "user", "content": "KBr"},
            {"role": "assistant", "content": "Here it is."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "now NaCl with"}, {"type": "text", "text": "2 atoms"}],
            },
        ],
    )
    assert [c["formula"] for c in answer.choices[0].message.model_extra["crystals"]] == ["NaCl"]


def test_what_was_not_understood_is_said(client):
    answer = say(client, "a blue crystal of NaCl with 2 atoms")
    assert "Not understood, so without effect: 'blue" in answer.choices[0].message.content


def test_a_spent_budget_is_said_and_ends_with_length(client):
    answer = say(
        client, "five crystals of NaCl in Fm-3m with 2 atoms", extra={"max_samples": 6}
    )  # rock salt, and nothing else
    (choice,) = answer.choices
    assert choice.finish_reason == "length"
    assert 1 <= len(choice.message.model_extra["crystals"]) < 5
    assert "of 5: the 6 samples of the budget are spent (stopped by duplicate" in choice.message.content


def test_conditions_beside_the_words_win(client):
    answer = say(client, "NaCl with 2 atoms", extra={"conditions": {"formula": "KBr"}})
    assert answer.model_extra["crystals"]["conditions"]["formula"] == {"K": 1, "Br": 1}


def test_a_text_that_stops_ends_the_message(client):
    content = say(client, stop=["```cif"]).choices[0].message.content
    assert content.startswith("Asked for")
    assert "```" not in content


@pytest.mark.parametrize(
    ("words", "settings", "says"),
    [
        ("NaXx2", {}, "did you mean"),
        ("cubic Pnma", {}, "orthorhombic"),
        ("NaCl", {"n": 5000}, "at most 1000"),
        ("900 crystals of NaCl", {"n": 10}, "at most 1000"),
        ("NaCl", {"logprobs": True}, "log_probability"),
        ("NaCl", {"response_format": {"type": "json_object"}}, "only text"),
        ("NaCl", {"tools": [{"type": "function", "function": {"name": "f"}}]}, "Leave it out"),
        ("NaCl", {"temperature": -2}, "temperature"),
        ("NaCl", {"presence_penalty": 1}, "only 0"),
        ("NaCl", {"extra": {"conditons": {}}}, "did you mean 'conditions'"),
        ("NaCl", {"extra": {"messages": []}}, "messages"),
        ("NaCl", {"extra": {"messages": [{"role": "system", "content": "x"}]}}, "none of them is the user's"),
        ("NaCl", {"extra": {"messages": [{"role": "user", "content": 3}]}}, "messages"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_words(client, words, settings, says):
    import openai

    with pytest.raises(openai.BadRequestError) as refused:
        say(client, words, **settings)
    assert says in refused.value.body["message"]


def test_an_unknown_model_is_not_found(client):
    import openai

    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": "NaCl"}])


def test_the_help_streams_too(client):
    chunks = list(say(client, "good morning", stream=True))
    assert "for example" in "".join(c.choices[0].delta.content or "" for c in chunks)
    assert json.loads(chunks[-1].model_dump_json())["choices"][0]["finish_reason"] == "stop"
