"use strict";

// The main page: the gallery, and the page of a neuron.

const PAGE = matchMedia("(max-width: 40rem)").matches ? 12 : 24;
const NEIGHBOUR_IMAGES = 4;

// The gallery

const form = document.getElementById("filters");
const gallery = document.getElementById("gallery");
const found = document.getElementById("found");
const more = document.getElementById("more");
const shown = { cell: null, places: [], n: 0, turn: 0 };

const levelOf = (cell, neuron) => cell.level_ends.findIndex((end) => neuron < end);

function chosen(cell, index) {
  const value = (name) => form.elements[name]?.value.trim() ?? "";
  const numbers = value("number").match(/\d+/g);
  const places = [...index.neuron.keys()];
  if (numbers) return places.filter((place) => numbers.includes(`${index.neuron[place]}`));
  const least = (name, otherwise) => (value(name) === "" ? otherwise : Number(value(name)));
  const [ms, support] = [least("ms", null), least("support", 0)];
  const [from, to] = [least("from", 0) / 100, least("to", 100) / 100];
  const passes = (place) =>
    (ms === null || index.ms[place] >= ms) &&
    index.support[place] >= support &&
    index.frequency[place] >= from &&
    index.frequency[place] <= to &&
    (value("level") === "" || levelOf(cell, index.neuron[place]) === Number(value("level"))) &&
    (value("label") === "" || index.label[place] === Number(value("label")));
  const sign = value("sort")[0] === "-" ? -1 : 1;
  const column = index[value("sort").slice(1)];
  const key = (place) => (Number.isNaN(column[place]) ? Infinity : sign * column[place]);
  return places.filter(passes).sort((a, b) => key(a) - key(b) || a - b);
}

async function showGallery() {
  const turn = ++shown.turn;
  const cell = cells.get(form.elements.cell.value);
  const index = await openIndex(cell.name);
  if (turn !== shown.turn) return;
  Object.assign(shown, { cell: cell.name, places: chosen(cell, index), n: 0 });
  const never = cell.n_neurons - index.neuron.length;
  const rest = never ? `; ${count(never)} of its ${count(cell.n_neurons)} neurons never fired` : "";
  found.textContent = `${count(shown.places.length)} neurons of ${cell.name}${rest}.`;
  gallery.replaceChildren();
  await showMore();
}

async function showMore() {
  const { turn, cell, places, n } = shown;
  const index = await openIndex(cell);
  const made = await Promise.all(places.slice(n, n + PAGE).map((place) => card(cell, index, place)));
  if (turn !== shown.turn || n !== shown.n) return;
  gallery.append(...made);
  shown.n += made.length;
  more.hidden = shown.n >= places.length;
  more.textContent = `Show more (${count(places.length - shown.n)} left)`;
}

function offerLevels() {
  const cell = cells.get(form.elements.cell.value);
  const ends = cell.level_ends;
  const options = ends.map((end, level) => element("option", { value: level }, `${level}: ${count(ends[level - 1] ?? 0)} – ${count(end - 1)}`));
  form.elements.level.replaceChildren(element("option", { value: "" }, "any"), ...options);
  document.getElementById("level-filter").hidden = ends.length < 2;
}

// The page of a neuron

const study = document.getElementById("study");
const page = document.getElementById("neuron");

async function showNeuron(cellName, neuron) {
  const cell = cells.get(cellName);
  const back = element("a", { href: `#/neurons/${encodeURIComponent(cellName)}` }, "← all neurons");
  const heading = element("h1", { tabindex: "-1" }, `Neuron ${neuron}`);
  const index = cell ? await openIndex(cellName) : null;
  const place = index?.place.get(neuron);
  if (place === undefined) {
    const text = cell && neuron < cell.n_neurons ? "This neuron never fired on these images." : `There is no such neuron in ${cellName}.`;
    return [element("p", { class: "trail" }, back), heading, element("p", {}, text)];
  }
  const facets = await details(cellName, place);
  const parts = [
    element("p", { class: "trail" }, back, ...(await around(cellName, index, place))),
    heading,
    element("p", { class: "lead" }, cellName),
    numbers(cell, index, place, facets),
    ...meant(cell, facets),
    element("h2", {}, "Activations"),
    histogram(facets.histogram, cell.n_images - facets.n_firing),
    element("h2", {}, "Top images"),
    await topImages(facets),
    ...(await heat(cell, neuron, facets)),
    ...(await neighbours(cellName, index, facets)),
    ...(await steered(cell, neuron)),
  ];
  return parts;
}

/** Links to the previous and next neuron: in the filtered gallery, or else in the order of MS. */
async function around(cell, index, place) {
  const inGallery = shown.cell === cell ? shown.places.indexOf(place) : -1;
  const [places, at] = inGallery >= 0 ? [shown.places, inGallery] : [[...index.neuron.keys()], place];
  const link = (offset, text) => {
    const other = places[at + offset];
    return other === undefined ? null : element("a", { href: address(cell, index.neuron[other]) }, text);
  };
  return [link(-1, "‹ previous"), link(1, "next ›")].filter((one) => one !== null);
}

function numbers(cell, index, place, facets) {
  const level = cell.level_ends.length > 1 ? levelOf(cell, index.neuron[place]) : null;
  const rows = [
    ["MonoSemanticity", score(index.ms[place])],
    ["images above its minimum", count(index.support[place])],
    ["fires on", `${percent(index.frequency[place])} (${count(facets.n_firing)} of ${count(cell.n_images)} images)`],
    ["mean", plain(facets.mean)],
    ["mean where it fires", plain(facets.mean_active)],
    ["maximum over images", plain(index.max[place])],
    ["maximum over tokens", plain(facets.max_token)],
    ["top images show", labelled(index, place)],
    ["Matryoshka level", level === null ? null : `${level} of 0 – ${cell.level_ends.length - 1}`],
  ];
  const kept = rows.filter(([, value]) => value !== null);
  return element("dl", { class: "facts" }, ...kept.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))));
}

/** What is known of its meaning: its names, its concept and every score. */
function meant(cell, { names, meaning }) {
  if (!names.length && !meaning) return [];
  const rows = names.map(([method, name, value]) => [`name by ${methodTitle(method)}`, `${name} (score ${plain(value)})`, null]);
  if (meaning?.concept) rows.push(["concept by labels", meaning.concept, null]);
  for (const [at, key] of (meaning ? cell.scores : []).entries()) rows.push([facts.scores[key].title, plain(meaning.scores[at]), facts.scores[key].words]);
  const shown = rows.map(([name, value, words]) => element("div", { title: words }, element("dt", {}, name), element("dd", {}, value)));
  const link = meaning ? element("p", {}, element("a", { href: "concepts.html#measures" }, "What the scores mean")) : null;
  return [element("h2", {}, "Concepts"), element("dl", { class: "facts" }, ...shown), ...(link ? [link] : [])];
}

function histogram(bins, n_silent) {
  if (!bins.length) return element("p", {}, "This neuron did not fire on held-out images.");
  const [first, ...counts] = bins;
  const [width, height, top, bottom] = [480, 200, 16, 40];
  const [most, step] = [Math.max(...counts), width / Math.max(counts.length, 8)];
  const edge = (bin) => plain(facts.histogram_edges[first + bin]);
  const bars = counts.map((n, bin) => {
    const tall = ((height - top - bottom) * n) / most;
    const box = { x: bin * step + 1, y: height - bottom - tall, width: step - 2, height: tall };
    const title = element("title", {}, `${edge(bin)} to ${edge(bin + 1)}: ${count(n)} images`);
    return element("g", {}, element("rect", box, title), n ? element("text", { x: (bin + 0.5) * step, y: box.y - 4, class: "n" }, count(n)) : null);
  });
  const every = Math.ceil(counts.length / 8);
  const ticks = [...Array(counts.length + 1).keys()].filter((bin) => bin % every === 0);
  const labels = ticks.map((bin) => element("text", { x: bin * step, y: height - bottom + 15, class: "tick" }, edge(bin)));
  const axis = element("line", { x1: 0, x2: width, y1: height - bottom, y2: height - bottom });
  const name = element("text", { x: width / 2, y: height - 4, class: "tick" }, "activation of an image");
  const words = `Histogram: ${counts.map((n, bin) => `${count(n)} images from ${edge(bin)} to ${edge(bin + 1)}`).join(", ")}.`;
  return element(
    "figure",
    { class: "histogram" },
    element("svg", { viewBox: `-20 0 ${width + 40} ${height}`, role: "img", "aria-label": words }, ...bars, axis, ...labels, name),
    element("figcaption", {}, `Inactive on the other ${count(n_silent)} held-out images.`),
  );
}

async function topImages({ images, activations }) {
  const captions = await Promise.all(images.map(caption));
  const tiles = images.map((image, rank) => {
    const { id, label } = captions[rank];
    const words = element("figcaption", { title: id }, element("b", {}, plain(activations[rank])), ` ${label ?? id}`);
    return element("figure", {}, picture(image, `Top image ${rank + 1}: ${id}${label === null ? "" : `, ${label}`}`), words);
  });
  return element("div", { class: "images" }, ...tiles);
}

async function heat(cell, neuron, { images }) {
  const heading = element("h2", {}, "Where it fires");
  if (cell.heat_none) return [heading, element("p", {}, cell.heat_none)];
  const { rows, columns, latents } = await load(`${cell.name}/heat`);
  const mine = latents[neuron];
  if (!mine) return [heading, element("p", {}, `Only the ${count(Object.keys(latents).length)} best neurons of this SAE have heat maps.`)];
  const caution = cell.heat_caution ? element("p", { class: "note" }, cell.heat_caution) : null;
  const legend = element("p", {}, `Value on each patch, from 0 (dark) to ${plain(mine.max)} (clear), the largest on these images. The largest value on each image is below it.`);
  const tiles = images.map((image, rank) => {
    const map = mine.maps[rank];
    if (map === null) return null;
    const values = unpack(map, Uint8Array);
    const canvas = element("canvas", { width: columns, height: rows });
    const pixels = new ImageData(columns, rows);
    values.forEach((value, patch) => (pixels.data[4 * patch + 3] = 190 * (1 - value / 255)));
    canvas.getContext("2d").putImageData(pixels, 0, 0);
    const largest = Math.max(...values);
    const strongest = values.indexOf(largest);
    const at = `strongest in row ${Math.floor(strongest / columns) + 1} of ${rows}, column ${(strongest % columns) + 1} of ${columns}`;
    const words = `Heat map ${rank + 1}: ${largest ? at : "inactive on every patch"}`;
    const overlay = element("span", { class: "heat", role: "img", "aria-label": words, title: words }, picture(image), canvas);
    return element("figure", {}, overlay, element("figcaption", {}, plain((largest / 255) * mine.max)));
  });
  return [heading, caution, legend, element("div", { class: "images" }, ...tiles.filter((tile) => tile))].filter((part) => part);
}

async function neighbours(cell, index, { near, cosine }) {
  if (!near?.length) return [];
  const places = near.map((neuron) => index.place.get(neuron));
  const cards = await Promise.all(places.map((place, rank) => card(cell, index, place, NEIGHBOUR_IMAGES, `cosine ${cosine[rank].toFixed(2)}`)));
  const words = "Neurons with the most similar decoder directions.";
  return [element("h2", {}, "Decoder neighbours"), element("p", {}, words), element("div", { class: "cards near" }, ...cards)];
}

/** The LLaVA's answers when this latent was edited, if it was. */
async function steered(cell, neuron) {
  if (!cell.steered) return [];
  const { examples, goals } = await load(`${cell.name}/steering`);
  const groups = examples[neuron];
  if (!groups) return [];
  const parts = [element("h2", {}, "Steering")];
  for (const { kind, title, right, n, images } of groups) {
    const rate = n > 1 ? `: ${right} of ${count(n)} ${goals[kind]}` : "";
    parts.push(element("h3", {}, title, element("span", { class: "quiet" }, rate)));
    parts.push(element("div", { class: "answers" }, ...images.map(answer)));
  }
  return parts;
}

function answer({ image, answers }) {
  const lines = answers.map(({ prompt, before, after, right }) =>
    element(
      "p",
      { class: right === null ? "" : right ? "yes" : "no" },
      element("span", { class: "small" }, prompt),
      before,
      " → ",
      element("b", {}, after),
    ),
  );
  const shown = image < 0 ? element("span", { class: "thumb white", role: "img", "aria-label": "white image" }) : picture(image, "held-out image");
  return element("div", { class: "answer" }, shown, element("div", {}, ...lines));
}

// Addresses: `#/neurons/<cell>`, `#/neuron/<cell>/<number>`, and the sections of the page

let visit = 0;

async function go() {
  const turn = ++visit;
  const [, kind, cell, number] = location.hash.split("/").map(decodeURIComponent);
  if (kind === "neuron") {
    const parts = await showNeuron(cell, Number(number)).catch((error) => [element("p", { class: "note" }, error.message)]);
    if (turn !== visit) return;
    page.replaceChildren(...parts);
    study.hidden = true;
    page.hidden = false;
    scrollTo(0, 0);
    page.querySelector("h1")?.focus({ preventScroll: true });
    document.title = `Neuron ${number} – ${facts.study}`;
    return;
  }
  const returning = study.hidden;
  study.hidden = false;
  page.hidden = true;
  document.title = `${facts.study} – sae-ray`;
  if (kind === "neurons") {
    if (form.elements.cell.value !== cell && cells.has(cell)) {
      form.elements.cell.value = cell;
      form.elements.cell.dispatchEvent(new Event("change", { bubbles: true }));
    }
    document.getElementById("neurons").scrollIntoView();
  } else if (returning && location.hash) {
    document.querySelector(location.hash)?.scrollIntoView();
  }
}

if (form) {
  const refresh = () => showGallery().catch((error) => (found.textContent = error.message));
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", refresh);
  form.addEventListener("change", (event) => {
    if (event.target.name !== "cell") return;
    offerLevels();
    refresh();
  });
  form.addEventListener("reset", () => setTimeout(() => (offerLevels(), refresh())));
  more.addEventListener("click", showMore);
  offerLevels();
  refresh();
}
addEventListener("hashchange", go);
go();
