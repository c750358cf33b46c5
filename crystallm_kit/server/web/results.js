// What is shown of an answer: cards, the crystal that is looked at, the funnel, what was understood.
//
// Crystals are kept as the server sent them. Pictures are drawn when they scroll into view.

import { conventional, cellOf, colourOf, countsOf, nameOf, readCrystal, sceneOf } from "./crystal.js";
import facts from "./facts.js";
import { sketch } from "./sketch.js";

const at = (id) => document.getElementById(id);

/** Return a new element: make("p", {className: "x"}, "text", otherElement). */
export function make(tag, settings = {}, ...content) {
  const element = Object.assign(document.createElement(tag), settings);
  element.append(...content);
  return element;
}

// ---------------------------------------------------------------- words for numbers

/** Return a formula with its counts as subscripts. */
export function formulaOf(crystal) {
  const parts = (crystal.formula ?? "no structure").split(/(\d+)/);
  return make("span", { className: "formula" }, ...parts.map((part) => (/^\d/.test(part) && crystal.formula ? make("sub", {}, part) : part)));
}

const symbolOf = (number) => facts.spacegroups[number - 1];

/** Return a Hermann-Mauguin symbol as it is printed: bars over digits, screw axes with subscripts. */
function typeset(symbol) {
  const parts = symbol.match(/-\d|_\d|./g) ?? [];
  return parts.map((part) => {
    if (part[0] === "-") return make("span", { className: "barred" }, part[1]);
    if (part[0] === "_") return make("sub", {}, part[1]);
    return /[a-zA-Z]/.test(part) ? make("i", {}, part) : part;
  });
}

/** Return "Fm-3m (225)", printed well and read out plainly. */
export function groupOf(crystal) {
  const number = crystal.spacegroup_number;
  if (!number) return make("span", { className: "group" }, "no space group");
  const symbol = make("span", {}, ...typeset(symbolOf(number)));
  symbol.setAttribute("aria-hidden", "true");
  return make("span", { className: "group" }, make("span", { className: "unseen" }, symbolOf(number)), symbol, ` ${number}`);
}

const MEASURES = [
  ["volume_per_atom_angstrom3", "Volume per atom", "Å³", 2],
  ["nearest_distance_angstrom", "Nearest atoms", "Å", 3],
  ["density_g_cm3", "Density", "g/cm³", 2],
];

function measured(crystal) {
  const rows = MEASURES.filter(([name]) => typeof crystal.measures?.[name] === "number").map(
    ([name, title, unit, digits]) => [title, `${crystal.measures[name].toFixed(digits)} ${unit}`],
  );
  if (typeof crystal.log_probability === "number") rows.push(["Log-probability", crystal.log_probability.toFixed(2).replace("-", "−")]);
  return rows;
}

function verdictOf({ verdict }) {
  const said = verdict.valid ? "valid" : (verdict.reason ?? "not valid").replaceAll("_", " ");
  return make("span", { className: `verdict ${verdict.valid ? "good" : "bad"}`, title: verdict.detail ?? "" }, said);
}

/** Return the name of a crystal's file. */
export function fileName(crystal, format) {
  const formula = crystal.formula ?? "sample";
  return `${String(crystal.index + 1).padStart(3, "0")}-${formula}-${crystal.spacegroup_number ?? 0}.${format}`;
}

export const fileText = (crystal) =>
  typeof crystal.structure === "string" ? crystal.structure : JSON.stringify(crystal.structure, null, 1);

// ---------------------------------------------------------------- cards

const scenes = new WeakMap();
const drawn = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (!isIntersecting) continue;
    sketch(target, scenes.get(target));
    drawn.unobserve(target);
  }
}, { rootMargin: "200px" });

/** Have a canvas show a scene as soon as, and again whenever, it has to be drawn. */
export function picture(canvas, scene) {
  scenes.set(canvas, scene);
  drawn.observe(canvas);
}

/** Draw all pictures again: the colours of the page have changed. */
export function redraw() {
  for (const canvas of document.querySelectorAll("canvas")) if (scenes.has(canvas)) drawn.observe(canvas);
}

/** Return the crystal to draw: in its conventional cell where there is one and it is wanted. */
export function crystalOf(crystal, format, { wantsConventional = true } = {}) {
  const read = readCrystal(crystal.structure, format);
  const number = crystal.spacegroup_number;
  return read && wantsConventional && number ? conventional(read, number, symbolOf(number)) : read;
}

/** Add a crystal's card; `choose` and `save` are called with the crystal. */
export function addCard(crystal, format, { choose, save }) {
  const read = crystalOf(crystal, format);
  const canvas = make("canvas", { className: "picture" });
  canvas.setAttribute("aria-hidden", "true");
  const pick = make(
    "button", { type: "button", className: "pick" },
    canvas,
    make("span", { className: "name" }, formulaOf(crystal), " ", groupOf(crystal)),
    " ", verdictOf(crystal),
  );
  pick.setAttribute("aria-pressed", "false");
  pick.addEventListener("click", () => choose(crystal));
  const values = measured(crystal).flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]);
  const card = make("li", { id: `card-${crystal.index}` }, pick, make("dl", {}, ...values));
  if (crystal.structure) {
    const button = make("button", { type: "button", className: "save" }, format === "json" ? "JSON" : format === "cif" ? "CIF" : "XYZ");
    button.setAttribute("aria-label", `Download ${fileName(crystal, format)}`);
    button.addEventListener("click", () => save(crystal));
    card.append(button);
  }
  at("cards").append(card);
  if (read) picture(canvas, sceneOf(read));
}

// ---------------------------------------------------------------- the one that is looked at

/** Show everything known of a crystal beside the view; marks its card. */
export function showFacts(crystal, format) {
  for (const pick of document.querySelectorAll(".pick[aria-pressed=true]")) pick.setAttribute("aria-pressed", "false");
  document.querySelector(`#card-${crystal.index} .pick`).setAttribute("aria-pressed", "true");
  at("title").replaceChildren(formulaOf(crystal));
  at("subtitle").replaceChildren(groupOf(crystal));
  const { valid, detail } = crystal.verdict;
  at("verdict").replaceChildren(verdictOf(crystal), valid || !detail ? "" : ` ${detail}`);
  const rows = measured(crystal);
  const read = readCrystal(crystal.structure, format);
  if (read) {
    const [a, b, c, ...angles] = cellOf(crystalOf(crystal, format).lattice);
    rows.push(["a, b, c", `${[a, b, c].map((x) => x.toFixed(3)).join("  ")} Å`]);
    rows.push(["α, β, γ", angles.map((x) => `${x.toFixed(1)}°`).join("  ")]);
    rows.push(["Atoms in the file", String(read.sites.length)]);
  }
  at("measures").replaceChildren(...rows.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
  const checks = Object.entries(crystal.verdict.checks ?? {});
  at("checks").replaceChildren(
    ...checks.map(([name, passed]) => make("li", { className: passed ? "good" : "bad" }, `${name.replaceAll("_", " ")}: ${passed ? "passed" : "failed"}`)),
  );
  at("text").textContent = crystal.text ?? "";
  for (const id of ["download-one", "copy-text"]) at(id).disabled = !crystal.structure;
  at("download-one").textContent = `Download ${{ cif: "CIF", extxyz: "XYZ", json: "JSON" }[format]}`;
}

/** Name the elements of a crystal beside their colours. */
export function showLegend(read) {
  const entries = read ? [...countsOf(read)] : [];
  at("legend").replaceChildren(
    ...entries.map(([element]) => {
      const dot = make("span", { className: "dot" });
      dot.style.backgroundColor = colourOf(element);
      return make("li", {}, dot, make("b", {}, element), ` ${nameOf(element)}`);
    }),
  );
}

// ---------------------------------------------------------------- the whole

const STAGES = {
  requested: "drawn", finished: "ended by the model", parsed: "read as a crystal", formula: "formula as asked",
  symmetry: "symmetry as asked", distances: "atoms not too close", charge: "charges balance: valid", unique: "unlike the others",
};

/** Show how many samples passed each gate, and what stopped the others. */
export function showFunnel(funnel, usage) {
  const { reasons = {}, ...counts } = funnel;
  const total = counts.requested || 1;
  const row = (name, n, className) => {
    const bar = make("span", { className: "share" });
    bar.style.width = `${(100 * n) / total}%`;
    const share = `${((100 * n) / total).toFixed(1)} %`;
    const title = make("th", { scope: "row" }, name);
    return make("tr", { className }, title, make("td", {}, n.toLocaleString("en")), make("td", {}, share), make("td", {}, bar));
  };
  at("funnel").querySelector("tbody").replaceChildren(
    ...Object.entries(counts).filter(([, n]) => typeof n === "number").map(([stage, n]) => row(STAGES[stage] ?? stage, n, "")),
    ...Object.entries(reasons).map(([reason, n]) => row(`stopped by ${reason.replaceAll("_", " ")}`, n, "stopped")),
  );
  at("usage").textContent = usage?.completion_tokens ? `${usage.completion_tokens.toLocaleString("en")} tokens were drawn.` : "";
  at("funnel").hidden = false;
}

/** Keep the room that what was understood will take. */
export function awaitUnderstood(isExpected) {
  at("understood").hidden = !isExpected;
  at("understood").dataset.waits = "yes";
  at("understood").replaceChildren(make("h2", {}, "Reading your words …"));
}

/** Show no crystal beside the view. */
export function clearFacts() {
  for (const id of ["title", "subtitle", "verdict", "measures", "checks", "text", "legend"]) at(id).replaceChildren();
}

/** Show what the server understood of the words, phrase by phrase, and what not. */
export function showUnderstood(understood) {
  if (!understood) return;
  const { understood: phrases = [], not_understood: lost = [], notes = [] } = understood;
  const pairs = phrases.map(([phrase, meaning]) => make("li", {}, `“${phrase}” `, make("b", {}, meaning)));
  const gone = lost.map((phrase) => make("li", { className: "lost" }, `“${phrase}” `, make("b", {}, "not understood")));
  const parts = [make("h2", {}, "Understood"), make("ul", { className: "phrases" }, ...pairs, ...gone)];
  if (!pairs.length) parts.push(make("p", {}, "Nothing in particular was asked for, so any crystal will do."));
  parts.push(...notes.map((note) => make("p", { className: "hint" }, note)));
  at("understood").replaceChildren(...parts);
  at("understood").dataset.waits = "";
  at("understood").hidden = false;
}
