"use strict";

const SVG = "http://www.w3.org/2000/svg";
const at = (id) => document.getElementById(id);
let points = [];
let inDegrees = false;
let shown = "";  // address of the photograph that was asked about

function made(kind, values, text) {
  const node = document.createElementNS(SVG, kind);
  for (const [name, value] of Object.entries(values)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function say(text, bad) {
  at("said").textContent = text;
  at("said").classList.toggle("bad", Boolean(bad));
}

function metres(value) {
  return value >= 10000 ? `${(value / 1000).toFixed(1)} km` : `${Math.round(value)} m`;
}

async function ask(file) {
  say(`${file.name}: looking ...`);
  const body = new FormData();
  body.append("photo", file);
  let answer;
  try {
    const reply = await fetch("api/locate", { method: "POST", body });
    answer = await reply.json().catch(() => ({}));
    if (!reply.ok) {
      const why = typeof answer.detail === "string" ? answer.detail : `the server said ${reply.status}`;
      say(`${file.name}: ${why}`, true);
      return;
    }
  } catch (error) {
    say(`${file.name}: the server does not answer`, true);
    return;
  }
  if (shown) URL.revokeObjectURL(shown);
  shown = URL.createObjectURL(file);
  show(file, answer);
}

function show(file, answer) {
  const verdict = { true: "in the map", false: "uncertain, may not be in the map", null: "no verdict" }[String(answer.in_map)];
  const held = answer.in_map === null ? "" : ` (confidence ${answer.confidence.toFixed(3)}, from ${answer.threshold.toFixed(3)})`;
  const place = answer.position;
  const where = !place ? "no position is known"
    : place.lat !== null ? `${place.lat.toFixed(6)}, ${place.lon.toFixed(6)}` : `${place.east.toFixed(1)} E ${place.north.toFixed(1)} N`;
  const spread = place ? `, spread ${metres(place.spread_m)}` : "";
  say(`${file.name}: ${verdict}${held}; ${where}${spread}`);
  const list = at("candidates");
  list.replaceChildren();
  answer.candidates.forEach((candidate, rank) => list.append(item(candidate, rank, answer)));
  at("answer").hidden = answer.candidates.length === 0;
  if (answer.candidates.length) select(0, answer);
  drawMap(answer);
}

function item(candidate, rank, answer) {
  const entry = document.createElement("li");
  const button = document.createElement("button");
  button.type = "button";
  button.setAttribute("aria-pressed", "false");
  if (candidate.image) {
    const image = document.createElement("img");
    image.src = candidate.image;
    image.alt = `Candidate ${rank + 1}`;
    button.append(image);
  }
  const name = document.createElement("b");
  name.textContent = `${rank + 1}. ${candidate.name}`;
  const told = [`similarity ${candidate.similarity.toFixed(3)}`];
  if (candidate.matches !== null) told.push(`${candidate.matches} matches`);
  if (rank && candidate.apart_m !== null) told.push(`${metres(candidate.apart_m)} from the first`);
  const words = document.createElement("small");
  words.textContent = told.join(", ");
  button.append(name, words);
  button.addEventListener("click", () => select(rank, answer));
  entry.append(button);
  return entry;
}

function select(rank, answer) {
  at("candidates").querySelectorAll("button").forEach((button, i) => button.setAttribute("aria-pressed", String(i === rank)));
  drawPair(answer.candidates[rank]);
}

function size(source) {
  return new Promise((resolve) => {
    const image = new Image();
    image.addEventListener("load", () => resolve({ width: image.naturalWidth, height: image.naturalHeight }));
    image.addEventListener("error", () => resolve(null));
    image.src = source;
  });
}

async function drawPair(candidate) {
  at("pair").hidden = !candidate.image;
  if (!candidate.image) return;
  const one = await size(shown) || { width: 4, height: 3 };
  const other = await size(candidate.image) || { width: 4, height: 3 };
  const height = 400;
  const left = height * one.width / one.height;
  const right = height * other.width / other.height;
  const gap = 10;
  const svg = at("matches");
  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${left + gap + right} ${height}`);
  svg.append(made("image", { href: shown, width: left, height, preserveAspectRatio: "none" }));
  svg.append(made("image", { href: candidate.image, x: left + gap, width: right, height, preserveAspectRatio: "none" }));
  for (const line of candidate.lines) {
    svg.append(made("line", {
      x1: line.query_x * left, y1: line.query_y * height,
      x2: left + gap + line.x * right, y2: line.y * height,
    }));
  }
}

function drawMap(answer) {
  const candidates = answer.candidates.map((one) => inDegrees ? [one.lon, one.lat] : [one.east, one.north]);
  const known = candidates.filter(([x, y]) => x !== null && y !== null);
  at("place").hidden = points.length + known.length === 0;
  if (at("place").hidden) return;
  const place = answer.position;
  const guess = place ? (inDegrees ? [place.lon, place.lat] : [place.east, place.north]) : null;
  const all = points.map((point) => [point.x, point.y]).concat(known, guess && guess[0] !== null ? [guess] : []);
  const low = [Infinity, Infinity], high = [-Infinity, -Infinity];
  for (const point of all) {
    for (const axis of [0, 1]) {
      low[axis] = Math.min(low[axis], point[axis]);
      high[axis] = Math.max(high[axis], point[axis]);
    }
  }
  const shrink = inDegrees ? Math.cos((low[1] + high[1]) / 2 * Math.PI / 180) : 1;
  const span = Math.max((high[0] - low[0]) * shrink, high[1] - low[1]) || 1;
  const side = 600, margin = 20;
  const width = Math.max(160, side * (high[0] - low[0]) * shrink / span), height = Math.max(160, side * (high[1] - low[1]) / span);
  const middle = [(low[0] + high[0]) / 2, (low[1] + high[1]) / 2];
  const put = ([x, y]) => [margin + width / 2 + (x - middle[0]) * shrink * side / span, margin + height / 2 - (y - middle[1]) * side / span];
  const svg = at("map");
  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${width + 2 * margin} ${height + 2 * margin}`);
  const dot = (point, kind, r) => {
    const [cx, cy] = put(point);
    const circle = made("circle", { cx, cy, r, class: kind });
    svg.append(circle);
    return circle;
  };
  points.forEach((point) => dot([point.x, point.y], "index", 2));
  answer.candidates.forEach((one, rank) => {
    const point = inDegrees ? [one.lon, one.lat] : [one.east, one.north];
    if (point[0] === null) return;
    dot(point, "candidate", 6).append(made("title", {}, `${rank + 1}. ${one.name}`));
    const [x, y] = put(point);
    svg.append(made("text", { x: x + 8, y: y - 8 - 12 * rank }, String(rank + 1)));
  });
  if (guess && guess[0] !== null) dot(guess, "estimate", 5);
}

async function start() {
  const file = at("file"), drop = at("drop");
  file.addEventListener("change", () => { if (file.files.length) ask(file.files[0]); });
  for (const name of ["dragenter", "dragover"]) {
    drop.addEventListener(name, (event) => { event.preventDefault(); drop.classList.add("over"); });
  }
  for (const name of ["dragleave", "drop"]) drop.addEventListener(name, () => drop.classList.remove("over"));
  drop.addEventListener("drop", (event) => {
    event.preventDefault();
    if (event.dataTransfer.files.length) ask(event.dataTransfer.files[0]);
  });
  const reply = await fetch("api/map");
  const map = await reply.json();
  points = map.points;
  inDegrees = map.in_degrees;
  at("about").textContent = `An index of ${map.photographs.toLocaleString("en")} photographs. What you drop stays on this machine.`;
}

start();
