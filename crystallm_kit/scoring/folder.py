"""The folder of a scoring run: what it was asked to do, so that it goes on with that and nothing else.

    scores/
      settings.json    the inputs, by the hash of their content
      report.json  report.html
      rows/DiffCSP.parquet    a row for each requested sample
      work/            the stages' parts; may be removed when all is done

Inputs have to be those of the first run; stages and protocols may be added, and come out of the cache where
they were worked out before.

Not here: the parts (rows.py).
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from crystallm_kit.errors import UserError

SETTINGS = "settings.json"
_LOCK = ".lock"
_OWN = ("settings.json", "report.json", "report.html", "rows", "work", "relaxed")


def open_folder(out: Path, inputs: Mapping[str, Any], *, fresh: bool = False) -> Path:
    """Make the folder, or check that it holds a run of the same inputs, and return the folder of its work.

    Args:
        out: The folder.
        inputs: JSON-ready; what the rows depend on.
        fresh: Remove what a run left there.

    Raises:
        UserError: If it is a file, holds something else, or a run of other inputs.
    """
    path = out / SETTINGS
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: a file, expected a folder for the scores; name another with --out")
    if out.is_dir() and any(out.iterdir()) and not path.exists():
        raise UserError(f"{out}: holds files that no scoring run wrote; name another folder with --out")
    if fresh and path.exists():
        for name in _OWN:
            one = out / name
            shutil.rmtree(one) if one.is_dir() else one.unlink(missing_ok=True)
    plain: dict[str, Any] = json.loads(json.dumps(inputs))
    if path.exists():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        difference = _difference("", earlier, plain)
        if difference:
            raise UserError(
                f"{out}: holds the scores of other inputs ({difference}); name another folder with --out, or "
                "remove them with --fresh"
            )
    else:
        out.mkdir(parents=True, exist_ok=True)
        writing = path.with_name(f".{SETTINGS}.writing")
        writing.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
        writing.replace(path)
    return out / "work"


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Hold a folder for one run. Raises UserError where another one is at work in it."""
    try:
        held = FileLock(out / _LOCK).acquire(blocking=False)
    except Timeout as error:
        raise UserError(f"{out}: another run is at work there; wait for it, or name another --out") from error
    with held:
        yield


def _difference(where: str, earlier: Any, now: Any) -> str:
    """Return the first key at which two settings differ, with both values; "" where they do not."""
    if isinstance(earlier, dict) and isinstance(now, dict):
        for key in sorted({*earlier, *now}):
            found = _difference(f"{where} {key}".strip(), earlier.get(key), now.get(key))
            if found:
                return found
        return ""
    return "" if earlier == now else f"{where}: {_shown(earlier)} there, {_shown(now)} now"


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    return json.dumps(value) if not isinstance(value, str) else value
