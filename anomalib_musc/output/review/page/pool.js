// SPDX-License-Identifier: Apache-2.0
// The pool, what the person has decided about it, and where that is kept.
"use strict";

const pool = JSON.parse(document.getElementById("pool").textContent); // images in the order of rank, from 0
const MARKS = ["good", "defect", "unsure"];
const SYMBOLS = { good: "✓", defect: "✕", unsure: "?" };
const storageKey = `anomalib-musc review ${pool.run}`;
const changes = new EventTarget(); // "threshold", "marks", "current": the page follows

const state = {
  threshold: pool.threshold,
  marks: {}, // rank: one of MARKS
  history: [], // [rank, mark before] of each mark, the latest last
  order: "score",
  filter: "all",
  current: pool.first, // rank
  opacity: 0.4,
  outline: true,
};
const KEPT = ["threshold", "marks", "history"];

function load() {
  try {
    Object.assign(state, JSON.parse(localStorage.getItem(storageKey)) ?? {});
  } catch {
    document.getElementById("no-storage").hidden = false;
  }
}

function save() {
  try {
    localStorage.setItem(storageKey, JSON.stringify(Object.fromEntries(KEPT.map((name) => [name, state[name]]))));
  } catch {
    document.getElementById("no-storage").hidden = false;
  }
}

function changed(what) {
  changes.dispatchEvent(new Event(what));
}

// At most once a frame, however fast the mouse moves.
let isDue = false;
function setThreshold(value) {
  if (!Number.isFinite(value)) return;
  state.threshold = value;
  if (isDue) return;
  isDue = true;
  requestAnimationFrame(() => {
    isDue = false;
    save();
    changed("threshold");
  });
}

// The same mark again takes it away. Returns whether the image is marked now.
function setMark(rank, mark) {
  const before = state.marks[rank] ?? null;
  const after = before === mark ? null : mark;
  state.history.push([rank, before]);
  applyMark(rank, after);
  say(`${nameOf(rank)}: ${after ?? "no mark"}`);
  return after !== null;
}

function undo() {
  if (!state.history.length) return say("Nothing to undo");
  const [rank, before] = state.history.pop();
  applyMark(rank, before);
  if (isHere(rank)) setCurrent(rank);
  return say(`Undone. ${nameOf(rank)}: ${before ?? "no mark"}`);
}

function applyMark(rank, mark) {
  if (mark) state.marks[rank] = mark;
  else delete state.marks[rank];
  save();
  changed("marks");
}

function setCurrent(rank) {
  state.current = rank;
  changed("current");
}

const isHere = (rank) => rank >= pool.first && rank <= pool.last;
const isFlagged = (rank) => pool.scores[rank] > state.threshold;
const nameOf = (rank) => pool.names[rank] || `image ${rank + 1}`;
const pathOf = (rank) => (pool.names[rank] ? pool.root + pool.names[rank] : "");

function folderOf(rank) {
  const cut = nameOf(rank).lastIndexOf(pool.separator);
  return [nameOf(rank).slice(0, Math.max(cut, 0)), nameOf(rank).slice(cut + 1)];
}

// What lies in the file of an image; nothing as long as the browser has not read so far.
function slotOf(rank) {
  return document.getElementById(`card-${rank}`);
}

function pictureOf(rank) {
  const jpeg = (slotOf(rank) ?? document.getElementById(`small-${rank}`))?.textContent;
  return jpeg ? `data:image/jpeg;base64,${jpeg}` : "";
}

function numbersOf(slot, name) {
  return slot.dataset[name].split(" ").filter(Boolean).map(Number);
}

const maps = new Map();
function mapOf(rank) {
  if (!maps.has(rank)) {
    const slot = slotOf(rank);
    const [rows, columns] = numbersOf(slot, "grid");
    const [low, high] = numbersOf(slot, "range");
    const values = Float64Array.from(atob(slot.dataset.map), (byte) => low + (byte.charCodeAt(0) / 255) * (high - low));
    maps.set(rank, { rows, columns, values, high });
  }
  return maps.get(rank);
}

function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

let silence;
function say(text) {
  const toast = document.getElementById("toast");
  toast.textContent = text;
  clearTimeout(silence);
  silence = setTimeout(() => (toast.textContent = ""), 4000);
}
