import gzip
import json
import os
from pathlib import Path

import pytest
from pymatgen.core import Lattice, Structure
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from crystallm_kit.errors import ModelError, ParseError, UnknownName, UserError
from crystallm_kit.recipes import load_recipe
from crystallm_kit.records import Crystal
from crystallm_kit.text.representation import REPRESENTATIONS, Alphabet, cut, representation
from crystallm_kit.tokens.tokenizer import (
    TokenizerRecipe,
    build_from_recipe,
    build_tokenizer,
    encode_strict,
    extend_tokenizer,
    format_tokenizer,
    load_tokenizer,
    main,
    padded_vocabulary_size,
    save_tokenizer,
)

FORMATS = sorted(REPRESENTATIONS)
ARTEFACTS = Path(__file__).parents[2] / "tokenizers"
ALPHABET = Alphabet(
    tokens=("<pad>", "<eos>", "N", "Na", "a", "1", "-", " ", "\n", "["), end="<eos>", pad="<pad>"
)
PEROVSKITE = Structure(
    Lattice.cubic(3.99),
    ["Ba", "Ti", "O", "O", "O"],
    [[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]],
)
PROSE = [
    "Nation and natural numbers: he said that no one in the Nation could name an oxide of sodium.",
    "In a crystal as old as this, I believe, carbon sits between others. Can Sn be found? Yes, he said so.",
]


@pytest.fixture(scope="module")
def base_tokenizer():
    """A byte-level BPE such as GPT-2's and Llama's, trained on a few sentences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=["</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(PROSE, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


@pytest.mark.parametrize("name", FORMATS)
def test_ids_and_text_are_lossless_both_ways(name):
    text = representation(name).encode(Crystal("x", PEROVSKITE))
    tokenizer = format_tokenizer(name)
    ids = encode_strict(tokenizer, text)
    assert tokenizer.decode(ids) == text
    assert encode_strict(tokenizer, tokenizer.decode(ids)) == ids


@pytest.mark.parametrize("name", FORMATS)
def test_the_tokenizer_cuts_as_the_alphabet_says(name):
    alphabet = representation(name).alphabet()
    text = representation(name).encode(Crystal("x", PEROVSKITE))
    tokenizer = format_tokenizer(name)
    assert tokenizer.convert_ids_to_tokens(encode_strict(tokenizer, text)) == cut(text, alphabet)


@pytest.mark.parametrize("name", FORMATS)
def test_end_and_pad_are_their_positions_in_the_alphabet(name):
    alphabet, tokenizer = representation(name).alphabet(), format_tokenizer(name)
    assert len(tokenizer) == len(alphabet.tokens)
    for token, token_id in ((alphabet.end, tokenizer.eos_token_id), (alphabet.pad, tokenizer.pad_token_id)):
        assert token_id == (None if token is None else alphabet.tokens.index(token))


@pytest.mark.parametrize("name", FORMATS)
def test_the_committed_artefact_is_a_fresh_build_of_its_recipe(name, tmp_path):
    recipe = load_recipe(ARTEFACTS / name / "recipe.yaml", TokenizerRecipe)
    assert recipe.representation == name
    save_tokenizer(build_from_recipe(recipe), tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        committed, fresh = ((f / file).read_text(encoding="utf-8") for f in (ARTEFACTS / name, tmp_path))
        assert json.loads(committed) == json.loads(fresh), f"run: {main.__module__} --build {name}"


@pytest.mark.parametrize("name", FORMATS)
def test_auto_tokenizer_reads_the_artefact(name):
    text = representation(name).encode(Crystal("x", PEROVSKITE))
    tokenizer = AutoTokenizer.from_pretrained(ARTEFACTS / name, local_files_only=True)
    assert tokenizer(text)["input_ids"] == encode_strict(format_tokenizer(name), text)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("name", FORMATS)
def test_the_decoder_is_one_that_guidance_takes(name):
    """A plain Fuse stops vLLM's guidance backend with "can't determine decoder type"."""
    decoder = json.loads((ARTEFACTS / name / "tokenizer.json").read_text(encoding="utf-8"))["decoder"]
    assert [part["type"] for part in decoder["decoders"]][-2:] == ["ByteFallback", "Fuse"]


def test_the_end_is_kept_in_decoding_and_skipped_only_on_request():
    tokenizer = build_tokenizer(ALPHABET)
    ids = encode_strict(tokenizer, "Na 1<eos>")
    assert ids == [3, 7, 5, 1]
    assert tokenizer.decode(ids) == "Na 1<eos>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Na 1"


def test_the_longest_token_wins_and_special_characters_are_plain():
    tokenizer = build_tokenizer(ALPHABET)
    assert tokenizer.convert_ids_to_tokens(encode_strict(tokenizer, "NaN[-1\n")) == [
        *("Na", "N", "[", "-", "1", "\n")
    ]


@pytest.mark.parametrize(("text", "position"), [("Na x1", 3), ("x", 0), ("Na\n1?", 4)])
def test_strict_encoding_names_what_no_token_covers(text, position):
    with pytest.raises(ParseError, match=f"character {position}: no token for") as caught:
        encode_strict(build_tokenizer(ALPHABET), text)
    assert caught.value.line == text.count("\n") + 1


def test_strict_encoding_does_not_take_the_unknown_token_for_a_token():
    alphabet = Alphabet(tokens=("1", " ", "<unk>"), pattern=r"1| |\w+", unknown="<unk>")
    tokenizer = build_tokenizer(alphabet)
    assert tokenizer("1 x")["input_ids"] == [0, 1, 2]
    with pytest.raises(ParseError, match="character 2"):
        encode_strict(tokenizer, "1 x")


def test_rewrites_come_before_cutting_and_are_undone_in_decoding():
    alphabet = Alphabet(
        tokens=("Pm", "Pm_sg", " ", "\n"), rewrites=((r" +", " "), (r"Pm(?=\n)", "Pm_sg")),
        decoder_rewrites=(("Pm_sg", "Pm"),),
    )  # fmt: skip
    tokenizer = build_tokenizer(alphabet)
    ids = encode_strict(tokenizer, "Pm   Pm\n")
    assert ids == [0, 2, 1, 3]
    assert tokenizer.decode(ids) == "Pm Pm\n"
    assert cut("Pm   Pm\n", alphabet) == ["Pm", " ", "Pm_sg", "\n"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": ("1", "1")}, "occur twice"),
        ({"tokens": ("1",), "end": "<eos>"}, "end '<eos>' is not among its tokens"),
        ({"tokens": ("1", "end", "bend"), "end": "end"}, "is part of the token 'bend'"),
    ],
)
def test_an_alphabet_that_cannot_be_lossless_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        build_tokenizer(Alphabet(**changes))


def test_a_padded_vocabulary_keeps_ids_and_is_not_written():
    plain, padded = build_tokenizer(ALPHABET), build_tokenizer(ALPHABET, pad_to_multiple_of=16)
    assert (len(plain), len(padded)) == (10, 16)
    assert encode_strict(padded, "Na 1<eos>") == encode_strict(plain, "Na 1<eos>")
    assert padded.convert_ids_to_tokens([15]) == ["<unused_5>"]


@pytest.mark.parametrize(
    ("n", "multiple", "padded"), [(371, 64, 384), (384, 64, 384), (371, 1, 371), (0, 8, 0)]
)
def test_padding_reaches_the_next_multiple(n, multiple, padded):
    assert padded_vocabulary_size(n, multiple) == padded
    with pytest.raises(UserError, match="multiple 0"):
        padded_vocabulary_size(n, 0)


def test_a_saved_tokenizer_loads_and_a_folder_without_one_says_so(tmp_path):
    save_tokenizer(build_tokenizer(ALPHABET), tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert encode_strict(loaded, "Na\n<eos>") == [3, 8, 1]
    assert (loaded.eos_token_id, loaded.pad_token_id) == (1, 0)
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path / "nowhere")


def test_a_broken_tokenizer_file_is_a_model_error(tmp_path):
    save_tokenizer(build_tokenizer(ALPHABET), tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model"')
    with pytest.raises(ModelError, match="cannot be read"):
        load_tokenizer(tmp_path)


def test_an_unknown_format_has_no_tokenizer():
    with pytest.raises(UnknownName, match="did you mean 'compact'"):
        format_tokenizer("compct")


def test_build_writes_the_folder_of_a_recipe(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "recipe.yaml").write_text("representation: xyz\npad_to_multiple_of: 8\n")
    main(["--build", "--folder", str(tmp_path), "mine"])
    assert len(load_tokenizer(tmp_path / "mine")) % 8 == 0
    assert "mine: 1" in capsys.readouterr().out


@pytest.mark.parametrize("name", FORMATS)
def test_an_extended_base_reads_prose_as_before(base_tokenizer, name):
    extended, _ = extend_tokenizer(base_tokenizer, representation(name).alphabet())
    unseen = "Banana trees of Canada, Titanic rutile, Fermi levels, Cobalt; NaN is data, not a Hafnium loop."
    for sentence in [*PROSE, unseen]:
        assert extended(sentence)["input_ids"] == base_tokenizer(sentence)["input_ids"]


@pytest.mark.parametrize("name", FORMATS)
def test_an_extended_base_is_lossless_on_the_formats_text(base_tokenizer, name):
    text = representation(name).encode(Crystal("x", PEROVSKITE))
    extended, added_ids = extend_tokenizer(base_tokenizer, representation(name).alphabet())
    ids = extended(text)["input_ids"]
    assert extended.decode(ids, clean_up_tokenization_spaces=False) == text
    assert len(ids) < len(base_tokenizer(text)["input_ids"])
    assert added_ids == list(range(len(base_tokenizer), len(extended)))


def test_an_extended_base_writes_elements_as_one_token_and_reuses_what_it_has(base_tokenizer):
    extended, added_ids = extend_tokenizer(base_tokenizer, representation("compact").alphabet())
    added = set(extended.convert_ids_to_tokens(added_ids))
    assert "Ba" in added
    assert added.isdisjoint("0123456789. \nCON")
    assert "Ba" in extended.tokenize("\nBa\n0.00")
    assert "<eos>" not in added  # the base has an end of its own
    assert extended.eos_token == "</s>"
    assert extended.pad_token == "<pad>"  # and had no pad


def test_extending_leaves_the_base_unchanged_and_survives_saving(base_tokenizer, tmp_path):
    n_before = len(base_tokenizer)
    extended, _ = extend_tokenizer(base_tokenizer, representation("compact").alphabet())
    assert len(base_tokenizer) == n_before
    save_tokenizer(extended, tmp_path)
    text = "A perovskite in the Nation:\n" + representation("compact").encode(Crystal("x", PEROVSKITE))
    assert load_tokenizer(tmp_path)(text)["input_ids"] == extended(text)["input_ids"]


# Engines know an end token by its id only, so a grammar that spells it can never be completed.
SPELLS_ITS_END = pytest.mark.xfail(strict=True, reason="the grammar of 'wyckoff' spells the end token")
SERVED = [pytest.param(name, marks=SPELLS_ITS_END) if name == "wyckoff" else name for name in FORMATS]


def _without_end(tokenizer, ids):
    return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids


@pytest.mark.parametrize("name", SERVED)
def test_guidance_follows_the_grammar_to_an_accepting_end(name):
    llguidance = pytest.importorskip("llguidance", reason="llguidance is not installed (vllm brings it)")
    from llguidance.hf import from_tokenizer

    tokenizer, text_format = load_tokenizer(ARTEFACTS / name), representation(name)
    ids = _without_end(tokenizer, encode_strict(tokenizer, text_format.encode(Crystal("x", PEROVSKITE))))
    grammar = llguidance.LLMatcher.grammar_from_lark(text_format.grammar().lark)
    matcher = llguidance.LLMatcher(from_tokenizer(tokenizer), grammar)
    assert matcher.try_consume_tokens(ids) == len(ids)
    assert matcher.is_accepting()


@pytest.mark.filterwarnings("ignore")  # xgrammar's own
@pytest.mark.parametrize("name", SERVED)
def test_xgrammar_follows_the_grammar_to_its_end(name):
    xgrammar = pytest.importorskip("xgrammar", reason="xgrammar is not installed (vllm brings it)")
    tokenizer, text_format = load_tokenizer(ARTEFACTS / name), representation(name)
    ids = _without_end(tokenizer, encode_strict(tokenizer, text_format.encode(Crystal("x", PEROVSKITE))))
    stop = None if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    compiler = xgrammar.GrammarCompiler(
        xgrammar.TokenizerInfo.from_huggingface(tokenizer, stop_token_ids=stop)
    )
    compiled = compiler.compile_grammar(xgrammar.Grammar.from_ebnf(text_format.grammar().gbnf))
    matcher = xgrammar.GrammarMatcher(compiled, terminate_without_stop_token=True)
    assert all(matcher.accept_token(token_id) for token_id in ids)
    assert matcher.is_terminated()


@pytest.mark.real_data
def test_cif_ids_are_those_of_crystallm():
    folder = os.environ.get("CRYSTALLM_KIT_GOLDEN")
    if folder is None:
        pytest.skip("CRYSTALLM_KIT_GOLDEN is not set: it names the folder of CrystaLLM's golden files")
    with gzip.open(Path(folder) / "crystallm_cif_golden.json.gz", "rt", encoding="utf-8") as file:
        rows = json.load(file)
    tokenizer = format_tokenizer("cif")
    assert all(encode_strict(tokenizer, row["text"]) == row["ids"] for row in rows)
    assert len(rows) == 200
