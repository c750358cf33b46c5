// A crystal as a still picture on a 2-D canvas: the cards' pictures, and all there is where WebGL is missing.
//
//   sketch(canvas, sceneOf(crystal))
//
// Painted from the back to the front, without perspective.

import { colourOf, drawnRadius } from "./crystal.js";

const PIECES = 6; // an edge is cut into this many, so that atoms can hide a part of it

/** Paint a scene on a canvas, in the size at which the page shows it; null clears it. */
export function sketch(canvas, scene) {
  const scale = Math.min(window.devicePixelRatio || 1, 2);
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  if (!scene) return;
  const line = getComputedStyle(canvas).color;
  const zoom = Math.min(width, height) / 2 / scene.radius;
  const at = ([x, y]) => [width / 2 + x * zoom, height / 2 - y * zoom];
  for (const [, paint] of parts(scene, pen, at, zoom, line).sort((one, other) => one[0] - other[0])) paint();
}

/** Return [depth, function that paints it] of everything in a scene. */
function parts(scene, pen, at, zoom, line) {
  const { atoms, bonds, edges } = scene;
  const stroke = (from, to, colour, thickness) => {
    pen.strokeStyle = colour;
    pen.lineWidth = thickness;
    pen.beginPath();
    pen.moveTo(...at(from));
    pen.lineTo(...at(to));
    pen.stroke();
  };
  const ball = ({ element, at: place }) => {
    const [x, y] = at(place);
    const size = drawnRadius(element) * zoom;
    const shade = pen.createRadialGradient(x - size * 0.35, y - size * 0.35, size * 0.1, x, y, size);
    shade.addColorStop(0, mixed(colourOf(element), "#ffffff", 0.65));
    shade.addColorStop(0.45, colourOf(element));
    shade.addColorStop(1, mixed(colourOf(element), "#000000", 0.45));
    pen.fillStyle = shade;
    pen.beginPath();
    pen.arc(x, y, size, 0, 2 * Math.PI);
    pen.fill();
  };
  const between = (u, v, share) => u.map((x, k) => x + (v[k] - x) * share);
  const found = atoms.map((atom) => [atom.at[2], () => ball(atom)]);
  for (const [one, other] of bonds.map((bond) => bond.map((index) => atoms[index]))) {
    const middle = between(one.at, other.at, 0.5);
    for (const end of [one, other]) {
      const colour = mixed(colourOf(end.element), "#000000", 0.15);
      const thickness = Math.max(1.2, 0.2 * zoom);
      found.push([(middle[2] + end.at[2]) / 2 - 0.05, () => stroke(end.at, middle, colour, thickness)]);
    }
  }
  for (const [from, to] of edges) {
    for (let k = 0; k < PIECES; k++) {
      const [start, end] = [between(from, to, k / PIECES), between(from, to, (k + 1) / PIECES)];
      found.push([(start[2] + end[2]) / 2, () => stroke(start, end, line, 1.1)]);
    }
  }
  return found;
}

/** Return the colour that lies `share` of the way from one "#rrggbb" to another. */
function mixed(one, other, share) {
  const channels = (colour) => [1, 3, 5].map((k) => parseInt(colour.slice(k, k + 2), 16));
  const [from, to] = [channels(one), channels(other)];
  return `rgb(${from.map((x, k) => Math.round(x + (to[k] - x) * share)).join()})`;
}
