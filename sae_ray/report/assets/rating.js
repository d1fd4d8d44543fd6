"use strict";

const facts = JSON.parse(document.getElementById("facts").textContent);
const [start, rating, done, tools, problem] = ["start", "rating", "done", "tools", "problem"].map((id) => document.getElementById(id));
const sets = [document.getElementById("left"), document.getElementById("right")];

// What a browser keeps: who rated last, and everybody's answers, as pair -> chosen neuron.

const kept = {
  read(name) {
    try {
      return JSON.parse(localStorage.getItem(`${facts.page}/${name}`));
    } catch {
      return null;
    }
  },
  write(name, value) {
    try {
      localStorage.setItem(`${facts.page}/${name}`, JSON.stringify(value));
    } catch {
      complain("This browser does not keep your answers. Download them before you close the page.");
    }
  },
};

function complain(words) {
  problem.textContent = words;
  problem.hidden = false;
}

/** Numbers from 0 to 1 that a text determines: FNV-1a, then mulberry32. */
function randomOf(text) {
  let state = 2166136261;
  for (const letter of new TextEncoder().encode(text)) state = Math.imul(state ^ letter, 16777619);
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** Each rater has an order of pairs and sides of their own, which a reload does not change. */
function arranged(rater) {
  const random = randomOf(`${facts.page}/${rater}`);
  const arrangement = facts.pairs.map((neurons, pair) => ({ pair, shown: random() < 0.5 ? neurons : [...neurons].reverse() }));
  for (let last = arrangement.length - 1; last > 0; last--) {
    const other = Math.floor(random() * (last + 1));
    [arrangement[last], arrangement[other]] = [arrangement[other], arrangement[last]];
  }
  return arrangement;
}

const now = { rater: null, answers: {}, order: [], at: 0, ready: false };

function begin(rater) {
  Object.assign(now, { rater, answers: kept.read(`answers/${rater}`) ?? {}, order: arranged(rater) });
  kept.write("rater", rater);
  goOn();
}

/** To the first pair without an answer. */
function goOn() {
  const first = now.order.findIndex(({ pair }) => !(pair in now.answers));
  now.at = first < 0 ? now.order.length : first;
  show();
}

function show() {
  const n = Object.keys(now.answers).length;
  const finished = now.rater !== null && now.at === now.order.length;
  start.hidden = now.rater !== null;
  rating.hidden = now.rater === null || finished;
  done.hidden = !finished;
  tools.hidden = document.getElementById("progress").hidden = now.rater === null;
  document.getElementById("position").textContent = finished ? `${n} answers` : `Pair ${now.at + 1} of ${now.order.length}`;
  document.querySelector("progress").value = n;
  document.getElementById("back").disabled = now.at === 0;
  document.getElementById("download").disabled = n === 0;
  document.getElementById("download").classList.toggle("main", finished);
  document.getElementById("other").title = `Answers are kept for ${now.rater}`;
  if (!rating.hidden) showPair();
}

const address = (neuron) => `neurons/${neuron}.jpg`;

function loaded(neuron) {
  const image = Object.assign(new Image(), { src: address(neuron) });
  return image.decode();
}

/** Long enough to see that the answer has arrived, and for the second click of a double click to have no effect. */
const pause = () => new Promise((resolve) => setTimeout(resolve, 250));

async function showPair() {
  const { at, order, rater } = now;
  const { pair, shown } = order[at];
  now.ready = false;
  for (const [side, set] of sets.entries()) {
    set.disabled = true;
    set.setAttribute("aria-pressed", now.answers[pair] === shown[side]);
  }
  try {
    await Promise.all([...shown.map(loaded), pause()]);
  } catch {
    return complain(`The images of this pair are missing (${shown.map(address).join(", ")}). Copy the page again, with all its files.`);
  }
  if (at !== now.at || rater !== now.rater) return;
  for (const [side, set] of sets.entries()) {
    for (const thumb of set.firstChild.children) thumb.style.backgroundImage = `url("${address(shown[side])}")`;
    set.disabled = false;
  }
  now.ready = true;
  if (at + 1 < order.length) order[at + 1].shown.forEach((neuron) => loaded(neuron).catch(() => {}));
}

function choose(side) {
  if (!now.ready || rating.hidden) return;
  const { pair, shown } = now.order[now.at];
  now.answers[pair] = shown[side];
  now.ready = false;
  kept.write(`answers/${now.rater}`, now.answers);
  goOn();
}

function back() {
  if (now.rater === null || now.at === 0) return;
  now.at -= 1;
  show();
}

// The file of answers

const quoted = (value) => (/[",\r\n]/.test(value) ? `"${value.replaceAll('"', '""')}"` : `${value}`);

function csv() {
  const rows = now.order.filter(({ pair }) => pair in now.answers).map(({ pair, shown }) => [facts.page, now.rater, pair, ...shown, now.answers[pair]]);
  const lines = [["page", "rater", "pair", "left", "right", "choice"], ...rows].map((row) => row.map((value) => quoted(`${value}`)).join(","));
  return `${lines.join("\r\n")}\r\n`;
}

function download() {
  const file = URL.createObjectURL(new Blob([csv()], { type: "text/csv" }));
  const name = `${facts.page}-${now.rater.replace(/[^\p{L}\p{N}]+/gu, "-")}.csv`;
  Object.assign(document.createElement("a"), { href: file, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(file), 60_000);
}

// Hands

for (const [side, set] of sets.entries()) {
  for (let place = 0; place < facts.side ** 2; place++) {
    const thumb = Object.assign(document.createElement("span"), { className: "thumb" });
    const [row, column] = [Math.floor(place / facts.side), place % facts.side];
    thumb.style.backgroundPosition = `${(100 * column) / (facts.side - 1)}% ${(100 * row) / (facts.side - 1)}%`;
    set.firstChild.append(thumb);
  }
  set.addEventListener("click", () => choose(side));
}

addEventListener("keydown", (event) => {
  const action = { ArrowLeft: () => choose(0), ArrowRight: () => choose(1), Backspace: back }[event.key];
  if (!action || event.repeat || event.ctrlKey || event.altKey || event.metaKey || event.target.matches("input")) return;
  event.preventDefault();
  action();
});

document.getElementById("back").addEventListener("click", back);
document.getElementById("download").addEventListener("click", download);
document.getElementById("other").addEventListener("click", () => {
  now.rater = null;
  show();
  start.querySelector("input").select();
});
start.querySelector("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const name = event.target.elements.rater.value.trim();
  if (name) begin(name);
});

const before = kept.read("rater");
if (before) begin(before);
else show();
