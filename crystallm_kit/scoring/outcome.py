"""report.json: all that a run found, for the page and for programs.

    {"schema": 1, "created": ..., "protocols": {...}, "sets": [{"name": "DiffCSP", "scores": [...]}]}

Not here: what is counted (summary.py) and shown (exhibits.py), the page (report.py).
"""

import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from crystallm_kit.scores.protocols import PUBLISHED, protocol_text
from crystallm_kit.scores.score import Score
from crystallm_kit.scoring.exhibits import distributions, edges_of, funnel, gallery, parities
from crystallm_kit.scoring.scene import Scene

REPORT = "report.json"
_LIBRARIES = (
    "crystallm-kit",
    "pymatgen",
    "numpy",
    "scipy",
    "numba",
    "moyopy",
    "smact",
    "pyarrow",
    "torch",
    "chgnet",
)


def report_of(
    scored: Sequence[tuple[Scene, Sequence[str], Sequence[Score], Mapping[str, float]]],
    *,
    command: str,
    settings: Mapping[str, Any],
    protocols: Sequence[str],
    notes: Sequence[str],
    published: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Return what report.json holds.

    Args:
        scored: Of each set: its scene, its sources, its scores, and seconds of its steps.
        command: That made it; "" from Python.
        settings: Of the run.
        protocols: That were asked for.
        notes: What has to be known.
        published: Rows of other systems, as published.rows_for_report gives them.
    """
    scenes = [one[0] for one in scored]
    reference = scenes[0].reference
    edges = edges_of([scene.samples for scene in scenes] + ([reference] if reference else []))
    return {
        "schema": 1,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "versions": versions(),
        "settings": dict(settings),
        "protocols": {
            name: {
                "title": PUBLISHED[name].title,
                "text": protocol_text(name),
                "settings": {"frozen": PUBLISHED[name].frozen, "source": PUBLISHED[name].source},
            }
            for name in protocols
        },
        "sets": [_set(*one, edges) for one in scored],
        "reference": None if reference is None else {
            "name": reference.name, "n": reference.n, "distributions": distributions(reference, edges),
        },
        "published": list(published),
        "notes": list(notes),
    }  # fmt: skip


def _set(
    scene: Scene, sources: Sequence[str], scores: Sequence[Score], seconds: Mapping[str, float],
    edges: Mapping[str, Sequence[float]],
) -> dict[str, Any]:  # fmt: skip
    counts, reasons = funnel(scene)
    return {
        "name": scene.samples.name,
        "sources": list(sources),
        "n_requested": scene.samples.n,
        "funnel": [list(pair) for pair in counts],
        "reasons": reasons,
        "scores": [score.as_dict() for score in scores],
        "distributions": distributions(scene.samples, edges),
        "gallery": gallery(scene),
        "parity": parities(scene),
        "rows": f"rows/{scene.samples.name}.parquet",
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
    }


def write_report_json(report: Mapping[str, Any], path: Path) -> None:
    """Write it, whole or not at all."""
    writing = path.with_name(f".{path.name}.writing")
    writing.write_text(
        json.dumps(report, ensure_ascii=False, indent=1, allow_nan=False) + "\n", encoding="utf-8"
    )
    writing.replace(path)


def versions() -> dict[str, str]:
    """Return the versions of what a number can depend on."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
