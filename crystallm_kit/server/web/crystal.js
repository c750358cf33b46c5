// Structure texts -> what can be drawn: atoms, bonds and cell edges.
//
//   const crystal = readCrystal(text, "cif")     {lattice: 3 rows in angstrom, sites: [{element, at: fractional}]}
//   const scene = sceneOf(crystal, {cells: 2})   {atoms, bonds, edges, radius}, centred, as seen on the screen
//
// Read here: the P1 files that the server writes. A scene's axes are those of the screen: x right, y up, z towards
// the viewer, in angstrom.

import { ELEMENTS } from "./elements.js";

// ---------------------------------------------------------------- vectors

export const dot = (u, v) => u[0] * v[0] + u[1] * v[1] + u[2] * v[2];
export const length = (u) => Math.sqrt(dot(u, u));
export const cross = (u, v) => [
  u[1] * v[2] - u[2] * v[1],
  u[2] * v[0] - u[0] * v[2],
  u[0] * v[1] - u[1] * v[0],
];
const minus = (u, v) => [u[0] - v[0], u[1] - v[1], u[2] - v[2]];
const plus = (u, v) => [u[0] + v[0], u[1] + v[1], u[2] + v[2]];
const unit = (u) => u.map((x) => x / length(u));
const combine = (f, rows) => [0, 1, 2].map((k) => f[0] * rows[0][k] + f[1] * rows[1][k] + f[2] * rows[2][k]);

function inverse(rows) {
  const [a, b, c] = rows;
  const volume = dot(a, cross(b, c));
  const columns = [cross(b, c), cross(c, a), cross(a, b)].map((u) => u.map((x) => x / volume));
  return [0, 1, 2].map((k) => columns.map((u) => u[k]));
}

const degrees = (u, v) => (Math.acos(dot(u, v) / length(u) / length(v)) * 180) / Math.PI;

/** Return a, b, c in angstrom and alpha, beta, gamma in degrees. */
export function cellOf(lattice) {
  const [a, b, c] = lattice;
  return [length(a), length(b), length(c), degrees(b, c), degrees(a, c), degrees(a, b)];
}

function latticeOf([a, b, c, alpha, beta, gamma]) {
  const [x, y, z] = [alpha, beta, gamma].map((angle) => Math.cos((angle * Math.PI) / 180));
  const sine = Math.sqrt(1 - z * z);
  const c2 = (x - y * z) / sine;
  return [
    [a, 0, 0],
    [b * z, b * sine, 0],
    [c * y, c * c2, c * Math.sqrt(1 - y * y - c2 * c2)],
  ];
}

// ---------------------------------------------------------------- reading

/** Return the crystal of a structure's text, or null where there is none to draw. */
export function readCrystal(text, format) {
  if (!text) return null;
  try {
    const crystal = { cif: readCif, extxyz: readExtxyz, json: readJson }[format](text);
    const numbers = [...crystal.lattice, ...crystal.sites.map((site) => site.at)].flat();
    return crystal.sites.length && numbers.every(Number.isFinite) ? crystal : null;
  } catch {
    return null;
  }
}

function readCif(text) {
  const value = (name) => parseFloat(text.match(new RegExp(`^${name}\\s+(\\S+)`, "m"))[1]);
  const cell = ["length_a", "length_b", "length_c", "angle_alpha", "angle_beta", "angle_gamma"];
  const lines = text.split(/\r?\n/);
  const first = lines.findIndex((line) => line.trim().startsWith("_atom_site_"));
  const names = [];
  const sites = [];
  for (const line of lines.slice(first).map((each) => each.trim())) {
    if (line.startsWith("_atom_site_")) names.push(line);
    else if (!line || line.startsWith("_") || line.startsWith("loop_") || line.startsWith("#")) break;
    else {
      const words = line.split(/\s+/);
      const field = (name) => words[names.indexOf(`_atom_site_${name}`)];
      const element = field("type_symbol").match(/^[A-Z][a-z]?/)[0];
      sites.push({ element, at: ["fract_x", "fract_y", "fract_z"].map((name) => parseFloat(field(name))) });
    }
  }
  return { lattice: latticeOf(cell.map((name) => value(`_cell_${name}`))), sites };
}

function readExtxyz(text) {
  const lines = text.split(/\r?\n/);
  const numbers = lines[1].match(/Lattice="([^"]+)"/)[1].trim().split(/\s+/).map(Number);
  const lattice = [numbers.slice(0, 3), numbers.slice(3, 6), numbers.slice(6, 9)];
  const back = inverse(lattice);
  const sites = lines.slice(2, 2 + parseInt(lines[0], 10)).map((line) => {
    const [element, ...position] = line.trim().split(/\s+/);
    return { element, at: combine(position.slice(0, 3).map(Number), back) };
  });
  return { lattice, sites };
}

function readJson(text) {
  const data = typeof text === "string" ? JSON.parse(text) : text;
  const structure = data.structure ?? data;
  const sites = structure.sites.map((site) => ({ element: site.species[0].element, at: site.abc }));
  return { lattice: structure.lattice.matrix, sites };
}

// ---------------------------------------------------------------- the conventional cell

// Centring -> conventional axes in terms of the standard primitive ones (one row an axis), as spglib and moyo
// define those.
const CENTRINGS = {
  F: [[-1, 1, 1], [1, -1, 1], [1, 1, -1]],
  I: [[0, 1, 1], [1, 0, 1], [1, 1, 0]],
  R: [[1, -1, 0], [0, 1, -1], [1, 1, 1]],
  C: [[1, 1, 0], [-1, 1, 0], [0, 0, 1]],
  A: [[1, 0, 0], [0, 1, -1], [0, 1, 1]],
};

function suits([a, b, c, alpha, beta, gamma], number) {
  const same = (...values) => Math.max(...values) / Math.min(...values) < 1.01;
  const right = (...angles) => angles.every((angle) => Math.abs(angle - 90) < 0.6);
  if (number >= 195) return same(a, b, c) && right(alpha, beta, gamma);
  if (number >= 143) return same(a, b) && right(alpha, beta) && Math.abs(gamma - 120) < 0.6;
  if (number >= 75) return same(a, b) && right(alpha, beta, gamma);
  if (number >= 16) return right(alpha, beta, gamma);
  return right(alpha, gamma);
}

/** Return the crystal in its conventional cell, or itself where it is that already or none is found. */
export function conventional(crystal, number, symbol) {
  const rows = CENTRINGS[symbol?.[0]];
  if (!rows) return crystal;
  const lattice = rows.map((row) => combine(row, crystal.lattice));
  if (!suits(cellOf(lattice), number)) return crystal;
  const back = inverse(rows);
  const wrap = (x) => x - Math.floor(x + 1e-4);
  const sites = [];
  for (const { element, at } of crystal.sites) {
    const found = new Set();
    for (const shift of shifts(1)) {
      const place = combine(plus(at, shift), back).map(wrap);
      const key = place.map((x) => x.toFixed(3)).join();
      if (!found.has(key)) sites.push({ element, at: place });
      found.add(key);
    }
  }
  return { lattice, sites };
}

function shifts(n) {
  const range = Array.from({ length: 2 * n + 1 }, (_, i) => i - n);
  return range.flatMap((x) => range.flatMap((y) => range.map((z) => [x, y, z])));
}

// ---------------------------------------------------------------- bonds

const SHELL = 1.15; // neighbours up to this times the nearest one's distance; bcc's second shell is at 1.155
const REACH = 1.3; // and up to this times the sum of the covalent radii

/** Return [i, j, shift of j in cells]: pairs in which each is among the other's nearest neighbours. */
function neighbours(sites, lattice) {
  const places = sites.map((site) => combine(site.at, lattice));
  const images = shifts(sites.length <= 40 ? 2 : 1).map((shift) => [shift, combine(shift, lattice)]);
  const nearest = sites.map(() => Infinity);
  const pairs = [];
  for (let i = 0; i < sites.length; i++) {
    for (let j = i; j < sites.length; j++) {
      const reach = REACH * (radius(sites[i].element) + radius(sites[j].element));
      for (const [shift, offset] of images) {
        const distance = length(minus(plus(places[j], offset), places[i]));
        if (distance < 0.1 || distance > reach) continue;
        nearest[i] = Math.min(nearest[i], distance);
        nearest[j] = Math.min(nearest[j], distance);
        pairs.push([i, j, shift, distance]);
      }
    }
  }
  return pairs.filter(([i, j, , distance]) => distance <= SHELL * Math.min(nearest[i], nearest[j]));
}

const radius = (element) => ELEMENTS[element]?.[2] ?? 1.5;

/** Return the radius in angstrom with which an atom is drawn. */
export const drawnRadius = (element) => 0.15 + 0.35 * radius(element);
export const colourOf = (element) => ELEMENTS[element]?.[1] ?? "#ff1493";
export const nameOf = (element) => ELEMENTS[element]?.[0] ?? element;

// ---------------------------------------------------------------- scenes

const TURN = (-24 * Math.PI) / 180; // how far the cell is turned about the vertical, and tilted to the viewer,
const TILT = (14 * Math.PI) / 180; //  so that no two of its edges fall on one another

/** Turn crystal axes (a to the right, c up) into those of the screen. */
function onScreen([x, y, z]) {
  const [right, up, out] = [x, z, -y];
  const [u, w] = [right * Math.cos(TURN) + out * Math.sin(TURN), out * Math.cos(TURN) - right * Math.sin(TURN)];
  return [u, up * Math.cos(TILT) - w * Math.sin(TILT), up * Math.sin(TILT) + w * Math.cos(TILT)];
}

/**
 * Return what is to be drawn of `cells` x `cells` x `cells` cells. Atoms on a face of the whole are shown on the
 * opposite face too.
 */
export function sceneOf(crystal, { cells = 1 } = {}) {
  const lattice = latticeOf(cellOf(crystal.lattice));
  const middle = combine([cells / 2, cells / 2, cells / 2], lattice);
  const place = (f) => onScreen(minus(combine(f, lattice), middle));
  const sites = crystal.sites.map(({ element, at }) => ({ element, at: at.map((x) => x - Math.floor(x + 1e-4)) }));
  const atoms = [];
  const known = new Map();
  sites.forEach(({ element, at }, site) => {
    const [xs, ys, zs] = at.map((x) => {
      const last = x < 1e-3 ? cells : cells - 1;
      return Array.from({ length: last + 1 }, (_, n) => n);
    });
    for (const nx of xs) for (const ny of ys) for (const nz of zs) {
      known.set(`${site},${nx},${ny},${nz}`, atoms.length);
      atoms.push({ element, site, cell: [nx, ny, nz], at: place(plus(at, [nx, ny, nz])) });
    }
  });
  const bonds = [];
  const from = new Map();
  for (const [i, j, shift] of neighbours(sites, lattice)) {
    if (!from.has(i)) from.set(i, []);
    from.get(i).push([j, shift]);
  }
  atoms.forEach(({ site, cell }, one) => {
    for (const [j, shift] of from.get(site) ?? []) {
      const other = known.get(`${j},${plus(cell, shift).join()}`);
      if (other !== undefined && !(j === site && other < one)) bonds.push([one, other]);
    }
  });
  const ends = [0, cells];
  const corners = ends.flatMap((x) => ends.flatMap((y) => ends.map((z) => length(place([x, y, z])))));
  return {
    atoms,
    bonds,
    edges: edgesOf(cells, place),
    axes: axesOf(place),
    letters: ["a", "b", "c"].map((letter, k) => [letter, place(beyond(k, cells, lattice))]),
    radius: Math.max(...corners) + 1,
  };
}

/** Return element -> number of atoms, in the order of the sites. */
export function countsOf(crystal) {
  const counts = new Map();
  for (const { element } of crystal.sites) counts.set(element, (counts.get(element) ?? 0) + 1);
  return counts;
}

function edgesOf(cells, place) {
  const edges = [];
  for (let u = 0; u <= cells; u++) for (let v = 0; v <= cells; v++) {
    edges.push([place([0, u, v]), place([cells, u, v])]);
    edges.push([place([u, 0, v]), place([u, cells, v])]);
    edges.push([place([u, v, 0]), place([u, v, cells])]);
  }
  return edges;
}

/** Return the fractional point a letter's width beyond the end of an axis, clear of an atom there. */
function beyond(axis, cells, lattice) {
  return [0, 1, 2].map((k) => (k === axis ? cells + 1.5 / length(lattice[k]) : 0));
}

function axesOf(place) {
  const origin = place([0, 0, 0]);
  return [place([1, 0, 0]), place([0, 1, 0]), place([0, 0, 1])].map((end) => unit(minus(end, origin)));
}
