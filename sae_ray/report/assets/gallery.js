"use strict";

// The gallery: all neurons of an SAE that pass a filter. Only the cards near the window are in the page.

const section = document.getElementById("neurons");
const form = document.getElementById("filters");
const gallery = document.getElementById("gallery");
const found = document.getElementById("found");
const showIgnored = document.getElementById("show-ignored");
const shown = { cell: null, index: null, places: [], settings: "", turn: 0 };
const ANY = "any"; // class, also one that the study ignores

const levelOf = (cell, neuron) => cell.level_ends.findIndex((end) => neuron < end);
const asked = (name) => form.elements[name]?.value.trim() ?? "";
const limit = (name, otherwise) => (asked(name) === "" ? otherwise : Number(asked(name)));

// What passes

async function filter() {
  const turn = ++shown.turn;
  const cell = cells.get(asked("cell"));
  const index = await openIndex(cell.name);
  const [sorted, scored] = await Promise.all([valuesOf(cell, index, asked("sort")), asked("score") ? scoresOf(cell.name, asked("score")) : null]);
  const isNamed = await naming(cell, index, asked("name").toLowerCase());
  if (turn !== shown.turn) return;
  const { places, n_ignored } = passing(cell, index, scored, isNamed);
  const sign = asked("order") === "+" ? 1 : -1;
  const key = (place) => (Number.isFinite(sorted[place]) ? sign * sorted[place] : Infinity);
  const inOrder = asked("sort") === "ms" && sign < 0; // as the index is, but that neurons with few images come last
  places.sort(inOrder ? (a, b) => a - b : (a, b) => key(a) - key(b) || a - b);
  Object.assign(shown, { cell: cell.name, index, places, settings: settings() });
  say(cell, index, n_ignored);
  list.show();
}

const valuesOf = (cell, index, key) => (key === "neuron" ? index.neuron : scoresOf(cell.name, key));

/** The places that pass, and how many more would if no class were ignored. */
function passing(cell, index, scored, isNamed) {
  const all = Array.from(index.neuron.keys());
  const numbers = asked("number").match(/\d+/g);
  if (numbers) {
    const wanted = new Set(numbers.map(Number));
    return { places: all.filter((place) => wanted.has(index.neuron[place])), n_ignored: 0 };
  }
  const [ms, support] = [limit("ms", -Infinity), limit("support", 0)];
  const [from, to] = [limit("from", 0) / 100, limit("to", 100) / 100];
  const [least, most] = [limit("least", -Infinity), limit("most", Infinity)];
  const [level, label] = [asked("level"), asked("label")];
  const ignored = new Set(label === "" ? facts.ignored : []);
  const passes = (place) =>
    (ms === -Infinity || index.ms[place] >= ms) &&
    index.support[place] >= support &&
    index.frequency[place] >= from &&
    index.frequency[place] <= to &&
    (level === "" || levelOf(cell, index.neuron[place]) === Number(level)) &&
    (label === "" || label === ANY || index.label[place] === Number(label)) &&
    (scored === null || (scored[place] >= least && scored[place] <= most)) &&
    isNamed(place);
  const fitting = all.filter(passes);
  const places = fitting.filter((place) => !ignored.has(index.label[place]));
  return { places, n_ignored: fitting.length - places.length };
}

/** Whether a text is part of a neuron's names, of its concept or of the label of its top images. */
async function naming(cell, index, text) {
  if (text === "") return () => true;
  const has = (words) => words.map((word) => word.toLowerCase().includes(text));
  const labels = has(facts.labels);
  const named = new Uint8Array(index.neuron.length);
  if (cell.scores !== null) {
    const [meaning, names] = await Promise.all([load(`${cell.name}/concepts`), load(`${cell.name}/names`)]);
    const concepts = has(meaning.names);
    unpack(meaning.of_neuron, Int32Array).forEach((concept, place) => (named[place] = concepts[concept] ?? 0));
    for (const { words, word, place } of names) {
      const [fits, at, whose] = [has(words), unpack(word, Int32Array), unpack(place, Int32Array)];
      whose.forEach((one, row) => (named[one] |= fits[at[row]]));
    }
  }
  return (place) => named[place] === 1 || labels[index.label[place]] === true;
}

function say(cell, index, n_ignored) {
  const never = cell.n_neurons - index.neuron.length;
  const rest = never ? `; ${count(never)} of its ${count(cell.n_neurons)} neurons never fired` : "";
  const least = asked("number") === "" && limit("support", 0) > 0 ? ` that are active on ${asked("support")} images or more` : "";
  const names = facts.ignored.map((label) => facts.labels[label]).join(", ");
  const without = n_ignored ? ` ${count(n_ignored)} that mostly show ${names} are left out.` : "";
  found.textContent = `${count(shown.places.length)} neurons of ${cell.name}${least}${rest}.${without}`;
  showIgnored.hidden = n_ignored === 0;
}

// The list

const GAP = 12;
const AHEAD = 400; // pixels above and below the window that have cards, too
const list = { columns: 1, width: 0, height: 0, cards: new Map() };

list.measure = () => {
  const least = matchMedia("(max-width: 40rem)").matches ? 144 : 160;
  list.columns = Math.max(1, Math.floor((gallery.clientWidth + GAP) / (least + GAP)));
  list.width = (gallery.clientWidth + GAP) / list.columns - GAP;
  gallery.style.setProperty("--card", `${list.width}px`);
  const sample = frame(0);
  gallery.append(sample);
  list.height = sample.offsetHeight + GAP;
  sample.remove();
};

list.show = () => {
  if (section.hidden) return;
  for (const card of list.cards.values()) card.remove();
  list.cards.clear();
  gallery.style.height = "0";
  if (!shown.places.length) return;
  list.measure();
  gallery.style.height = `${Math.ceil(shown.places.length / list.columns) * list.height - GAP}px`;
  list.draw();
};

/** Puts the cards near the window into the page, in their order, and takes the others out. */
list.draw = () => {
  if (section.hidden || !shown.places.length) return;
  const top = gallery.getBoundingClientRect().top;
  const row = (y) => Math.floor((y - top) / list.height);
  const first = Math.max(0, row(-AHEAD)) * list.columns;
  const last = Math.min(shown.places.length, (row(innerHeight + AHEAD) + 1) * list.columns);
  for (const [at, card] of list.cards) {
    if ((at >= first && at < last) || card.contains(document.activeElement)) continue;
    card.remove();
    list.cards.delete(at);
  }
  let next = gallery.firstChild;
  for (let at = first; at < last; at++) {
    while (next && Number(next.dataset.at) < at) next = next.nextSibling;
    if (list.cards.has(at)) continue;
    const card = frame(at);
    list.cards.set(at, card);
    gallery.insertBefore(card, next);
    fill(card, shown.cell, shown.places[at]);
  }
};

/** A card without what has to be loaded. */
function frame(at) {
  const item = element("div", { role: "listitem", class: "item", "data-at": at, "aria-setsize": shown.places.length, "aria-posinset": at + 1 });
  const [x, y] = [(at % list.columns) * (list.width + GAP), Math.floor(at / list.columns) * list.height];
  item.style.transform = `translate(${x}px, ${y}px)`;
  item.append(cardOf(shown.cell, shown.index, shown.places[at], { settings: shown.settings }));
  return item;
}

// Pictures come a few cards a frame, those of the newest card first, and one file at a time: a fast scroll does not wait
// for what it has passed.
const PER_FRAME = 12;
const waiting = [];
let busy = false;

function fill(card, cell, place) {
  waiting.push([card, cell, place]);
  if (!busy) work();
}

const nextFrame = () => new Promise(requestAnimationFrame);

async function work() {
  busy = true;
  for (let n = 1; waiting.length; ) {
    const [card, cell, place] = waiting.pop();
    if (!card.isConnected) continue;
    try {
      const facets = await details(cell, place);
      if (card.isConnected) complete(card.firstChild, facets);
    } catch (error) {
      found.textContent = error.message;
    }
    if (n++ % PER_FRAME === 0) await nextFrame();
  }
  busy = false;
}

/** Moves the focus to the card at a place of the list, wherever it is. */
function focusCard(at) {
  const top = gallery.getBoundingClientRect().top + Math.floor(at / list.columns) * list.height;
  const [above, below] = [top - 64, top + list.height - innerHeight]; // the page's head is above
  if (above < 0) scrollBy(0, above);
  else if (below > 0) scrollBy(0, below);
  list.draw();
  list.cards.get(at)?.firstChild.focus({ preventScroll: true });
}

function walk(event) {
  const item = event.target.closest(".item");
  if (!item || event.ctrlKey || event.metaKey || event.altKey) return;
  const n = shown.places.length;
  const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -list.columns, ArrowDown: list.columns, Home: -n, End: n };
  if (!(event.key in moves)) return;
  event.preventDefault();
  const at = Number(item.dataset.at) + moves[event.key];
  if (event.key.startsWith("Arrow") && (at < 0 || at >= n)) return;
  focusCard(Math.min(Math.max(at, 0), n - 1));
}

// Settings, as they are in the address

let fresh = {};

/** The settings that are not as at first, for an address. */
function settings() {
  const changed = [...new FormData(form)].filter(([name, value]) => name !== "cell" && value !== fresh[name]);
  return new URLSearchParams(changed).toString();
}

/** Offers what the chosen SAE has; what was chosen stays where it can. */
function offerScores() {
  const cell = cells.get(form.elements.cell.value);
  const offer = (select, options, preferred = "") => {
    const before = select.value;
    select.replaceChildren(...options.map(([value, title]) => element("option", { value, selected: value === preferred }, title)));
    if (before !== "" && options.some(([value]) => `${value}` === before)) select.value = before;
  };
  const scores = keysOf(cell).map((key) => [key, facts.scores[key].title]);
  offer(form.elements.sort, [...scores, ["neuron", "number"]], "ms");
  offer(form.elements.score, [["", "any"], ...scores]);
  const ends = cell.level_ends;
  offer(form.elements.level, [["", "any"], ...ends.map((end, level) => [level, `${level}: ${count(ends[level - 1] ?? 0)} – ${count(end - 1)}`])]);
  document.getElementById("level-filter").hidden = ends.length < 2;
}

/** Makes the filter that of an address, unless it is. */
async function setFilter(cell, query) {
  if (shown.cell === cell && shown.settings === query) return;
  form.reset();
  form.elements.cell.value = cell;
  offerScores();
  for (const [name, value] of new URLSearchParams(query)) {
    if (form.elements[name] && name !== "cell") form.elements[name].value = value;
  }
  const more = form.querySelector("details");
  more.open ||= [...more.querySelectorAll("[name]")].some(({ name, value }) => value !== fresh[name]);
  await filter();
}

const galleryAddress = () => `#/neurons/${encodeURIComponent(asked("cell"))}${settings() && `?${settings()}`}`;

async function refilter() {
  history.replaceState(null, "", galleryAddress());
  await filter().catch((error) => (found.textContent = error.message));
}

if (form) {
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", ({ target }) => {
    if (target.name === "cell") offerScores();
    refilter();
  });
  document.getElementById("afresh").addEventListener("click", () => {
    const cell = asked("cell");
    form.reset();
    form.elements.cell.value = cell;
    offerScores();
    refilter();
  });
  showIgnored.addEventListener("click", () => {
    form.elements.label.value = ANY;
    refilter();
    form.elements.label.focus();
  });
  offerScores();
  fresh = Object.fromEntries(new FormData(form));
  gallery.addEventListener("keydown", walk);
  let due = 0;
  addEventListener("scroll", () => (due ||= requestAnimationFrame(() => ((due = 0), list.draw()))), { passive: true });
  new ResizeObserver(([{ contentRect }]) => {
    if (contentRect.width && Math.abs(contentRect.width - (list.columns * (list.width + GAP) - GAP)) > 0.5) list.show();
  }).observe(gallery);
}
