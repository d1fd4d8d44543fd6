// The playground: one state, redrawn when it changes and kept in the URL, so that a link restores it.
"use strict";

const $ = (id) => document.getElementById(id);
const MODES = { set: "set to", add: "add", scale: "times", ablate: "ablate", balanced: "push by" };
const LINKED_IMAGE = 24000; // images with more characters are left out of links
const WHITE = white();
const FRESH = {
  image: WHITE, prompt: "What is shown in this image? Use exactly one word!", sae: null,
  features: [], error: "drop", isolate: false, temperature: 0, tokens: 32,
  rectangles: [], // where to edit: [left, top, right, bottom] in fractions of the image
  mask: "", // a picture as a data URL: what is painted in it is edited too
  when: null, // { index, above }: edit only where this feature is above so many times its maximum
};
const PAGE = 12; // features at a time
const MASK_SIDE = 96; // pixels of the longest side of a painted mask
const BRUSH = 0.1; // its radius, as a share of that side
let state = { ...FRESH };
let known = {}; // features of the selected SAE, by index
let running = null; // what stops the answer that is being written
let latest = null; // the last request for features
let seen = null; // the image as the encoder sees it, which heat maps lie on
let painted = null; // a canvas with what is painted on the image
let dragged = null; // where the pointer went down on the image
const pictures = new Map(); // address -> object URL

function white() {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 56;
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff";
  context.fillRect(0, 0, 56, 56);
  return canvas.toDataURL("image/png");
}

// --- the server ---------------------------------------------------------------------------------

async function call(path, options = {}) {
  const headers = { ...options.headers };
  if ($("key").value) headers.Authorization = `Bearer ${$("key").value}`;
  const response = await fetch(path.replace(/^\//, ""), { ...options, headers });
  if (response.ok) return response;
  if (response.status === 401) document.querySelector(".key").hidden = false;
  const body = await response.json().catch(() => null);
  throw new Error(body?.error?.message ?? `the server answered ${response.status}`);
}

async function json(path, body) {
  const options = body && { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  return (await call(path, options)).json();
}

const ofSae = (rest) => `/v1/saes/${encodeURIComponent(state.sae)}/features${rest}`;

async function tell(work) {
  $("problem").hidden = true;
  try {
    await work();
  } catch (error) {
    if (error.name === "AbortError") return;
    $("problem").textContent = error.message;
    $("problem").hidden = false;
  }
}

// --- asking -------------------------------------------------------------------------------------

function request(image) {
  const features = state.features.map(({ index, strength, mode }) => {
    if (mode === "ablate") return { index, mode };
    return { index, strength, mode, unit: mode === "scale" || mode === "balanced" ? "absolute" : "max" };
  });
  const steering = { sae: state.sae, features, error: state.error, isolate: state.isolate, types: ["DEFAULT", "STEERED"] };
  if (state.rectangles.length) steering.region = { rectangles: state.rectangles };
  if (state.mask) steering.region = { ...steering.region, mask: state.mask };
  if (state.when) steering.when = { ...state.when, unit: "max" };
  const content = [{ type: "image_url", image_url: { url: image } }, { type: "text", text: state.prompt }];
  return {
    messages: [{ role: "user", content }], steering, stream: true,
    temperature: state.temperature, max_tokens: state.tokens,
  };
}

async function ask() {
  running?.abort();
  const control = (running = new AbortController());
  const panels = { DEFAULT: $("default"), STEERED: $("steered") };
  for (const panel of Object.values(panels)) panel.textContent = "";
  $("stop").hidden = false;
  try {
    const response = await call("/v1/chat/completions", {
      method: "POST", signal: control.signal,
      headers: { "Content-Type": "application/json" }, body: JSON.stringify(request(state.image)),
    });
    for await (const event of events(response.body)) {
      if (event.error) throw new Error(event.error.message);
      for (const choice of event.choices) panels[choice.steering_type].textContent += choice.delta.content ?? "";
    }
  } finally {
    if (running === control) $("stop").hidden = true;
  }
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

// --- features -----------------------------------------------------------------------------------

async function loadSaes() {
  const { data } = await json("/v1/saes");
  $("sae").replaceChildren(...data.map((sae) => new Option(`${sae.id} (${sae.n_features.toLocaleString("en")} features)`, sae.id)));
  if (!data.some((sae) => sae.id === state.sae)) state.sae = data.at(-1).id;
  $("sae").value = state.sae;
}

async function search() {
  const text = $("search").value.trim();
  const page = (offset) => json(ofSae(`?limit=${PAGE}&offset=${offset}${text ? `&search=${encodeURIComponent(text)}` : ""}`));
  await showFound(page(0), ({ total }) => (text ? `${total} features, most similar to “${text}” first` : `${total} features, highest score first`), page);
}

async function inspect() {
  const answer = json("/v1/features/inspect", { image: state.image, sae: state.sae, limit: PAGE });
  await showFound(answer, () => "Active on this image, strongest first");
}

// `page` asks for the features from an offset on, if there may be more.
async function showFound(answer, headline, page = null) {
  latest = answer;
  const body = await answer.catch((error) => { if (latest === answer) throw error; });
  if (latest !== answer) return; // something else was asked for meanwhile
  const { data } = body;
  seen = body.image;
  const title = headline(body);
  for (const feature of data) known[feature.index] = feature;
  $("found-title").textContent = data.length ? title : `${title}: none`;
  $("found").replaceChildren(...data.map(card));
  offerMore(answer, page, body.total);
  showHeat(null);
  showCondition();
}

function offerMore(answer, page, total) {
  const shown = $("found").children.length;
  $("more").hidden = page === null || shown >= total;
  $("more").onclick = () => tell(async () => {
    const { data } = await page(shown);
    if (latest !== answer) return;
    for (const feature of data) known[feature.index] = feature;
    $("found").append(...data.map(card));
    $("found").children[shown].querySelector("button").focus();
    offerMore(answer, page, total);
    showCondition();
  });
}

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function thumbnails(feature, n) {
  const box = element("div", { className: "pictures" });
  for (let rank = 0; rank < Math.min(n, feature.n_images); rank++) {
    const image = element("img", { alt: "", loading: "lazy" });
    box.append(image);
    picture(ofSae(`/${feature.index}/images/${rank}`)).then((url) => (image.src = url), () => image.remove());
  }
  return box;
}

async function picture(path) {
  if (!pictures.has(path)) pictures.set(path, call(path).then((response) => response.blob()).then(URL.createObjectURL));
  return pictures.get(path);
}

const titleOf = (feature) => feature.name ?? `feature ${feature.index}`;
const namedBy = ({ name_method, name_score }) => name_method === null ? "" : `name by ${name_method}${name_score === null ? "" : ` (${name_score.toFixed(2)})`}`;
const factsOf = (feature) =>
  [`#${feature.index}`, namedBy(feature), feature.ms === null ? "" : `MS ${feature.ms.toFixed(2)}`, `fires on ${(100 * feature.frequency).toLocaleString("en", { maximumSignificantDigits: 2 })} %`]
    .filter(Boolean).join(" · ");

function card(feature) {
  const add = element("button", { type: "button", textContent: "Steer" });
  add.setAttribute("aria-label", `Steer with ${titleOf(feature)}, number ${feature.index}`);
  add.onclick = () => choose(feature.index);
  const buttons = element("div", { className: "buttons" }, add);
  if (feature.heat) {
    const where = element("button", { type: "button", textContent: "Where?" });
    where.setAttribute("aria-label", `Where ${titleOf(feature)}, number ${feature.index}, is active`);
    where.onclick = () => showHeat(feature.heat);
    buttons.append(where);
  }
  const facts = element("div", { className: "facts-line", textContent: factsOf(feature) });
  const pictures = thumbnails(feature, 4);
  if (feature.heat) pictures.prepend(element("div", { className: "seen" }, element("img", { alt: "", src: seen }), drawHeat(element("canvas"), feature.heat)));
  return element("li", {}, element("div", { className: "name", textContent: titleOf(feature) }), facts, pictures, buttons);
}

function choose(index) {
  if (!state.features.some((one) => one.index === index)) state.features.push({ index, strength: 4, mode: "set" });
  change();
  $("chosen").lastElementChild.querySelector("input").focus();
}

function editor(one) {
  const feature = known[one.index];
  const slider = element("input", { type: "range", min: -4, max: 12, step: 0.25, value: one.strength });
  slider.setAttribute("aria-label", `Strength of ${titleOf(feature)}`);
  const mode = element("select", {}, ...Object.entries(MODES).map(([value, text]) => new Option(text, value)));
  mode.value = one.mode;
  mode.setAttribute("aria-label", `Edit of ${titleOf(feature)}`);
  const shown = element("output");
  const show = () => {
    slider.hidden = shown.hidden = one.mode === "ablate";
    shown.textContent = { scale: `× ${one.strength}`, balanced: `${one.strength} × token` }[one.mode] ?? `${one.strength} × max`;
  };
  slider.oninput = () => { one.strength = Number(slider.value); show(); keep(); };
  mode.onchange = () => {
    one.mode = mode.value;
    if (one.mode === "balanced") { // of the token itself, whose length is far more than the feature's maximum
      [one.strength, state.error] = [1, "keep"];
      [slider.value, $("error").value] = [one.strength, state.error];
    }
    show();
    keep();
  };
  const remove = element("button", { type: "button", textContent: "Remove" });
  remove.setAttribute("aria-label", `Remove ${titleOf(feature)}`);
  remove.onclick = () => { state.features = state.features.filter((other) => other !== one); change(); };
  show();
  const head = element("div", {}, element("span", { className: "name", textContent: titleOf(feature) }), " ",
    element("span", { className: "facts-line", textContent: factsOf(feature) }));
  return element("li", {}, thumbnails(feature, 4), head, remove, element("div", { className: "line" }, mode, slider, shown));
}

function showHeat(heat) {
  const canvas = $("heat");
  canvas.hidden = heat === null;
  $("picture").src = heat === null ? state.image : seen;
  drawRegion();
  if (heat !== null) drawHeat(canvas, heat);
}

function drawHeat(canvas, heat) {
  canvas.height = heat.length;
  canvas.width = heat[0].length;
  const most = Math.max(...heat.flat()) || 1;
  const context = canvas.getContext("2d");
  heat.forEach((row, y) => row.forEach((value, x) => {
    context.fillStyle = `rgb(230 60 20 / ${Math.max(0, value) / most})`;
    context.fillRect(x, y, 1, 1);
  }));
  return canvas;
}

// --- where to edit ------------------------------------------------------------------------------

// The picture keeps its shape inside of the square frame.
function placeOfPicture() {
  const { naturalWidth, naturalHeight } = $("picture");
  const frame = $("region").getBoundingClientRect();
  const scale = Math.min(frame.width / naturalWidth, frame.height / naturalHeight);
  const [width, height] = [naturalWidth * scale, naturalHeight * scale];
  return { x: (frame.width - width) / 2, y: (frame.height - height) / 2, width, height, frame };
}

function pointed(event) {
  const { x, y, width, height, frame } = placeOfPicture();
  const share = (value) => Math.round(100 * Math.min(1, Math.max(0, value))) / 100;
  return [share((event.clientX - frame.x - x) / width), share((event.clientY - frame.y - y) / height)];
}

const between = ([x0, y0], [x1, y1]) => [Math.min(x0, x1), Math.min(y0, y1), Math.max(x0, x1), Math.max(y0, y1)];
const isRectangle = (one) =>
  Array.isArray(one) && one.length === 4 && one.every((value) => value >= 0 && value <= 1) && one[0] < one[2] && one[1] < one[3];

function drawRegion(rectangles = state.rectangles) {
  const canvas = $("region");
  const { x, y, width, height, frame } = placeOfPicture();
  [canvas.width, canvas.height] = [frame.width, frame.height];
  if (!$("heat").hidden || !width) return; // a heat map lies on what the encoder sees, which may be less
  const context = canvas.getContext("2d");
  context.fillStyle = context.strokeStyle = getComputedStyle(canvas).color;
  context.lineWidth = 2;
  if (painted) {
    context.drawImage(painted, x, y, width, height);
    context.globalCompositeOperation = "source-in";
    context.globalAlpha = 0.5;
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.globalCompositeOperation = "source-over";
  }
  for (const [left, top, right, bottom] of rectangles) {
    const box = [x + left * width, y + top * height, (right - left) * width, (bottom - top) * height];
    context.globalAlpha = 0.2;
    context.fillRect(...box);
    context.globalAlpha = 1;
    context.strokeRect(...box);
  }
}

function newMask(width, height) {
  const scale = MASK_SIDE / Math.max(width, height);
  const [columns, rows] = [width, height].map((side) => Math.max(1, Math.round(side * scale)));
  painted = element("canvas", { width: columns, height: rows });
  return painted.getContext("2d");
}

function paint(from, to) {
  const context = painted?.getContext("2d") ?? newMask($("picture").naturalWidth, $("picture").naturalHeight);
  const [[x0, y0], [x, y]] = [from, to].map(([x, y]) => [x * painted.width, y * painted.height]);
  context.fillStyle = context.strokeStyle = "#fff"; // what stays transparent is not edited
  context.lineWidth = 2 * BRUSH * MASK_SIDE;
  context.beginPath();
  context.moveTo(x0, y0);
  context.lineTo(x, y);
  context.stroke();
  context.beginPath();
  context.arc(x, y, BRUSH * MASK_SIDE, 0, 2 * Math.PI);
  context.fill();
}

async function restoreMask() {
  painted = null;
  if (!state.mask) return;
  const image = element("img", { src: state.mask });
  await image.decode().then(
    () => newMask(image.naturalWidth, image.naturalHeight).drawImage(image, 0, 0, painted.width, painted.height),
    () => (state.mask = ""),
  );
}

const painting = () => $("brush").getAttribute("aria-pressed") === "true";

function startDrag(event) {
  if (!$("heat").hidden) return showHeat(null); // back to the whole picture
  $("region").setPointerCapture(event.pointerId);
  dragged = pointed(event);
  drag(event);
}

function drag(event) {
  if (!dragged) return;
  const at = pointed(event);
  if (!painting()) return drawRegion([...state.rectangles, between(dragged, at)]);
  paint(dragged, at);
  dragged = at;
  drawRegion();
}

function finishDrag(event) {
  if (!dragged) return;
  const drawn = between(dragged, pointed(event));
  dragged = null;
  if (painting()) state.mask = painted.toDataURL("image/png");
  else if (isRectangle(drawn)) state.rectangles = [...state.rectangles, drawn];
  change();
}

function rectangleEditor(rectangle, place) {
  const sides = ["Left", "Top", "Right", "Bottom"].map((side, at) => {
    const input = element("input", { type: "number", min: 0, max: 100, value: Math.round(100 * rectangle[at]), required: true });
    input.setAttribute("aria-label", `${side} of rectangle ${place + 1} in % of the image`);
    input.oninput = () => {
      const next = state.rectangles[place].with(at, Number(input.value) / 100);
      input.setCustomValidity(isRectangle(next) ? "" : "Left must be less than right, and top less than bottom, from 0 to 100.");
      if (!input.checkValidity()) return;
      state.rectangles = state.rectangles.with(place, next);
      drawRegion();
      keep();
    };
    input.onchange = () => input.reportValidity();
    return element("label", {}, `${side} %`, input);
  });
  const remove = element("button", { type: "button", textContent: "Remove" });
  remove.setAttribute("aria-label", `Remove rectangle ${place + 1}`);
  remove.onclick = () => { state.rectangles = state.rectangles.toSpliced(place, 1); change(); };
  return element("li", {}, ...sides, remove);
}

function showCondition() {
  const features = Object.values(known).sort((one, other) => titleOf(one).localeCompare(titleOf(other)) || one.index - other.index);
  $("when").replaceChildren(new Option("(anywhere)", ""), ...features.map((one) => new Option(`${titleOf(one)} (#${one.index})`, one.index)));
  $("when").value = state.when?.index ?? "";
  $("above").value = state.when?.above ?? 0;
  $("above-label").hidden = state.when === null;
}

function showWhere() {
  $("rectangles").replaceChildren(...state.rectangles.map(rectangleEditor));
  const rest = [state.rectangles.length ? "the rectangles" : "", state.mask ? "what is painted" : ""].filter(Boolean);
  $("everywhere").textContent = rest.length ? `Only the part of the image in ${rest.join(" and ")}.` : "The whole image.";
  $("clear").hidden = !rest.length;
  showCondition();
  drawRegion();
}

function forgetRegion() {
  Object.assign(state, { rectangles: [], mask: "" });
  painted = null;
}

// --- state --------------------------------------------------------------------------------------

function keep() {
  const { image, ...rest } = state;
  if (image !== WHITE && image.length <= LINKED_IMAGE) rest.image = image;
  history.replaceState(null, "", `#${encodeURIComponent(JSON.stringify(rest))}`);
}

function restore() {
  try {
    const given = JSON.parse(decodeURIComponent(location.hash.slice(1)) || "{}");
    for (const name of Object.keys(FRESH)) if (typeof given[name] === typeof FRESH[name] || name === "sae") state[name] = given[name] ?? FRESH[name];
    if (!state.image.startsWith("data:image/")) state.image = WHITE;
    state.features = state.features.filter((one) => Number.isInteger(one?.index) && one.mode in MODES && Number.isFinite(one.strength));
    state.rectangles = state.rectangles.filter(isRectangle);
    if (!state.mask.startsWith("data:image/")) state.mask = "";
    if (!Number.isInteger(state.when?.index) || !(state.when.above >= 0)) state.when = null;
  } catch {
    state = { ...FRESH };
  }
}

function change() {
  showSettings();
  $("chosen").replaceChildren(...state.features.map(editor));
  $("none").hidden = state.features.length > 0;
  showWhere();
  keep();
}

function showSettings() {
  $("picture").src = state.image;
  for (const name of ["prompt", "temperature", "tokens", "error"]) $(name).value = state[name];
  $("isolate").checked = state.isolate;
}

async function learnChosen() {
  const missing = [...state.features, ...(state.when ? [state.when] : [])].filter((one) => !(one.index in known));
  const found = await Promise.allSettled(missing.map((one) => json(ofSae(`/${one.index}`))));
  for (const one of found) if (one.status === "fulfilled") known[one.value.index] = { ...one.value, n_images: one.value.images.length };
  state.features = state.features.filter((one) => one.index in known);
  if (!(state.when?.index in known)) state.when = null;
}

async function takeFile(file) {
  // Browsers do not know the types of all images that the server reads.
  if (file?.type === "") file = new Blob([file], { type: "image/unknown" });
  if (!file?.type.startsWith("image/")) throw new Error("not an image; choose a JPEG, PNG, WebP or other image file");
  takeImage(await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  }));
}

function takeImage(image) {
  state.image = image;
  forgetRegion();
  latest = null; // what was asked about the other image
  showHeat(null);
  change();
}

async function copy(text) {
  await navigator.clipboard.writeText(text);
  $("copied").textContent = "Copied.";
  setTimeout(() => ($("copied").textContent = ""), 2000);
}

const here = () => location.href.replace(/[^/]*(\?.*)?(#.*)?$/, "");
const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;
const key = () => Boolean($("key").value);

function asCurl() {
  const authorization = key() ? ` -H "Authorization: Bearer $SAE_RAY_API_KEY"` : "";
  return `curl -N ${here()}v1/chat/completions -H 'Content-Type: application/json'${authorization} -d ${quoted(JSON.stringify(request(state.image)))}`;
}

function asPython() {
  const { messages, steering, temperature, max_tokens } = request(state.image);
  const literal = (value) => JSON.stringify(JSON.stringify(value));
  return `import json${key() ? "\nimport os" : ""}

from openai import OpenAI

client = OpenAI(base_url=${JSON.stringify(`${here()}v1`)}, api_key=${key() ? `os.environ["SAE_RAY_API_KEY"]` : `"none"`})
answer = client.chat.completions.create(
    model=client.models.list().data[0].id,
    messages=json.loads(${literal(messages)}),
    temperature=${temperature},
    max_tokens=${max_tokens},
    extra_body={"steering": json.loads(${literal(steering)})},
)
for choice in answer.choices:
    print(choice.steering_type, choice.message.content)
`;
}

// --- events -------------------------------------------------------------------------------------

function listen() {
  const submit = (id, work) => ($(id).onsubmit = (event) => { event.preventDefault(); tell(work); });
  submit("ask", ask);
  submit("find", search);
  $("how").onsubmit = (event) => event.preventDefault();
  $("stop").onclick = () => { running?.abort(); $("stop").hidden = true; };
  $("blank").onclick = () => takeImage(WHITE);
  $("inspect").onclick = () => tell(inspect);
  $("file").onchange = () => tell(() => takeFile($("file").files[0]));
  $("curl").onclick = () => tell(() => copy(asCurl()));
  $("python").onclick = () => tell(() => copy(asPython()));
  $("link").onclick = () => tell(() => { keep(); return copy(location.href); });
  $("key").onchange = () => tell(start);
  $("sae").onchange = () => tell(() => { Object.assign(state, { sae: $("sae").value, features: [], when: null }); known = {}; change(); return search(); });
  $("prompt").oninput = () => { state.prompt = $("prompt").value; keep(); };
  $("prompt").onkeydown = (event) => { if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); $("ask").requestSubmit(); } };
  $("error").onchange = () => { state.error = $("error").value; keep(); };
  $("isolate").onchange = () => { state.isolate = $("isolate").checked; keep(); };
  for (const name of ["temperature", "tokens"]) $(name).oninput = () => { state[name] = Number($(name).value); keep(); };
  const canvas = $("region");
  canvas.onpointerdown = startDrag;
  canvas.onpointermove = drag;
  canvas.onpointerup = finishDrag;
  canvas.onpointercancel = () => { dragged = null; drawRegion(); };
  $("picture").onload = () => drawRegion();
  new ResizeObserver(() => drawRegion()).observe(canvas);
  $("add").onclick = () => {
    state.rectangles = [...state.rectangles, [0.25, 0.25, 0.75, 0.75]];
    change();
    $("rectangles").lastElementChild.querySelector("input").focus();
  };
  $("brush").onclick = () => $("brush").setAttribute("aria-pressed", String(!painting()));
  $("clear").onclick = () => { forgetRegion(); change(); };
  $("when").onchange = () => {
    const index = $("when").value;
    state.when = index ? { index: Number(index), above: state.when?.above ?? 0 } : null;
    showCondition();
    keep();
  };
  $("above").oninput = () => { if ($("above").reportValidity()) { state.when.above = Number($("above").value); keep(); } };
  const drop = $("drop");
  drop.ondragover = (event) => { event.preventDefault(); drop.classList.add("over"); };
  drop.ondragleave = () => drop.classList.remove("over");
  drop.ondrop = (event) => { event.preventDefault(); drop.classList.remove("over"); tell(() => takeFile(event.dataTransfer.files[0])); };
  document.onpaste = (event) => { if (event.clipboardData.files.length) tell(() => takeFile(event.clipboardData.files[0])); };
  window.onhashchange = () => tell(start);
}

async function start() {
  restore();
  known = {};
  latest = null;
  showSettings();
  await loadSaes();
  await learnChosen();
  await restoreMask();
  change();
  await search();
}

listen();
tell(start);
