"use strict";

// What all pages of the report share: their data, elements and pictures.
// A page opened from disk can load scripts but not fetch files, so each file of data/ is a script that calls `report`.

const facts = JSON.parse(document.getElementById("facts").textContent);
const arrived = new Map();

function load(name) {
  if (!arrived.has(name)) {
    const entry = {};
    entry.promise = new Promise((resolve, reject) => Object.assign(entry, { resolve, reject }));
    arrived.set(name, entry);
    const script = document.createElement("script");
    script.src = `data/${name.split("/").map(encodeURIComponent).join("/")}.js`;
    script.onload = () => script.remove();
    script.onerror = () => entry.reject(new Error(`${script.src} is missing; copy the report again, with all its files`));
    document.head.append(script);
  }
  return arrived.get(name).promise;
}

window.report = (name, value) => arrived.get(name).resolve(value);

function unpack(text, Type) {
  return new Type(Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer);
}

const cells = new Map(facts.cells.map((cell) => [cell.name, cell]));
const indices = new Map();

/** The numbers of the cell's neurons that fired at least once, best first. */
async function openIndex(cell) {
  if (!indices.has(cell)) {
    const packed = await load(`${cell}/index`);
    const types = { neuron: Int32Array, support: Int32Array, label: Int32Array };
    const columns = Object.entries(packed).map(([name, text]) => [name, unpack(text, types[name] ?? Float32Array)]);
    const index = Object.fromEntries(columns);
    index.place = new Map(Array.from(index.neuron, (neuron, place) => [neuron, place]));
    indices.set(cell, index);
  }
  return indices.get(cell);
}

const unpacked = new Map();

function once(name, packed, Type) {
  if (!unpacked.has(name)) unpacked.set(name, unpack(packed, Type));
  return unpacked.get(name);
}

/** The scores that neurons of a cell have, by their keys. */
const keysOf = (cell) => [...Object.keys(facts.scores).filter((key) => facts.scores[key].indexed), ...(cell.scores ?? [])];

/** A score of the cell's neurons, in the order of the index. One that was measured may be known of the first only. */
async function scoresOf(cell, key) {
  if (facts.scores[key].indexed) return (await openIndex(cell))[key];
  const name = `${cell}/scores/${key}`;
  return once(name, await load(name), Float32Array);
}

/** The chunk's values for the neuron at this place of the index. */
async function details(cell, place) {
  const chunk = await load(`${cell}/${Math.floor(place / facts.per_chunk)}`);
  const row = place % facts.per_chunk;
  return Object.fromEntries(Object.entries(chunk).map(([name, column]) => [name, column[row]]));
}

async function caption(image) {
  const perSprite = facts.thumbnail.side ** 2;
  const captions = await load(`images/${Math.floor(image / perSprite)}`);
  const [id, label] = captions[image % perSprite];
  return { id, label };
}

// Elements

function element(tag, attributes = {}, ...children) {
  const made = document.createElementNS(tag in SVG ? "http://www.w3.org/2000/svg" : "http://www.w3.org/1999/xhtml", tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const SVG = { svg: 1, rect: 1, line: 1, circle: 1, text: 1, title: 1, g: 1 };

const count = (value) => value.toLocaleString("en");
const plain = (value) => (value === null || Number.isNaN(value) ? "–" : Number(value.toPrecision(3)).toLocaleString("en", { maximumFractionDigits: 6 }));
const score = (value) => (Number.isNaN(value) ? "–" : value.toFixed(3));
const METHODS = { vlm: "LLaVA, from its top images", steering: "LLaVA, steered by it", soft_wpmi: "SoftWPMI", decoder_cosine: "decoder cosine" };
const methodTitle = (method) => METHODS[method] ?? method;
const percent = (share) => `${Number((100 * share).toPrecision(2))} %`;

function showPicture(target) {
  const { side } = facts.thumbnail;
  const [sprite, place] = [Math.floor(target.dataset.image / side ** 2), target.dataset.image % side ** 2];
  const [row, column] = [Math.floor(place / side), place % side];
  target.style.backgroundImage = `url("sprites/${sprite}.jpg")`;
  target.style.backgroundPosition = `${(100 * column) / (side - 1)}% ${(100 * row) / (side - 1)}%`;
}

// Pictures are loaded when they come near the viewport, so that a long page loads few sprites.
const watcher = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      if (!isIntersecting) continue;
      watcher.unobserve(target);
      showPicture(target);
    }
  },
  { rootMargin: "400px" },
);

/** An image by its number. Without a description it is decoration, hidden from screen readers. */
function picture(image, description = null, show = (made) => watcher.observe(made)) {
  const made = element("span", {
    class: image < facts.n_pictured ? "thumb" : "thumb none",
    "data-image": image,
    role: description === null ? null : "img",
    "aria-label": description,
    title: description,
    "aria-hidden": description === null ? "true" : null,
  });
  if (image < facts.n_pictured) show(made);
  return made;
}

for (const span of document.querySelectorAll("[data-image]")) {
  if (span.dataset.image < facts.n_pictured) watcher.observe(span);
}

/** The label of most top images, which may be cut off, and the share of them that has it, which never is. */
function labelled(index, place) {
  const label = index.label[place];
  if (label < 0) return null;
  const name = facts.labels[label];
  return element("span", { class: "label", title: name }, element("span", {}, name), element("span", {}, percent(index.share[place])));
}

const address = (cell, neuron, settings = "") => `${facts.home}#/neuron/${encodeURIComponent(cell)}/${neuron}${settings && `?${settings}`}`;

/** The first name, but for that of the decoder alone. */
const nameOf = ({ names }) => names.find(([method]) => method !== "decoder_cosine")?.[1] ?? null;

/** A neuron's card, but for what has to be loaded, which `complete` adds. `settings` are those of the gallery. */
function cardOf(cell, index, place, { note = null, settings = "" } = {}) {
  const neuron = index.neuron[place];
  return element(
    "a",
    { class: "card", href: address(cell, neuron, settings) },
    element("span", { class: "head" }, element("b", {}, `${neuron}`), element("span", {}, note ?? `MS ${score(index.ms[place])}`)),
    element("span", { class: "pictures", "aria-hidden": "true" }),
    element("span", { class: "foot" }, labelled(index, place)),
    element("span", { class: "foot" }, element("span", {}, `on ${percent(index.frequency[place])}`)),
  );
}

/** Adds the pictures and the name. `show` says when pictures are loaded. */
function complete(card, facets, n_images = Infinity, show = showPicture) {
  card.children[1].append(...facets.images.slice(0, n_images).map((image) => picture(image, null, show)));
  const name = nameOf(facets);
  if (name !== null) card.children[3].append(element("span", { class: "name", title: name }, name));
  return card;
}

async function card(cell, index, place, { n_images, ...rest } = {}) {
  return complete(cardOf(cell, index, place, rest), await details(cell, place), n_images, (made) => watcher.observe(made));
}
