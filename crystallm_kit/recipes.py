"""Recipes: YAML files that become the frozen dataclass asked for, or say what is wrong with them.

A recipe says everything that a run depends on. Keys are the fields of a dataclass; nested dataclasses are
nested mappings; a field without a default must be given. An unknown key is refused with the nearest known
one, so that a misspelt setting is never silently its default:

    finetune/x.yaml: unknown key 'lr_rate' under 'optimizer'; did you mean 'lr'? Known: betas, eps, lr, ...

Field types understood: bool, int, float, str, Path, Any, X | None, Literal, tuple[X, ...], tuple[X, Y],
list[X], dict[str, X] and Mapping[str, X], and dataclasses. `1e-3` is a float and `1e5` an int where such a
field is wanted (YAML 1.1, which PyYAML reads, takes both for text).

Not here: the dataclasses themselves, each beside the code that it steers (training/loop.py).
"""

import dataclasses
import types
import typing
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml

from crystallm_kit.errors import RecipeError, did_you_mean

T = TypeVar("T")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which refuses a key given twice instead of keeping the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key '{key.value}' is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_recipe(path: str | Path | None, cls: type[T], overrides: tuple[str, ...] = ()) -> T:
    """Return the recipe in a YAML file as an instance of `cls`.

    Args:
        path: The file; None: the overrides alone.
        cls: A dataclass whose fields are the keys.
        overrides: "key.sub=value", as from `--set`; the value is read as YAML. They win over the file.

    Raises:
        RecipeError: The file is missing or no YAML; a key is unknown, missing or given twice; a value has the
            wrong type, or is refused by the dataclass (ValueError in `__post_init__`).
    """
    if path is None:
        data, where = None, "recipe"
    else:
        data, where = _read(Path(path)), str(path)
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise RecipeError(f"{where}: a recipe is a mapping of keys to values, got {_shown(data)}.")
    for override in overrides:
        _apply(override, data, where)
    return from_dict(data, cls, where=where)


def _read(path: Path) -> Any:
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}).") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not YAML: {' '.join(str(error).split())}") from error


def from_dict(data: Mapping[str, Any], cls: type[T], *, where: str = "recipe") -> T:
    """Return `data` (plain mappings, lists and scalars) as an instance of the dataclass `cls`.

    Args:
        data: As read from YAML or JSON.
        cls: The dataclass.
        where: Names the source in messages.

    Raises:
        RecipeError: As `load_recipe`.
    """
    return typing.cast(T, _dataclass(data, cls, where, ""))


def recipe_to_dict(recipe: Any) -> dict[str, Any]:
    """Return a recipe as plain mappings, lists and scalars, fit for YAML and JSON; `from_dict` inverts it."""
    return typing.cast(dict[str, Any], _plain(recipe))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _apply(override: str, data: dict[str, Any], where: str) -> None:
    """Set one "key.sub=value" in `data`, in place; of a list, the key is a position: "library.0=x"."""
    keys, equals, text = override.partition("=")
    names = [name.strip() for name in keys.split(".")]
    if not equals or not all(names):
        raise RecipeError(f"{where}: --set '{override}': expected key=value or key.sub=value.")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: --set '{override}': the value is not YAML: {error}") from error
    place: Any = data
    for k, name in enumerate(names[:-1]):
        key = _key(place, name, names[:k], override, where)
        inner = place[key] if isinstance(place, list) else place.get(key)
        if inner is None:
            inner = place[key] = {}
        if not isinstance(inner, dict | list):
            raise RecipeError(f"{where}: --set '{override}': '{name}' is {_shown(inner)}, which has no keys.")
        place = inner
    place[_key(place, names[-1], names[:-1], override, where)] = value


def _key(place: dict[str, Any] | list[Any], name: str, above: list[str], override: str, where: str) -> Any:
    """Return a name as the key that it is there. Raises RecipeError if a list has no such position."""
    if isinstance(place, dict):
        return name
    if not name.isdecimal() or int(name) >= len(place):
        raise RecipeError(
            f"{where}: --set '{override}': '{'.'.join(above)}' is {_shown(place)}; "
            f"name a position of it, 0 to {len(place) - 1}, not '{name}'."
        )
    return int(name)


def _dataclass(data: Any, cls: type[Any], where: str, key: str) -> Any:
    under = f" under '{key}'" if key else ""
    if not isinstance(data, Mapping):
        raise _wrong_type(where, key, "a mapping of keys to values", data)
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for name in data:
        if name not in fields:
            raise RecipeError(
                f"{where}: unknown key '{name}'{under}{did_you_mean(str(name), fields)} "
                f"Known: {', '.join(sorted(fields))}."
            )
    values: dict[str, Any] = {}
    for name, field in fields.items():
        inner = f"{key}.{name}" if key else name
        if name in data:
            values[name] = _convert(data[name], hints[name], where, inner)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise RecipeError(f"{where}: key '{name}'{under} is missing; it has no default.")
    try:
        return cls(**values)
    except ValueError as error:
        raise RecipeError(f"{where}: {f'{key}: ' if key else ''}{error}") from error


def _convert(value: Any, hint: Any, where: str, key: str) -> Any:
    """Return `value` as the type `hint`, or raise RecipeError naming the key's path."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(value, arguments, where, key)
    if origin is Literal:
        if value not in arguments:
            near = did_you_mean(value, arguments) if isinstance(value, str) else "."
            known = ", ".join(str(a) for a in arguments)
            raise RecipeError(f"{where}: key '{key}' cannot be {_shown(value)}{near} Known: {known}.")
        return value
    if dataclasses.is_dataclass(hint):
        return _dataclass(value, typing.cast(type, hint), where, key)
    if origin in (tuple, list):
        return _convert_sequence(value, origin, arguments, where, key)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise _wrong_type(where, key, "a mapping of keys to values", value)
        return {name: _convert(item, arguments[1], where, f"{key}.{name}") for name, item in value.items()}
    return _convert_scalar(value, hint, where, key)


def _convert_union(value: Any, choices: tuple[Any, ...], where: str, key: str) -> Any:
    if value is None and type(None) in choices:
        return None
    choices = tuple(choice for choice in choices if choice is not type(None))
    for (
        choice
    ) in choices:  # a value that is already of one of the types stays what it is: int | str keeps "7"
        if type(value) is choice:
            return value
    for choice in choices[:-1]:
        try:
            return _convert(value, choice, where, key)
        except RecipeError:
            continue
    return _convert(value, choices[-1], where, key)


def _convert_sequence(value: Any, origin: Any, arguments: tuple[Any, ...], where: str, key: str) -> Any:
    if not isinstance(value, list | tuple):
        raise _wrong_type(where, key, "a list", value)
    hints = arguments[:1] * len(value) if origin is list or arguments[-1] is Ellipsis else arguments
    if len(hints) != len(value):
        raise _wrong_type(where, key, f"a list of {len(hints)} values", value)
    return origin(
        _convert(item, hint, where, f"{key}[{i}]")
        for i, (item, hint) in enumerate(zip(value, hints, strict=True))
    )


def _convert_scalar(value: Any, hint: Any, where: str, key: str) -> Any:
    if hint in (int, float) and isinstance(value, str):
        try:
            value = float(value)
        except ValueError as error:
            raise _wrong_type(where, key, _NAMES[hint], value) from error
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is float and is_number:
        return float(value)
    if hint is int and is_number and float(value).is_integer():
        return int(value)
    if (hint is bool and isinstance(value, bool)) or (hint is str and isinstance(value, str)):
        return value
    if hint is Path and isinstance(value, str | Path):
        return Path(value)
    raise _wrong_type(where, key, _NAMES.get(hint, getattr(hint, "__name__", str(hint))), value)


_NAMES = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    Path: "a path",
}


def _wrong_type(where: str, key: str, expected: str, value: Any) -> RecipeError:
    return RecipeError(f"{where}: key '{key}' must be {expected}, got {_shown(value)}.")


def _shown(value: Any) -> str:
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping | list | tuple):
        return f"a {'mapping' if isinstance(value, Mapping) else 'list'} of {len(value)}"
    return f"'{value}'"
