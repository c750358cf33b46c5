"""The page in a real Chromium, on the real server with the shipped model: what a person can do there.

Slow: Chromium draws WebGL in software, and most claims generate crystals. Skipped where there is no Chromium.
"""

import io
import json
import shutil
import subprocess
import time
import zipfile
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from pymatgen.core import Lattice, Structure

pytest.importorskip("selenium", reason="selenium drives the browser; it is not installed")

from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

pytestmark = pytest.mark.slow
KEY = "test-key-of-24-characters"
PATIENCE = 120  # seconds until what must come has come


class Browser:
    """One tab, driven as a person would."""

    def __init__(self, driver, downloads):
        self.driver = driver
        self.downloads = downloads
        self.resize(1440, 900)
        self.driver.execute_cdp_cmd(
            "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(downloads)}
        )

    def resize(self, width, height):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def open(self, url):
        self.driver.get(url)
        self.until(lambda: self.driver.execute_script("return document.querySelector('.examples li')"))
        self.driver.get_log("performance")  # what belongs to this visit comes from here on

    def find(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def script(self, text, *arguments):
        return self.driver.execute_script(text, *arguments)

    def until(self, condition, seconds=PATIENCE):
        return WebDriverWait(self.driver, seconds, poll_frequency=0.1).until(lambda _: condition())

    def text(self, selector):
        return self.script("return document.querySelector(arguments[0]).textContent", selector)

    def press(self, selector):
        """Click, wherever in the page it is."""
        self.script("document.querySelector(arguments[0]).click()", selector)

    def fill(self, **fields):
        for name, value in fields.items():
            field = self.find(f"#{name}")
            self.script("for (let e = arguments[0].closest('details'); e; e = null) e.open = true", field)
            if field.tag_name == "select":
                self.script("arguments[0].value = arguments[1]", field, value)
            else:
                field.clear()
                field.send_keys(str(value))

    def by_conditions(self, **fields):
        self.press("input[name=way][value=conditions]")
        self.fill(**fields)

    def generate(self):
        """Press Generate and wait for the end of the answer."""
        self.press("#generate")
        self.until(lambda: self.find("#generate").is_enabled())

    def requests(self):
        """Return the requests of this visit so far, as Chromium tells of them."""
        entries = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        return [e["params"]["request"] for e in entries if e["method"] == "Network.requestWillBeSent"]

    def sent(self):
        """Return the requests for crystals of this visit so far."""
        return [request for request in self.requests() if request["url"].endswith("/v1/crystals")]

    def colours(self, selector):
        """Return how many different colours a canvas shows."""
        return self.script(
            """const from = document.querySelector(arguments[0]), {width, height} = from;
            const pen = Object.assign(document.createElement("canvas"), {width, height}).getContext("2d");
            pen.drawImage(from, 0, 0);
            return new Set(new Uint32Array(pen.getImageData(0, 0, width, height).data.buffer)).size;""",
            selector,
        )

    def image(self):
        return self.script("return document.querySelector('#viewer canvas:not(#still)').toDataURL()")

    def downloaded(self, suffix):
        """Return the one new file with a suffix, once it is whole.

        Chromium reserves the name with an empty file, and moves the whole one over it.
        """
        (path,) = self.until(lambda: [p for p in self.downloads.glob(f"*{suffix}") if p.stat().st_size])
        content = path.read_bytes()
        path.unlink()
        return path.name, content

    def module(self, name, expression, *arguments):
        """Return what an expression gives with one of the page's modules as `module`; it may be a promise."""
        return self.driver.execute_async_script(
            f"""const given = [...arguments], done = given.pop();
            const use = async (module) => done(await ({expression}));
            import("/page/{name}").then(use).catch((error) => done(String(error)));""",
            *arguments,
        )


@pytest.fixture(scope="module")
def chromium(new_chromium, tmp_path_factory):
    with new_chromium() as driver:
        yield Browser(driver, tmp_path_factory.mktemp("downloads"))


@pytest.fixture
def page(chromium, live_server):
    chromium.resize(1440, 900)
    chromium.open(live_server.url)
    return chromium


def is_shown(browser, selector):
    return browser.find(selector).is_displayed()


# ---------------------------------------------------------------- crystals


def test_words_give_structures_in_3d(page):
    page.fill(prompt="three oxides of lithium and cobalt, shiny", seed=1)
    page.generate()
    assert len(page.all("#cards li")) == 3
    assert {"contains O", "only Li, Co", "not understood"} & {e.text for e in page.all("#understood b")}
    assert "“shiny” not understood" in page.text("#understood")
    page.until(lambda: page.colours("#viewer canvas:not(#still)") > 100)
    assert page.colours("#cards li canvas") > 100
    assert {name.text for name in page.all("#legend b")} <= {"Li", "Co", "O"}
    assert "valid" in page.text("#verdict")


def test_fields_reach_the_request_and_empty_ones_do_not(page):
    page.by_conditions(
        formula="CaF2", spacegroup="Fm-3m", sites=3, crystal_system="cubic", n=2, temperature=0.9,
        number_temperature=0.5, top_p=0.95, top_k=7, seed=5, max_samples=20, redraws=1, format="json",
        model="crystallm-kit",
    )  # fmt: skip
    page.press("#unique")
    page.press("#include_invalid")
    page.generate()
    (request,) = page.sent()
    assert json.loads(request["postData"]) == {
        "conditions": {"formula": "CaF2", "spacegroup": "Fm-3m", "sites": 3, "crystal_system": "cubic"},
        "n": 2, "temperature": 0.9, "number_temperature": 0.5, "top_p": 0.95, "top_k": 7, "seed": 5,
        "max_samples": 20, "redraws": 1, "format": "json", "model": "crystallm-kit", "unique": False,
        "constrained": True, "include_invalid": True, "stream": True,
    }  # fmt: skip
    assert len(page.all("#cards .verdict.good")) == 2


def test_elements_and_property_ranges_reach_the_request(page):
    page.by_conditions(elements="Na, Cl", n=1, seed=1)
    page.press("#only_elements")
    page.fill(**{"density_g_cm3-low": 1, "density_g_cm3-high": 4})
    page.generate()
    (request,) = page.sent()
    body = json.loads(request["postData"])
    assert body["conditions"] == {
        "elements": "Na, Cl", "only_elements": True, "properties": {"density_g_cm3": {"low": 1, "high": 4}},
    }  # fmt: skip
    assert set(body) == {"conditions", "n", "seed", "model", "unique", "constrained", "format", "stream"}
    assert len(page.all("#cards li")) == 1


def test_an_adapter_of_the_server_can_be_chosen(page, live_server):
    names = "return [...document.querySelectorAll('#model option')].map((option) => option.value)"
    offered = list(live_server.state.model_names())
    page.until(lambda: page.script(names) == offered)
    page.by_conditions(formula="MgO", n=1, model=offered[1])
    page.generate()
    assert json.loads(page.sent()[0]["postData"])["model"] == offered[1]
    assert len(page.all("#cards li")) == 1


@pytest.mark.parametrize("form", ["cif", "extxyz", "json"])
def test_a_crystal_looks_the_same_in_every_file_format(page, form):
    page.by_conditions(formula="NaCl", spacegroup=225, n=1, seed=3, format=form)
    page.generate()
    page.until(lambda: page.colours("#viewer canvas:not(#still)") > 100)
    facts = page.text("#measures")
    assert "90.0°  90.0°  90.0°" in facts, "Fm-3m is shown in its conventional cell"
    assert facts.endswith("Atoms in the file2")
    assert [entry.text.split() for entry in page.all("#legend li")] == [["Na", "Sodium"], ["Cl", "Chlorine"]]
    assert page.find("#conventional").is_enabled()


def test_many_crystals_share_one_webgl_context(page):
    """Browsers give a page about 16 contexts."""
    page.by_conditions(formula="NaCl", n=24, seed=1)
    page.press("#unique")
    page.generate()
    assert len(page.all("#cards li")) == 24
    assert len(page.all("#viewer canvas:not(#still)")) == 1
    last = "#cards li:last-child canvas"
    page.script("document.querySelector(arguments[0]).scrollIntoView()", last)
    page.until(lambda: page.colours(last) > 50)
    page.press("#cards li:last-child .pick")
    page.until(lambda: page.colours("#viewer canvas:not(#still)") > 100)
    errors = [entry["message"] for entry in page.driver.get_log("browser") if "WebGL" in entry["message"]]
    assert not errors


def test_crystals_appear_before_the_last_one_is_made_and_stop_ends_the_work(page, live_server):
    page.by_conditions(elements="O", n=500, seed=1)
    page.press("#generate")
    page.until(lambda: page.all("#cards li:not(.waiting)"))
    assert not page.find("#generate").is_enabled()
    page.press("#stop")
    page.until(lambda: page.find("#generate").is_enabled(), 5)
    assert page.text("#status").startswith("Stopped with ")
    assert 0 < len(page.all("#cards li")) < 500
    backend = live_server.state.backend
    page.until(lambda: backend.n_running() == backend.n_waiting() == 0, 10)


def test_what_stopped_the_samples_is_counted(page):
    page.by_conditions(formula="MgO", spacegroup=225, n=3, max_samples=6, seed=1)
    page.generate()
    rows = {row.find_element(By.TAG_NAME, "th").text: row.text for row in page.all("#funnel tbody tr")}
    assert rows["drawn"] == "drawn 6 100.0 %"
    assert "stopped by duplicate" in rows
    assert "of 3 wanted: all 6 samples are spent" in page.text("#status")


def test_no_valid_crystal_is_said_in_words(page):
    page.by_conditions(formula="Xe7He5", n=1, max_samples=2, seed=1)
    page.press("#constrained")
    page.generate()
    assert not page.all("#cards li")
    assert "No valid crystal" in page.text("#problem")
    assert is_shown(page, "#funnel")
    assert not is_shown(page, "#stage")


# ---------------------------------------------------------------- files and curl


def test_the_curl_text_gives_the_same_crystals(page):
    if not shutil.which("curl"):
        pytest.skip("no curl on the PATH")
    page.by_conditions(formula="TiO2", n=2)
    page.fill(prompt="") if is_shown(page, "#prompt") else None
    page.generate()
    command = page.text("#curl-text")
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=PATIENCE, check=True)
    crystals = [
        json.loads(line.removeprefix("data: ")) for line in done.stdout.splitlines() if '"index"' in line
    ]
    assert [crystal["id"] for crystal in crystals] == [
        f"{c['seed']}-{c['index']}" for c in map(numbered, crystals)
    ]
    shown = []
    for position in range(1, 3):
        page.press(f"#cards li:nth-child({position}) .pick")
        shown.append(page.text("#text"))
    assert [crystal["text"] for crystal in crystals] == shown


def numbered(crystal):
    seed, _, index = crystal["id"].rpartition("-")
    return {"seed": seed, "index": index}


def test_words_with_quotes_survive_the_shell(page):
    command = page.module(
        "client.js", "module.curlOf({prompt: given[0]})", "it's 'CaO' \"$HOME\" `id` \\ ; & #"
    )
    command = command.replace("curl -sS -N", "printf '%s\\n'")
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == {"prompt": "it's 'CaO' \"$HOME\" `id` \\ ; & #"}


def test_a_cif_downloads_and_is_the_crystal(page):
    page.by_conditions(formula="SrTiO3", n=1, seed=2)
    page.generate()
    page.press("#cards .save")
    name, content = page.downloaded(".cif")
    structure = Structure.from_str(content.decode(), fmt="cif")
    assert structure.composition.reduced_formula == "SrTiO3"
    assert "SrTiO3" in name
    page.press("#download-one")
    assert page.downloaded(".cif")[1] == content


def test_all_files_download_as_one_archive(page):
    page.by_conditions(formula="CaF2", n=3, seed=2)
    page.generate()
    page.press("#download-all")
    _, content = page.downloaded(".zip")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.testzip() is None
        names = [name for name in archive.namelist() if name.endswith(".cif")]
        read = [Structure.from_str(archive.read(name).decode(), fmt="cif") for name in names]
        told = json.loads(archive.read("crystals.json"))
    assert [structure.composition.reduced_formula for structure in read] == ["CaF2"] * 3
    assert told["request"]["seed"] == 2
    assert len(told["crystals"]) == 3


# ---------------------------------------------------------------- the view


def turned(page, *keys):
    """Return whether the view changes when keys are pressed in it."""
    before = page.image()
    page.find("#viewer").send_keys(*keys)
    return page.image() != before


def test_keyboard_alone_generates_selects_and_turns(page):
    def focused():
        return page.script("return document.activeElement.id || document.activeElement.className")

    def tab_to(wanted, key=Keys.TAB):
        for _ in range(60):
            ActionChains(page.driver).send_keys(key).perform()
            if wanted():
                return
        raise AssertionError(f"Tab never reached it; the focus is on {focused()!r}")

    ActionChains(page.driver).send_keys(Keys.TAB).perform()
    assert focused() == "skip"
    tab_to(lambda: focused() == "prompt")
    keys = ActionChains(page.driver).send_keys("two oxides of calcium and titanium")
    keys.key_down(Keys.CONTROL).send_keys(Keys.ENTER).key_up(Keys.CONTROL).perform()
    page.until(lambda: len(page.all("#cards .pick")) == 2 and page.find("#generate").is_enabled())
    page.until(lambda: page.all("#viewer canvas:not(#still)"))
    tab_to(lambda: focused() == "viewer")
    outline = page.script("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid", "the focus can be seen"
    before = page.image()
    ActionChains(page.driver).send_keys(Keys.ARROW_RIGHT).perform()
    page.until(lambda: page.image() != before)
    tab_to(lambda: page.script("return document.activeElement.matches('#cards li:last-child .pick')"))
    ActionChains(page.driver).send_keys(Keys.ENTER).perform()
    assert page.find("#cards li:last-child .pick").get_attribute("aria-pressed") == "true"
    assert len(page.all(".pick[aria-pressed=true]")) == 1
    tab_to(lambda: focused() == "generate", Keys.SHIFT + Keys.TAB)


def test_the_view_turns_zooms_looks_along_axes_and_shows_more_cells(page):
    page.by_conditions(formula="CaTiO3", n=1, seed=4)
    page.generate()
    page.until(lambda: page.all("#viewer canvas:not(#still)"))
    first = page.image()
    for key in (Keys.ARROW_LEFT, Keys.ARROW_UP, "+", "-", "a", "b", "c"):
        assert turned(page, key), f"key {key!r}"
    assert turned(page, "0")
    assert page.image() == first, "0 is the view at the start"
    for button in ("[data-along='2']", "[data-zoom='1.25']", "[data-along='']"):
        before = page.image()
        page.press(f".handles {button}")
        page.until(lambda before=before: page.image() != before)
    ActionChains(page.driver).drag_and_drop_by_offset(page.find("#viewer"), 80, 30).perform()
    assert page.image() != first, "dragging turns"
    before = page.image()
    page.press("input[name=cells][value='3']")
    page.until(lambda: page.image() != before)


def test_a_wheel_over_the_view_scrolls_the_page_until_the_view_is_chosen(page):
    page.by_conditions(formula="NaCl", n=1, seed=1)
    page.generate()
    page.until(lambda: page.all("#viewer canvas:not(#still)"))
    page.resize(1440, 500)
    view = page.find("#viewer")
    page.script("scrollTo(0, 0)")
    before = page.image()
    wheel = {"type": "mouseWheel", "x": 700, "y": 300, "deltaX": 0, "deltaY": 120}
    page.driver.execute_cdp_cmd("Input.dispatchMouseEvent", wheel)
    page.until(lambda: page.script("return scrollY") > 0, 5)
    assert page.image() == before
    page.script("scrollTo(0, 0); arguments[0].focus({preventScroll: true})", view)
    page.driver.execute_cdp_cmd("Input.dispatchMouseEvent", wheel)
    page.until(lambda: page.image() != before, 5)
    assert page.script("return scrollY") == 0


CENTRED = {
    225: Lattice.cubic(5.6),
    229: Lattice.cubic(3.2),
    166: Lattice.hexagonal(4, 20),
    139: Lattice.tetragonal(4, 7),
    69: Lattice.orthorhombic(4, 6, 7),
    65: Lattice.orthorhombic(4, 6, 7),
    38: Lattice.orthorhombic(4, 6, 7),
    15: Lattice.monoclinic(9, 4, 5, 105),
}


@pytest.mark.parametrize("number", CENTRED)
def test_a_centred_crystal_is_drawn_in_its_conventional_cell(page, number):
    import moyopy
    from moyopy.interface import MoyoAdapter

    from crystallm_kit.records import Crystal
    from crystallm_kit.structures.spacegroups import spacegroup_symbol
    from crystallm_kit.structures.writing import text_of
    from crystallm_kit.text.representation import representation

    sites = [[0.11, 0.23, 0.37], [0, 0, 0]]
    crystal = Structure.from_spacegroup(number, CENTRED[number], ["Na", "Cl"], sites)
    form = representation("wyckoff")
    primitive = form.decode(form.encode(Crystal("x", crystal))).structure  # as the model's texts are read
    found = page.module(
        "crystal.js", "module.conventional(module.readCrystal(given[0], 'cif'), given[1], given[2])",
        text_of(Crystal("x", primitive), "cif"), number, spacegroup_symbol(number),
    )  # fmt: skip
    sites = found["sites"]
    drawn = Structure(found["lattice"], [s["element"] for s in sites], [s["at"] for s in sites])
    assert len(primitive) < len(drawn) == len(crystal)
    assert sorted(drawn.lattice.abc) == pytest.approx(sorted(crystal.lattice.abc), abs=1e-3)
    angles = [[min(angle, 180 - angle) for angle in cell.lattice.angles] for cell in (drawn, crystal)]
    assert angles[0] == pytest.approx(angles[1], abs=1e-3)
    assert moyopy.MoyoDataset(MoyoAdapter.from_structure(drawn), symprec=0.01).number == number


def test_rock_salt_is_drawn_with_atoms_on_all_faces_and_six_neighbours(page):
    scene = page.module(
        "crystal.js",
        "(module.sceneOf({lattice: [[5.6,0,0],[0,5.6,0],[0,0,5.6]], sites: given[0]}))",
        [{"element": e, "at": list(s.frac_coords)} for s in rock_salt() for e in [s.specie.symbol]],
    )
    assert len(scene["atoms"]) == 27
    assert len(scene["bonds"]) == 54, "a 3 x 3 x 3 grid of points has 54 nearest pairs"
    assert len(scene["edges"]) == 12


def rock_salt():
    return Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.6), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])


def test_without_webgl_a_still_picture_is_shown_and_all_else_works(new_chromium, tmp_path, live_server):
    with new_chromium(webgl=False) as driver:
        browser = Browser(driver, tmp_path)
        browser.open(live_server.url)
        browser.by_conditions(formula="NaCl", n=2, seed=1)
        browser.generate()
        browser.until(lambda: is_shown(browser, "#no-webgl"))
        assert "no WebGL" in browser.text("#no-webgl")
        browser.until(lambda: browser.colours("#still") > 50)
        browser.press("#cards .save")
        assert browser.downloaded(".cif")[1].startswith(b"#")


# ---------------------------------------------------------------- errors, keys, the wire


def test_an_error_is_shown_beside_the_field_that_it_is_about(page):
    page.by_conditions(formula="BaTiQ3")
    page.generate()
    wrong = page.find("#formula-wrong")
    assert wrong.is_displayed()
    assert "no element 'Q'" in wrong.text
    assert page.find("#formula").get_attribute("aria-invalid") == "true"
    assert page.script("return document.activeElement.id") == "formula"
    page.fill(formula="MgO", n=1)
    page.generate()
    assert not page.all(".wrong")
    assert len(page.all("#cards li")) == 1


def test_contradictions_and_limits_are_shown_in_words(page, live_server):
    page.by_conditions(spacegroup="Fm-3m", crystal_system="hexagonal")
    page.generate()
    assert "is cubic, not hexagonal" in page.text("#problem") + page.text("#request")
    page.fill(spacegroup="", crystal_system="", max_samples=live_server.state.settings.max_samples + 1)
    page.generate()
    assert "at most" in page.text("#max_samples-wrong")


def test_words_that_nobody_understands_are_told_beside_the_words(page):
    page.fill(prompt="something nice")
    page.generate()
    assert "nothing of it was understood" in page.text("#prompt-wrong")
    page.fill(prompt="")
    page.generate()
    assert page.text("#prompt-wrong")
    assert len(page.sent()) == 1, "no words, no request"


def test_a_server_that_stops_says_when_to_try_again(chromium, make_state, serve_app):
    from crystallm_kit.server.app import create_app

    with serve_app(create_app(make_state())) as server:
        chromium.open(server.url)
        server.state.admission.drain()
        chromium.by_conditions(formula="MgO", n=1)
        chromium.generate()
        assert "The server is not ready" in chromium.text("#problem")
        assert chromium.text("#problem button").startswith("Try again in ")
        assert not chromium.find("#problem button").is_enabled()


def test_a_server_that_is_gone_is_told_in_words(chromium, make_state, serve_app):
    from crystallm_kit.server.app import create_app

    with serve_app(create_app(make_state())) as server:
        chromium.open(server.url)
    chromium.by_conditions(formula="MgO", n=1)
    chromium.generate()
    assert "cannot be reached" in chromium.text("#problem")


def test_the_key_is_asked_for_sent_in_a_header_and_shown_nowhere(chromium, make_state, serve_app, tmp_path):
    from crystallm_kit.server.app import create_app

    file = Path(tmp_path / "keys.txt")
    file.write_text(f"{KEY}\n", encoding="utf-8")
    file.chmod(0o600)
    with serve_app(create_app(make_state(api_key_file=file))) as server:
        chromium.open(server.url)
        chromium.until(lambda: is_shown(chromium, "#key"), 5)
        chromium.by_conditions(formula="MgO", n=1)
        chromium.generate()
        assert "API key" in chromium.text("#key-wrong")
        assert chromium.script("return document.activeElement.id") == "key"
        chromium.fill(key=KEY)
        chromium.generate()
        assert len(chromium.all("#cards li")) == 1
        requests = chromium.requests()
        asked = [request for request in requests if request["url"].endswith("/v1/crystals")]
        assert [request["headers"].get("Authorization") for request in asked] == [None, f"Bearer {KEY}"]
        assert not any(KEY in request["url"] + request.get("postData", "") for request in requests)
        assert KEY not in chromium.script("return document.body.textContent + location.href")
        assert '"Authorization: Bearer $API_KEY"' in chromium.text("#curl-text")
        kept = "return JSON.stringify([{...sessionStorage}, {...localStorage}, document.cookie])"
        assert KEY not in chromium.script(kept), "a key is kept only where the person says so"
        if shutil.which("curl"):
            command = ["sh", "-c", chromium.text("#curl-text")]
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=PATIENCE,
                check=True,
                env={"API_KEY": KEY, "PATH": "/usr/bin:/bin"},
            )
            assert "event: crystal" in done.stdout
        chromium.press("#keep-key")
        assert KEY in chromium.script(kept)
        chromium.press("#keep-key")
        assert KEY not in chromium.script(kept)


def test_no_request_leaves_the_server(page, live_server):
    page.driver.get(f"{live_server.url}/?again")
    page.fill(prompt="two oxides of magnesium", seed=1)
    page.generate()
    page.until(lambda: page.all("#viewer canvas:not(#still)"))
    page.press("#cards .save")
    page.downloaded(".cif")
    urls = [request["url"] for request in page.requests()]
    assert f"{live_server.url}/v1/crystals" in urls
    assert any("3dmol" in url for url in urls)
    outside = [
        u for u in urls if urlsplit(u).scheme not in ("blob", "data") and not u.startswith(live_server.url)
    ]
    assert not outside
    wrong = [entry for entry in page.driver.get_log("browser") if "Security" in entry["message"]]
    assert not wrong, "nothing was refused by the page's policy"


@pytest.mark.parametrize("size", [1, 2, 7])
def test_events_are_read_however_the_stream_is_cut(page, size):
    stream = 'event: crystal\r\ndata: {"a": "é"}\n\n: still there\n\ndata: one\ndata: two\n\r'
    stream += "data: [DONE]\n\ndata: cut"
    events = page.module(
        "client.js",
        """(async () => {
            const bytes = new TextEncoder().encode(given[0]), found = [];
            const stream = new ReadableStream({start(to) {
                for (let i = 0; i < bytes.length; i += given[1]) to.enqueue(bytes.slice(i, i + given[1]));
                to.close();
            }});
            for await (const each of module.eventsOf(stream)) found.push([each.event, each.data]);
            return found;
        })()""",
        stream, size,
    )  # fmt: skip
    assert events == [["crystal", '{"a": "é"}'], ["message", "one\ntwo"], ["message", "[DONE]"]]


# ---------------------------------------------------------------- the look


@pytest.mark.parametrize("width", [320, 390, 768, 1440])
def test_nothing_has_to_be_scrolled_sideways(page, width):
    page.resize(width, 844)
    assert page.script("return document.documentElement.scrollWidth") <= width
    page.by_conditions(elements="Ba, Ti, O", n=2, seed=1)
    for summary in page.all("summary"):
        page.script("arguments[0].parentElement.open = true", summary)
    page.generate()
    page.until(lambda: page.all("#viewer canvas:not(#still)"))
    assert page.script("return document.documentElement.scrollWidth") <= width
    beyond = page.script(
        """const isBeyond = (e) => e.getClientRects().length && !e.closest("pre, .table")
            && e.getBoundingClientRect().right > arguments[0] + 0.5;
        const all = [...document.querySelectorAll("main *:not(.unseen, option)")];
        return all.filter(isBeyond).map((e) => e.outerHTML.slice(0, 80));""",
        width,
    )
    assert not beyond


def test_the_page_does_not_jump_while_crystals_come(page):
    page.script(
        """window.jumps = [];
        const note = (e) => e.hadRecentInput || window.jumps.push(e.value);
        new PerformanceObserver((list) => list.getEntries().forEach(note)).observe({type: "layout-shift"});"""
    )
    page.fill(prompt="four oxides of lithium and cobalt", seed=1)
    page.generate()
    page.until(lambda: page.all("#viewer canvas:not(#still)"))
    time.sleep(0.5)
    assert sum(page.script("return window.jumps")) < 0.1  # where "good" ends (web.dev/articles/cls)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_told_from_its_ground(page, scheme):
    """WCAG 2.2, 1.4.3: 4.5 to 1, for what is shown before, after and in an error."""
    page.driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    page.fill(prompt="two oxides of lithium and cobalt, shiny", seed=1)
    page.generate()
    for summary in page.all("summary"):
        page.script("arguments[0].parentElement.open = true", summary)
    page.press("input[name=way][value=conditions]")
    low = page.script(CONTRAST)
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert not low


CONTRAST = """
const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
const linear = (x) => (x /= 255) <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
const ground = (e) => {
  for (; e; e = e.parentElement) {
    const found = channels(getComputedStyle(e).backgroundColor);
    if (found.length === 3) return found;
  }
  return [255, 255, 255];
};
const says = (e) => e.matches("input, select, textarea")
  || [...e.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
const isOut = (e) => !e.getClientRects().length || e.matches(":disabled, option, canvas")
  || e.closest("[inert], .unseen");
const found = [];
for (const e of document.querySelectorAll("body *")) {
  if (!says(e) || isOut(e)) continue;
  const [one, other] = [light(channels(getComputedStyle(e).color)), light(ground(e))].sort((a, b) => b - a);
  const ratio = (one + 0.05) / (other + 0.05);
  if (ratio < 4.5) found.push([e.tagName, e.id, e.className, e.textContent.slice(0, 30), ratio.toFixed(2)]);
}
return found;
"""


def test_every_control_has_a_name(page):
    page.by_conditions(formula="MgO", n=1, seed=1)
    page.generate()
    nameless = page.script(
        """return [...document.querySelectorAll("button, input, select, textarea, summary, a")]
            .filter((e) => !(e.getAttribute("aria-label") || e.labels?.length || e.textContent.trim()))
            .map((e) => e.outerHTML)"""
    )
    assert not nameless
