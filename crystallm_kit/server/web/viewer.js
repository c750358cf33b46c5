// The large view of one crystal: 3Dmol.js in one WebGL context, turned by mouse, touch and keyboard.
//
//   const viewer = await createViewer(element)      null where the browser has no WebGL
//   viewer.show(scene)                              keeps the way it is turned
//   viewer.along(0)                                 look along a (1: b, 2: c, null: the view at the start)
//   viewer.turn("y", 15), viewer.zoom(1.2)
//
// Not here: which crystal, the buttons around it (page.js), how a scene is made (crystal.js).

import { colourOf, cross, drawnRadius, length } from "./crystal.js";

const SOURCE = new URL("./3dmol-2.5.5.min.js", import.meta.url);
const CLOSER = 1.35; // 3Dmol leaves room for a molecule's surface around what it brings into view
const KEYS = {
  ArrowLeft: (viewer) => viewer.turn("y", -10),
  ArrowRight: (viewer) => viewer.turn("y", 10),
  ArrowUp: (viewer) => viewer.turn("x", -10),
  ArrowDown: (viewer) => viewer.turn("x", 10),
  "+": (viewer) => viewer.zoom(1.2),
  "=": (viewer) => viewer.zoom(1.2),
  "-": (viewer) => viewer.zoom(1 / 1.2),
  0: (viewer) => viewer.along(null),
  a: (viewer) => viewer.along(0),
  b: (viewer) => viewer.along(1),
  c: (viewer) => viewer.along(2),
};

let library = null;

/** Return 3Dmol.js, fetched when it is first needed. */
function load() {
  library ??= new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = SOURCE;
    script.onload = () => resolve(window.$3Dmol);
    script.onerror = () => reject(new Error("the 3-D viewer could not be loaded"));
    document.head.append(script);
  });
  return library;
}

function hasWebGL() {
  try {
    const context = document.createElement("canvas").getContext("webgl2");
    context?.getExtension("WEBGL_lose_context")?.loseContext();
    return Boolean(context);
  } catch {
    return false;
  }
}

/** Return the viewer in an element, or null where there can be none. */
export async function createViewer(element) {
  if (!hasWebGL()) return null;
  try {
    const $3Dmol = await load();
    return new Viewer($3Dmol.createViewer(element, { orthographic: true, antialias: true }), element);
  } catch {
    return null;
  }
}

class Viewer {
  constructor(inner, element) {
    this.inner = inner;
    this.element = element;
    this.scene = null;
    // A wheel over the view scrolls the page until the view has been clicked or tabbed to.
    const letGo = (event) => document.activeElement !== element && event.stopPropagation();
    element.addEventListener("wheel", letGo, { capture: true, passive: true });
    element.addEventListener("mousedown", () => element.focus({ preventScroll: true }), { capture: true });
    element.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || !KEYS[event.key]) return;
      event.preventDefault();
      KEYS[event.key](this);
    });
  }

  /** Draw a scene; the first one, or `afresh`, from the view at the start. */
  show(scene, { afresh = false } = {}) {
    const turned = this.inner.getView().slice(4);
    const isFirst = this.scene === null;
    this.scene = scene;
    this.inner.clear();
    const point = ([x, y, z]) => ({ x, y, z });
    const atoms = scene.atoms.map(({ element, at }) => ({ elem: element, ...point(at), bonds: [], bondOrder: [] }));
    for (const [one, other] of scene.bonds) {
      for (const [from, to] of [[one, other], [other, one]]) {
        atoms[from].bonds.push(to);
        atoms[from].bondOrder.push(1);
      }
    }
    const model = this.inner.addModel();
    model.addAtoms(atoms);
    for (const element of new Set(scene.atoms.map((atom) => atom.element))) {
      const color = colourOf(element);
      const sphere = { radius: drawnRadius(element), color };
      model.setStyle({ elem: element }, { sphere, stick: { radius: 0.1, color } });
    }
    const { color: line, backgroundColor } = getComputedStyle(this.element);
    const color = hexOf(line);
    this.inner.setBackgroundColor(hexOf(backgroundColor), 1); // what is far away fades into it
    for (const [start, end] of scene.edges) {
      this.inner.addCylinder({ start: point(start), end: point(end), radius: 0.02 + scene.radius / 300, color, fromCap: 2, toCap: 2 });
    }
    for (const [letter, place] of scene.letters) {
      this.inner.addLabel(letter, {
        position: point(place), fontColor: color, fontSize: 15 * devicePixelRatio, showBackground: false, alignment: "center", inFront: true,
      });
    }
    this.fit();
    if (!isFirst && !afresh) this.#set(turned);
    else this.along(null);
  }

  /** Show nothing. */
  clear() {
    this.inner.clear();
    this.inner.render();
  }

  /** Bring the whole scene into view, turned as it is. */
  fit() {
    this.inner.zoomTo();
    this.inner.zoom(CLOSER);
    this.inner.render();
  }

  /** Look along a, b or c (0, 1, 2), or as at the start (null). */
  along(axis) {
    this.fit();
    this.#set(axis === null ? [0, 0, 0, 1] : towards(this.scene.axes, axis));
  }

  turn(axis, degrees) {
    this.inner.rotate(degrees, axis);
    this.inner.render();
  }

  zoom(factor) {
    this.inner.zoom(factor);
    this.inner.render();
  }

  #set(quaternion) {
    this.inner.setView([...this.inner.getView().slice(0, 4), ...quaternion]);
    this.inner.render();
  }
}

/** Return the quaternion that turns one axis to the viewer and the next but one upwards (a: c up, c: b up). */
function towards(axes, axis) {
  const out = axes[axis];
  const above = axes[axis === 2 ? 1 : 2];
  const right = cross(above, out).map((x, _, all) => x / length(all));
  const up = cross(out, right);
  return quaternionOf([right, up, out]);
}

/** Return the quaternion (x, y, z, w) of a rotation matrix given by its rows. */
function quaternionOf([r, u, o]) {
  const trace = r[0] + u[1] + o[2];
  if (trace > 0) {
    const s = 2 * Math.sqrt(trace + 1);
    return [(o[1] - u[2]) / s, (r[2] - o[0]) / s, (u[0] - r[1]) / s, s / 4];
  }
  if (r[0] > u[1] && r[0] > o[2]) {
    const s = 2 * Math.sqrt(1 + r[0] - u[1] - o[2]);
    return [s / 4, (r[1] + u[0]) / s, (r[2] + o[0]) / s, (o[1] - u[2]) / s];
  }
  if (u[1] > o[2]) {
    const s = 2 * Math.sqrt(1 + u[1] - r[0] - o[2]);
    return [(r[1] + u[0]) / s, s / 4, (u[2] + o[1]) / s, (r[2] - o[0]) / s];
  }
  const s = 2 * Math.sqrt(1 + o[2] - r[0] - u[1]);
  return [(r[2] + o[0]) / s, (u[2] + o[1]) / s, s / 4, (u[0] - r[1]) / s];
}

function hexOf(colour) {
  const channels = colour.match(/\d+/g).slice(0, 3).map(Number);
  return `#${channels.map((x) => x.toString(16).padStart(2, "0")).join("")}`;
}
