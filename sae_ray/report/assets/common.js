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

// Pictures are loaded when they come near the viewport, so that a long gallery loads few sprites.
const watcher = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      if (!isIntersecting) continue;
      watcher.unobserve(target);
      const { side } = facts.thumbnail;
      const [sprite, place] = [Math.floor(target.dataset.image / side ** 2), target.dataset.image % side ** 2];
      const [row, column] = [Math.floor(place / side), place % side];
      target.style.backgroundImage = `url("sprites/${sprite}.jpg")`;
      target.style.backgroundPosition = `${(100 * column) / (side - 1)}% ${(100 * row) / (side - 1)}%`;
    }
  },
  { rootMargin: "400px" },
);

/** An image by its number. Without a description it is decoration, hidden from screen readers. */
function picture(image, description = null) {
  const made = element("span", {
    class: image < facts.n_pictured ? "thumb" : "thumb none",
    "data-image": image,
    role: description === null ? null : "img",
    "aria-label": description,
    title: description,
    "aria-hidden": description === null ? "true" : null,
  });
  if (image < facts.n_pictured) watcher.observe(made);
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
  return element("span", { class: "label", title: name }, element("span", {}, name), element("span", {}, percent(index.purity[place])));
}

const address = (cell, neuron) => `${facts.home}#/neuron/${encodeURIComponent(cell)}/${neuron}`;

async function card(cell, index, place, n_images = Infinity, note = null) {
  const { images } = await details(cell, place);
  const neuron = index.neuron[place];
  const label = labelled(index, place);
  return element(
    "a",
    { class: "card", href: address(cell, neuron) },
    element("span", { class: "head" }, element("b", {}, `${neuron}`), element("span", {}, note ?? `MS ${score(index.ms[place])}`)),
    element("span", { class: "pictures", "aria-hidden": "true" }, ...images.slice(0, n_images).map((image) => picture(image))),
    element("span", { class: "foot" }, label ?? element("span"), element("span", {}, `on ${percent(index.frequency[place])}`)),
  );
}
