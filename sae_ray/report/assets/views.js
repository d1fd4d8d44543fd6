"use strict";

// What the views of neurons consist of: a neuron's own page, two side by side, and those of an image.

const NEIGHBOUR_IMAGES = 4;

/** What is known of a neuron, whatever shows it; null where there is none. */
async function knownOf(cellName, neuron) {
  const cell = cells.get(cellName);
  const index = cell ? await openIndex(cellName) : null;
  const place = index?.place.get(neuron);
  return place === undefined ? null : { cell, neuron, index, place, facets: await details(cellName, place) };
}

function whyUnknown(cellName, neuron) {
  const silent = neuron < (cells.get(cellName)?.n_neurons ?? 0);
  return silent ? "This neuron never fired on these images." : `There is no such neuron in ${cellName}.`;
}

async function showNeuron(cellName, neuron) {
  const back = element("a", { href: galleryAddress() }, "← all neurons");
  const heading = element("h1", { tabindex: "-1" }, `Neuron ${neuron}`);
  const one = await knownOf(cellName, neuron);
  if (one === null) return [element("p", { class: "trail" }, back), heading, element("p", {}, whyUnknown(cellName, neuron))];
  const name = nameOf(one.facets);
  const { cell, index, place, facets } = one;
  const meaning = meant(one);
  return [
    element("p", { class: "trail" }, back, ...around(place), element("a", { href: compareAddress(cellName, neuron) }, "compare")),
    heading,
    element("p", { class: "lead" }, name === null ? null : element("b", {}, `${name} · `), cellName),
    element("h2", {}, "Top images"),
    element("p", {}, "Open one to see which neurons fire most on it."),
    await topImages(one),
    ...(await heat(one)),
    element("h2", {}, "Activations"),
    facts_of(numbers(one)),
    histogram(facets.histogram, cell.n_images - facets.n_firing),
    ...(meaning.length ? [element("h2", {}, "Concepts"), facts_of(meaning)] : []),
    ...(facets.meaning ? [element("p", {}, element("a", { href: "concepts.html#measures" }, "What the scores mean"))] : []),
    ...(await neighbours(cellName, index, facets)),
    ...steerIt(one),
    ...(await steered(cell, neuron)),
  ];
}

/** Links to the previous and next neuron: of the gallery, or else in the order of MS. */
function around(place) {
  const inGallery = shown.places.indexOf(place);
  const [places, at] = inGallery >= 0 ? [shown.places, inGallery] : [Array.from(shown.index.neuron.keys()), place];
  const link = (offset, rel, text) => {
    const other = places[at + offset];
    return other === undefined ? null : element("a", { href: address(shown.cell, shown.index.neuron[other], shown.settings), rel, title: { prev: "Key: ←", next: "Key: →" }[rel] }, text);
  };
  return [link(-1, "prev", "‹ previous"), link(1, "next", "next ›")].filter((one) => one !== null);
}

const facts_of = (rows) =>
  element("dl", { class: "facts" }, ...rows.map(([name, value, words]) => element("div", { title: words }, element("dt", {}, name), element("dd", {}, value))));

/** Name and value of what was counted. */
function numbers({ cell, index, place, facets }) {
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
  return rows.filter(([, value]) => value !== null);
}

/** Name, value and meaning of what is known of its meaning: its names, its concept and every score. */
function meant({ cell, facets: { names, meaning } }) {
  const rows = names.map(([method, name, value]) => [`name by ${methodTitle(method)}`, `${name} (score ${plain(value)})`, null]);
  if (meaning?.concept) rows.push(["concept by labels", meaning.concept, null]);
  for (const [at, key] of (meaning ? cell.scores : []).entries()) rows.push([facts.scores[key].title, plain(meaning.scores[at]), facts.scores[key].words]);
  return rows;
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

async function topImages({ cell, neuron, facets: { images, activations } }) {
  const captions = await Promise.all(images.map(caption));
  const tiles = images.map((image, rank) => {
    const { id, label } = captions[rank];
    const words = element("figcaption", { title: id }, element("b", {}, plain(activations[rank])), ` ${label ?? id}`);
    const shownAs = picture(image, `Top image ${rank + 1}: ${id}${label === null ? "" : `, ${label}`}`);
    return element("figure", {}, element("a", { href: imageAddress(cell.name, image) }, shownAs), words);
  });
  return element("div", { class: "images" }, ...tiles);
}

// Heat maps

/** A neuron's value on each patch of an image, and the largest of them, in 255ths of its largest on all; null without a map. */
function mapOf(heats, neuron, rank) {
  const mine = heats?.latents[neuron];
  if (!mine || !mine.maps[rank]) return null;
  const values = unpack(mine.maps[rank], Uint8Array);
  const largest = Math.max(...values);
  return { values, largest, value: (largest / 255) * mine.max, rows: heats.rows, columns: heats.columns };
}

/** An image under a map: clear where the neuron is strong. */
function overlaid(image, { values, largest, rows, columns }, title) {
  const canvas = element("canvas", { width: columns, height: rows });
  const pixels = new ImageData(columns, rows);
  values.forEach((value, patch) => (pixels.data[4 * patch + 3] = 190 * (1 - value / 255)));
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  const strongest = values.indexOf(largest);
  const at = `strongest in row ${Math.floor(strongest / columns) + 1} of ${rows}, column ${(strongest % columns) + 1} of ${columns}`;
  const words = `${title}: ${largest ? at : "inactive on every patch"}`;
  return element("span", { class: "heat", role: "img", "aria-label": words, title: words }, picture(image), canvas);
}

async function heat({ cell, neuron, facets: { images } }) {
  const heading = element("h2", {}, "Where it fires");
  if (cell.heat_none) return [heading, element("p", {}, cell.heat_none)];
  const heats = await load(`${cell.name}/heat`);
  const mine = heats.latents[neuron];
  if (!mine) return [heading, element("p", {}, `Only the ${count(Object.keys(heats.latents).length)} best neurons of this SAE have heat maps.`)];
  const caution = cell.heat_caution ? element("p", { class: "note" }, cell.heat_caution) : null;
  const legend = element("p", {}, `Value on each patch, from 0 (dark) to ${plain(mine.max)} (clear), the largest on these images. The largest value on each image is below it.`);
  const tiles = images.flatMap((image, rank) => {
    const map = mapOf(heats, neuron, rank);
    if (map === null) return [];
    return [element("figure", {}, overlaid(image, map, `Heat map ${rank + 1}`), element("figcaption", {}, plain(map.value)))];
  });
  return [heading, caution, legend, element("div", { class: "images" }, ...tiles)].filter((part) => part);
}

async function neighbours(cell, index, { near, cosine }) {
  if (!near?.length) return [];
  const places = near.map((neuron) => index.place.get(neuron));
  const cards = await Promise.all(places.map((place, rank) => card(cell, index, place, { n_images: NEIGHBOUR_IMAGES, note: `cosine ${cosine[rank].toFixed(2)}` })));
  const words = "Neurons with the most similar decoder directions.";
  return [element("h2", {}, "Decoder neighbours"), element("p", {}, words), element("div", { class: "cards near" }, ...cards)];
}

// Steering

/** How to steer by a neuron, where its SAE is on the layer that the study's LLaVA reads. */
function steerIt({ cell, neuron }) {
  if (!cell.steering) return [];
  const command = (text) => element("p", {}, element("code", {}, text));
  return [
    element("h2", {}, "Steer by it"),
    element("p", {}, "Ask the LLaVA about an image, with this neuron at 4 times its largest value:"),
    command(`${cell.steering.ask} --latent ${neuron}=4x`),
    element("p", {}, `Or with a slider, in the playground of the server, where feature ${neuron} of ${cell.name} is this neuron:`),
    command(cell.steering.serve),
  ];
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

// Two side by side

const compareForm = document.getElementById("sides");
const compareAddress = (...sides) => `#/compare/${sides.map((one) => encodeURIComponent(one ?? "")).join("/")}`;
const CLASSES = 60;
const BEST = 12;

const sidesAsked = () => ["left", "right"].map((side) => [compareForm.elements[side].value, compareForm.elements[`${side}-neuron`].value.trim()]);

/** What an address compares: SAE and neuron of each side; a neuron that is not given is "". */
function sidesOf([left, leftNeuron = "", right, rightNeuron = ""]) {
  const first = cells.has(left) ? left : facts.first ?? facts.cells[0].name;
  const other = facts.cells.find(({ name }) => name !== first)?.name ?? first;
  return [[first, leftNeuron], [cells.has(right) ? right : leftNeuron === "" ? other : first, rightNeuron]];
}

async function showCompared(rest) {
  const sides = sidesOf(rest);
  const single = sides.findIndex(([, neuron]) => neuron === "");
  if (single >= 0 && sides[1 - single][1] !== "") sides[single][1] = `${await counterpart(sides[1 - single], sides[single][0])}`;
  for (const [at, side] of ["left", "right"].entries()) {
    [compareForm.elements[side].value, compareForm.elements[`${side}-neuron`].value] = sides[at];
  }
  return sides[0][1] === "" ? comparedSaes(sides.map(([name]) => name)) : comparedNeurons(sides);
}

/** The neuron of another SAE, or another one of the same, whose top images show the same class most purely; else the best. */
async function counterpart([cell, neuron], other) {
  const [index, there] = [await openIndex(cell), await openIndex(other)];
  const label = index.label[index.place.get(Number(neuron))];
  const allowed = (place) => cell !== other || there.neuron[place] !== Number(neuron);
  const same = Array.from(there.neuron.keys()).filter((place) => there.label[place] === label && allowed(place));
  return there.neuron[same.sort((a, b) => there.share[b] - there.share[a] || a - b)[0] ?? 0];
}

async function comparedNeurons(sides) {
  const both = await Promise.all(sides.map(([cell, neuron]) => knownOf(cell, Number(neuron))));
  const missing = both.indexOf(null);
  if (missing >= 0) return [element("p", {}, whyUnknown(sides[missing][0], Number(sides[missing][1])))];
  const [left, right] = both;
  const common = left.facets.images.filter((image) => right.facets.images.includes(image)).length;
  const titles = both.map(({ cell, neuron }) => element("a", { href: address(cell.name, neuron) }, `${neuron} of ${cell.name}`));
  const columns = await Promise.all(both.map(async (one) => element("div", {}, element("h2", {}, `Neuron ${one.neuron}`), await topImages(one), ...(await heat(one)), element("h2", {}, "Activations"), histogram(one.facets.histogram, one.cell.n_images - one.facets.n_firing))));
  return [
    element("p", {}, `${common} of ${Math.max(left.facets.images.length, right.facets.images.length)} top images are the same.`),
    element("div", { class: "pair" }, ...columns),
    sideBySide("neuron", titles, both.map((one) => [...numbers(one), ...meant(one)])),
  ];
}

async function comparedSaes(names) {
  const titles = names.map((name) => element("a", { href: `#/neurons/${encodeURIComponent(name)}` }, name));
  const figures = names.map((name) => {
    const row = [...document.querySelectorAll("#grid tbody tr")].find(({ cells }) => cells[0].textContent.trim() === name);
    return [...(row?.cells ?? [])].slice(1).map((one) => [one.dataset.label, one.textContent]);
  });
  const sides = await Promise.all(names.map(async (name) => ({ name, index: await openIndex(name) })));
  const classes = commonClasses(sides);
  const slot = async ({ name, index }, place) => (place === undefined ? element("p", { class: "quiet" }, "no neuron") : card(name, index, place));
  const rows = classes.length
    ? classes.slice(0, CLASSES).map(({ label, best }) => [facts.labels[label], best])
    : Array.from({ length: BEST }, (_, rank) => [`${rank + 1}`, sides.map(({ index }) => (rank < index.neuron.length ? rank : undefined))]);
  const made = rows.map(async ([title, best]) => [element("h3", {}, title), ...(await Promise.all(best.map((place, side) => slot(sides[side], place))))]);
  const rest = classes.length > CLASSES ? ` ${CLASSES} of ${count(classes.length)} classes are shown.` : "";
  const words = classes.length ? `For each class, the neuron with the highest MS of those of whose top images at least 75 % show it.${rest}` : "The neurons with the highest MS.";
  return [sideBySide("SAE", titles, figures), element("h2", {}, "Their best neurons"), element("p", {}, words), element("div", { class: "versus" }, ...(await Promise.all(made)).flat())];
}

/** The classes that neurons stand for, without ignored ones, each with the place of the best neuron of each side. */
function commonClasses(sides) {
  const best = sides.map(({ index }) => bestOfClasses(index));
  const labels = new Set(best.flatMap((one) => [...one.keys()]));
  const byName = (a, b) => facts.labels[a].localeCompare(facts.labels[b]);
  return [...labels].sort(byName).map((label) => ({ label, best: best.map((one) => one.get(label)) }));
}

const PURE = 0.75;

/** Class -> the place of the neuron with the highest MS of those whose top images nearly all show it; without ignored ones. */
function bestOfClasses(index) {
  const least = Number(form.elements.support.defaultValue);
  const stands = (place) => index.label[place] >= 0 && index.share[place] >= PURE && index.support[place] >= least;
  const found = new Map();
  for (let place = 0; place < index.label.length; place++) {
    const label = index.label[place];
    if (!found.has(label) && stands(place) && !facts.ignored.includes(label)) found.set(label, place);
  }
  return found;
}

function sideBySide(what, titles, sides) {
  const names = [...new Set(sides.flatMap((rows) => rows.map(([name]) => name)))];
  const head = element("tr", {}, element("th", { scope: "col" }, what), ...titles.map((title) => element("th", { scope: "col" }, title)));
  const rows = names.map((name) => element("tr", {}, element("th", { scope: "row" }, name), ...sides.map((rows) => element("td", {}, rows.find(([one]) => one === name)?.[1] ?? "–"))));
  return element("table", { class: "sides" }, element("thead", {}, head), element("tbody", {}, ...rows));
}

// The neurons of an image

const imageAddress = (cell, image) => `#/image/${encodeURIComponent(cell)}/${image}`;
const ON_IMAGE = 48;

async function showImage(cellName, image) {
  const cell = cells.get(cellName);
  const perSprite = facts.thumbnail.side ** 2;
  const fires = cell ? (await load(`${cellName}/images/${Math.floor(image / perSprite)}`))[image % perSprite] : null;
  if (!fires) return [element("h1", { tabindex: "-1" }, "Image"), element("p", {}, `There is no such image of ${cellName}.`)];
  const [{ id, label }, index] = await Promise.all([caption(image), openIndex(cellName)]);
  const heats = cell.heat_none ? null : await load(`${cellName}/heat`);
  const cards = await Promise.all(
    fires.slice(0, ON_IMAGE).map(async ([place, rank]) => {
      const made = await card(cellName, index, place, { n_images: NEIGHBOUR_IMAGES, note: `top image ${rank + 1}` });
      const map = mapOf(heats, index.neuron[place], rank);
      if (map !== null) made.children[1].before(overlaid(image, map, "Heat map"));
      return made;
    }),
  );
  const others = facts.cells.filter(({ name }) => name !== cellName).map(({ name }) => element("a", { href: imageAddress(name, image) }, name));
  const rest = fires.length > ON_IMAGE ? ` ${ON_IMAGE} of ${count(fires.length)} are shown.` : "";
  return [
    element("p", { class: "trail" }, element("a", { href: galleryAddress() }, "← all neurons")),
    element("h1", { tabindex: "-1" }, label ?? "Image"),
    element("p", { class: "lead" }, id),
    element("div", { class: "one" }, picture(image, id)),
    element("h2", {}, "Neurons that fire most on it"),
    element("p", {}, `Neurons of ${cellName} that have it among their top images, the highest rank first.${rest}${heats ? " A heat map shows where on it they fire." : ""}`),
    cards.length ? element("div", { class: "cards" }, ...cards) : element("p", {}, "There are none."),
    element("details", {}, element("summary", {}, "Of other SAEs"), element("ul", {}, ...others.map((one) => element("li", {}, one)))),
  ];
}
