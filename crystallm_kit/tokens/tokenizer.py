"""Tokenizers: a format's alphabet as a Hugging Face fast tokenizer, and as an addition to another model's.

Contract: position in `Alphabet.tokens` = token id; the tokens of a text, joined, are the text, so
`decode(encode(t))` is `t` for every text that the format can write. What no token covers is dropped by a
plain call of the tokenizer; `encode_strict` raises instead, and is what the kit's own code calls.

    >>> tokenizer = format_tokenizer("compact")
    >>> tokenizer.convert_ids_to_tokens(encode_strict(tokenizer, "5.64 5.64"))
    ['5', '.', '6', '4', ' ', '5', '.', '6', '4']

`python -m crystallm_kit.tokens.tokenizer --build` writes each folder `tokenizers/<name>/` from its
recipe.yaml.

Not here: how texts are cut (text/representation.py), which id may come next (masking.py), packing
(corpus.py).
"""

import argparse
import copy
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from crystallm_kit.errors import ModelError, ParseError, UserError
from crystallm_kit.recipes import load_recipe
from crystallm_kit.text.representation import (
    REPRESENTATIONS,
    Alphabet,
    cutting_pattern,
    representation,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FastTokenizer: TypeAlias = "PreTrainedTokenizerFast"  # for modules that do not load transformers
UNUSED = "<unused_{}>"


def build_tokenizer(alphabet: Alphabet, *, pad_to_multiple_of: int = 1) -> "PreTrainedTokenizerFast":
    """Return the lossless fast tokenizer of an alphabet.

    `eos_token_id` and `pad_token_id` are the ids that `alphabet.end` and `alphabet.pad` have by position.
    Decoding keeps them, unless asked to skip special tokens.

    Args:
        alphabet: Tokens in id order, and how a text is cut.
        pad_to_multiple_of: Fill the vocabulary with "<unused_i>" up to a multiple of this; see
            `padded_vocabulary_size` before using it.

    Raises:
        UserError: If a token occurs twice; if end, pad or unknown is no token; or if one of these
            is part of another token, so that registering it would change how texts are cut.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: position for position, token in enumerate(alphabet.tokens)}
    if len(vocabulary) != len(alphabet.tokens):
        twice = sorted({token for token in alphabet.tokens if alphabet.tokens.count(token) > 1})
        raise UserError(f"alphabet: tokens that occur twice: {twice}; every token needs one id")
    named = {"end": alphabet.end, "pad": alphabet.pad, "unknown": alphabet.unknown}
    for role, token in named.items():
        if token is not None:
            _check_special(role, token, vocabulary)
    for i in range(padded_vocabulary_size(len(vocabulary), pad_to_multiple_of) - len(vocabulary)):
        vocabulary[UNUSED.format(i)] = len(vocabulary)

    unknown = {} if alphabet.unknown is None else {"unk_token": alphabet.unknown}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, **unknown))
    if alphabet.rewrites:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Replace(Regex(pattern), by) for pattern, by in alphabet.rewrites]
        )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(cutting_pattern(alphabet)), "removed", invert=True)
    # ByteFallback changes nothing here; guidance refuses a decoder that is a plain Fuse.
    rewrites = [decoders.Replace(literal, by) for literal, by in alphabet.decoder_rewrites]
    tokenizer.decoder = decoders.Sequence([*rewrites, decoders.ByteFallback(), decoders.Fuse()])
    special = {"eos_token": alphabet.end, "pad_token": alphabet.pad, "unk_token": alphabet.unknown}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        **{role: token for role, token in special.items() if token is not None},
    )


def padded_vocabulary_size(n_tokens: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that holds `n_tokens`.

    Tensor cores like multiples of 64. vLLM pads its own copy of the embedding and cuts the logits back, so it
    needs none of this. Rows that are added to the model itself ARE sampled, by every engine: mask them
    (tokens/masking.py), or leave the vocabulary as it is.

    Raises:
        UserError: If `multiple` is not positive.
    """
    if multiple < 1:
        raise UserError(f"vocabulary size: multiple {multiple}; expected 1 or more")
    return -(-n_tokens // multiple) * multiple


def encode_strict(tokenizer: "PreTrainedTokenizerFast", text: str) -> list[int]:
    """Return the ids of a text, without special tokens added.

    Raises:
        ParseError: If a part of the text is covered by no token, with its position.
    """
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    normalizer = tokenizer.backend_tokenizer.normalizer
    expected = text if normalizer is None else normalizer.normalize_str(text)
    position = 0
    for token in tokenizer.convert_ids_to_tokens(ids):
        if not expected.startswith(token, position):
            break
        position += len(token)
    if position != len(expected):
        line = expected.count("\n", 0, position) + 1
        raise ParseError(
            "uncovered_text",
            f"character {position}: no token for {expected[position : position + 12]!r}; "
            "expected text of the format that this tokenizer was built for",
            line,
        )
    return ids


def prompt_ids(tokenizer: "PreTrainedTokenizerFast", text: str) -> list[int]:
    """Return the ids that a model gets for a prompt, in training and in generation alike.

    The text's own ids; before them the tokenizer's first token (BOS) where it puts one there by default. An
    end that a tokenizer appends by default is left out: the crystal follows.
    """
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    first = tokenizer.bos_token_id
    begins = first is not None and tokenizer("")["input_ids"][:1] == [first]
    return [first, *ids] if begins and ids[:1] != [first] else ids


def following_ids(tokenizer: "PreTrainedTokenizerFast", text: str) -> list[int]:
    """Return the ids of a text that follows a line of a prompt.

    Tokenizers of the SentencePiece kind put a blank before a text that stands alone; one that follows has
    none.
    """
    line: list[int] = tokenizer("\n", add_special_tokens=False)["input_ids"]
    ids: list[int] = tokenizer(f"\n{text}", add_special_tokens=False)["input_ids"]
    if ids[: len(line)] == line:
        return ids[len(line) :]
    alone: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return alone


def extend_tokenizer(
    base_tokenizer: "PreTrainedTokenizerFast", alphabet: Alphabet
) -> tuple["PreTrainedTokenizerFast", list[int]]:
    """Return a copy of a base model's tokenizer that knows a format's tokens, and the ids that are new.

    The embedding has to grow by `len(added_ids)` rows (fewer if the model's embedding is already larger than
    its vocabulary), and the new rows have to be trained. Not added: what the base writes as one token already
    (digits, most element symbols), and the format's end where the base has an end of its own.

    A token of letters and digits is recognised only where it stands as a word of its own: adding "Na" leaves
    "Nation" as it was, and the "Na" of "Na4" is cut by the base's own rule. A token with a blank, a point or
    a newline ("12 ", ".25" of `wyckoff`) is recognised wherever it stands, in a prompt's numbers too.
    Decoding gives the text back in every case: a blank that the base puts before every stretch between such
    tokens (SentencePiece) is put before the first alone.

    Args:
        base_tokenizer: Any fast tokenizer; left unchanged.
        alphabet: The format's tokens.
    """
    from transformers import AddedToken

    tokenizer = copy.deepcopy(base_tokenizer)
    _prefix_once(tokenizer)
    n_before = len(tokenizer)
    special = {alphabet.end, alphabet.pad, alphabet.unknown}
    new = [token for token in alphabet.tokens if token not in special and not _is_one_token(tokenizer, token)]
    tokenizer.add_tokens(
        [AddedToken(token, single_word=token.isalnum(), normalized=False, special=False) for token in new]
    )
    roles = {"eos_token": alphabet.end, "pad_token": alphabet.pad}
    missing = {role: token for role, token in roles.items() if token and getattr(tokenizer, role) is None}
    if missing:
        tokenizer.add_special_tokens(missing)
    return tokenizer, list(range(n_before, len(tokenizer)))


def load_tokenizer(path: str | Path) -> "PreTrainedTokenizerFast":
    """Return the tokenizer of a local folder (a tokenizer's own, or a model's).

    Raises:
        ModelError: If the folder holds no tokenizer that can be read.
    """
    from transformers import AutoTokenizer

    if not (Path(path) / "tokenizer.json").is_file():
        raise ModelError(
            f"{path}: no tokenizer.json; expected a folder that save_tokenizer or training wrote"
        )
    try:
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: the tokenizer cannot be read: {error}") from error


def base_tokenizer(name: str) -> "PreTrainedTokenizerFast":
    """Return the tokenizer of a base model: of a folder, or of a Hugging Face id.

    Decoding gives back what the tokens say: some tokenizers remove blanks before points and commas by
    default, which would read "2.96 .3053" as "2.96.3053".

    Raises:
        ModelError: If there is none, it is a slow one, or it has no end token.
    """
    from transformers import AutoTokenizer

    if Path(name).is_dir():
        tokenizer = load_tokenizer(name)
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"tokenizer '{name}': {' '.join(str(error).split())[:300]}. Expected a folder with "
                "tokenizer.json, or the Hugging Face id of a model."
            ) from error
    if not tokenizer.is_fast:
        raise ModelError(f"tokenizer '{name}': a slow one, without tokenizer.json; convert it first.")
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"tokenizer '{name}': it has no end token, so a model could not say where a crystal ends. "
            "Set eos_token in its tokenizer_config.json."
        )
    tokenizer.clean_up_tokenization_spaces = False
    return tokenizer


def tokenizer_sha256(folder: str | Path) -> str:
    """Return the sha256 of a tokenizer folder's tokenizer.json."""
    return hashlib.sha256((Path(folder) / "tokenizer.json").read_bytes()).hexdigest()


def save_tokenizer(tokenizer: "PreTrainedTokenizerFast", path: str | Path, *, as_it_is: bool = False) -> None:
    """Write tokenizer.json and tokenizer_config.json, as AutoTokenizer.from_pretrained reads them.

    Args:
        tokenizer: Any fast tokenizer.
        path: The folder.
        as_it_is: Name the general class, which takes tokenizer.json as it is; a model family's own class may
            make the steps before the vocabulary anew.
    """
    folder = Path(path)
    tokenizer.save_pretrained(str(folder))
    config_file = folder / "tokenizer_config.json"
    config = json.loads(config_file.read_text())
    # The name that every release knows; transformers 5 writes its new, internal one.
    if as_it_is or config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def format_tokenizer(name: str, **settings: Any) -> "PreTrainedTokenizerFast":
    """Return the tokenizer of a named text format with these settings.

    Raises:
        UnknownName: If no format has that name.
        UserError: If the format does not know a setting.
    """
    return build_tokenizer(representation(name, **settings).alphabet())


@dataclass(frozen=True)
class TokenizerRecipe:
    """What `tokenizers/<name>/recipe.yaml` says.

    Attributes:
        representation: Name of the text format.
        settings: The format's own settings.
        pad_to_multiple_of: See `padded_vocabulary_size`; 1 adds nothing.
    """

    representation: str
    settings: dict[str, Any] = field(default_factory=dict)
    pad_to_multiple_of: int = 1


def build_from_recipe(recipe: TokenizerRecipe) -> "PreTrainedTokenizerFast":
    """Return the tokenizer that a recipe describes."""
    alphabet = representation(recipe.representation, **recipe.settings).alphabet()
    return build_tokenizer(alphabet, pad_to_multiple_of=recipe.pad_to_multiple_of)


def _check_special(role: str, token: str, vocabulary: dict[str, int]) -> None:
    """Raise where registering `token` would change the ids or the cutting of other tokens."""
    if token not in vocabulary:
        raise UserError(f"alphabet: {role} {token!r} is not among its tokens; append it to them")
    for other in vocabulary:
        if other != token and token in other:
            raise UserError(
                f"alphabet: {role} {token!r} is part of the token {other!r}, which registering it would cut; "
                "choose one that is part of no other"
            )


def _is_one_token(tokenizer: "PreTrainedTokenizerFast", token: str) -> bool:
    ids = following_ids(tokenizer, token)
    return len(ids) == 1 and ids[0] != tokenizer.unk_token_id


def _prefix_once(tokenizer: "PreTrainedTokenizerFast") -> None:
    """Let a SentencePiece tokenizer put its "▁" before a text, not before what follows an added token.

    As tokenizer files have it: a normalizer that prepends "▁" and replaces blanks (Llama 2, Mistral), or a
    Metaspace step with the scheme "always". On texts without added tokens the ids stay what they were.
    """
    from tokenizers import pre_tokenizers

    backend = tokenizer.backend_tokenizer
    state = json.loads(backend.to_str())
    normalizer, pre_tokenizer = state["normalizer"] or {}, state["pre_tokenizer"] or {}
    steps = [step["type"] for step in normalizer.get("normalizers", [])]
    always = pre_tokenizer.get("type") == "Metaspace" and pre_tokenizer.get("prepend_scheme") == "always"
    if always or (steps == ["Prepend", "Replace"] and not pre_tokenizer):
        if steps == ["Prepend", "Replace"]:
            backend.normalizer = None
        backend.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement="▁", prepend_scheme="first", split=bool(pre_tokenizer.get("split", False))
        )


def main(arguments: list[str] | None = None) -> None:
    """Build tokenizer folders from their recipes; with none named, one for every format of the table."""
    parser = argparse.ArgumentParser(
        prog="python -m crystallm_kit.tokens.tokenizer", description=main.__doc__
    )
    parser.add_argument("--build", action="store_true", required=True, help="write the artefacts")
    parser.add_argument("--folder", type=Path, default=Path("tokenizers"), help="where the artefacts live")
    parser.add_argument("names", nargs="*", default=sorted(REPRESENTATIONS), help="folders to build")
    options = parser.parse_args(arguments)
    for name in options.names:
        folder = options.folder / name
        tokenizer = build_from_recipe(load_recipe(folder / "recipe.yaml", TokenizerRecipe))
        save_tokenizer(tokenizer, folder)
        print(f"{folder}: {len(tokenizer)} tokens")


if __name__ == "__main__":
    main()
