r"""One crystal -> the token sequences that its training examples are made of.

    EncodedCrystal(id="mp-22862", text="Na1 Cl1 225\nNa a\nCl b\n5.64 end", texts=[[11, 112, ...], [...]],
                   prompts=[[1006], [1007], ...], prompt_kinds=[ONLY_ELEMENTS, SOME_ELEMENTS, ...], ...)

Texts: every equivalent description where the format knows them (`wyckoff`), the canonical one first; then, if
the recipe augments, texts of augmented views. Prompts: the parts that a template's prompt can have, in its
order, so that drawing.py draws conditions anew for each epoch; whole prompts where a template is no sum of
parts, and where a base model's tokenizer cuts them, since that may join what stands in two parts.
Deterministic: seed and id fix what is drawn, whatever the order of the crystals or the number of processes.

Not here: drawing (drawing.py), files, splits and shards (corpus.py).
"""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pymatgen.core.lattice import Lattice
from pymatgen.core.structure import Structure

from crystallm_kit.errors import EncodeError, ParseError, UserError, did_you_mean
from crystallm_kit.recipes import recipe_to_dict
from crystallm_kit.records import PROPERTIES, Conditions, Crystal, Range
from crystallm_kit.structures.augmentation import AugmentationRecipe, augment
from crystallm_kit.structures.elements import ELEMENTS, SYMBOL
from crystallm_kit.structures.spacegroups import spacegroup_number
from crystallm_kit.structures.symmetry import dataset, space_group
from crystallm_kit.text.conditions import parse_formula
from crystallm_kit.text.prompt_tokens import KIT_TEMPLATE_TOKENS
from crystallm_kit.text.prompts import template_named, training_conditions
from crystallm_kit.text.representation import Alphabet, representation
from crystallm_kit.text.wyckoff import WyckoffRepresentation, text_to_symmetric
from crystallm_kit.tokens.cutting import BaseCutter, Cutter
from crystallm_kit.tokens.drawing import (
    ANSWER,
    CLOSING,
    CONDITION,
    ELEMENT,
    ELEMENTS_END,
    FOCUS,
    INFILL,
    ONLY_ELEMENTS,
    PROPERTY,
    SOME_ELEMENTS,
    WHOLE_PROMPT,
    ConditionDropping,
    StoredInfo,
    VocabularyInfo,
)
from crystallm_kit.tokens.tasks import check_tasks, check_template, pairs_of
from crystallm_kit.tokens.tokenizer import (
    FastTokenizer,
    base_tokenizer,
    extend_tokenizer,
    format_tokenizer,
    load_tokenizer,
    save_tokenizer,
    tokenizer_sha256,
)

# Format -> template that it has tokens for, and template -> formats that it asks for.
OWN_TEMPLATES = {"wyckoff": ("kit-1",), "cif": ("cif-crystallm", "cif-crystallm-pi")}
_FORMATS_OF_TEMPLATE = {
    "kit-1": ("wyckoff",),
    "crystal-text-llm": ("compact",),
    "cif-crystallm": ("cif",),
    "cif-crystallm-pi": ("cif",),
}
_DIALECT_OF_TEMPLATE = {"cif-crystallm": "v1", "cif-crystallm-pi": "pi"}
_PAIRS = (
    "Without a tokenizer: wyckoff with kit-1, cif with cif-crystallm. With one: compact with "
    "crystal-text-llm, wyckoff with kit-1, and every format with words-1."
)
_ADVICE = ". It may without new tokens: set new_tokens to none."
_CIF_SYMMETRY = re.compile(
    r"data_(?P<formula>\w+)\n.*_symmetry_space_group_name_H-M +(?P<symbol>[^\n]+?) *\n", flags=re.DOTALL
)


@dataclass(frozen=True)
class EncodingRecipe:
    """How crystals become token sequences.

    Attributes:
        format: Name of the text format.
        format_settings: Its settings.
        template: Name of the prompt template.
        tokenizer: Of the base model that is to be fine-tuned: a folder or a Hugging Face id. None: the
            format's own alphabet, for models from scratch.
        new_tokens: none: the base tokenizer as it is; format: extended by the format's tokens.
        n_texts: Most texts stored of one crystal.
        augmentation: Of the views whose texts are stored beside the crystal's own.
        n_whole_prompts: Prompts stored of one crystal, for templates that are no sum of parts.
        dropping: How conditions are drawn.
        tasks: Name of a task (tasks.py) -> share of the examples.
        properties: What the data must have, and what the task `property` asks for; empty: whatever a crystal
            has.
    """

    format: str = "wyckoff"
    format_settings: dict[str, Any] = field(default_factory=dict)
    template: str = "kit-1"
    tokenizer: str | None = None
    new_tokens: Literal["none", "format"] = "none"
    n_texts: int = 16
    n_whole_prompts: int = 16
    dropping: ConditionDropping = field(default_factory=ConditionDropping)
    augmentation: AugmentationRecipe = field(default_factory=AugmentationRecipe)
    tasks: dict[str, float] = field(default_factory=lambda: {"generate": 1.0})
    properties: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if min(self.n_texts, self.n_whole_prompts) < 1:
            raise ValueError("n_texts and n_whole_prompts must be at least 1")
        check_tasks(self.tasks, self.properties)
        focus = self.dropping.focus
        if focus is not None and focus not in PROPERTIES:
            known = ", ".join(PROPERTIES)
            raise ValueError(
                f"dropping.focus: no property '{focus}'{did_you_mean(focus, PROPERTIES)} Known: {known}"
            )

    def identity(self) -> dict[str, Any]:
        """Return what decides the ids, as plain mappings: corpora of before a setting keep their hash."""
        plain = recipe_to_dict(self)
        new: dict[str, Any] = {
            "tokenizer": None,
            "new_tokens": "none",
            "tasks": {"generate": 1.0},
            "properties": [],
        }
        old = ("none_probability", "keep_probability", "only_elements_probability")
        if self.dropping.focus is None:
            plain["dropping"] = {name: plain["dropping"][name] for name in old}
        return {name: value for name, value in plain.items() if name not in new or value != new[name]}


@dataclass(frozen=True)
class EncodedCrystal:
    """What is stored of one crystal.

    Attributes:
        id: Of the crystal.
        composition: Reduced, elements by alphabet, every count written ("Cl1 Na1"): what splits go by.
        spacegroup_number: As found; 0 for a molecule.
        cell_formula: Content of the conventional cell, written like `composition`.
        volume_per_formula_unit_angstrom3: Of the reduced formula.
        text: The canonical text.
        texts: Token ids of all texts, with the end token where the format has one; the canonical one first.
        prompts: Token ids of prompt parts, or of whole prompts; then of the other tasks' prompts, each before
            its answer.
        prompt_kinds: What each of them is (drawing.py).
    """

    id: str
    composition: str
    spacegroup_number: int
    cell_formula: str
    volume_per_formula_unit_angstrom3: float
    text: str
    texts: list[list[int]]
    prompts: list[list[int]]
    prompt_kinds: list[int]

    @property
    def longest(self) -> int:
        """Tokens of its longest prompt and text, or task and answer, together."""
        sized = [(kind, len(p)) for kind, p in zip(self.prompt_kinds, self.prompts, strict=True)]
        whole = [n for kind, n in sized if kind == WHOLE_PROMPT]
        # a prompt made of parts has one of the two keywords for elements
        parts = sum(n for kind, n in sized if kind < INFILL) - (ONLY_ELEMENTS in self.prompt_kinds)
        parts -= sum([n for kind, n in sized if kind == FOCUS][1:])  # and one value of the property in focus
        pairs = [n + sized[i + 1][1] for i, (kind, n) in enumerate(sized) if kind in (INFILL, PROPERTY)]
        return max((max(whole) if whole else parts) + max(map(len, self.texts)), *pairs, 0)

    @property
    def has_pairs(self) -> bool:
        """Whether it can be asked other tasks than to write it."""
        return ANSWER in self.prompt_kinds

    def without_long_pairs(self, max_tokens: int) -> "EncodedCrystal":
        """Return it without the tasks whose prompt and answer have more tokens than that."""
        kinds, prompts = self.prompt_kinds, self.prompts
        n = next((i for i, kind in enumerate(kinds) if kind >= INFILL), len(kinds))
        short = [
            i for i in range(n, len(kinds), 2) if len(prompts[i]) + len(prompts[i + 1]) <= max_tokens
        ]  # fmt: skip
        kept = [*range(n), *(i for pair in short for i in (pair, pair + 1))]
        return replace(self, prompts=[prompts[i] for i in kept], prompt_kinds=[kinds[i] for i in kept])


class CrystalEncoder:
    """Encodes crystals by one recipe."""

    def __init__(
        self, recipe: EncodingRecipe, *, seed: int, tokenizer_folder: str | Path | None = None
    ) -> None:
        """Prepare to encode.

        Args:
            recipe: How.
            seed: Of what is drawn.
            tokenizer_folder: What `write_tokenizer` wrote; for a recipe with a base tokenizer.

        Raises:
            UnknownName: If the recipe names no format or template.
            UserError: If it names no setting of the format, or the template does not fit the format.
        """
        self.recipe = recipe
        self.seed = seed
        self.format = representation(recipe.format, **recipe.format_settings)
        self.alphabet = self.format.alphabet()
        self.template = template_named(recipe.template, format=recipe.format)
        check_pair(recipe)
        self.folder = tokenizer_folder
        self.tokenizer: FastTokenizer | None = None
        self.cut: Cutter | BaseCutter
        if recipe.tokenizer is None:
            self.cut = Cutter(self.alphabet)
        else:
            folder = tokenizer_folder
            self.tokenizer = corpus_tokenizer(recipe) if folder is None else load_tokenizer(folder)
            self.cut = BaseCutter(self.tokenizer)
        self._closing = "" if self.template.begins_the_text else self.template.render(Conditions())

    @property
    def info(self) -> StoredInfo:
        """What a model trained on the corpus has to know."""
        if self.tokenizer is None:
            ids = {token: position for position, token in enumerate(self.alphabet.tokens)}
            vocabulary = VocabularyInfo(
                size=len(ids),
                pad_token_id=None if self.alphabet.pad is None else ids[self.alphabet.pad],
                eos_token_id=self.cut.end_id,
                element_token_ids={symbol: ids[symbol] for symbol in ELEMENTS if symbol in ids},
            )
        else:
            vocabulary = VocabularyInfo(
                size=_n_ids(self.tokenizer),
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=self.cut.end_id,
                bos_token_id=self.tokenizer.bos_token_id,
                n_base=_n_ids(base_tokenizer(str(self.recipe.tokenizer))),
            )
        return StoredInfo(
            vocabulary,
            self.recipe.format,
            dict(self.recipe.format_settings),
            self.template.name,
            self.template.hash,
            "" if self.folder is None else tokenizer_sha256(self.folder),
        )

    def __call__(self, crystal: Crystal) -> EncodedCrystal:
        """Return the sequences of a crystal.

        Raises:
            EncodeError: If the format cannot carry it, or none of the tasks can be asked of it.
            ParseError: If a token is missing.
        """
        index = int.from_bytes(hashlib.sha256(crystal.id.encode()).digest()[:8])
        rng = np.random.default_rng((self.seed, index))
        texts = self._texts(crystal, rng, index)
        number, content = self._symmetry(crystal, texts[0])
        prompts, kinds = self._prompts(crystal, number, sum(content.values()), rng)
        for kind, prompt, answer in pairs_of(
            crystal, texts, self.template, rng, tasks=self.recipe.tasks, properties=self.recipe.properties,
            spacegroup=number or None,
        ):  # fmt: skip
            prompts += [self.cut.prompt(prompt), self._with_end(self.cut(answer))]
            kinds += [kind, ANSWER]
        if not self.recipe.tasks.get("generate") and ANSWER not in kinds:
            raise EncodeError(
                f"crystal '{crystal.id}': it can be asked none of the tasks {', '.join(self.recipe.tasks)}"
            )
        counts = {str(e): round(n) for e, n in crystal.structure.composition.get_el_amt_dict().items()}
        divisor = math.gcd(*counts.values())
        n_centering = space_group(number).n_centering if number else 1
        volume = crystal.structure.volume if isinstance(crystal.structure, Structure) else 0.0
        return EncodedCrystal(
            id=crystal.id,
            composition=_written({e: n // divisor for e, n in counts.items()}),
            spacegroup_number=number,
            cell_formula=_written({e: n * n_centering for e, n in content.items()}),
            volume_per_formula_unit_angstrom3=volume / divisor,
            text=texts[0],
            texts=[self._with_end(self.cut(text)) for text in texts],
            prompts=prompts,
            prompt_kinds=kinds,
        )

    def _texts(self, crystal: Crystal, rng: np.random.Generator, index: int) -> list[str]:
        n = self.recipe.n_texts
        if isinstance(self.format, WyckoffRepresentation):
            texts = self.format.encode_descriptions(crystal)
        else:
            texts = [self.format.encode(crystal)]
        if len(texts) > n:
            others = 1 + rng.permutation(len(texts) - 1)[: n - 1]
            texts = [texts[0], *(texts[i] for i in sorted(others))]
        if self.recipe.augmentation.does_anything:
            for view in range(n - len(texts)):
                augmented = augment(
                    crystal, self.recipe.augmentation, seed=self.seed, epoch=view, index=index
                )
                texts.append(self.format.encode(augmented))
        return list(dict.fromkeys(texts))

    def _with_end(self, ids: list[int]) -> list[int]:
        end = self.cut.end_id
        return ids if end is None or ids[-1] == end else [*ids, end]

    def _symmetry(self, crystal: Crystal, text: str) -> tuple[int, dict[str, int]]:
        """Return space group number and content of the primitive cell; 0 and all atoms for a molecule."""
        if isinstance(self.format, WyckoffRepresentation):
            symmetric = text_to_symmetric(text)
            return symmetric.spacegroup_number, {SYMBOL[z]: n for z, n in symmetric.counts.items()}
        if self.recipe.format == "cif" and (stated := _CIF_SYMMETRY.search(text)):
            # the writer has searched for symmetry already; searching again would take a third of the time
            number = spacegroup_number(stated["symbol"])
            content = parse_formula(stated["formula"])
            return number, {e: n // space_group(number).n_centering for e, n in content.items()}
        if not isinstance(crystal.structure, Structure):
            return 0, dict(Counter(site.specie.symbol for site in crystal.structure))
        found = dataset(crystal.structure)
        return int(found.number), dict(Counter(SYMBOL[int(z)] for z in found.prim_std_cell.numbers))

    def _prompts(
        self, crystal: Crystal, number: int, n_sites: int, rng: np.random.Generator
    ) -> tuple[list[list[int]], list[int]]:
        """Return prompt sequences and their kinds."""
        if self.template.begins_the_text:
            return [[]], [WHOLE_PROMPT]
        known: dict[str, Any] = {"template": self.template.name}
        if number:
            known |= {"spacegroup_number": number, "n_primitive_sites": n_sites}
        everything = training_conditions(
            crystal, rng, none_probability=0.0, keep_probability=1.0, only_elements_probability=1.0, **known
        )
        parts = self._parts(everything, rng) if self.tokenizer is None else None
        if parts is None:
            own = self.recipe.dropping
            dropping: dict[str, Any] = {
                "none_probability": own.none_probability,
                "keep_probability": own.keep_probability,
                "only_elements_probability": own.only_elements_probability,
            }
            prompts = [
                self.cut.prompt(
                    self.template.render(training_conditions(crystal, rng, **dropping, **known), rng)
                )
                for _ in range(self.recipe.n_whole_prompts)
            ]
            return prompts, [WHOLE_PROMPT] * len(prompts)
        return parts

    def _parts(
        self, everything: Conditions, rng: np.random.Generator
    ) -> tuple[list[list[int]], list[int]] | None:
        """Return the parts of the prompt that states everything, or None if it is no sum of parts."""
        rest = self.template.render(everything)
        singles = {name: self._part(single) for name, single in _one_by_one(everything).items()}
        sequences: list[list[int]] = []
        kinds: list[int] = []
        while rest != self._closing:
            name = next((name for name, text in singles.items() if text and rest.startswith(text)), None)
            if name is None:
                return None
            text = singles.pop(name)
            rest = rest.removeprefix(text)
            if name == "elements":
                some = self._part(Conditions(elements=everything.elements))
                sequences += [[i] for i in (self.cut(text)[0], *self.cut(some))]
                kinds += [ONLY_ELEMENTS, SOME_ELEMENTS, *[ELEMENT] * len(everything.elements), ELEMENTS_END]
            elif name == self.recipe.dropping.focus:
                values = self._focus_values(name, everything.properties[name], rng)
                sequences += [self.cut(self._part(Conditions(properties={name: v}))) for v in values]
                kinds += [FOCUS] * len(values)
            else:
                sequences.append(self.cut(text))
                kinds.append(CONDITION)
        if len(kinds) != len(sequences):  # an element of more than one token
            return None
        return [*sequences, self.cut(self._closing)], [*kinds, CLOSING]

    def _focus_values(self, name: str, true: Range, rng: np.random.Generator) -> list[Range]:
        """Return the values that prompts may state of the property in focus, the true one first."""
        dropping, known = self.recipe.dropping, PROPERTIES[name]
        factors = np.exp(dropping.focus_spread * rng.standard_normal(dropping.focus_values - 1))
        others = [float(np.clip((true.low or 0.0) * f, known.low, known.high)) for f in factors]
        return [true, *map(Range.exactly, others)]

    def _part(self, single: Conditions) -> str:
        return self.template.render(single).removesuffix(self._closing)


def check_pair(recipe: EncodingRecipe) -> None:
    """Raise UserError if the recipe's template does not fit its format, or needs a base tokenizer."""
    name, form = recipe.template, recipe.format
    template = template_named(name)
    check_template(template, recipe.tasks, recipe.properties)
    fitting = _FORMATS_OF_TEMPLATE.get(name)
    if fitting and form not in fitting:
        raise UserError(
            f"encoding: template '{name}' asks for {' or '.join(fitting)}, the format is '{form}'. {_PAIRS}"
        )
    if recipe.tokenizer is None and recipe.new_tokens != "none":
        raise UserError(
            "encoding: new_tokens extends a base model's 'tokenizer', and none is given: a folder, or the "
            "Hugging Face id of a model."
        )
    dialect = _DIALECT_OF_TEMPLATE.get(name)
    if dialect and (stated := recipe.format_settings.get("dialect", "v1")) != dialect:
        raise UserError(
            f"encoding: template '{name}' asks for format_settings.dialect '{dialect}', it is '{stated}'."
        )
    if recipe.tokenizer is None and name not in OWN_TEMPLATES.get(form, ()):
        raise UserError(
            f"encoding: the format '{form}' has no tokens of its own for the words of template '{name}'; "
            f"name a base model's 'tokenizer'. {_PAIRS}"
        )
    if recipe.tokenizer is not None and template.begins_the_text:
        raise UserError(
            f"encoding: the prompts of template '{name}' are cut by the format's own tokens; leave "
            f"'tokenizer' out. {_PAIRS}"
        )


def corpus_tokenizer(recipe: EncodingRecipe) -> FastTokenizer:
    """Return the tokenizer of a corpus: the format's, the base model's, or that with the format's tokens.

    Raises:
        ModelError: If the base tokenizer cannot be loaded or has no end token.
    """
    if recipe.tokenizer is None:
        return format_tokenizer(recipe.format, **recipe.format_settings)
    tokenizer = base_tokenizer(recipe.tokenizer)
    if recipe.new_tokens == "format":
        tokenizer, _ = extend_tokenizer(tokenizer, _new_alphabet(recipe))
    return tokenizer


def write_tokenizer(recipe: EncodingRecipe, folder: str | Path) -> None:
    """Write the tokenizer of a corpus, for its encoders and for the folders of models trained on it."""
    tokenizer = corpus_tokenizer(recipe)
    # where tokens were added, tokenizer.json must be read as it is, not built anew by the base's own class
    save_tokenizer(tokenizer, folder, as_it_is=recipe.new_tokens == "format")


def check_round_trip(encoder: CrystalEncoder) -> None:
    """Raise UserError if a base tokenizer's tokens do not give back the texts of crystals of all elements."""
    for first, second in zip(ELEMENTS[::2], ELEMENTS[1::2], strict=False):
        structure = Structure(Lattice.cubic(3.4), [first, second], [[0.0] * 3, [0.5] * 3])
        try:
            text = encoder.format.encode(Crystal(f"{first}{second}", structure))
        except EncodeError:
            continue
        try:
            encoder.cut(text)
        except ParseError as error:
            raise UserError(
                f"tokenizer '{encoder.recipe.tokenizer}' does not suit the format '{encoder.recipe.format}': "
                f"{error}{_ADVICE if encoder.recipe.new_tokens == 'format' else '.'}"
            ) from error


def _new_alphabet(recipe: EncodingRecipe) -> Alphabet:
    """Return what a base tokenizer is extended by: the format's tokens, and kit-1's where that asks."""
    alphabet = representation(recipe.format, **recipe.format_settings).alphabet()
    if recipe.template == "kit-1":
        return alphabet
    # a blank as a token of its own would cut English sentences apart
    return replace(alphabet, tokens=tuple(t for t in alphabet.tokens if t not in KIT_TEMPLATE_TOKENS))


def _n_ids(tokenizer: FastTokenizer) -> int:
    return 1 + max(int(i) for i in tokenizer.get_vocab().values())  # some vocabularies have gaps


def _one_by_one(conditions: Conditions) -> Mapping[str, Conditions]:
    """Return each condition alone, by its name; a formula is left out: no sum of parts states it."""
    found: dict[str, Conditions] = {}
    if conditions.elements:
        found["elements"] = Conditions(elements=conditions.elements, only_elements=True)
    for name in ("n_elements", "anonymous_formula", "spacegroup_number", "crystal_system", "n_sites"):
        if (value := getattr(conditions, name)) is not None:
            found[name] = replace(Conditions(), **{name: value})
    for name, value in conditions.properties.items():
        found[name] = Conditions(properties={name: value})
    return found


def _written(counts: Mapping[str, int]) -> str:
    return " ".join(f"{element}{counts[element]}" for element in sorted(counts))
