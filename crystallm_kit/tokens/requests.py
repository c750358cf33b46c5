"""What is asked of a constrained sample: conditions, compiled once into the integers that the masks use.

    >>> compile_request(Conditions(formula={"Na": 1, "Cl": 1}), max_sites=4).plans
    ((1, 1), (2, 2))

A request that no crystal can meet is refused here, before anything is drawn.

Not here: the masks (masking.py), the tables (wyckoff_tables.py).
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from crystallm_kit.errors import ImpossibleRequest, UnknownName, UserError
from crystallm_kit.records import Conditions
from crystallm_kit.structures.elements import ELEMENTS, RANK
from crystallm_kit.structures.symmetry import crystal_system
from crystallm_kit.text.conditions import anonymous_counts, check_conditions, conditions_from_dict
from crystallm_kit.tokens.wyckoff_tables import MAX_ELEMENTS, N_COUNTS, can_fill, can_hold, witnesses

MAX_SITES = 64  # atoms in the primitive cell, unless a request says otherwise
_MAX_ORDERS = 2_520  # of the counts of an anonymous formula; seven elements, two of one count
_MAX_PLANS = _MAX_ORDERS * N_COUNTS
_MOST_LEVELS = 8  # of the JSON of a request; conditions have 4


@dataclass(frozen=True)
class Request:
    """Conditions as the constraint uses them; made by `compile_request`.

    Attributes:
        elements: Ranks (position in ELEMENTS) that may occur.
        required: Ranks that must occur, increasing.
        n_elements: Exact number of different elements, 0 if free.
        n_sites: Exact number of atoms in the primitive cell, 0 if free.
        plans: Allowed counts of the elements in order; empty: any.
        groups: Space group numbers that may occur; empty: any.
        max_sites: Most atoms in the primitive cell.
    """

    elements: tuple[int, ...]
    required: tuple[int, ...] = ()
    n_elements: int = 0
    n_sites: int = 0
    plans: tuple[tuple[int, ...], ...] = ()
    groups: tuple[int, ...] = ()
    max_sites: int = MAX_SITES


def compile_request(
    conditions: Conditions, *, known_elements: Iterable[str] = ELEMENTS, max_sites: int = MAX_SITES
) -> Request:
    """Return what the constraint needs to know of some conditions (properties are left to the model).

    Args:
        conditions: What is wanted.
        known_elements: Elements that may occur where the conditions leave it open: those a model was trained
            on.
        max_sites: Most atoms in the primitive cell where the conditions leave it open.

    Raises:
        UnknownName: An element or crystal system that is none.
        ImpossibleRequest: If no crystal can meet the conditions.
    """
    check_conditions(conditions)
    wanted = set(conditions.elements) | set(conditions.formula or ())
    only = bool(conditions.only_elements and conditions.elements) or conditions.formula is not None
    elements = wanted if only else wanted | set(known_elements)
    required = tuple(sorted(RANK[e] for e in wanted))
    pattern = _pattern(conditions)
    n_elements = len(pattern or ()) or conditions.n_elements or (len(required) if only else 0)
    n_least = max(n_elements, len(required), 1)
    if n_least > MAX_ELEMENTS:
        raise ImpossibleRequest(f"{n_least} elements asked for; at most {MAX_ELEMENTS}")
    if n_least > len(elements):
        raise ImpossibleRequest(f"{n_least} elements asked for, but only {len(elements)} may occur")
    smallest = sum(pattern) if pattern is not None else n_least
    n_sites = conditions.n_sites or 0
    if n_sites and n_sites < smallest:
        raise ImpossibleRequest(f"{n_sites} sites cannot hold {smallest} atoms of {n_least} elements")
    groups = _groups(conditions)
    limit = max(max_sites, n_sites, smallest)
    if limit >= N_COUNTS:
        raise ImpossibleRequest(f"{limit} sites asked for; at most {N_COUNTS - 1} in a primitive cell")
    plans: tuple[tuple[int, ...], ...] = ()
    if pattern is not None:
        plans = _plans(pattern, conditions, n_sites, limit, groups)
        limit = max(limit, *map(sum, plans))
    elif groups and not can_fill(groups, n_sites, limit, n_least):
        raise ImpossibleRequest(
            f"{n_sites or f'at most {limit}'} sites in {_names(groups)} with {n_least} elements"
            f"{'' if n_elements else ' or more'}: no assignment of Wyckoff positions adds up"
        )
    return Request(
        tuple(sorted(RANK[e] for e in elements)), required, n_elements, n_sites, plans, groups, limit
    )


def _pattern(conditions: Conditions) -> tuple[int, ...] | None:
    """Return the smallest counts, in element order for a formula, increasing for an anonymous one."""
    if conditions.formula is not None:
        counts = [conditions.formula[e] for e in sorted(conditions.formula, key=RANK.__getitem__)]
    elif conditions.anonymous_formula is not None:
        counts = sorted(anonymous_counts(conditions.anonymous_formula))
    else:
        return None
    return tuple(c // math.gcd(*counts) for c in counts)


def _groups(conditions: Conditions) -> tuple[int, ...]:
    if conditions.spacegroup_number is not None:
        return (conditions.spacegroup_number,)
    if conditions.crystal_system is None:
        return ()
    return tuple(n for n in range(1, 231) if crystal_system(n) == conditions.crystal_system)


def _names(groups: Sequence[int]) -> str:
    return f"space group {groups[0]}" if len(groups) == 1 else f"any {crystal_system(groups[0])} space group"


def _plans(
    pattern: tuple[int, ...], conditions: Conditions, n_sites: int, limit: int, groups: tuple[int, ...]
) -> tuple[tuple[int, ...], ...]:
    unit = sum(pattern)
    sizes = [n_sites // unit] if n_sites else list(range(1, (N_COUNTS - 1) // unit + 1))
    tried = (groups if len(groups) == 1 else witnesses(groups)) if groups else (1,)
    sizes = [
        z
        for z in sizes
        if max(pattern) * z < N_COUNTS and any(can_hold(g, [z * c for c in pattern]) for g in tried)
    ]
    if not n_sites and sizes:
        # Where nothing fits the usual size, the smallest cell that does: LiFePO4 in Pnma has 28 sites.
        sizes = [z for z in sizes if z * unit <= limit] or sizes[:1]
    if not sizes:
        names = "".join(f"{s}{n if n > 1 else ''}" for s, n in (conditions.formula or {}).items())
        raise ImpossibleRequest(
            f"{names or conditions.anonymous_formula} in "
            f"{_names(groups) if groups else 'any space group'} with "
            f"{f'{n_sites} sites' if n_sites else f'at most {N_COUNTS - 1} sites'}: "
            "no assignment of Wyckoff positions adds up"
        )
    orders = [pattern] if conditions.formula is not None else _orders(pattern)
    return tuple(tuple(z * c for c in order) for z in sizes for order in orders)


def _orders(pattern: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return the different orders of some counts, increasing.

    Raises ImpossibleRequest if they are too many.
    """
    n_orders = math.factorial(len(pattern))
    for repeats in Counter(pattern).values():
        n_orders //= math.factorial(repeats)
    if n_orders > _MAX_ORDERS:
        raise ImpossibleRequest(
            f"{len(pattern)} elements with counts {pattern} can be ordered in {n_orders} ways, more than the "
            f"{_MAX_ORDERS} that are followed; name the elements with a formula."
        )
    orders: set[tuple[int, ...]] = {()}
    for _ in pattern:
        orders = {(*o, c) for o in orders for c in set(pattern) if o.count(c) < pattern.count(c)}
    return sorted(orders)


def request_to_json(request: Request) -> str:
    """Return a request as a line of JSON, for engines that run elsewhere; what is free is left out."""
    return json.dumps(
        {f.name: getattr(request, f.name) for f in fields(Request) if getattr(request, f.name)},
        separators=(",", ":"),
    )


def request_from_json(
    text: str, *, known_elements: Iterable[str] = ELEMENTS, max_sites: int = MAX_SITES
) -> Request:
    """Return the request of a line of JSON: what `request_to_json` wrote, or {"conditions": {...}}.

    Conditions are those of text/conditions.conditions_from_dict, compiled here. Nothing is taken on trust: a
    request that no text can meet would leave a sample without a token to go on with.

    Raises:
        UserError: If it is no JSON object, has unknown keys or values out of range.
        ImpossibleRequest: If no crystal can meet it.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"request '{text[:60]}': no JSON ({error})") from error
    if _is_deeper(data, _MOST_LEVELS):
        raise UserError(f"request '{text[:60]}': more than {_MOST_LEVELS} levels of lists and objects")
    if not isinstance(data, dict):
        raise UserError(f"request '{text[:60]}': expected a JSON object")
    if "conditions" in data:
        if set(data) != {"conditions"} or not isinstance(data["conditions"], dict):
            raise UserError("request: expected an object under 'conditions', and no other key beside it")
        conditions = conditions_from_dict(data["conditions"])
        return compile_request(conditions, known_elements=known_elements, max_sites=max_sites)
    known = [f.name for f in fields(Request)]
    for key in data:
        if key not in known:
            raise UnknownName.among("key of a request", str(key), [*known, "conditions"])
    if "elements" not in data:
        raise UserError("request: elements: missing; ranks of the elements that may occur are expected")
    return _checked(Request(**{key: _integers(key, value) for key, value in data.items()}))  # type: ignore[arg-type]


def _is_deeper(value: object, n_levels: int) -> bool:
    """Tell whether lists and objects stand in each other more than so many levels deep."""
    if not isinstance(value, list | dict):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return n_levels == 0 or any(_is_deeper(entry, n_levels - 1) for entry in inner)


def _integers(key: str, value: object) -> int | tuple[int, ...] | tuple[tuple[int, ...], ...]:
    """Return a field's value, lists as tuples. Raises UserError."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < N_COUNTS * MAX_ELEMENTS:
        return value
    if isinstance(value, list) and len(value) <= _MAX_PLANS:
        return tuple(_integers(key, entry) for entry in value)  # type: ignore[return-value]
    raise UserError(f"request: {key}: expected a number of 0 or more, or a list of them")


def _checked(request: Request) -> Request:
    """Return the request if some text meets it. Raises UserError, ImpossibleRequest."""
    lists = (request.elements, request.required, request.groups)
    numbers = (request.n_elements, request.n_sites, request.max_sites)
    flat = all(isinstance(entry, int) for entries in lists if isinstance(entries, tuple) for entry in entries)
    plans_flat = isinstance(request.plans, tuple) and all(
        isinstance(plan, tuple) and all(isinstance(count, int) for count in plan) for plan in request.plans
    )
    if not (flat and plans_flat and all(isinstance(n, int) for n in numbers)) or not all(
        isinstance(entries, tuple) for entries in lists
    ):
        raise UserError("request: a number where a list is expected, or the other way round")
    allowed = set(request.elements)
    if not allowed or max(allowed) >= len(ELEMENTS) or not set(request.required) <= allowed:
        raise UserError("request: elements: expected ranks of elements, the required ones among them")
    if list(request.required) != sorted(set(request.required)):
        raise UserError("request: required: expected increasing ranks")
    if any(not 1 <= group <= 230 for group in request.groups):
        raise UserError("request: groups: expected space group numbers, 1 to 230")
    n_least = max(request.n_elements, len(request.required), 1)
    if n_least > min(MAX_ELEMENTS, len(allowed)) or (request.n_elements and n_least > request.n_elements):
        raise ImpossibleRequest(f"{n_least} elements asked for, and {len(allowed)} may occur")
    if max(request.max_sites, request.n_sites) >= N_COUNTS or request.max_sites < n_least:
        raise ImpossibleRequest(
            f"{request.max_sites} sites at most for {n_least} elements; at most {N_COUNTS - 1}"
        )
    if request.n_sites and not n_least <= request.n_sites <= request.max_sites:
        raise ImpossibleRequest(f"{request.n_sites} sites, at most {request.max_sites}, {n_least} elements")
    tried = (
        (request.groups if len(request.groups) == 1 else witnesses(request.groups))
        if request.groups
        else (1,)
    )
    for plan in request.plans:
        fits = len(plan) == request.n_elements and min(plan, default=0) >= 1 and max(plan) < N_COUNTS
        fits = fits and sum(plan) == (request.n_sites or sum(plan))
        if not fits or not any(can_hold(group, plan) for group in tried):
            raise ImpossibleRequest(f"counts {plan}: no assignment of Wyckoff positions adds up")
    if request.groups and not request.plans:
        limit = request.max_sites
        if not can_fill(request.groups, request.n_sites, limit, n_least):
            raise ImpossibleRequest(f"no space group of {request.groups} holds so many sites and elements")
    return request
