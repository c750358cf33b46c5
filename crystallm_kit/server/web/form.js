// The form: what it asks for as a request body, and errors beside the field that they are about.
//
// Contract: a field that is left empty is left out of the request, so that the server's own default holds; only the
// seed is always sent, drawn here where none is given, so that the same request gives the same crystals again.

import facts from "./facts.js";

const at = (id) => document.getElementById(id);
const EXAMPLES = [
  "cubic perovskite of Ba, Ti and O",
  "six oxides of lithium and cobalt",
  "TiO2 in space group 136",
  "eight hexagonal sulfides of three elements",
];
const TEXTS = ["formula", "elements", "spacegroup", "crystal_system", "anonymous_formula"];
const NUMBERS = ["n", "max_samples", "temperature", "number_temperature", "top_p", "top_k", "redraws"];
const LARGEST_SEED = 2 ** 31;

/** Fill in what the kit knows: space groups, crystal systems, properties, examples. */
export function fillForm() {
  at("spacegroups").append(...facts.spacegroups.map((symbol, i) => new Option(String(i + 1), symbol)));
  at("crystal_system").append(...facts.crystal_systems.map((system) => new Option(system)));
  at("properties").append(...facts.properties.map(rangeField));
  document.querySelector(".examples").append(...EXAMPLES.map(example));
  for (const radio of document.getElementsByName("way")) radio.addEventListener("change", showWay);
  showWay(); // a browser that goes back may have kept the other one
}

function rangeField({ name, unit, description, low, high }) {
  const group = document.createElement("fieldset");
  group.className = "range";
  group.id = name;
  const legend = document.createElement("legend");
  legend.append(description.replace(/ relative.*|;.*/, ""), " ", Object.assign(document.createElement("small"), { textContent: unit }));
  group.append(legend);
  for (const side of ["low", "high"]) {
    const input = Object.assign(document.createElement("input"), {
      type: "number", id: `${name}-${side}`, step: "any", min: low, max: high, placeholder: side === "low" ? "from" : "to",
    });
    input.setAttribute("aria-label", side === "low" ? "from" : "to");
    group.append(input);
  }
  return group;
}

function example(text) {
  const item = document.createElement("li");
  const button = Object.assign(document.createElement("button"), { type: "button", textContent: text });
  button.addEventListener("click", () => {
    at("prompt").value = text;
    clearWrong();
    at("prompt").focus();
  });
  item.append(button);
  return item;
}

const way = () => document.querySelector("input[name=way]:checked").value;

function showWay() {
  at("in-words").hidden = way() !== "words";
  at("by-conditions").hidden = way() === "words";
}

/** Offer the server's models; the one chosen before stays chosen. */
export function fillModels(names) {
  const chosen = at("model").value;
  at("model").replaceChildren(...names.map((name) => new Option(name)));
  if (names.includes(chosen)) at("model").value = chosen;
}

/** Return the request's body, or null if a field is wrong, which then says so. */
export function bodyOfForm() {
  clearWrong();
  const wrong = [...at("request").querySelectorAll("input, textarea")].filter(
    (field) => !field.closest("section[hidden]") && !field.validity.valid,
  );
  for (const field of [...wrong].reverse()) showWrong(field.id, field.validationMessage);
  if (wrong.length) return null;
  const body = way() === "words" ? { prompt: at("prompt").value.trim() } : { conditions: conditionsOfForm() };
  if (body.prompt === "") {
    showWrong("prompt", "Say what you want, or ask by conditions.");
    return null;
  }
  for (const name of NUMBERS) if (at(name).value !== "") body[name] = Number(at(name).value);
  if (at("model").value) body.model = at("model").value;
  for (const name of ["unique", "constrained"]) body[name] = at(name).checked;
  if (at("include_invalid").checked) body.include_invalid = true;
  body.format = at("format").value;
  body.seed = at("seed").value === "" ? Math.floor(Math.random() * LARGEST_SEED) : Number(at("seed").value);
  body.stream = true;
  return body;
}

function conditionsOfForm() {
  const conditions = {};
  for (const name of TEXTS) if (at(name).value.trim()) conditions[name] = at(name).value.trim();
  if (conditions.elements && at("only_elements").checked) conditions.only_elements = true;
  if (at("sites").value !== "") conditions.sites = Number(at("sites").value);
  const properties = {};
  for (const { name } of facts.properties) {
    const sides = ["low", "high"].filter((side) => at(`${name}-${side}`).value !== "");
    if (sides.length) properties[name] = Object.fromEntries(sides.map((side) => [side, Number(at(`${name}-${side}`).value)]));
  }
  if (Object.keys(properties).length) conditions.properties = properties;
  return conditions;
}

// ---------------------------------------------------------------- errors

const FIELDS = [...TEXTS, ...NUMBERS, "sites", "seed", "model", "format", "prompt", ...facts.properties.map((p) => p.name)];

/** Return the id of the field that an error is about: the first word of its message, or its `param`; or null. */
export function fieldOf({ message, param, status }) {
  if (status === 401) return "key";
  const [, word] = message.match(/^(?:conditions: )?(?:condition )?(\w+)/) ?? [];
  const field = [word, param].find((name) => FIELDS.includes(name)) ?? null;
  if (field === null) return null;
  return way() === "words" && at(field).closest("#by-conditions") ? "prompt" : field;
}

/** Return a message without the names that lead it: "conditions: formula: formula 'X': ..." says it three times. */
function plain(message, id) {
  const words = message.replace(/^(conditions|condition|prompt):? /, "");
  return words.startsWith(`${id}: `) ? words.slice(id.length + 2) : words;
}

/** Say beside a field what is wrong with it, and go there. */
export function showWrong(id, message) {
  const field = at(id);
  for (let part = field.closest("details"); part; part = part.parentElement.closest("details")) part.open = true;
  const textContent = plain(message, id);
  const words = Object.assign(document.createElement("p"), { className: "wrong", id: `${id}-wrong`, role: "alert", textContent });
  (field.closest(".field, fieldset") ?? field).append(words);
  field.setAttribute("aria-invalid", "true");
  field.setAttribute("aria-errormessage", words.id);
  (field.matches("fieldset") ? field.querySelector("input") : field).focus();
}

export function clearWrong() {
  for (const words of document.querySelectorAll(".wrong")) words.remove();
  for (const field of document.querySelectorAll("[aria-invalid]")) {
    field.removeAttribute("aria-invalid");
    field.removeAttribute("aria-errormessage");
  }
}
