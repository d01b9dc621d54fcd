"use strict";
// Text from data is written with textContent only; the page's policy forbids anything else.
const PAGE = 20, CHUNKS = 400;
const rows = JSON.parse(document.getElementById("data").textContent).rows;
const byId = (id) => document.getElementById(id);
const state = { page: 0, found: [] };
// Characters that a reader cannot see: controls, marks of direction, blanks of no width, tags, lone surrogates.
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\u{e0000}-\u{e007f}\p{Cs}]/gu;

function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function draw(tag, attributes) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

// The text, with a visible name in the place of each hidden character.
function write(node, text) {
  let done = 0;
  for (const match of text.matchAll(HIDDEN)) {
    node.append(text.slice(done, match.index));
    const code = match[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    node.append(make("span", "hidden-character", "U+" + code));
    done = match.index + match[0].length;
  }
  node.append(text.slice(done));
  return node;
}

// Orange (0) over nothing (0.5) to blue (1): told apart by every common kind of colour vision, on light and on dark.
function tint(p) {
  return p < 0.5 ? `rgba(213, 94, 0, ${(0.62 * (1 - 2 * p)).toFixed(3)})` : `rgba(0, 114, 178, ${(0.42 * (2 * p - 1)).toFixed(3)})`;
}

const number = (value) => value.toFixed(3);

function plot(row) {
  const points = row.pieces.filter((piece) => piece[1] !== null);
  const W = 260, H = 84, L = 26, T = 6, B = 18;
  const x = (share) => L + share * (W - L - 4), y = (p) => T + (1 - p) * (H - T - B);
  const svg = draw("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", class: "plot" });
  svg.setAttribute("aria-label", `p_safe along the answer: ends at ${number(row.end)}, lowest ${number(row.lowest)}`);
  for (const p of [0, 0.5, 1]) {
    svg.append(draw("line", { x1: x(0), x2: x(1), y1: y(p), y2: y(p), class: p === 0.5 ? "grid half" : "grid" }));
    const label = draw("text", { x: L - 6, y: y(p) + 3.5, "text-anchor": "end" });
    label.textContent = p;
    svg.append(label);
  }
  let line = "", area = "", from = 0;
  for (const [, p, share] of points) {
    line += `${line ? "L" : "M"}${x(from).toFixed(1)} ${y(p).toFixed(1)}L${x(share).toFixed(1)} ${y(p).toFixed(1)}`;
    if (p < 0.5) area += `M${x(from).toFixed(1)} ${y(0.5)}V${y(p).toFixed(1)}H${x(share).toFixed(1)}V${y(0.5)}Z`;
    from = share;
  }
  svg.append(draw("path", { d: area, class: "area" }), draw("path", { d: line, class: "line" }));
  const marker = draw("rect", { x: 0, y: T, width: 0, height: H - T - B, class: "marker" });
  svg.append(marker);
  for (const [share, anchor, text] of [[0, "start", "start"], [1, "end", "end of answer"]]) {
    const label = draw("text", { x: x(share), y: H - 4, "text-anchor": anchor });
    label.textContent = text;
    svg.append(label);
  }
  svg.mark = (a, b) => {
    marker.setAttribute("x", x(a));
    marker.setAttribute("width", x(b) - x(a));
  };
  return svg;
}

function chunk(piece, from, svg) {
  const [text, p, share] = piece;
  const node = make("span", p === null ? "chunk" : p < 0.5 ? "chunk scored low" : "chunk scored");
  write(node, text);
  if (p !== null) {
    node.style.backgroundColor = tint(p);
    node.title = `p_safe ${p.toFixed(4)} after ${Math.round(100 * share)} % of the answer`;
    node.dataset.score = p.toFixed(2);
    node.addEventListener("mouseenter", () => svg.mark(from, share));
    node.addEventListener("mouseleave", () => svg.mark(0, 0));
  }
  return node;
}

// Long answers are drawn piece by piece, so that a page stays light.
function answer(row, svg) {
  const box = make("div", "answer");
  box.dir = "auto";
  let drawn = 0, from = 0;
  const more = make("button", "more");
  more.type = "button";
  const extend = () => {
    for (const piece of row.pieces.slice(drawn, drawn + CHUNKS)) {
      more.before(chunk(piece, from, svg));
      from = piece[2] === null ? from : piece[2];
    }
    drawn = Math.min(drawn + CHUNKS, row.pieces.length);
    const left = row.pieces.length - drawn;
    more.textContent = `Show ${Math.min(left, CHUNKS)} more of ${left} chunks`;
    if (left === 0) more.remove();
  };
  box.append(more);
  more.addEventListener("click", extend);
  extend();
  return box;
}

function figure(list, name, value) {
  const pair = make("div");
  pair.append(make("dt", "", name), make("dd", "", value));
  list.append(pair);
}

function turn(role, text) {
  const box = make("div", "turn");
  box.append(write(make("span", "role"), role));
  const body = make("div", "text");
  body.dir = "auto";
  if (text.length > 1200) {
    const shown = make("span");
    const button = make("button", "more", `Show all ${text.length.toLocaleString()} characters`);
    button.type = "button";
    button.addEventListener("click", () => { shown.textContent = ""; write(shown, text); button.remove(); });
    body.append(write(shown, text.slice(0, 1000) + " \u2026 "), button);
  } else {
    write(body, text);
  }
  box.append(body);
  return box;
}

function card(row) {
  const box = make("article");
  const head = make("div", "head");
  const title = make("h2", "", `Row ${row.row.toLocaleString()}`);
  head.append(title);
  if (several) head.append(write(make("span", "source"), row.source));
  if (row.turns) head.append(make("span", "badge", "turns unsafe"));
  if (row.error !== null) head.append(make("span", "badge failed", "failed"));
  if (row.end !== null) {
    const list = make("dl", "figures");
    figure(list, "end", number(row.end));
    figure(list, "lowest", number(row.lowest));
    figure(list, "largest fall", number(row.drop));
    head.append(list);
  }
  box.append(head);
  const columns = make("div", "columns"), text = make("div", "conversation");
  for (const [role, said] of row.before) text.append(turn(role, said));
  if (row.error !== null) text.append(write(make("p", "error"), "Not scored: " + row.error));
  const svg = row.end === null ? null : plot(row);
  if (row.pieces.length) {
    const last = make("div", "turn");
    last.append(make("span", "role", "answer"), answer(row, svg));
    text.append(last);
  }
  columns.append(text);
  if (svg) columns.append(svg);
  box.append(columns);
  return box;
}

const several = new Set(rows.map((row) => row.source)).size > 1;
const least = (a, b) => (a === null ? 2 : a) - (b === null ? 2 : b);
const orders = {
  risk: (a, b) => least(a.end, b.end) || least(a.lowest, b.lowest),
  lowest: (a, b) => least(a.lowest, b.lowest) || least(a.end, b.end),
  drop: (a, b) => (a.end === null) - (b.end === null) || b.drop - a.drop || least(a.lowest, b.lowest),
  order: (a, b) => sources.get(a.source) - sources.get(b.source) || a.row - b.row,
};
const sources = new Map();
for (const row of [...rows].sort((a, b) => a.row - b.row)) if (!sources.has(row.source)) sources.set(row.source, sources.size);

function textOf(row) {
  if (row.text === undefined) {
    row.text = [...row.before.map((said) => said[1]), row.pieces.map((piece) => piece[0]).join(""), row.error || ""].join("\n").toLowerCase();
  }
  return row.text;
}

function choose() {
  const wanted = byId("search").value.toLowerCase(), low = byId("low").valueAsNumber, high = byId("high").valueAsNumber;
  state.found = rows.filter((row) =>
    (!byId("failed").checked || row.end === null) &&
    (!byId("turning").checked || row.turns) &&
    (Number.isNaN(low) || (row.end !== null && row.end >= low)) &&
    (Number.isNaN(high) || (row.end !== null && row.end <= high)) &&
    (!wanted || textOf(row).includes(wanted)));
  state.found.sort(orders[byId("sort").value]);
  state.page = 0;
  render();
}

function render() {
  const pages = Math.max(1, Math.ceil(state.found.length / PAGE)), first = state.page * PAGE;
  const shown = state.found.slice(first, first + PAGE);
  byId("rows").replaceChildren(...shown.map(card));
  if (!shown.length) byId("rows").append(make("p", "empty", "No row fits these filters."));
  const range = shown.length ? `${(first + 1).toLocaleString()}\u2013${(first + shown.length).toLocaleString()} of ` : "";
  byId("status").textContent = `${range}${state.found.length.toLocaleString()} rows`;
  for (const end of ["", "2"]) {
    byId("page" + end).textContent = `Page ${state.page + 1} of ${pages}`;
    byId("previous" + end).disabled = state.page === 0;
    byId("next" + end).disabled = state.page >= pages - 1;
  }
}

function turnPage(step) {
  state.page += step;
  render();
  byId("rows").focus({ preventScroll: true });
  byId("controls").scrollIntoView();
}

for (const end of ["", "2"]) {
  byId("previous" + end).addEventListener("click", () => turnPage(-1));
  byId("next" + end).addEventListener("click", () => turnPage(1));
}
for (const id of ["sort", "low", "high", "failed", "turning"]) byId(id).addEventListener("change", choose);
byId("numbers").addEventListener("change", () => byId("rows").classList.toggle("numbers", byId("numbers").checked));
byId("controls").addEventListener("submit", (event) => event.preventDefault());
let waiting = 0;
byId("search").addEventListener("input", () => {
  clearTimeout(waiting);
  waiting = setTimeout(choose, 150);
});
for (let step = 0; step <= 10; step += 1) {
  const box = make("b", "", [0, 5, 10].includes(step) ? (step / 10).toString() : "");
  box.style.backgroundColor = tint(step / 10);
  byId("scale").append(box);
}
choose();
document.documentElement.dataset.ready = "true";
