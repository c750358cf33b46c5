// What the report does besides being read: structures that turn, a table that sorts and filters, the contents' mark.
//
// Runs after elements.js, crystal.js and viewer.js of the server's page, in one module with them: sceneOf,
// createViewer and `library` (3Dmol.js, which is in the page already) are theirs.
{
  const find = (selector, from = document) => from.querySelector(selector);
  const all = (selector, from = document) => [...from.querySelectorAll(selector)];

  // ---------------------------------------------------------------- structures

  const structures = JSON.parse(find("#data")?.textContent || "[]");
  const stage = find(".stage");
  let viewer = null; // a promise of it, once something is shown
  let shown = null;
  let cells = 1;
  const LARGER = 1.3; // than the server's page shows it: there is no legend around it

  function sceneShown() {
    return sceneOf({ lattice: structures[shown].lattice, sites: structures[shown].sites }, { cells });
  }

  async function startViewer() {
    const ready = await createViewer(find("#viewer"));
    // Looking along an axis fits the crystal anew.
    find("#viewer").addEventListener("keydown", (event) => "abc0".includes(event.key) && ready?.zoom(LARGER));
    return ready;
  }

  async function show(number, { scroll = false } = {}) {
    const isNew = number !== shown;
    shown = number;
    const card = find(`[data-structure="${number}"]`);
    for (const button of all(".pick")) button.setAttribute("aria-pressed", String(button.parentElement === card));
    const about = find(".about", card).cloneNode(true);
    find(".facts").replaceChildren(...about.childNodes);
    find(".file pre").textContent = structures[number].cif;
    if (scroll) stage.scrollIntoView({ block: "nearest" });
    viewer ??= startViewer();
    const ready = await viewer;
    if (shown !== number) return;
    if (ready) {
      ready.show(sceneShown(), { afresh: isNew });
      ready.zoom(LARGER);
    } else {
      find("#viewer").replaceChildren(find(".still", card).cloneNode(true));
      find(".stage .note").hidden = false;
      find(".handles").hidden = true;
    }
  }

  function prepareStructures() {
    const cards = all(".card").filter((card) => find(".pick", card));
    if (!stage || !cards.length) return;
    library = Promise.resolve(window.$3Dmol);
    stage.hidden = false;
    stage.parentElement.classList.add("live");
    for (const card of cards) {
      find(".pick", card).addEventListener("click", () => show(Number(card.dataset.structure), { scroll: true }));
    }
    // A button does what its key does in the view.
    for (const button of all("[data-view]")) {
      button.addEventListener("click", () => find("#viewer").dispatchEvent(new KeyboardEvent("keydown", { key: button.dataset.view })));
    }
    find("[data-cells]").addEventListener("click", async (event) => {
      cells = cells === 1 ? 2 : 1;
      event.currentTarget.setAttribute("aria-pressed", String(cells === 2));
      const ready = await viewer;
      ready.show(sceneShown());
      ready.zoom(LARGER);
    });
    find("[data-save]").addEventListener("click", () => {
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([structures[shown].cif], { type: "chemical/x-cif" }));
      link.download = `${structures[shown].name}.cif`;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    });
    // WebGL starts when the structures come into sight, not with the page.
    const first = Number(cards[0].dataset.structure);
    const watcher = new IntersectionObserver((entries) => {
      if (!entries.some((entry) => entry.isIntersecting)) return;
      watcher.disconnect();
      if (shown === null) show(first);
    }, { rootMargin: "200px" });
    watcher.observe(stage);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => shown !== null && show(shown));
  }

  // ---------------------------------------------------------------- the table of failures

  function prepareTable() {
    const table = find("#failed");
    if (!table) return;
    const body = table.tBodies[0];
    const rows = [...body.rows];
    const words = rows.map((row) => row.textContent.toLowerCase());
    const form = find(".filters");
    form.hidden = false;
    const filter = () => {
      const wanted = Object.fromEntries(new FormData(form));
      const asked = wanted.words.trim().toLowerCase();
      let n = 0;
      rows.forEach((row, k) => {
        row.hidden = Boolean(
          (wanted.set && row.dataset.set !== wanted.set) || (wanted.reason && row.dataset.reason !== wanted.reason) || (asked && !words[k].includes(asked)),
        );
        n += row.hidden ? 0 : 1;
      });
      find("output", form).textContent = `${n} of ${rows.length} shown`;
    };
    form.addEventListener("input", filter);
    form.addEventListener("submit", (event) => event.preventDefault());
    filter();
    all("thead th", table).forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const up = head.getAttribute("aria-sort") !== "ascending";
        for (const other of all("thead th", table)) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const value = (row) => row.cells[column].dataset.sort ?? row.cells[column].textContent;
        const isNumber = "number" in head.dataset;
        const order = (one, other) => (isNumber ? (Number(one) || 0) - (Number(other) || 0) : one.localeCompare(other, "en", { numeric: true }));
        body.append(...[...body.rows].sort((one, other) => (up ? 1 : -1) * order(value(one), value(other))));
      });
    });
  }

  // ---------------------------------------------------------------- the contents

  function prepareContents() {
    const links = new Map(all(".contents a").map((link) => [link.hash.slice(1), link]));
    const seen = new Set();
    const observer = new IntersectionObserver((entries) => {
      for (const { target, isIntersecting } of entries) seen[isIntersecting ? "add" : "delete"](target.id);
      const first = [...links.keys()].find((id) => seen.has(id));
      for (const [id, link] of links) {
        if (id === first) link.setAttribute("aria-current", "true");
        else link.removeAttribute("aria-current");
      }
    }, { rootMargin: "-60px 0px -55% 0px" });
    for (const id of links.keys()) if (document.getElementById(id)) observer.observe(document.getElementById(id));
  }

  prepareTable();
  prepareContents();
  prepareStructures();
}
