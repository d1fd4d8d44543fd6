"use strict";

// The main page: which view an address opens, and keys.
//
// `#/neurons/<SAE>?<settings>`, `#/neuron/<SAE>/<number>?<settings>`, `#/compare/<SAE>/<number>/<SAE>/<number>`, where
// numbers may be left out, `#/image/<SAE>/<number>`, and the sections of the study. Settings are those of the gallery.

const study = document.getElementById("study");
const compare = document.getElementById("compare");
const page = document.getElementById("page");
const PLACES = { "": study, neurons: section, neuron: page, image: page, compare };

let visit = 0;
let last = { kind: null, neuron: null, scroll: 0 };

function parsed() {
  const [path, settings = ""] = location.hash.split("?");
  const [, kind = "", ...rest] = path.split("/").map(decodeURIComponent);
  return { kind: Object.hasOwn(PLACES, kind) ? kind : "", rest, settings: new URLSearchParams(settings).toString() };
}

function open(place) {
  for (const one of new Set(Object.values(PLACES))) if (one) one.hidden = one !== place;
}

async function go() {
  const turn = ++visit;
  const { kind, rest, settings } = parsed();
  const before = last;
  if (!section.hidden) before.scroll = scrollY;
  last = { kind, neuron: kind === "neuron" ? Number(rest[1]) : before.neuron, scroll: before.scroll };
  if (kind === "" || !form) return showStudy();
  const cell = cells.has(rest[0]) ? rest[0] : asked("cell");
  if (kind === "neurons") return showNeurons(cell, settings, before, turn);
  const work = {
    neuron: async () => (await setFilter(cell, settings), showNeuron(rest[0], Number(rest[1]))),
    image: () => showImage(rest[0], Number(rest[1])),
    compare: () => showCompared(rest),
  }[kind];
  const parts = await work().catch((error) => [element("p", { class: "note" }, error.message)]);
  if (turn !== visit) return;
  (kind === "compare" ? document.getElementById("compared") : page).replaceChildren(...parts);
  open(PLACES[kind]);
  if (kind !== "compare" || before.kind !== kind) {
    scrollTo(0, 0);
    PLACES[kind].querySelector("h1")?.focus({ preventScroll: true });
  }
  document.title = `${PLACES[kind].querySelector("h1")?.textContent ?? facts.study} – ${facts.study}`;
}

function showStudy() {
  const returning = study.hidden;
  open(study);
  document.title = `${facts.study} – sae-ray`;
  if (!returning) return;
  if (location.hash) document.getElementById(location.hash.slice(1))?.scrollIntoView();
  else scrollTo(0, 0);
}

/** The gallery; where the reader left it, if its settings are as before. */
async function showNeurons(cell, settings, before, turn) {
  const again = shown.cell === cell && shown.settings === settings;
  await setFilter(cell, settings).catch((error) => (found.textContent = error.message));
  if (turn !== visit) return;
  const opened = section.hidden;
  open(section);
  document.title = `Neurons – ${facts.study}`;
  if (!opened) return;
  list.show();
  scrollTo(0, again ? before.scroll : 0);
  const at = again && before.kind === "neuron" ? shown.places.findIndex((place) => shown.index.neuron[place] === before.neuron) : -1;
  if (at >= 0) focusCard(at);
  else section.querySelector("h1").focus({ preventScroll: true });
}

/** The neurons that a newcomer sees first. */
async function showBest() {
  const best = document.getElementById("best");
  const first = facts.first ?? facts.cells[0].name;
  const index = await openIndex(first);
  const places = [...bestOfClasses(index).values()];
  const seen = places.length ? places : Array.from(index.neuron.keys());
  best.append(...(await Promise.all(seen.slice(0, BEST).map((place) => card(first, index, place)))));
}

addEventListener("hashchange", go);
addEventListener("keydown", (event) => {
  if (page.hidden || event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea, summary")) return;
  const link = { ArrowLeft: "[rel=prev]", ArrowRight: "[rel=next]", Escape: ".trail a" }[event.key];
  if (link) page.querySelector(link)?.click();
});
compareForm?.addEventListener("submit", (event) => event.preventDefault());
compareForm?.addEventListener("change", ({ target }) => {
  if (target.type === "number" && target.value === "") for (const one of ["left", "right"]) compareForm.elements[`${one}-neuron`].value = "";
  location.hash = compareAddress(...sidesAsked().flat());
});
if (form) showBest().catch((error) => (found.textContent = error.message));
go();
