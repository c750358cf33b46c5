// The page: a request goes out, its crystals come in one by one, one of them is looked at.
//
// Not here: the form's fields (form.js), how results look (results.js), the wire (client.js), the 3-D view (viewer.js).

import { download, zip } from "./archive.js";
import { RequestFailed, ask, curlOf, models } from "./client.js";
import { sceneOf } from "./crystal.js";
import { bodyOfForm, clearWrong, fieldOf, fillForm, fillModels, showWrong } from "./form.js";
import * as results from "./results.js";
import { createViewer } from "./viewer.js";

const at = (id) => document.getElementById(id);
const KEPT_KEY = "crystallm_kit.key";
const DEFAULT_WANTED = 4;
const ROCK_SALT = {
  lattice: [[5.64, 0, 0], [0, 5.64, 0], [0, 0, 5.64]],
  sites: [[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]].flatMap(([x, y, z]) => [
    { element: "Na", at: [x, y, z] },
    { element: "Cl", at: [(x + 0.5) % 1, y, z] },
  ]),
};

// What the page shows now: the request sent, its crystals, the one looked at.
const shown = { body: null, withKey: false, crystals: [], chosen: null, abort: null, viewer: undefined };

// ---------------------------------------------------------------- asking

async function generate() {
  if (shown.abort) return;
  const body = bodyOfForm();
  if (!body) return;
  const key = at("key").value.trim();
  begin(body, key);
  const abort = (shown.abort = new AbortController());
  let finished = null;
  try {
    for await (const { event, data } of ask(body, { key, signal: abort.signal })) {
      if (event === "request") heard(data);
      if (event === "crystal") arrive(data);
      else if (data.funnel) {
        finished = data;
        results.showFunnel(data.funnel, data.usage);
      }
    }
    end(finished ?? {});
  } catch (error) {
    if (error.name === "AbortError") say(`Stopped with ${counted(shown.crystals)}.`);
    else if (error instanceof RequestFailed) fail(error);
    else throw error;
  } finally {
    shown.abort = null;
    running(false);
  }
}

function begin(body, key) {
  Object.assign(shown, { body, withKey: Boolean(key), crystals: [], chosen: null });
  for (const id of ["problem", "funnel", "empty", "download-all"]) at(id).hidden = true;
  results.awaitUnderstood("prompt" in body);
  at("stage").hidden = false;
  results.clearFacts();
  at("stage").inert = true; // until there is a crystal in it
  draw();
  at("cards").replaceChildren(...Array.from({ length: Math.min(body.n ?? DEFAULT_WANTED, 8) }, waiting));
  at("curl-text").textContent = curlOf(body, { withKey: shown.withKey });
  at("curl").hidden = at("copy-curl").hidden = false;
  at("progress").max = body.n ?? DEFAULT_WANTED;
  at("progress").removeAttribute("value");
  running(true);
  if (at("results").getBoundingClientRect().top > innerHeight / 2) goTo(at("results"));
  say("Waiting for the first crystal …");
}

/** What was understood is known. */
function heard({ understood }) {
  results.showUnderstood(understood);
  at("progress").max = shown.body.n ?? understood?.n ?? DEFAULT_WANTED;
}

function waiting() {
  const card = results.make("li", { className: "waiting" });
  card.setAttribute("aria-hidden", "true");
  return card;
}

function arrive(crystal) {
  document.querySelector("#cards .waiting")?.remove();
  const rest = [...document.querySelectorAll("#cards .waiting")];
  shown.crystals.push(crystal);
  results.addCard(crystal, shown.body.format, { choose, save });
  at("cards").append(...rest);
  const n = shown.crystals.filter((each) => each.verdict.valid).length;
  at("progress").value = n;
  say(`${n} of ${at("progress").max} ${at("progress").max === 1 ? "crystal" : "crystals"}`);
  at("download-all").hidden = false;
  if (shown.chosen === null && crystal.structure) choose(crystal, { byItself: true });
}

function end({ finish_reason: reason, funnel }) {
  const valid = shown.crystals.filter((crystal) => crystal.verdict.valid);
  if (!valid.length) {
    tell(
      "No valid crystal came of it",
      "Every sample failed a check; the table says which. Ask for less at once, leave out the property or the space group, or allow more samples under More settings.",
    );
    say("No valid crystal.");
  } else {
    const spent = reason === "budget" ? ` of ${at("progress").max} wanted: all ${funnel.requested} samples are spent` : "";
    say(`${counted(valid)}${spent}. Seed ${shown.body.seed}.`);
  }
}

function fail(error) {
  say(shown.crystals.length ? `Broken off after ${counted(shown.crystals)}.` : "Nothing was generated.");
  const field = fieldOf(error);
  if (field) showWrong(field, error.message);
  if (!shown.crystals.length) at("curl").hidden = at("copy-curl").hidden = true;
  if (field && error.status !== 401) return;
  const titles = { 401: "The server asks for a key", 429: "The server is busy", 502: "The model failed", 503: "The server is not ready" };
  tell(titles[error.status] ?? "This did not work", error.message, error.retryAfter);
}

function running(isRunning) {
  at("generate").disabled = isRunning;
  at("stop").disabled = !isRunning;
  at("progress").hidden = !isRunning;
  at("results").setAttribute("aria-busy", String(isRunning));
  if (isRunning) return;
  for (const card of document.querySelectorAll("#cards .waiting")) card.remove();
  if (shown.chosen === null) at("stage").hidden = true;
  if (at("understood").dataset.waits) at("understood").hidden = true;
  if (!shown.crystals.length && at("problem").hidden) at("empty").hidden = false;
}

const counted = (crystals) => `${crystals.length} ${crystals.length === 1 ? "crystal" : "crystals"}`;

function say(words) {
  at("status").textContent = words;
}

/** Show a problem; where the server says when, offer to try again then. */
function tell(title, message, retryAfter = null) {
  const parts = [results.make("h2", {}, title), results.make("p", {}, message)];
  if (retryAfter !== null) {
    const again = results.make("button", { type: "button" }, "Try again");
    const ready = Date.now() + retryAfter * 1000;
    const tick = () => {
      const left = Math.ceil((ready - Date.now()) / 1000);
      again.disabled = left > 0;
      again.textContent = left > 0 ? `Try again in ${left} s` : "Try again";
      if (left > 0 && again.isConnected) setTimeout(tick, 250);
    };
    again.addEventListener("click", generate);
    parts.push(again);
    at("problem").replaceChildren(...parts);
    tick();
  } else at("problem").replaceChildren(...parts);
  at("problem").hidden = false;
}

// ---------------------------------------------------------------- looking

async function choose(crystal, { byItself = false } = {}) {
  shown.chosen = crystal;
  at("stage").inert = false;
  results.showFacts(crystal, shown.body.format);
  at("viewer").setAttribute("aria-label", `${crystal.formula ?? "Sample"} in 3-D`);
  if (!byItself) goTo(at("stage"), "nearest");
  await draw({ afresh: true });
}

async function draw(settings = {}) {
  if (!shown.chosen) return (await shown.viewer)?.clear();
  const format = shown.body.format;
  const inFile = results.crystalOf(shown.chosen, format, { wantsConventional: false });
  const usual = results.crystalOf(shown.chosen, format);
  at("conventional").disabled = usual === inFile;
  const read = at("conventional").checked ? usual : inFile;
  results.showLegend(read);
  const scene = read && sceneOf(read, { cells: Number(document.querySelector("input[name=cells]:checked").value) });
  shown.viewer ??= createViewer(at("viewer"));
  const viewer = await shown.viewer;
  at("no-webgl").hidden = at("still").hidden = viewer !== null;
  for (const button of document.querySelectorAll(".handles button")) button.disabled = viewer === null;
  if (!viewer) results.picture(at("still"), scene);
  else if (scene) viewer.show(scene, settings);
  else viewer.clear();
}

function save(crystal) {
  download(results.fileName(crystal, shown.body.format), results.fileText(crystal));
}

function saveAll() {
  const { format } = shown.body;
  const kept = shown.crystals.filter((crystal) => crystal.structure);
  const files = Object.fromEntries(kept.map((crystal) => [results.fileName(crystal, format), results.fileText(crystal)]));
  const told = { request: shown.body, crystals: shown.crystals.map(({ structure, ...rest }) => rest) };
  download("crystals.zip", zip({ ...files, "crystals.json": JSON.stringify(told, null, 1) }));
}

function goTo(element, block = "start") {
  const isCalm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  element.scrollIntoView({ block, behavior: isCalm ? "auto" : "smooth" });
}

/** Copy a text, and say so on the button for a moment. */
async function copy(text, button) {
  const before = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = copyOldWay(text) ? "Copied" : "Not copied";
  }
  setTimeout(() => (button.textContent = before), 1500);
}

/** Copy through a selection: pages that did not come over https have no clipboard. */
function copyOldWay(text) {
  const field = results.make("textarea", { value: text, className: "unseen", readOnly: true });
  const focused = document.activeElement;
  document.body.append(field);
  field.select();
  const isCopied = document.execCommand("copy");
  field.remove();
  focused?.focus();
  return isCopied;
}

// ---------------------------------------------------------------- start

async function learnModels() {
  try {
    fillModels((await models(at("key").value.trim())).map((model) => model.id));
    if (at("key").getAttribute("aria-invalid")) clearWrong();
  } catch (error) {
    if (error.status === 401) at("key-part").open = true;
  }
}

function keepKey() {
  if (at("keep-key").checked) sessionStorage.setItem(KEPT_KEY, at("key").value);
  else sessionStorage.removeItem(KEPT_KEY);
}

function listen() {
  at("request").addEventListener("submit", (event) => {
    event.preventDefault();
    generate();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      generate();
    }
  });
  at("stop").addEventListener("click", () => shown.abort?.abort());
  at("key").addEventListener("change", () => {
    keepKey();
    learnModels();
  });
  at("keep-key").addEventListener("change", keepKey);
  at("download-all").addEventListener("click", saveAll);
  at("download-one").addEventListener("click", () => save(shown.chosen));
  at("copy-text").addEventListener("click", (event) => copy(results.fileText(shown.chosen), event.target));
  at("copy-curl").addEventListener("click", (event) => copy(at("curl-text").textContent, event.target));
  for (const radio of document.getElementsByName("cells")) radio.addEventListener("change", () => draw());
  at("conventional").addEventListener("change", () => draw());
  document.querySelector(".handles").addEventListener("click", async (event) => {
    const button = event.target.closest("button");
    const viewer = button && (await shown.viewer);
    if (!viewer) return;
    if (button.dataset.zoom) viewer.zoom(Number(button.dataset.zoom));
    else viewer.along(button.dataset.along === "" ? null : Number(button.dataset.along));
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    results.redraw();
    draw();
  });
}

at("key").value = sessionStorage.getItem(KEPT_KEY) ?? "";
at("keep-key").checked = at("key").value !== "";
fillForm();
listen();
results.picture(at("specimen"), sceneOf(ROCK_SALT));
learnModels();
