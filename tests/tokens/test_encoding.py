"""One crystal as token ids: by a base model's tokenizer as by the format's own, nothing is lost."""

import json
import os
import shutil
from itertools import islice
from pathlib import Path

import pytest
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Lattice, Structure

from crystallm_kit.errors import ModelError, UserError
from crystallm_kit.records import Crystal
from crystallm_kit.structures.files import read
from crystallm_kit.text.parsing import parse_completion
from crystallm_kit.text.prompts import template_named
from crystallm_kit.text.representation import REPRESENTATIONS, representation
from crystallm_kit.tokens.encoding import (
    CrystalEncoder,
    EncodingRecipe,
    check_pair,
    check_round_trip,
    write_tokenizer,
)
from crystallm_kit.tokens.tokenizer import base_tokenizer, load_tokenizer, prompt_ids

PEROVSKITE = Crystal(
    "BaTiO3",  # AFLOW AB3C_cP5_221_a_c_b
    Structure(
        Lattice.cubic(4.0), ["Ba", "Ti", "O", "O", "O"],
        [[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]),
    {"band_gap_ev": 1.8, "formation_energy_ev_per_atom": -3.4, "bulk_modulus_gpa": 162.0},
)  # fmt: skip
KINDS = ("byte_level", "sentence_piece", "llama_2")


@pytest.fixture(params=KINDS)
def base(request) -> Path:
    return request.getfixturevalue(request.param)


def encoder_of(base, tmp_path, **settings):
    recipe = EncodingRecipe(**{"format": "compact", "template": "crystal-text-llm", "tokenizer": str(base),
                               **settings})  # fmt: skip
    write_tokenizer(recipe, tmp_path / "tokenizer")
    return CrystalEncoder(recipe, seed=5, tokenizer_folder=tmp_path / "tokenizer")


@pytest.mark.parametrize("new_tokens", ["none", "format"])
def test_ids_of_a_base_tokenizer_are_read_back_as_the_text_and_end_with_its_end(base, new_tokens, tmp_path):
    encoder = encoder_of(base, tmp_path, new_tokens=new_tokens)
    check_round_trip(encoder)
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    encoded = encoder(PEROVSKITE)
    assert encoded.text == representation("compact").encode(PEROVSKITE)
    for ids in encoded.texts:
        assert ids[-1] == tokenizer.eos_token_id == base_tokenizer(str(base)).eos_token_id
        assert tokenizer.decode(ids[:-1]) == encoded.text
        assert ids[0] == tokenizer.convert_tokens_to_ids("4")  # no blank before the first number


def test_prompts_are_the_ids_that_generation_sends(base, tmp_path):
    encoder = encoder_of(base, tmp_path)
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    template = template_named("crystal-text-llm")
    encoded = encoder(PEROVSKITE)
    assert len(encoded.prompts) == 16
    for ids in encoded.prompts:
        assert ids[0] == tokenizer.bos_token_id
        prompt = tokenizer.decode(ids[1:])
        assert prompt_ids(tokenizer, prompt) == ids
        template.parse(prompt)  # raises if it is none of the template's
    assert len({tuple(ids) for ids in encoded.prompts}) > 5


def test_the_vocabulary_says_where_the_base_ends_and_the_new_tokens_begin(byte_level, tmp_path):
    plain = encoder_of(byte_level, tmp_path / "plain").info.vocabulary
    extended = encoder_of(byte_level, tmp_path / "extended", new_tokens="format").info.vocabulary
    n = len(base_tokenizer(str(byte_level)))
    assert (plain.size, plain.n_base) == (n, n)
    assert extended.n_base == n
    new = load_tokenizer(tmp_path / "extended" / "tokenizer").get_added_vocab()
    assert extended.size == n + sum(i >= n for i in new.values())
    assert {"Sm", "Xe"} <= set(new)
    assert (plain.bos_token_id, plain.eos_token_id, plain.pad_token_id) == (0, 1, None)


def test_the_tokenizers_hash_is_that_of_its_file(byte_level, tmp_path):
    import hashlib

    info = encoder_of(byte_level, tmp_path).info
    content = (tmp_path / "tokenizer" / "tokenizer.json").read_bytes()
    assert info.tokenizer_sha256 == hashlib.sha256(content).hexdigest()
    assert info.template_sha256 == template_named("crystal-text-llm").hash


def test_blanks_before_points_survive_decoding(byte_level, tmp_path):
    """Tokenizers such as Llama 3's remove them by default: "2.96 .3053" became "2.96.3053"."""
    base = tmp_path / "base"
    base.mkdir()
    for file in byte_level.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**config, "clean_up_tokenization_spaces": True}))
    recipe = EncodingRecipe(format="wyckoff", template="kit-1", tokenizer=str(base))
    write_tokenizer(recipe, tmp_path / "tokenizer")
    encoder = CrystalEncoder(recipe, seed=0, tokenizer_folder=tmp_path / "tokenizer")
    rutile = "Ti2 O4 136\nTi a\nO f\n4.59 2.96 .3053 end"
    assert load_tokenizer(tmp_path / "tokenizer").decode(encoder.cut(rutile)) == rutile


def test_kit_1_with_a_base_tokenizer_has_whole_prompts(byte_level, tmp_path):
    """Tokenised apart, parts of a prompt would not have the ids of the prompt."""
    encoder = encoder_of(byte_level, tmp_path, format="wyckoff", template="kit-1", new_tokens="format")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    prompts = [tokenizer.decode(ids[1:]) for ids in encoder(PEROVSKITE).prompts]
    for prompt in prompts:
        assert template_named("kit-1").render(template_named("kit-1").parse(prompt)) == prompt
    assert len(set(prompts)) > 5


@pytest.mark.parametrize(
    ("form", "template", "message"),
    [
        ("compact", "crystal-text-llm", "has no tokens of its own for the words"),
        ("compact", "kit-1", "asks for wyckoff, the format is 'compact'"),
        ("xyz", "cif-crystallm", "asks for cif"),
    ],
)
def test_a_template_that_the_format_cannot_say_is_refused_before_the_work(form, template, message):
    with pytest.raises(UserError, match=message) as caught:
        check_pair(EncodingRecipe(format=form, template=template))
    assert "Without a tokenizer: wyckoff with kit-1, cif with cif-crystallm." in str(caught.value)


def test_crystallms_prompts_keep_their_own_tokens(byte_level):
    with pytest.raises(UserError, match="leave 'tokenizer' out"):
        check_pair(EncodingRecipe(format="cif", template="cif-crystallm", tokenizer=str(byte_level)))


def test_a_tokenizer_that_loses_the_text_is_refused_before_the_work(tmp_path):
    """The format's own tokenizer drops what it has no token for; as a base it cannot carry another format."""
    recipe = EncodingRecipe(format="wyckoff", template="kit-1")
    write_tokenizer(recipe, tmp_path / "wyckoff")
    with pytest.raises(UserError, match=r"does not suit the format 'compact'.*the text has"):
        check_round_trip(encoder_of(tmp_path / "wyckoff", tmp_path))


def test_where_new_tokens_lose_the_text_the_message_says_to_do_without(sentence_piece, tmp_path):
    """A step that puts a blank before every stretch, inside a sequence of steps, is left as it is."""
    base = tmp_path / "base"
    shutil.copytree(sentence_piece, base)
    state = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    step = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}
    state |= {"normalizer": None, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [step]}}
    (base / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    check_round_trip(encoder_of(base, tmp_path / "plain"))
    with pytest.raises(UserError, match="set new_tokens to none"):
        check_round_trip(encoder_of(base, tmp_path / "extended", new_tokens="format"))


@pytest.mark.real_data
@pytest.mark.skipif("CRYSTALLM_KIT_DATA" not in os.environ, reason="CRYSTALLM_KIT_DATA names no data folder")
@pytest.mark.parametrize("form", sorted(REPRESENTATIONS))
def test_ids_of_real_crystals_are_read_back_as_the_same_crystals(form, base, tmp_path):
    crystals = list(islice(read(Path(os.environ["CRYSTALLM_KIT_DATA"]) / "mp_val.parquet"), 30))
    encoder = encoder_of(base, tmp_path, format=form, template="words-1", new_tokens="format")
    tokenizer, matcher = load_tokenizer(tmp_path / "tokenizer"), StructureMatcher()
    for crystal in crystals:
        found = parse_completion(tokenizer.decode(encoder(crystal).texts[0][:-1]), encoder.format)
        assert isinstance(found, Crystal), found
        assert matcher.fit(found.structure, crystal.structure)


def test_a_missing_tokenizer_and_one_without_an_end_are_named(byte_level, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="tokenizer 'no/such-model'"):
        base_tokenizer("no/such-model")
    tokenizer = load_tokenizer(byte_level)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(str(tmp_path))
    with pytest.raises(ModelError, match="no end token"):
        base_tokenizer(str(tmp_path))


def test_new_tokens_without_a_base_are_refused():
    with pytest.raises(UserError, match="new_tokens extends a base model's 'tokenizer', and none is given"):
        check_pair(EncodingRecipe(new_tokens="format"))


def test_crystallm_pis_prompts_ask_for_its_dialect():
    settings = {"format": "cif", "template": "cif-crystallm-pi"}
    with pytest.raises(UserError, match=r"asks for format_settings\.dialect 'pi', it is 'v1'"):
        check_pair(EncodingRecipe(**settings))
    encoder = CrystalEncoder(EncodingRecipe(**settings, format_settings={"dialect": "pi"}), seed=0)
    encoded = encoder(PEROVSKITE)
    assert encoded.prompts == [[]]
    assert encoder.alphabet.tokens[encoded.texts[0][-1]] == "<eos>"
    assert encoded.cell_formula == "Ba1 O3 Ti1"
