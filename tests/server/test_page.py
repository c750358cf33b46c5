"""The page's files as they are served: nothing else, of the right type, in agreement with the kit."""

import gzip
import json
import re
from pathlib import Path

import pytest
from ase.data import covalent_radii
from ase.data.colors import jmol_colors
from fastapi import FastAPI
from fastapi.testclient import TestClient
from pymatgen.core import Element

from crystallm_kit.records import PROPERTIES
from crystallm_kit.server import page
from crystallm_kit.structures.elements import ELEMENTS
from crystallm_kit.structures.spacegroups import spacegroup_number

WEB = Path(page.__file__).parent / "web"
FILES = sorted(path for path in WEB.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def client():
    app = FastAPI()
    page.mount(app)
    return TestClient(app)


def facts(client):
    text = client.get("/page/facts.js").text
    return json.loads(text.removeprefix("export default ").rstrip().removesuffix(";"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_file_of_the_page_is_served_whole_with_its_type(client, path):
    answer = client.get("/" if path.name == "index.html" else f"/page/{path.name}")
    assert answer.status_code == 200
    assert answer.content == path.read_bytes()
    kind = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml", ".html": "text/html"}
    assert answer.headers["content-type"].startswith(kind.get(path.suffix, "text/plain"))
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "name",
    [
        "..%2fstate.py", "%2e%2e%2fstate.py", "..%2f..%2f..%2fpyproject.toml", "%2fetc%2fpasswd", "vendor",
        "",
        "style.css%00", "..\\state.py", "web/style.css", "vendor%2f3dmol-2.5.5.min.js", "STYLE.css",
    ],
)  # fmt: skip
def test_nothing_but_the_files_of_the_page_is_served(client, name):
    assert client.get(f"/page/{name}").status_code == 404


def test_the_policy_lets_the_browser_load_from_this_server_alone(client):
    for name in ("", "page/page.js", "page/facts.js"):
        policy = client.get(f"/{name}").headers["content-security-policy"]
        parts = {words[0]: words[1:] for words in (part.split() for part in policy.split(";"))}
        assert parts["default-src"] == ["'none'"]
        assert parts["script-src"] == parts["connect-src"] == parts["style-src"] == ["'self'"]
        assert "unsafe" not in policy
        assert "http" not in policy


def test_what_the_page_refers_to_is_there_and_is_its_own(client):
    html = client.get("/").text
    for link in re.findall(r'(?:src|href)="([^"#]+)"', html):
        assert link == "docs" or client.get(f"/{link}").status_code == 200, link
    for path in WEB.glob("*.js"):
        for name in re.findall(r'(?:from |URL\()"\./([^"]+)"', path.read_text(encoding="utf-8")):
            assert client.get(f"/page/{name}").status_code == 200, (path.name, name)
    assert "style=" not in html, "the policy forbids inline styles"
    assert not re.search(r"<script(?![^>]*\bsrc=)|\son\w+=", html), "the policy forbids inline scripts"


def test_a_browser_that_has_a_file_is_not_sent_it_again(client):
    first = client.get("/page/style.css")
    again = client.get("/page/style.css", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert first.headers["cache-control"] == "no-cache"
    lasting = [path.name for path in (WEB / "vendor").iterdir()]
    assert all("immutable" in client.get(f"/page/{name}").headers["cache-control"] for name in lasting)


def test_files_are_compressed_for_those_who_can_read_that(client):
    name = next(path.name for path in (WEB / "vendor").glob("*.js"))
    with client.stream("GET", f"/page/{name}", headers={"Accept-Encoding": "gzip"}) as answer:
        sent = b"".join(answer.iter_raw())
    assert answer.headers["content-encoding"] == "gzip"
    assert len(sent) < 200_000
    assert gzip.decompress(sent) == (WEB / "vendor" / name).read_bytes()
    plain = client.get(f"/page/{name}", headers={"Accept-Encoding": "identity"})
    assert "content-encoding" not in plain.headers
    assert client.head("/").status_code == 200


def test_the_viewer_comes_with_its_licence_and_is_small():
    (viewer,) = (WEB / "vendor").glob("*.js")
    licence = (WEB / "vendor" / f"{viewer.name.removesuffix('.min.js')}.LICENSE.txt").read_text(
        encoding="utf-8"
    )
    assert "University of Pittsburgh" in licence
    assert "Redistribution and use in source and binary forms" in licence
    assert viewer.stat().st_size < 1_000_000


def test_the_form_offers_what_the_kit_knows(client):
    known = facts(client)
    assert [spacegroup_number(symbol) for symbol in known["spacegroups"]] == list(range(1, 231))
    assert [entry["name"] for entry in known["properties"]] == list(PROPERTIES)
    assert len(known["crystal_systems"]) == 7


def test_every_element_of_the_kit_has_the_name_colour_and_radius_that_its_sources_give():
    text = (WEB / "elements.js").read_text(encoding="utf-8")
    rows = re.findall(r'^  (\w+): \["(\w+)", "#(\w{6})", ([\d.]+)\],$', text, flags=re.MULTILINE)
    assert {row[0] for row in rows} == set(ELEMENTS)
    spelled = {"Al": "Aluminium", "Cs": "Caesium", "S": "Sulfur"}
    for symbol, name, colour, radius in rows:
        element = Element(symbol)
        assert name == spelled.get(symbol, element.long_name)
        assert colour == "".join(f"{round(255 * x):02x}" for x in jmol_colors[element.Z])
        assert float(radius) == pytest.approx(covalent_radii[element.Z], abs=0.005)
