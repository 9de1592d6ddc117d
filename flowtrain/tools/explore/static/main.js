// The page: images to choose from, the image that is open, and what is done to it.

import { ask, file, getData, Latest, model, Superseded, upload } from "./api.js";
import * as facts from "./facts.js";
import { $, $$, command, element, Grid, save, say, setShape, slider, tabs } from "./page.js";

const FIRST = 4; // samples of the first request, so that something is soon there
const SETTLED = 250; // ms after the last move, when facts are asked for
const CHUNK = 300; // ms that a request for samples should take

let about; // what the server says about the model
let target = "source"; // what a click on an image chooses
const place = { source: null, other: null, way: 0, from_other: [], to_class: null, principal: {}, attributes: {} };
const ends = { source: {}, other: {} }; // the two images that were chosen, by address and in words

/** The place as the server reads it. */
function asked() {
  const principal = Object.entries(place.principal)
    .filter(([, amount]) => amount)
    .map(([key, amount]) => ({ level: +key.split(".")[0], component: +key.split(".")[1], amount }));
  const attributes = Object.entries(place.attributes)
    .filter(([, amount]) => amount)
    .map(([name, amount]) => ({ name, amount }));
  const mixed = place.from_other.some(Boolean);
  return {
    source: place.source,
    other: place.way > 0 || mixed ? place.other : null,
    way: place.way,
    from_other: mixed ? place.from_other : [],
    to_class: place.to_class?.amount ? place.to_class : null,
    principal,
    attributes,
  };
}

/** Runs something. Says how long that takes, if it takes long, and where it fails. */
async function trying(run, what) {
  const began = performance.now();
  const seconds = () => Math.round((performance.now() - began) / 1000);
  const timer = what && setInterval(() => say(`${what}: ${seconds()} s …`), 1000);
  try {
    const found = await run();
    if (what && $("#status").textContent.startsWith(what)) say("");
    return found;
  } catch (error) {
    if (!(error instanceof Superseded)) say(error.message, true);
    return null;
  } finally {
    clearInterval(timer);
  }
}

// --- the image that is open ------------------------------------------------------------------------

let settled;

/** Shows an image. What the model says about it is asked for after it, since a newer image ends that. */
const moves = new Latest(async (wanted, newest) => {
  const began = performance.now();
  clearTimeout(settled);
  $("#shown").classList.add("waiting");
  const answer = await trying(() => ask("show", { place: wanted }), "The image is computed");
  if (!answer || !newest()) return;
  if ($("#status").classList.contains("bad")) say(""); // of an earlier image
  const shown = $("#shown");
  shown.src = answer.image;
  shown.alt = described(wanted);
  shown.classList.remove("waiting");
  command($("#image-command"), answer.command);
  $("#caption").textContent = `${shown.alt} · ${Math.round(performance.now() - began)} ms`;
  settled = setTimeout(() => askFacts(wanted), SETTLED);
});

/** The image at a place in words. */
function described(wanted) {
  const { source, other } = ends;
  const parts = [source.words];
  if (wanted.way > 0) parts.push(`${Math.round(100 * wanted.way)}% of the way to ${other.words}`);
  if (wanted.from_other.length) parts.push(`with levels of ${other.words}`);
  if (wanted.to_class) parts.push(`towards class ${wanted.to_class.label}`);
  if (wanted.principal.length || wanted.attributes.length) parts.push("changed");
  return parts.join(", ");
}

/** Shows the image at the place, and a little later what the model says about it. */
function move() {
  if (!place.source) return;
  moves.push(asked());
  try {
    sessionStorage.setItem("kept", JSON.stringify({ model: about.model, place, ends }));
  } catch { // two large images may not fit
    sessionStorage.removeItem("kept");
  }
}

/** Opens the image from before a reload, with its edits, unless the model has other levels now. */
function restore() {
  const kept = JSON.parse(sessionStorage.getItem("kept"));
  if (kept?.model !== about.model || kept.place.from_other.length !== about.levels.length) return;
  Object.assign(place, kept.place);
  Object.assign(ends, kept.ends);
  for (const end of ["source", "other"]) showEnd(end);
  reflect();
}

async function askFacts(wanted) {
  for (const part of [$("#bits"), $("#maps"), $("#scores"), $("#nearest")]) part.classList.add("waiting");
  const answer = await trying(() => ask("facts", { place: wanted }));
  if (!answer) return;
  facts.show(answer, about);
  for (const part of [$("#bits"), $("#maps"), $("#scores")]) part.classList.remove("waiting");
  document.body.dataset.facts = JSON.stringify(wanted); // for tests
  if (about.train) await askNearest(wanted);
  await askEnds(wanted);
}

/** Shows beside each slider of the open levels how its direction changes the image. */
async function askEnds(wanted) {
  const start = { ...wanted, principal: [] };
  const known = JSON.stringify(start);
  for (const level of $$("#principal details[open]")) {
    if (level.dataset.of === known) continue;
    const answer = await ask("ends", { place: start, level: Number(level.dataset.level) }).catch(() => null);
    if (!answer) return; // a newer image, or a place too far out
    level.dataset.of = known;
    const count = answer.images.length / 2;
    $$(".slider", level).forEach((each, i) => {
      const [back, forth] = $$("img", each);
      back.src = answer.images[i];
      forth.src = answer.images[count + i];
    });
  }
}

async function askNearest(wanted) {
  const by = $("#nearest-by input:checked").value;
  const answer = await trying(() => ask("neighbours", { place: wanted, by }));
  if (!answer) return;
  facts.showNearest(answer, by, $("#shown").classList.contains("pixels"));
  $("#nearest").classList.remove("waiting");
}

function choose(source, url, text, byHand = true) {
  place[target] = source;
  ends[target] = { url, words: text };
  showEnd(target);
  for (const grid of Object.values(grids)) grid.mark(place.source, place.other);
  if (target === "source") {
    reset();
    if (byHand && matchMedia("(max-width: 700px)").matches) $("#opened").scrollIntoView({ behavior: "smooth" });
  } else {
    setTarget("source");
    say("");
    enable();
    move();
  }
}

/** Shows one of the two images that were chosen, at once: the server sends the same. */
function showEnd(end) {
  const { url, words } = ends[end];
  if (!url) return;
  for (const image of $$(end === "source" ? "#shown, .end-source" : ".end-other")) {
    image.src = url;
    image.alt = words;
  }
}

/** Undoes all that was done to the image. */
function reset() {
  place.principal = {};
  place.attributes = {};
  place.to_class = null;
  place.way = 0;
  place.from_other = about.levels.map(() => false);
  reflect();
}

/** Sets the controls to the place, and shows it. */
function reflect() {
  for (const each of $$("#directions .slider")) each.set(each.amount());
  setOutput($("#way"), place.way);
  setOutput($("#class-amount"), place.to_class?.amount ?? 0);
  if (place.to_class) $("#to-class").value = place.to_class.label;
  place.from_other.forEach((other, i) => {
    $(`[name=mix-${i}][value=${other ? "other" : "source"}]`).checked = true;
  });
  enable();
  move();
}

function setOutput(input, value) {
  input.value = value;
  input.nextElementSibling.textContent = Number(value).toFixed(2);
}

function enable() {
  for (const button of $$("#reset, #save-png, #save-npz, #directions input, #class input, #class select")) {
    button.disabled = !place.source;
  }
  for (const each of $$("#way, #play, #mix-levels input, #save-gif")) {
    each.disabled = !place.source || !place.other;
  }
}

function setTarget(to) {
  target = to;
  $(`#target input[value=${to}]`).checked = true;
}

// --- where images come from -----------------------------------------------------------------------

const grids = {
  samples: new Grid($("#samples .grid"), choose),
  tests: new Grid($("#tests .grid"), choose),
  own: new Grid($("#own .grid"), choose),
};
const temperatures = [];
let samples = 0; // how many the grid shall show

const sampling = new Latest(async (wanted, newest) => {
  // A sequential flow takes as long for one as for all.
  let count = about.sequential ? wanted.count : Math.min(FIRST, wanted.count);
  let same = null; // the command that draws them
  for (let start = 0; start < wanted.count && newest(); ) {
    const began = performance.now();
    const fields = { seed: wanted.seed, temperatures: wanted.temperatures, label: wanted.label };
    const until = Math.min(start + count, wanted.count);
    const what = `Samples ${start + 1} to ${until} of ${wanted.count} are drawn`;
    const answer = await trying(() => ask("samples", { ...fields, start, count }), what);
    if (!answer || !newest()) return;
    answer.images.forEach((url, i) => {
      const source = { kind: "sample", ...fields, index: start + i };
      grids.samples.put(start + i, url, source, `Sample ${start + i} of seed ${wanted.seed}`);
    });
    grids.samples.mark(place.source, place.other);
    same = answer.command;
    start += count;
    const each = (performance.now() - began) / count;
    count = Math.max(1, Math.min(wanted.count - start, Math.round(CHUNK / each)));
  }
  grids.samples.shorten(wanted.count);
  command($("#samples-command"), same);
  if (!place.source) grids.samples.open(0); // so that no panel is empty
});

function sample() {
  const seed = Number($("#seed").value);
  if (!Number.isSafeInteger(seed) || seed < 0) {
    say("Seed: expected a whole number that is not negative", true);
    return;
  }
  say("");
  const label = $("#sample-class").value;
  sampling.push({ seed, temperatures: [...temperatures], label: label === "" ? null : Number(label), count: samples });
}

async function moreTests() {
  const start = grids.tests.items.length;
  const count = Math.min(36, about.test - start, about.largest_count);
  if (count <= 0) return;
  const answer = await trying(() => ask("tests", { start, count }));
  if (!answer) return;
  answer.images.forEach((url, i) => {
    grids.tests.put(start + i, url, { kind: "test", index: start + i }, `Test image ${start + i}`);
  });
  grids.tests.mark(place.source, place.other);
  $("#more-tests").hidden = start + count >= about.test;
}

async function take(files) {
  showPick("own");
  for (const each of files) {
    const line = element("li", {}, `${each.name}: …`);
    $("#said").append(line);
    if (each.size > about.largest_file) {
      line.textContent = `${each.name}: larger than ${Math.floor(about.largest_file / 2 ** 20)} MiB`;
      line.className = "bad";
      continue;
    }
    try {
      const { id, image, said } = await upload(each);
      line.textContent = `${each.name}: ${said}`;
      grids.own.put(grids.own.items.length, image, { kind: "upload", id }, each.name);
      choose({ kind: "upload", id }, image, each.name);
    } catch (error) {
      line.textContent = `${each.name}: ${error.message}`;
      line.className = "bad";
    }
  }
}

const showPick = tabs($("#pick [role=tablist]"), (panel) => {
  if (panel === "tests" && !grids.tests.items.length) moreTests();
});
tabs($("#opened [role=tablist]"));

// --- controls --------------------------------------------------------------------------------------

/** A reason as a sentence. */
function sentence(words) {
  return `${words[0].toUpperCase()}${words.slice(1)}.`;
}

/** The number of a level, and where it stands among the levels. */
function nameOf(level) {
  const count = about.levels.length;
  if (count === 1) return "Temperature";
  const where = level === 0 ? ", finest" : level === count - 1 ? ", coarsest" : "";
  return `Level ${level + 1}${where}`;
}

function buildTemperatures() {
  const box = $("#temperatures");
  about.levels.forEach((level, i) => {
    temperatures[i] = 1;
    const made = slider(nameOf(i), { min: 0, max: 1.5, step: 0.05, value: 1 }, (value) => {
      temperatures[i] = value;
      sample();
    });
    made.title = `Temperature of the ${level.entries} entries (${level.words})`;
    box.append(made);
  });
  if (about.levels.length > 1) box.prepend(element("p", { class: "faint" }, "Temperature of each level"));
}

function buildMix() {
  const box = $("#mix-levels");
  $("#tab-mix").hidden = about.levels.length === 1;
  about.levels.forEach((level, i) => {
    const choice = (value, text) =>
      element(
        "label",
        {},
        element("input", {
          type: "radio", name: `mix-${i}`, value, checked: value === "source",
          onchange: () => {
            place.from_other[i] = value === "other";
            move();
          },
        }),
        ` ${text}`,
      );
    box.append(
      element("fieldset", {}, element("legend", {}, `${nameOf(i)} (${level.words})`), choice("source", "the image"), choice("other", "the second")),
    );
  });
}

/** A slider for an edit of the latent, `place[kind][key]`. */
function editSlider(name, kind, key, farthest) {
  const made = slider(name, { min: -farthest, max: farthest, step: 0.05, value: 0 }, (value) => {
    place[kind][key] = value;
    move();
  });
  made.amount = () => place[kind][key] ?? 0;
  made.set(made.amount());
  return made;
}

function buildAttributes() {
  if (!about.attributes.length) return;
  const box = $("#attributes");
  box.append(element("h3", {}, "Attributes"), element("p", { class: "faint" }, "-1 to 1 is the way from images without to images with it"));
  for (const { name, accuracy } of about.attributes) {
    const made = editSlider(name, "attributes", name, 3);
    made.title = `It separates ${Math.round(100 * accuracy)}% of held-out images`;
    box.append(made);
  }
}

function buildDirections() {
  const missing = $("#directions .missing");
  missing.hidden = !about.data && about.principal.length > 0;
  missing.textContent = about.data
    ? sentence(about.data)
    : `Principal directions are computed: ${Math.floor(100 * about.progress)}% …`;
  if (!about.principal.length || $("#principal").children.length) return;
  for (let level = about.principal.length - 1; level >= 0; level -= 1) {
    const box = element("div", { class: "sliders" });
    for (let component = 0; component < about.principal[level]; component += 1) {
      const made = editSlider(`Direction ${component + 1}`, "principal", `${level}.${component}`, 4);
      made.classList.add("hinted");
      const end = () => element("img", { alt: "", class: $("#shown").classList.contains("pixels") && "pixels" });
      $("input", made).before(end());
      $("input", made).after(end());
      box.append(made);
    }
    const title = about.levels.length > 1 ? `Principal directions of level ${nameOf(level).slice(6)}` : "Principal directions";
    const hint = "in standard deviations of training images; the small pictures show this image at -3 and 3";
    box.prepend(element("p", { class: "faint" }, hint));
    const open = level === about.principal.length - 1;
    const ontoggle = () => place.source && askEnds(asked());
    $("#principal").append(element("details", { open, ontoggle, "data-level": level }, element("summary", {}, title), box));
  }
  enable();
}

function buildClasses() {
  for (const each of $$(".of-classes")) each.hidden = !about.classes;
  $("#tab-class").hidden = !about.moves_classes;
  const options = () => Array.from({ length: about.classes }, (_, k) => element("option", { value: k }, String(k)));
  $("#sample-class").append(element("option", { value: "" }, "all"), ...options());
  $("#to-class").append(...options());
}

function play() {
  const button = $("#play");
  const on = button.getAttribute("aria-pressed") !== "true";
  button.setAttribute("aria-pressed", on);
  button.textContent = on ? "Stop" : "Play";
  let step = 0.02;
  const next = () => {
    if (button.getAttribute("aria-pressed") !== "true") return;
    if (!moves.running) {
      if (place.way + step > 1 || place.way + step < 0) step = -step;
      place.way = Math.min(1, Math.max(0, place.way + step));
      setOutput($("#way"), place.way);
      move();
    }
    setTimeout(next, 60);
  };
  next();
}

async function download(topic, fields, name) {
  say("The file is made …");
  const blob = await trying(() => file(topic, fields));
  if (blob) {
    save(blob, name);
    say(`Saved ${name}`);
  }
}

function listen() {
  $("#target").addEventListener("change", (event) => (target = event.target.value));
  $("#seed").addEventListener("input", sample);
  $("#another").addEventListener("click", () => {
    $("#seed").value = Math.floor(Math.random() * 100000);
    sample();
  });
  $("#sample-class").addEventListener("change", sample);
  $("#more-samples").addEventListener("click", () => {
    samples = Math.min(2 * samples, about.largest_count);
    sample();
  });
  $("#more-tests").addEventListener("click", moreTests);
  for (const button of $$(".get-data")) {
    button.addEventListener("click", async () => (await trying(getData)) && refresh());
  }
  $("#files").addEventListener("change", (event) => take(event.target.files));
  $("#reset").addEventListener("click", reset);
  $("#way").addEventListener("input", (event) => {
    place.way = Number(event.target.value);
    setOutput(event.target, place.way);
    move();
  });
  $("#play").addEventListener("click", play);
  for (const button of $$(".choose-other")) {
    button.addEventListener("click", () => {
      setTarget("other");
      say("Choose the second image");
      $("#pick").scrollIntoView({ behavior: "smooth" });
    });
  }
  const toClass = () => {
    place.to_class = { label: Number($("#to-class").value), amount: Number($("#class-amount").value) };
    setOutput($("#class-amount"), place.to_class.amount);
    move();
  };
  $("#to-class").addEventListener("change", toClass);
  $("#class-amount").addEventListener("input", toClass);
  $("#nearest-by").addEventListener("change", () => place.source && askNearest(asked()));
  $("#save-png").addEventListener("click", () => download("png", { place: asked() }, "image.png"));
  $("#save-npz").addEventListener("click", () => download("latent", { place: asked() }, "latent.npz"));
  $("#save-gif").addEventListener("click", () =>
    download("gif", { place: { source: place.source, other: place.other }, steps: 24 }, "path.gif"),
  );
  for (const button of $$(".copy")) {
    button.hidden = !navigator.clipboard; // which plain HTTP from another machine lacks
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText($("code", button.parentElement).textContent);
      say("Copied");
    });
  }
  addEventListener("dragover", (event) => {
    event.preventDefault();
    document.body.classList.add("dropping");
  });
  addEventListener("dragleave", (event) => event.relatedTarget || document.body.classList.remove("dropping"));
  addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("dropping");
    if (event.dataTransfer.files.length) take(event.dataTransfer.files);
  });
}

/** What the server says of the model, again until all is computed. */
async function refresh() {
  const found = await trying(model);
  if (!found) return;
  about = found;
  buildDirections();
  $("#tests .missing").hidden = !about.data;
  $("#tests .missing").textContent = about.data ? sentence(about.data) : "";
  for (const button of $$(".get-data")) button.hidden = !about.waits;
  $("#more-tests").hidden = !about.test || grids.tests.items.length >= about.test;
  if (about.test && !grids.tests.items.length && !$("#tests").hidden) moreTests();
  const reading = about.data === "the data are being read";
  if (reading || about.progress < 1 - 1e-9) {
    if (reading || !about.data) setTimeout(refresh, 500);
  } else if (place.source) {
    askFacts(asked()); // with all test images
  }
}

async function start() {
  about = await trying(model);
  if (!about) return;
  const [channels, height, width] = about.shape;
  $("#model").textContent = about.model;
  $("#bits .unit").textContent = about.unit;
  document.title = `${about.model} · flowtrain explore`;
  const latents = about.levels.map((level) => level.words).join(", ");
  $("#about").textContent =
    `Images of ${about.dataset}: ${channels} x ${height} x ${width}, values 0 to ${about.grey - 1}. ` +
    `${about.parameters.toLocaleString("en")} parameters. Latent: ${latents}.` +
    (about.sequential ? " It samples one entry after the other, so moves take long." : "");
  setShape(about.shape);
  samples = Math.min(about.sequential ? 16 : 36, about.largest_count);
  buildTemperatures();
  buildMix();
  buildAttributes();
  buildClasses();
  listen();
  reset();
  restore();
  sample();
  await refresh();
}

start();
