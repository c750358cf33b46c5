"""POST /v1/crystals with httpx: each crystal is written as it passes, the funnel is printed at the end.

python serve/clients/stream_crystals.py BaTiO3 4 cifs/          pip install httpx
CRYSTALLM_KIT_URL (default http://127.0.0.1:8000) says where; CRYSTALLM_KIT_KEY holds the key, if needed.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx

URL = os.environ.get("CRYSTALLM_KIT_URL", "http://127.0.0.1:8000")
KEY = os.environ.get("CRYSTALLM_KIT_KEY", "")


def events(lines: Iterator[str]) -> Iterator[tuple[str, dict]]:
    """Yield (kind, data) of server-sent events until the stream says that it is whole.

    Raises RuntimeError if the server says that it failed, or the connection ended before that.
    """
    kind = "message"
    for line in lines:
        if line.startswith("event: "):
            kind = line.removeprefix("event: ")
        elif line == "data: [DONE]":
            return
        elif line.startswith("data: "):
            data = json.loads(line.removeprefix("data: "))
            if "error" in data:
                raise RuntimeError(data["error"]["message"])
            yield kind, data
            kind = "message"
    raise RuntimeError("the stream ended before it was whole")


def main(formula: str = "BaTiO3", n: str = "4", folder: str = "cifs") -> None:
    """Ask for n valid crystals of a formula and write them as CIF files."""
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    body = {"conditions": {"formula": formula}, "n": int(n), "format": "cif", "stream": True}
    headers = {"Authorization": f"Bearer {KEY}"} if KEY else {}
    with httpx.stream("POST", f"{URL}/v1/crystals", json=body, headers=headers, timeout=600) as response:
        if response.status_code != 200:
            response.read()
            sys.exit(f"{response.status_code}: {response.json()['error']['message']}")
        for kind, data in events(response.iter_lines()):
            if kind == "crystal":
                (out / f"{data['id']}.cif").write_text(data["structure"], encoding="utf-8")
                print(data["id"], data["formula"], data["spacegroup_number"], data["log_probability"])
            elif kind == "funnel":
                print(data["finish_reason"], "after", data["usage"]["n_samples"], "samples")


if __name__ == "__main__":
    main(*sys.argv[1:])
