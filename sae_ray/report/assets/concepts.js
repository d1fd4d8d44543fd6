"use strict";

// The page of concepts: concepts and their best neurons, scores against one another, and names.

const byId = (id) => document.getElementById(id);
const form = byId("filters");
const STEP = { concepts: 25, names: 20 };
const BEST = 8;
const PEEK_IMAGES = 8;
const MATRIX = {
  n_images: "images",
  rho: "ρ",
  shuffled_rho: "ρ, shuffled labels",
  average_precision: "average precision",
  probe_r: "probe R",
  sparse_1: "1-neuron probe",
  fms_1: "FMS@1",
};

/** The chosen cell, what is known of it, and what passes the filter. */
const now = { turn: 0, cell: null, index: null, n: 0, meaning: null, conceptOf: null, names: [], nameOf: null, places: [], concepts: [] };
const listed = { concepts: 0, names: 0, chosen: [] };

/** The work, of which the reader is told if it fails. */
const complaining = (work) => async (...given) => {
  try {
    await work(...given);
  } catch (error) {
    byId("problem").textContent = error.message;
    byId("problem").hidden = false;
  }
};

// Data

/** A score of the neurons on this page, in the order of the index. */
async function shownScores(cell, key) {
  const [values, { n }] = await Promise.all([scoresOf(cell, key), open(cell)]);
  return values.subarray(0, n);
}

async function open(cell) {
  const [index, meaning, found] = await Promise.all([openIndex(cell), load(`${cell}/concepts`), load(`${cell}/names`)]);
  const whole = ["place", "word", "n_images", "fits"];
  const names = found.map(({ method, words, ...packed }) => {
    const own = Object.entries(packed).map(([key, values]) => [key, once(`${cell}/names/${method}/${key}`, values, whole.includes(key) ? Int32Array : Float32Array)]);
    return { method, words, ...Object.fromEntries(own) };
  });
  const conceptOf = once(`${cell}/concepts/of_neuron`, meaning.of_neuron, Int32Array);
  return { cell: cells.get(cell), index, n: conceptOf.length, meaning, conceptOf, names, nameOf: null };
}

const conceptAt = (place) => now.meaning.names[now.conceptOf[place]] ?? null;

/** The name of the neuron at a place and its method, as it is everywhere: the first there is, but for that of its decoder alone. */
function namedAt(place) {
  now.nameOf ??= new Map(
    now.names
      .filter(({ method }) => method !== "decoder_cosine")
      .reverse()
      .flatMap(({ method, words, word, place }) => Array.from(place, (own, row) => [own, [words[word[row]], method]])),
  );
  return now.nameOf.get(place) ?? [null, null];
}

// Files

const quoted = (value) => (/[",\r\n]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value);
const written = (value) => (value === null || value === undefined || Number.isNaN(value) ? "" : typeof value === "number" ? `${Number(value.toPrecision(7))}` : quoted(`${value}`));

function save(what, rows) {
  const text = rows.map((row) => `${row.map(written).join(",")}\r\n`).join("");
  const file = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
  const name = `${facts.study}-${what}.csv`.replace(/[^\p{L}\p{N}.]+/gu, "-").replace(/^-+/, "");
  Object.assign(document.createElement("a"), { href: file, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(file), 60_000);
}

/** The rows of a table that are shown, with all digits. */
function tableRows(table) {
  const text = (one) => one.dataset.value ?? one.textContent.trim();
  return [...table.rows].filter((row) => !row.hidden).map((row) => [...row.cells].map(text));
}

for (const button of document.querySelectorAll("[data-table]")) {
  button.addEventListener("click", () => save(button.dataset.file, tableRows(byId(button.dataset.table))));
}
for (const input of document.querySelectorAll("[data-rows]")) {
  input.form.addEventListener("submit", (event) => event.preventDefault());
  input.addEventListener("input", () => {
    const wanted = input.value.trim().toLowerCase();
    for (const row of byId(input.dataset.rows).tBodies[0].rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
  });
}

// The filter

const text = (name) => form.elements[name].value.trim();
const limit = (name, otherwise) => (text(name) === "" ? otherwise : Number(text(name)));

function offer(select, options, preferred) {
  const before = select.value;
  select.replaceChildren(...options.map(([value, title]) => element("option", { value }, title)));
  const values = options.map(([value]) => value);
  select.value = values.includes(before) && before !== "" ? before : values.includes(preferred) ? preferred : values[0];
}

function offerScores(cell) {
  const options = keysOf(cell).map((key) => [key, facts.scores[key].title]);
  offer(form.elements.score, [["", "any"], ...options], "");
  offer(byId("across"), options, "ms");
  offer(byId("up"), options, cell.scores[0] ?? "frequency");
}

async function filter() {
  const turn = ++now.turn;
  const opened = await open(form.elements.cell.value);
  const key = form.elements.score.value;
  const values = key ? await shownScores(opened.cell.name, key) : null;
  if (turn !== now.turn) return;
  Object.assign(now, opened);

  const [concept, name] = [text("concept").toLowerCase(), text("name").toLowerCase()];
  const [support, from, to] = [limit("support", 0), limit("from", -Infinity), limit("to", Infinity)];
  const fitting = now.meaning.names.map((one) => one.toLowerCase().includes(concept));
  const named = new Uint8Array(now.n);
  for (const one of now.names) {
    const words = one.words.map((word) => word.toLowerCase().includes(name));
    one.place.forEach((place, row) => (named[place] |= words[one.word[row]]));
  }
  const passes = (place) =>
    now.index.support[place] >= support &&
    (concept === "" || fitting[now.conceptOf[place]]) &&
    (name === "" || named[place]) &&
    (values === null || (values[place] >= from && values[place] <= to));
  now.places = Array.from({ length: now.n }, (_, place) => place).filter(passes);
  const titles = now.meaning.concept.map((one) => one.toLowerCase());
  now.concepts = titles.flatMap((one, row) => (one.includes(concept) ? [row] : []));

  const { cell, index, n } = now;
  const left = index.neuron.length - n;
  const rest = left ? ` Of ${count(index.neuron.length)} neurons that fired, this page has the ${count(n)} with the highest MS.` : "";
  byId("found").textContent = `${count(now.places.length)} of ${count(n)} neurons of ${cell.name} pass.${rest}`;
  Object.assign(listed, { concepts: 0, names: 0 });
  hidePeek();
  showConcepts();
  await Promise.all([showNames(), drawScatter()]);
}

// Concepts and their best neurons

function offerConceptScores() {
  const { scores } = now.meaning;
  const known = Object.keys(MATRIX).filter((key) => scores[key].some((value) => value !== null));
  offer(byId("concept-sort"), [...known.map((key) => [key, `${MATRIX[key]}, high to low`]), ["name", "name"]], "rho");
  return known;
}

function conceptsInOrder() {
  const by = byId("concept-sort").value;
  if (by === "name") return [...now.concepts].sort((a, b) => now.meaning.concept[a].localeCompare(now.meaning.concept[b]));
  const value = (row) => now.meaning.scores[by]?.[row] ?? -Infinity;
  return [...now.concepts].sort((a, b) => value(b) - value(a) || a - b);
}

function showConcepts() {
  const { meaning } = now;
  const none = meaning.concept.length === 0;
  byId("no-concepts").hidden = !none;
  byId("with-concepts").hidden = none;
  if (none) return;
  const known = offerConceptScores();
  const order = conceptsInOrder();
  listed.concepts = Math.max(listed.concepts, STEP.concepts);
  const best = Math.min(BEST, Math.max(...meaning.best.map((one) => one.length)));
  const ranks = Array.from({ length: best }, (_, rank) => element("th", { scope: "col" }, rank ? `${rank + 1}` : "best"));
  const head = element("tr", {}, element("th", { scope: "col" }, "concept"), ...known.map((key) => element("th", { scope: "col" }, MATRIX[key])), ...ranks);
  const rows = order.slice(0, listed.concepts).map((row) => conceptRow(row, known, best));
  byId("matrix").replaceChildren(element("thead", {}, head), element("tbody", {}, ...rows));
  const capped = meaning.n_concepts > meaning.concept.length ? ` The ${count(meaning.concept.length)} with the highest ρ of ${count(meaning.n_concepts)} are on this page.` : "";
  const { drawn } = now.cell.counts;
  const few = drawn !== null && drawn < meaning.n_concepts ? ` Probes and FMS are measured of ${count(drawn)} concepts, drawn at random.` : "";
  byId("concepts-found").textContent = `${count(Math.min(order.length, listed.concepts))} of ${count(order.length)} concepts are shown.${capped}${few}`;
  byId("more-concepts").hidden = order.length <= listed.concepts;
}

function conceptRow(row, known, n_best) {
  const { meaning } = now;
  const numbers = known.map((key) => {
    const value = meaning.scores[key][row];
    return element("td", {}, key === "n_images" ? (value === null ? "–" : count(value)) : plain(value));
  });
  const best = Array.from({ length: n_best }, (_, rank) => {
    const [neuron, rho] = meaning.best[row][rank] ?? [null, null];
    const place = now.index.place.get(neuron);
    if (place === undefined) return element("td", {});
    const own = conceptAt(place) === meaning.concept[row];
    const attributes = { href: address(now.cell.name, neuron), "data-place": place, style: `--share: ${Math.max(0, rho)}` };
    return element("td", { class: "best" }, element("a", attributes, element(own ? "b" : "span", {}, `${neuron}`), element("span", {}, plain(rho))));
  });
  return element("tr", {}, element("th", { scope: "row" }, meaning.concept[row]), ...numbers, ...best);
}

function conceptFile() {
  const { scores, concept, best } = now.meaning;
  const keys = Object.keys(scores);
  const n_best = Math.max(0, ...best.map((one) => one.length));
  const ranks = Array.from({ length: n_best }, (_, rank) => [`neuron_${rank + 1}`, `rho_${rank + 1}`]).flat();
  const rows = conceptsInOrder().map((row) => [concept[row], ...keys.map((key) => scores[key][row]), ...best[row].flat()]);
  save(`concepts-${now.cell.name}`, [["concept", ...keys, ...ranks], ...rows]);
}

// One score against another

const scatter = byId("scatter");
const canvas = scatter.querySelector("canvas");
const plot = { places: [], x: [], y: [], titles: [], values: [], pointed: null, kept: false };
const MARGIN = { left: 64, right: 18, top: 14, bottom: 52 };

/** Maps the range of values to that of pixels, with ticks. */
function axisOf(values, logarithmic, from, to) {
  const at = logarithmic ? Math.log10 : (value) => value;
  let [low, high] = [Infinity, -Infinity];
  for (const value of values) [low, high] = [Math.min(low, at(value)), Math.max(high, at(value))];
  const pad = 0.03 * (high - low) || 0.5;
  [low, high] = [low - pad, high + pad];
  const place = (value) => from + ((at(value) - low) / (high - low)) * (to - from);
  const most = Math.max(2, Math.abs(to - from) / (to > from ? 75 : 45)); // labels are wider than tall
  const rough = (high - low) / most;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = unit * [1, 2, 5, 10].find((one) => one * unit >= rough);
  const linear = () => Array.from({ length: Math.floor(high / step) - Math.ceil(low / step) + 1 }, (_, n) => Number(((Math.ceil(low / step) + n) * step).toPrecision(12)));
  const decades = () => {
    const whole = Array.from({ length: Math.floor(high) - Math.floor(low) + 1 }, (_, n) => Math.floor(low) + n);
    const parts = whole.length <= most / 2 ? [1, 2, 5] : [1];
    const found = whole.flatMap((power) => parts.map((part) => part * 10 ** power));
    const every = Math.ceil(found.length / most);
    return found.filter((value, n) => at(value) >= low && at(value) <= high && n % every === 0).map((value) => Number(value.toPrecision(12)));
  };
  return { place, ticks: logarithmic ? decades() : linear() };
}

async function drawScatter() {
  const { turn, cell } = now;
  const keys = [byId("across").value, byId("up").value];
  const [x, y] = await Promise.all(keys.map((key) => shownScores(cell.name, key)));
  if (turn !== now.turn || keys[0] !== byId("across").value || keys[1] !== byId("up").value) return;
  const scores = keys.map((key) => facts.scores[key]);
  const usable = (value, score) => Number.isFinite(value) && (value > 0 || !score.logarithmic);
  const places = now.places.filter((place) => usable(x[place], scores[0]) && usable(y[place], scores[1]));
  const box = { width: scatter.clientWidth, height: scatter.clientHeight };
  const across = axisOf(places.map((place) => x[place]), scores[0].logarithmic, MARGIN.left, box.width - MARGIN.right);
  const up = axisOf(places.map((place) => y[place]), scores[1].logarithmic, box.height - MARGIN.bottom, MARGIN.top);
  Object.assign(plot, { places, titles: scores.map((one) => one.title), values: [x, y], pointed: null, kept: false });
  plot.x = places.map((place) => across.place(x[place]));
  plot.y = places.map((place) => up.place(y[place]));
  hidePeek();
  drawPoints(box);
  drawAxes(box, across, up);
  const without = now.places.length - places.length;
  byId("scatter-words").textContent = `${count(places.length)} neurons are shown${without ? `; ${count(without)} others have no value for one of the scores` : ""}.`;
}

function drawPoints({ width, height }) {
  const ratio = window.devicePixelRatio || 1;
  Object.assign(canvas, { width: Math.round(width * ratio), height: Math.round(height * ratio) });
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  pen.fillStyle = getComputedStyle(canvas).color;
  const n = plot.places.length;
  const [radius, alpha] = n <= 500 ? [4, 0.65] : n <= 5000 ? [3, 0.5] : [2, 0.3];
  pen.globalAlpha = alpha;
  for (let one = 0; one < n; one++) {
    pen.beginPath();
    pen.arc(plot.x[one], plot.y[one], radius, 0, 2 * Math.PI);
    pen.fill();
  }
}

function drawAxes({ width, height }, across, up) {
  const [left, right, top, bottom] = [MARGIN.left, width - MARGIN.right, MARGIN.top, height - MARGIN.bottom];
  const empty = plot.places.length === 0;
  const columns = (empty ? [] : across.ticks).map((value) => [across.place(value), value]);
  const rows = (empty ? [] : up.ticks).map((value) => [up.place(value), value]);
  const svg = element(
    "svg",
    { "aria-hidden": "true" },
    ...columns.flatMap(([at, value]) => [element("line", { x1: at, x2: at, y1: top, y2: bottom }), element("text", { x: at, y: bottom + 18, "text-anchor": "middle" }, plain(value))]),
    ...rows.flatMap(([at, value]) => [element("line", { x1: left, x2: right, y1: at, y2: at }), element("text", { x: left - 8, y: at + 4, "text-anchor": "end" }, plain(value))]),
    element("text", { x: (left + right) / 2, y: height - 12, "text-anchor": "middle", class: "axis" }, plot.titles[0]),
    element("text", { transform: `translate(16 ${(top + bottom) / 2}) rotate(-90)`, "text-anchor": "middle", class: "axis" }, plot.titles[1]),
    empty ? element("text", { x: (left + right) / 2, y: (top + bottom) / 2, "text-anchor": "middle" }, "No neuron passes the filter and has both scores.") : null,
    element("circle", { r: 7, visibility: "hidden" }),
  );
  scatter.querySelector("svg")?.remove();
  scatter.prepend(svg);
}

function nearest(x, y, within) {
  let [best, distance] = [null, within ** 2];
  for (let one = 0; one < plot.places.length; one++) {
    const apart = (plot.x[one] - x) ** 2 + (plot.y[one] - y) ** 2;
    if (apart <= distance) [best, distance] = [one, apart];
  }
  return best;
}

/** Shows the neuron of a point, and its images. */
function point(one) {
  plot.pointed = one;
  const ring = scatter.querySelector("circle");
  ring.setAttribute("visibility", one === null ? "hidden" : "visible");
  if (one === null) return hidePeek();
  ring.setAttribute("cx", plot.x[one]);
  ring.setAttribute("cy", plot.y[one]);
  const place = plot.places[one];
  const box = scatter.getBoundingClientRect();
  const [x, y] = [box.left + plot.x[one], box.top + plot.y[one]];
  const lines = plot.titles.map((title, axis) => [title, plain(plot.values[axis][place])]);
  return showPeek(place, { left: x - 10, right: x + 10, top: y - 10, bottom: y + 10 }, lines);
}

const follow = ({ clientX, clientY }) => {
  if (plot.kept) return;
  const box = scatter.getBoundingClientRect();
  const one = nearest(clientX - box.left, clientY - box.top, 24);
  if (one !== plot.pointed) return point(one);
};
const leave = ({ pointerType }) => !plot.kept && pointerType === "mouse" && point(null);
const keep = ({ clientX, clientY }) => {
  const box = scatter.getBoundingClientRect();
  const one = nearest(clientX - box.left, clientY - box.top, 24);
  plot.kept = one !== null;
  peek.classList.toggle("kept", plot.kept);
  return point(one);
};
const step = (event) => {
  const moves = { ArrowLeft: ["x", -1], ArrowRight: ["x", 1], ArrowDown: ["y", 1], ArrowUp: ["y", -1] };
  if (event.key === "Enter" && plot.pointed !== null) location.href = address(now.cell.name, now.index.neuron[plot.places[plot.pointed]]);
  if (event.key === "Escape") Object.assign(plot, { kept: false }), point(null);
  if (!(event.key in moves) || !plot.places.length) return;
  event.preventDefault();
  const [axis, by] = moves[event.key];
  const order = [...plot.places.keys()].sort((a, b) => plot[axis][a] - plot[axis][b] || a - b);
  const at = plot.pointed === null ? 0 : order.indexOf(plot.pointed) + by;
  plot.kept = true;
  peek.classList.add("kept");
  return point(order[Math.min(Math.max(at, 0), order.length - 1)]);
};
for (const [event, work] of Object.entries({ pointermove: follow, pointerleave: leave, click: keep, keydown: step })) {
  scatter.addEventListener(event, complaining(work));
}
scatter.addEventListener("blur", () => {
  if (peek.contains(document.activeElement)) return;
  plot.kept = false;
});

/** What scores of the name from the vocabulary are called beside a name that may be another. */
const OF_WORDS = { name_score: "soft_wpmi_score", name_margin: "soft_wpmi_margin" };

async function neuronFile() {
  const { cell, index } = now;
  const keys = keysOf(cell);
  const columns = await Promise.all(keys.map((key) => shownScores(cell.name, key)));
  const rows = now.places.map((place) => [index.neuron[place], conceptAt(place), ...namedAt(place), ...columns.map((one) => one[place])]);
  save(`neurons-${cell.name}`, [["neuron", "concept", "name", "name_method", ...keys.map((key) => OF_WORDS[key] ?? key)], ...rows]);
}

// A neuron at a glance

const peek = byId("peek");
let glance = 0;

function hidePeek() {
  glance++;
  peek.hidden = true;
  peek.classList.remove("kept");
}

/** Shows a neuron beside what is pointed at, given by its edges in the window. */
async function showPeek(place, beside, lines) {
  const turn = ++glance;
  const { cell, index } = now;
  const { images } = await details(cell.name, place);
  if (turn !== glance) return;
  const neuron = index.neuron[place];
  const [[name], concept] = [namedAt(place), conceptAt(place)];
  const row = ([title, value]) => [element("dt", {}, title), element("dd", {}, value)];
  peek.replaceChildren(
    element("p", {}, element("a", { href: address(cell.name, neuron) }, `Neuron ${neuron}`), name === null ? null : element("b", {}, ` ${name}`)),
    element("span", { class: "pictures", "aria-hidden": "true" }, ...images.slice(0, PEEK_IMAGES).map((image) => picture(image))),
    ...(concept === null ? [] : [element("p", { class: "quiet" }, `concept: ${concept}`)]),
    element("dl", {}, ...lines.flatMap(row)),
  );
  peek.hidden = false;
  const { offsetWidth: width, offsetHeight: height } = peek;
  const [wide, tall] = [document.documentElement.clientWidth, window.innerHeight];
  const left = beside.right + width + 8 <= wide ? beside.right + 4 : Math.max(8, beside.left - width - 4);
  const top = Math.min(Math.max(8, beside.top), Math.max(8, tall - height - 8));
  Object.assign(peek.style, { left: `${left}px`, top: `${top}px` });
  byId("pointed").textContent = `Neuron ${neuron}${name === null ? "" : `, ${name}`}: ${lines.map((line) => line.join(" ")).join(", ")}`;
}

/** Shows the neuron of a link that is pointed at. */
function glanceAt({ target }) {
  const link = target.closest?.("[data-place]");
  if (!link) return;
  const place = Number(link.dataset.place);
  return showPeek(place, link.getBoundingClientRect(), [["MS", score(now.index.ms[place])], ["fires on", percent(now.index.frequency[place])]]);
}

for (const event of ["pointerover", "focusin"]) document.addEventListener(event, complaining(glanceAt));
for (const event of ["pointerout", "focusout"]) document.addEventListener(event, ({ target }) => target.closest?.("[data-place]") && hidePeek());

// Names

const HOLDS = 0.8;
/** Columns that only some methods have, with their titles. */
const VERIFIED = { margin: "ahead of the next word", agreement: "top images called so", control_score: "score of a control name" };

async function showNames() {
  const { names, cell } = now;
  byId("no-names").hidden = names.length > 0;
  byId("with-names").hidden = names.length === 0;
  if (!names.length) return;
  offer(byId("method"), names.map(({ method }) => [method, methodTitle(method)]), names[0].method);
  const one = names.find(({ method }) => method === byId("method").value);
  byId("names-figures").textContent = one.control_score ? tried(one) : `${count(one.place.length)} of ${count(now.n)} neurons have a name from the vocabulary: ${count(one.words.length)} different ones.${byConcept(one)}`;
  Object.assign(listed, { names: 0, chosen: chosenNames(one) });
  byId("names-found").textContent = `${count(listed.chosen.length)} names pass.`;
  const more = Object.keys(VERIFIED).filter((key) => one[key]);
  const titles = ["neuron", "top images", "name", "score", ...more.map((key) => VERIFIED[key]), "images it rests on", "concept by labels", "is it"];
  const wordy = ["top images", "name", "concept by labels"];
  const head = titles.map((title) => element("th", { scope: "col", class: wordy.includes(title) ? "words" : null }, title));
  byId("names-table").replaceChildren(element("thead", {}, element("tr", {}, ...head)), element("tbody", {}));
  await moreNames();
}

/** How names hold that were tried on held-out images, and control names. */
function tried({ place, score, control_score }) {
  const known = (values) => values.filter((value) => !Number.isNaN(value));
  const holding = (values) => `${count(known(values).filter((value) => value >= HOLDS).length)} of ${count(known(values).length)}`;
  return `${count(place.length)} neurons have a name. Tried on held-out images, ${holding(score)} names hold (score of at least ${HOLDS}: that the name fits an image on which the neuron fires better than one on which it does not), and ${holding(control_score)} control names, which know nothing of the neuron.`;
}

function byConcept() {
  const { names_right, pure } = now.cell.counts;
  return byId("method").value !== "soft_wpmi" || names_right === null || names_right === undefined ? "" : ` Of the ${pure === null ? "" : `${count(pure)} `}neurons that stand for one concept (purity of at least 75 %), ${percent(names_right)} have its name.`;
}

/** The rows of names that pass, in order. */
function chosenNames(one) {
  const passing = new Uint8Array(now.n);
  for (const place of now.places) passing[place] = 1;
  const [fits, by, needle] = [byId("fits").value, byId("name-sort").value, text("name").toLowerCase()];
  const word = (row) => one.words[one.word[row]];
  const passes = (row) => passing[one.place[row]] && (fits === "" || one.fits[row] === Number(fits)) && word(row).toLowerCase().includes(needle);
  const key = (row) => (Number.isNaN(one.score[row]) ? Infinity : -one.score[row]);
  const order = { place: () => 0, score: (a, b) => key(a) - key(b) || 0, name: (a, b) => word(a).localeCompare(word(b)) }[by];
  return [...one.place.keys()].filter(passes).sort((a, b) => order(a, b) || a - b).map((row) => ({ one, row, place: one.place[row] }));
}

async function moreNames() {
  const { turn } = now;
  const { chosen } = listed;
  const part = chosen.slice(listed.names, listed.names + STEP.names);
  listed.names += part.length;
  byId("more-names").hidden = listed.names >= chosen.length;
  const rows = await Promise.all(part.map(nameRow));
  if (turn === now.turn && chosen === listed.chosen) byId("names-table").tBodies[0].append(...rows);
}

async function nameRow({ one, row, place }) {
  const neuron = now.index.neuron[place];
  const { images } = await details(now.cell.name, place);
  const cell = (label, shown, attributes = {}) => element("td", { "data-label": label, ...attributes }, shown);
  const said = { 1: "yes", 0: "no" }[one.fits[row]] ?? "–";
  return element(
    "tr",
    {},
    element("th", { scope: "row" }, element("a", { href: address(now.cell.name, neuron), "data-place": place }, `${neuron}`)),
    cell(null, element("span", { class: "pictures", "aria-hidden": "true" }, ...images.slice(0, 4).map((image) => picture(image))), { class: "tops" }),
    cell("name", element("b", {}, one.words[one.word[row]]), { class: "words" }),
    cell("score", plain(one.score[row])),
    ...Object.entries(VERIFIED).flatMap(([key, title]) => (one[key] ? [cell(title, plain(one[key][row]))] : [])),
    cell("images", one.n_images[row] > 0 ? count(one.n_images[row]) : "–"),
    cell("concept", conceptAt(place) ?? "–", { class: "words" }),
    cell("is it", element("b", {}, said), { class: { yes: "yes", no: "no" }[said] }),
  );
}

function nameFile() {
  const more = Object.keys(VERIFIED);
  const rows = listed.chosen.map(({ one, row, place }) => [
    ...[now.index.neuron[place], one.method, one.words[one.word[row]], one.score[row], ...more.map((key) => one[key]?.[row])],
    ...[one.n_images[row] > 0 ? one.n_images[row] : null, conceptAt(place), { 1: "yes", 0: "no" }[one.fits[row]]],
  ]);
  save(`names-${now.cell.name}`, [["neuron", "method", "name", "score", ...more, "n_images", "concept", "is_its_concept"], ...rows]);
}

// Hands

const refresh = complaining(filter);

form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("input", refresh);
form.addEventListener("change", ({ target }) => {
  if (target.name !== "cell") return;
  offerScores(cells.get(target.value));
  refresh();
});
form.addEventListener("reset", () => setTimeout(() => (offerScores(cells.get(form.elements.cell.value)), refresh())));
byId("concept-sort").addEventListener("change", showConcepts);
byId("more-concepts").addEventListener("click", () => ((listed.concepts += STEP.concepts), showConcepts()));
for (const id of ["across", "up"]) byId(id).addEventListener("change", complaining(drawScatter));
byId("swap").addEventListener("click", () => {
  const [across, up] = [byId("across"), byId("up")];
  [across.value, up.value] = [up.value, across.value];
  complaining(drawScatter)();
});
for (const id of ["method", "fits", "name-sort"]) byId(id).addEventListener("change", complaining(showNames));
byId("more-names").addEventListener("click", complaining(moreNames));
for (const [id, file] of Object.entries({ "concepts-csv": conceptFile, "neurons-csv": neuronFile, "names-csv": nameFile })) {
  byId(id).addEventListener("click", complaining(file));
}
addEventListener("themechange", complaining(drawScatter));
new ResizeObserver(() => now.cell && complaining(drawScatter)()).observe(scatter);
addEventListener("scroll", complaining(() => plot.kept && point(plot.pointed)), { passive: true });

offerScores(cells.get(form.elements.cell.value));
refresh();
