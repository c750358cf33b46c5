"""What a report shows of a set besides its scores: the funnel, distributions, structures, parities.

Not here: pictures and the page (report.py), the schema's place (outcome.py).
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from crystallm_kit.scores.funnel import STAGES as GATES
from crystallm_kit.scores.funnel import stage_of
from crystallm_kit.scores.stability.scores import METASTABLE_EV
from crystallm_kit.scoring.scene import Scene
from crystallm_kit.scoring.view import Floats, View

_MOST_POINTS = 2000  # of a picture
_N_BEST, _N_TYPICAL, _N_FAILURES = 6, 6, 9
_FEWEST_VOTES = 5  # candidates of a target whose shares say something
_BINS = 40
_HULL_BINS = (-0.2, 0.8)  # eV/atom
# Quantity -> column of the checks, unit; of numbers.
_NUMERIC = {
    "density_g_cm3": "g/cm3",
    "volume_per_atom_angstrom3": "angstrom^3",
    "n_sites": "",
}
HULL_DISTANCE = "hull_distance_ev_per_atom"
_CATEGORIES = ("n_elements", "spacegroup_number", "crystal_system")
_MEASURES = ("density_g_cm3", "volume_per_atom_angstrom3", "nearest_distance_angstrom", "n_sites")


def funnel(scene: Scene) -> tuple[list[tuple[str, int]], dict[str, int]]:
    """Return how many samples pass each gate and all before it, and what stopped the others."""
    reasons = scene.samples.reasons()
    said = scene.samples.texts("checks", "stage")
    stops = [
        None if reason is None else (gate or _gate_of(reason))
        for reason, gate in zip(reasons, said, strict=True)
    ]
    stopped = Counter(stop for stop in stops if stop is not None)
    left, counts = scene.samples.n, []
    for gate in GATES[:-1]:
        left -= stopped[gate]
        counts.append((gate, left))
    counts.append(("unique", int(scene.unique("kit").sum())))
    known = scene.known("default")
    if known is not None:
        counts.append(("novel", int((scene.unique("kit") & ~known).sum())))
        if scene.relaxation is not None:
            distance = scene.samples.floats("stability", HULL_DISTANCE)
            stable = scene.unique("kit") & ~known & (distance <= METASTABLE_EV)
            counts.append(("metastable", int(stable.sum())))
    found = Counter(reason for reason in reasons if reason is not None)
    n_copies = int((scene.check("kit.valid") & ~scene.unique("kit")).sum())
    if n_copies:
        found["duplicate"] = n_copies
    return counts, dict(found.most_common())


def _gate_of(reason: str) -> str:
    if reason in ("missing", "truncated", "error", "timeout"):
        return "finished"
    gate = stage_of(reason)
    return "parsed" if gate == "unique" else gate  # unreadable, molecule, disordered


def edges_of(views: Sequence[View]) -> dict[str, list[float]]:
    """Return the bins of each numeric quantity, the same for all sets; ends lie where the most extreme do."""
    edges = {}
    for name in _NUMERIC:
        values = np.concatenate([_finite(view, name) for view in views])
        if not len(values):
            continue
        if name == "n_sites":
            edges[name] = [x - 0.5 for x in range(int(values.min()), min(int(values.max()), 200) + 2)]
        else:
            low, high = np.percentile(values, [0.2, 99.8])
            high = high if high > low else low + 1.0
            edges[name] = [round(float(x), 6) for x in np.linspace(low, high, _BINS + 1)]
    return edges


def distributions(view: View, edges: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Return the distributions of a set; what lies outside the bins counts in the first or last one."""
    found: dict[str, Any] = {}
    for name, unit in _NUMERIC.items():
        if name in edges:
            bins = np.array(edges[name])
            counts, _ = np.histogram(np.clip(_finite(view, name), bins[0], bins[-1]), bins)
            found[name] = {"kind": "numeric", "unit": unit, "edges": bins.tolist(), "counts": counts.tolist()}
    if view.has("stability"):
        values = view.floats("stability", HULL_DISTANCE)
        values = values[np.isfinite(values)]
        bins = np.linspace(_HULL_BINS[0], _HULL_BINS[1], _BINS + 1).round(6)
        counts, _ = np.histogram(np.clip(values, *_HULL_BINS), bins)
        found[HULL_DISTANCE] = {
            "kind": "numeric", "unit": "eV/atom", "edges": bins.tolist(), "counts": counts.tolist(),
        }  # fmt: skip
    for name in _CATEGORIES:
        column = view.column("checks", name)
        labels = (
            [one for one in column if one is not None]
            if column.dtype == object
            else [str(int(one)) for one in column if np.isfinite(one)]
        )
        found[name] = {"kind": "category", "unit": "", "values": dict(Counter(labels).most_common())}
    elements: Counter[str] = Counter()
    for one in view.column("checks", "elements"):
        elements.update(one or ())
    found["elements"] = {"kind": "category", "unit": "", "values": dict(elements.most_common())}
    return found


def _finite(view: View, name: str) -> Floats:
    values = view.floats("checks", name)
    return np.asarray(values[np.isfinite(values)])


def gallery(scene: Scene, *, seed: int = 0) -> list[dict[str, Any]]:
    """Return structures to look at: the best, some as they come, and failures of each kind."""
    reasons = scene.samples.reasons()
    unique = scene.unique("kit")
    known = scene.known("default")
    good = np.flatnonzero(unique if known is None else unique & ~known)
    best = good[np.argsort(_merit(scene)[good], kind="stable")][:_N_BEST]
    rest = np.setdiff1d(np.flatnonzero(scene.check("kit.valid")), best)
    typical = np.sort(np.random.default_rng(seed).permutation(rest)[:_N_TYPICAL])
    kinds = [("best", i) for i in best.tolist()] + [("typical", i) for i in typical.tolist()]
    kinds += [("failure", i) for i in _failures(reasons)]
    at = np.array([i for _, i in kinds], dtype=np.int64)
    shown = []
    checks = scene.samples.rows("checks", at)
    distance = scene.samples.floats("stability", HULL_DISTANCE) if scene.samples.has("stability") else None
    for (kind, i), row, read in zip(kinds, checks, scene.samples.rows("read", at), strict=True):
        measures = {name: row[name] for name in _MEASURES if row[name] is not None}
        if distance is not None and np.isfinite(distance[i]):
            measures = {HULL_DISTANCE: round(float(distance[i]), 4), **measures}
        shown.append({
            "id": read["id"], "kind": kind, "reason": reasons[i],
            "detail": read["detail"] or row["trouble"] or row["detail"] or "", "formula": row["formula"],
            "spacegroup_number": row["spacegroup_number"], "cif": row["cif"] or "", "measures": measures,
        })  # fmt: skip
    return shown


def _merit(scene: Scene) -> Floats:
    """Return what is lower for better samples: hull distance, else improbability, else low symmetry."""
    if scene.samples.has("stability"):
        distance = scene.samples.floats("stability", HULL_DISTANCE)
        return np.where(np.isfinite(distance), distance, np.inf)
    said = [json.loads(text) if text else {} for text in scene.samples.texts("read", "properties")]
    likely = np.array([one.get("log_probability") or np.nan for one in said], dtype=np.float64)
    if np.isfinite(likely).any():
        return np.where(np.isfinite(likely), -likely, np.inf)
    number = scene.samples.floats("checks", "spacegroup_number")
    alone = scene.samples.floats("checks", "n_elements") < 2  # an element is no discovery
    return np.where(np.isfinite(number) & ~alone, -number, np.inf)


def _failures(reasons: Sequence[str | None]) -> list[int]:
    """Return samples of the most frequent reasons, one of each, then a second of each ..."""
    by_reason: dict[str, list[int]] = {}
    for i, reason in enumerate(reasons):
        if reason is not None and reason != "missing":
            by_reason.setdefault(reason, []).append(i)
    frequent = sorted(by_reason.values(), key=lambda held: -len(held))
    turns = [held[turn] for turn in range(_N_FAILURES) for held in frequent if turn < len(held)]
    return turns[:_N_FAILURES]


def parities(scene: Scene) -> list[dict[str, Any]]:
    """Return pairs of two numbers that should be equal, and of a confidence and whether it was right.

    What was asked for and what came out; a crystal before and after relaxation; a candidate and its target;
    and the share of a target's candidates that are one structure, with whether that structure is the target.
    """
    found = (_relaxation_parity(scene), _density_parity(scene), _target_parity(scene), _agreement(scene))
    return [plot for plot in found if plot is not None]


def _relaxation_parity(scene: Scene) -> dict[str, Any] | None:
    if scene.relaxation is None:
        return None
    before = scene.samples.floats("stability", "submitted_hull_distance_ev_per_atom").round(4)
    after = scene.samples.floats("stability", HULL_DISTANCE).round(4)
    return _parity(
        "Hull distance as submitted and relaxed", ("as submitted", before), ("relaxed", after), "eV/atom"
    )


def _density_parity(scene: Scene) -> dict[str, Any] | None:
    asked = np.full(scene.n, np.nan)
    for i, text in enumerate(scene.samples.texts("read", "conditions")):
        wanted = (json.loads(text).get("properties") or {}).get("density_g_cm3") if text else None
        if wanted and wanted.get("low") == wanted.get("high") is not None:
            asked[i] = float(wanted["low"])
    density = scene.samples.floats("checks", "density_g_cm3")
    return _parity("Density asked for and found", ("asked for", asked), ("found", density), "g/cm3")


def _target_parity(scene: Scene) -> dict[str, Any] | None:
    """Return the volume per atom of each target and of its first candidate, whether it matches or not."""
    if scene.pairs is None or scene.targets is None:
        return None
    column = "volume_per_atom_angstrom3"
    first = np.flatnonzero(scene.pairs.candidate == 0)
    theirs = scene.targets.floats("checks", column)[scene.pairs.target[first]].round(3)
    ours = scene.samples.floats("checks", column)[first].round(3)
    title = "Volume per atom of targets and of their first candidates"
    return _parity(title, ("target", theirs), ("first candidate", ours), "angstrom^3")


def _parity(title: str, x: tuple[str, Floats], y: tuple[str, Floats], unit: str) -> dict[str, Any] | None:
    """Return a plot of the pairs that are numbers; each axis is its label and values. None without a pair."""
    at = np.flatnonzero(np.isfinite(x[1]) & np.isfinite(y[1]))[:_MOST_POINTS]
    if not len(at):
        return None
    return {
        "title": title, "x_label": x[0], "y_label": y[0], "unit": unit, "x": x[1][at].tolist(),
        "y": y[1][at].tolist(),
    }  # fmt: skip


def _agreement(scene: Scene) -> dict[str, Any] | None:
    """Return, for each different structure among a target's candidates, its share of them and its truth.

    Different is what pymatgen's matcher tells apart at its defaults; true is what matches at those of
    structure prediction. All candidates count in the share, unreadable ones too: they are votes for nothing.
    """
    if scene.pairs is None or "default" not in scene.copies.of:
        return None
    target = scene.pairs.target
    n_candidates = np.bincount(target)
    readable = scene.readable
    of = scene.copies.of["default"]
    # a copy of a copy's original; originals may lie among the candidates of another target of that formula
    root = np.where(of >= 0, of, np.arange(scene.n))
    votes = Counter(zip(target[readable].tolist(), root[readable].tolist(), strict=True))
    matched = np.isfinite(scene.samples.floats("matches", "rms_distance.csp"))
    first: dict[tuple[int, int], int] = {}
    for i in np.flatnonzero(readable).tolist():
        first.setdefault((int(target[i]), int(root[i])), i)
    kinds = [kind for kind in first if n_candidates[kind[0]] >= _FEWEST_VOTES]
    if not kinds:
        return None
    return {
        "kind": "calibration", "title": "Agreement of a target's candidates",
        "x_label": "share of the candidates that are a structure", "y_label": "of these, the target's",
        "unit": "", "x": [round(votes[kind] / int(n_candidates[kind[0]]), 4) for kind in kinds],
        "y": [int(matched[first[kind]]) for kind in kinds],
    }  # fmt: skip
