"""The report in a real Chromium, opened as a file: structures turn, tables sort, it fits a phone and paper.

Slow: Chromium draws WebGL in software. Skipped where there is no Chromium.
"""

import base64
import itertools
import json
import re

import pytest

pytest.importorskip("selenium", reason="selenium drives the browser; it is not installed")

from pymatgen.core import Lattice, Structure
from pymatgen.io.cif import CifWriter
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from crystallm_kit.scoring.comparison import compare_runs
from crystallm_kit.scoring.gallery import drawn
from crystallm_kit.scoring.published import rows_for_report
from crystallm_kit.scoring.report import write_report

pytestmark = pytest.mark.slow
HOSTILE = '"><img src=x onerror="window.hurt=1"></script><script>window.hurt=1</script>'
PATIENCE = 60  # seconds


class Browser:
    """One tab."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, path, *, width=1280, height=900, dark=False):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        self.driver.get(path.as_uri())

    def find(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def script(self, text, *arguments):
        return self.driver.execute_script(text, *arguments)

    def until(self, condition):
        return WebDriverWait(self.driver, PATIENCE, poll_frequency=0.1).until(lambda _: condition())

    def texts(self, selector):
        return self.script(
            "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", selector
        )

    def to_structures(self):
        self.script("document.querySelector('#structures').scrollIntoView()")
        self.until(lambda: self.script("return document.querySelector('.facts').textContent.length"))

    def image(self):
        """Return what the 3-D view shows, once it shows something."""
        return self.until(lambda: self.script("return document.querySelector('#viewer canvas')?.toDataURL()"))

    def settled(self):
        """Return the picture of the 3-D view once it no longer changes."""
        seen = [""]

        def same():
            seen.append(self.image())
            return seen[-1] == seen[-2] and seen[-1]

        return self.until(same)

    def complaints(self):
        return [e["message"] for e in self.driver.get_log("browser") if e["level"] in ("SEVERE", "WARNING")]


@pytest.fixture(scope="module")
def chromium(new_chromium):
    with new_chromium() as driver:
        yield Browser(driver)


@pytest.fixture
def report(small_run):
    return write_report(small_run(published=rows_for_report("cdvae_panel_mp20")))


def test_it_loads_nothing_but_itself_and_nothing_is_wrong(chromium, report):
    chromium.driver.get_log("performance")
    chromium.open(report)
    chromium.to_structures()
    chromium.settled()
    entries = (json.loads(e["message"])["message"] for e in chromium.driver.get_log("performance"))
    asked = [e["params"]["request"]["url"] for e in entries if e["method"] == "Network.requestWillBeSent"]
    outside = [url for url in asked if not url.startswith(("data:", "blob:")) and url != report.as_uri()]
    assert not outside
    assert not chromium.complaints()


def test_structures_turn_by_keys_mouse_and_buttons(chromium, report):
    chromium.open(report)
    chromium.to_structures()
    view = chromium.find("#viewer")
    first = chromium.settled()
    view.send_keys(Keys.ARROW_RIGHT)
    turned = chromium.settled()
    assert turned != first
    ActionChains(chromium.driver).drag_and_drop_by_offset(view, 60, 20).perform()
    assert chromium.settled() != turned
    chromium.find("[data-view='0']").click()
    assert chromium.settled() == first
    chromium.find("[data-view='a']").click()
    assert chromium.settled() != first
    chromium.find("[data-view='0']").click()
    chromium.find("[data-cells]").click()
    assert chromium.find("[data-cells]").get_attribute("aria-pressed") == "true"
    assert chromium.settled() != first


def test_a_picked_card_is_shown_with_its_facts_and_its_cif(chromium, report):
    chromium.open(report)
    chromium.to_structures()
    first = chromium.settled()
    second = chromium.all(".pick")[1]
    second.send_keys(Keys.ENTER)
    chromium.until(lambda: second.get_attribute("aria-pressed") == "true")
    assert chromium.settled() != first
    assert "SrTiO3" in chromium.texts(".facts")[0]
    assert "_cell_length_a" in chromium.texts(".file pre")[0]
    assert [b.get_attribute("aria-pressed") for b in chromium.all(".pick")].count("true") == 1


AWKWARD = {
    "one atom": Structure(Lattice.cubic(3.0), ["Po"], [[0, 0, 0]]),
    "hcp": Structure(
        Lattice.hexagonal(2.95, 4.68), ["Ti", "Ti"], [[1 / 3, 2 / 3, 0.25], [2 / 3, 1 / 3, 0.75]]
    ),
    "rock salt": Structure.from_spacegroup(
        "Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5] * 3]
    ),
    "triclinic": Structure(
        Lattice.from_parameters(8.14, 12.79, 7.16, 94.3, 116.6, 87.7),
        ["Na", "Al", "Si", "O", "O"],
        [[0.27, 0.99, 0.15], [0.01, 0.17, 0.21], [0.0, 0.82, 0.24], [0.0, 0.13, 0.97], [0.95, 0.2, 0.05]],
    ),
}


@pytest.mark.parametrize("name", AWKWARD)
def test_the_still_and_the_turning_picture_show_the_same_atoms_and_bonds(chromium, report, name):
    """The still follows the rules of the server's crystal.js in Python: both must agree."""
    module = next(s for s in re.findall(r"<script[^>]*>(.*?)</script>", report.read_text(), re.DOTALL)
                  if "function sceneOf" in s)  # fmt: skip
    rules = module.partition("// The large view of one crystal")[0]
    crystal = drawn(str(CifWriter(AWKWARD[name])))
    chromium.driver.get("about:blank")
    count = f"{rules}; const scene = sceneOf(arguments[0]); return [scene.atoms.length, scene.bonds.length]"
    still = [crystal.still.count("<circle"), crystal.still.count("stroke-width") / 2]
    assert chromium.script(count, crystal.data) == still


def test_failures_are_filtered_and_sorted(chromium, report):
    chromium.open(report)

    def shown():
        return chromium.script(
            "return [...document.querySelectorAll('#failed tbody tr')].filter(r => !r.hidden)"
            ".map(r => [...r.cells].map(c => c.textContent))"
        )

    everything = shown()
    assert len(everything) == 16 + 40 + 2
    chromium.find("select[name=reason]").send_keys("overlap")
    chromium.until(lambda: len(shown()) == 2)
    assert {row[2] for row in shown()} == {"overlap"}
    assert chromium.texts(".filters output") == ["2 of 58 shown"]
    chromium.find("select[name=set]").send_keys("the kit")
    chromium.until(lambda: len(shown()) == 1)
    chromium.script("document.querySelector('.filters').reset()")
    chromium.find("input[name=words]").send_keys("sample:7")
    chromium.until(lambda: {row[-1] for row in shown()} == {"sample:7"})
    chromium.find("input[name=words]").clear()
    chromium.find("input[name=words]").send_keys("s")
    head = chromium.all("#failed th")[-1]
    head.find_element(By.TAG_NAME, "button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    numbers = [int(row[-1].split(":")[1]) for row in shown()]
    assert numbers == sorted(numbers)
    head.find_element(By.TAG_NAME, "button").send_keys(Keys.ENTER)
    assert head.get_attribute("aria-sort") == "descending"


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_it_fits_phones_tablets_and_desks(chromium, report, small_run, tmp_path, width, dark):
    compared = compare_runs([report.parent, small_run("other")], tmp_path / "c.html")
    for path in (report, compared):
        chromium.open(path, width=width, dark=dark)
        inside, whole = chromium.script(
            "const root = document.documentElement; return [root.clientWidth, root.scrollWidth]"
        )
        assert whole <= inside, f"{path.name} is wider than the screen"


@pytest.mark.parametrize("dark", [False, True])
def test_all_text_stands_out_from_what_is_behind_it(chromium, report, dark):
    """WCAG 2.2, 1.4.3: 4.5 to 1; measured on the colours that Chromium computes."""
    chromium.open(report, dark=dark)
    weak = chromium.script(CONTRAST)
    assert not weak


CONTRAST = """
const pen = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const rgba = (colour) => {
  pen.clearRect(0, 0, 1, 1); pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1);
  return [...pen.getImageData(0, 0, 1, 1).data];
};
const over = ([r, g, b, a], under) => [r, g, b].map((x, k) => (x * a + under[k] * (255 - a)) / 255);
const light = (c) => {
  const part = (x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  return 0.2126 * part(c[0] / 255) + 0.7152 * part(c[1] / 255) + 0.0722 * part(c[2] / 255);
};
const behind = (element) => {
  const layers = [];
  for (let e = element; e; e = e.parentElement) layers.push(rgba(getComputedStyle(e).backgroundColor));
  return layers.reverse().reduce((under, layer) => over(layer, under), [255, 255, 255]);
};
const weak = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement;
  const text = walker.currentNode.textContent.trim();
  if (!text || element.closest("script, .unseen, .skip, .table, title")) continue;
  const style = getComputedStyle(element);
  if (!element.checkVisibility()) continue;
  const colour = rgba(element.closest("svg") ? style.fill : style.color);
  const ground = behind(element.closest("svg")?.parentElement ?? element);
  const [a, b] = [light(over(colour, ground)), light(ground)].sort((x, y) => y - x);
  const ratio = (a + 0.05) / (b + 0.05);
  if (ratio < 4.5) weak.push(`${element.tagName} ${text.slice(0, 30)} ${ratio.toFixed(2)}`);
}
return [...new Set(weak)];
"""


def test_the_keyboard_reaches_everything_that_can_be_used(chromium, report):
    chromium.open(report)
    chromium.to_structures()
    reached = set()
    chromium.script("document.activeElement.blur(); scrollTo(0, 0)")
    for _ in range(160):
        ActionChains(chromium.driver).send_keys(Keys.TAB).perform()
        reached.add(
            chromium.script(
                "const e = document.activeElement;"
                "return e.id || e.name || e.className || e.dataset.view || e.textContent"
            )
        )
    assert {"skip", "viewer", "pick", "set", "reason", "words", "scroll tall", "a", "0", "+"} <= reached


def test_controls_and_pictures_have_names_for_screen_readers(chromium, report):
    chromium.open(report)
    chromium.to_structures()
    nameless = chromium.script(
        """const kinds = "button, a, input, select, [role=region], [role=application], svg[role=img]";
        return [...document.querySelectorAll(kinds)]
        .filter((e) => !(e.getAttribute("aria-label") || e.textContent.trim() || e.labels?.length
                         || e.querySelector("title")?.textContent)).map((e) => e.outerHTML.slice(0, 90))"""
    )
    assert not nameless
    levels = chromium.script(
        "return [...document.querySelectorAll('h1, h2, h3, h4')].map(e => +e.tagName[1])"
    )
    assert levels[0] == 1
    assert all(later - earlier <= 1 for earlier, later in itertools.pairwise(levels))
    ids = chromium.script("return [...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))


def test_hostile_texts_do_not_run(chromium, small_run):
    folder = small_run(command=HOSTILE, notes=[HOSTILE], settings={HOSTILE: HOSTILE})
    path = folder / "report.json"
    content = json.loads(path.read_text())
    one = content["sets"][0]
    one["name"] = HOSTILE
    one["gallery"][0].update(id=HOSTILE, formula=HOSTILE, detail=HOSTILE)
    one["gallery"][0]["cif"] += f"# {HOSTILE}"
    path.write_text(json.dumps(content))
    chromium.open(write_report(folder))
    chromium.to_structures()
    chromium.settled()
    assert chromium.script("return window.hurt") is None
    assert HOSTILE in chromium.texts(".file pre")[0]
    assert HOSTILE in chromium.texts(".facts")[0]


def test_what_would_get_through_unescaped_could_still_not_run(chromium, report, tmp_path):
    """The policy lets no script but the page's own run, and no handler."""
    path = tmp_path / "broken.html"
    path.write_text(
        report.read_text(encoding="utf-8").replace('<main id="main">', f'<main id="main">{HOSTILE}')
    )
    chromium.open(path)
    chromium.until(lambda: len(chromium.all("img")) == 1)
    assert chromium.script("return window.hurt") is None
    assert any("Content Security Policy" in message for message in chromium.complaints())


def test_paper_shows_stills_in_light_colours_and_all_settings(chromium, report):
    chromium.open(report, dark=True)
    chromium.to_structures()
    chromium.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": [
        {"name": "prefers-color-scheme", "value": "dark"}]})  # fmt: skip
    assert chromium.script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not chromium.find(".stage").is_displayed()
    assert not chromium.find(".contents").is_displayed()
    assert all(still.is_displayed() for still in chromium.all(".card .still"))
    assert chromium.find("#method dl").is_displayed()
    chromium.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    printed = chromium.driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
    pages = base64.b64decode(printed["data"])
    assert pages.startswith(b"%PDF")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b(?!s)", pages)) <= 15


def test_without_webgl_a_still_picture_stands_in_the_view(new_chromium, report):
    with new_chromium(webgl=False) as driver:
        browser = Browser(driver)
        browser.open(report)
        browser.to_structures()
        browser.until(lambda: browser.find("#viewer .still").is_displayed())
        assert browser.find(".stage .note").is_displayed()
        assert not browser.find(".handles").is_displayed()


def test_without_scripts_all_is_there_to_read(chromium, report):
    chromium.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        chromium.open(report)
        assert len(chromium.all("#failed tbody tr")) == 58
        assert chromium.find("#failed tbody tr").is_displayed()
        assert not chromium.find(".filters").is_displayed()
        assert not chromium.find(".stage").is_displayed()
        assert all(still.is_displayed() for still in chromium.all(".card .still"))
    finally:
        chromium.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
