// What the model says about an image: bits by place and level, scores, nearest training images.

import { $, element } from "./page.js";

// The colours of a map from few bits to many (viridis, which keeps its order in grey).
const STOPS = ["#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39", "#fde725"];
const COLOURS = STOPS.map((stop) => [1, 3, 5].map((at) => parseInt(stop.slice(at, at + 2), 16)));

const SCORES = {
  likelihood: ["Likelihood", "few bits are a high likelihood"],
  typicality: ["Typicality", "distance from the mean likelihood"],
  complexity_corrected: ["Complexity-corrected", "bits beyond the better of PNG and WebP"],
};

function numbers(base64) {
  const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  return new Float32Array(bytes.buffer);
}

function colour(share) {
  const at = Math.min(Math.max(share, 0), 1) * (COLOURS.length - 1);
  const low = Math.min(Math.floor(at), COLOURS.length - 2);
  return COLOURS[low].map((value, i) => value + (COLOURS[low + 1][i] - value) * (at - low));
}

/** A map as a figure: a canvas with one pixel for each cell, and the cell under the pointer in words. */
function map(title, { size, values, loss }, unit) {
  const [height, width] = size;
  const cells = numbers(values);
  const low = cells.reduce((a, b) => Math.min(a, b)); // there may be too many for arguments
  const high = cells.reduce((a, b) => Math.max(a, b));
  const words = `${title}: ${loss.toFixed(3)} ${unit}, from ${low.toFixed(2)} to ${high.toFixed(2)}`;
  const canvas = element("canvas", { width, height, role: "img", "aria-label": words });
  const context = canvas.getContext("2d");
  const picture = context.createImageData(width, height);
  cells.forEach((cell, i) => {
    picture.data.set([...colour((cell - low) / (high - low || 1)), 255], 4 * i);
  });
  context.putImageData(picture, 0, 0);
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    const column = Math.floor(((event.clientX - box.left) / box.width) * width);
    const row = Math.floor(((event.clientY - box.top) / box.height) * height);
    const cell = cells[row * width + column];
    if (cell !== undefined) canvas.title = `row ${row}, column ${column}: ${cell.toFixed(3)} ${unit}`;
  });
  const scale = element("i");
  scale.style.setProperty("--stops", STOPS.join(", "));
  return element(
    "figure",
    { class: "map" },
    canvas,
    element("div", { class: "legend", "aria-hidden": "true" }, low.toFixed(2), scale, high.toFixed(2)),
    element("figcaption", {}, element("strong", {}, title), ` ${loss.toFixed(3)}`),
  );
}

/** Shows the answer of `facts`. */
export function show(facts, about) {
  $("#bits .figure").textContent = facts.loss.toFixed(3);
  const bound = about.exact ? "The exact value." : `It is ${about.bound}, from one draw of the noise.`;
  const likelihood = facts.scores.find((score) => score.name === "likelihood");
  const far = likelihood?.below > 0.99 ? " It is less likely than nearly all of them: here paths of flowtrain interpolate stop." : "";
  $("#bits-note").textContent = bound + far;
  const maps = [];
  const several = facts.levels.length > 1;
  if (facts.map) {
    maps.push(map(several ? "All levels" : "Each pixel", facts.map, about.unit));
    if (several) {
      for (const level of facts.levels) maps.push(map(level.name, level, about.unit));
    }
  } else {
    maps.push(element("p", { class: "missing" }, "There is no map: layers of this model mix all pixels."));
  }
  const rest = [];
  if (facts.noise) rest.push(`learned noise ${facts.noise.toFixed(3)}`);
  if (facts.class) {
    const { label, probability, loss } = facts.class;
    rest.push(`class ${label} (${percent(probability)} likely) ${loss.toFixed(3)}`);
  }
  if (facts.map) {
    const part = several ? "The levels" : "The mean of the map";
    const sum = rest.length
      ? `${part} and the parts without a place (${rest.join(", ")}) add up to the number above.`
      : several ? `${part} add up to the number above.` : `${part} is the number above.`;
    const cell = about.exact
      ? "A pixel has its bits given all pixels before it."
      : "A cell has the density of its latents, and the volume that layers gain or lose there.";
    maps.push(element("p", { class: "faint" }, `${sum} ${cell}`));
  }
  $("#maps").dataset.count = several ? facts.levels.length + 1 : 1;
  $("#maps").replaceChildren(...maps);
  $("#scores").replaceChildren(...facts.scores.map((each) => score(each)));
}

function percent(share) {
  return `${(100 * share).toFixed(share > 0.001 && share < 0.999 ? 1 : 0)}%`;
}

function score({ name, value, below, of, entropy }) {
  const [title, words] = SCORES[name];
  const marker = element("i");
  const known = below != null;
  if (known) marker.style.width = `${100 * below}%`;
  const bar = element("div", { class: "bar", "aria-hidden": "true" }, ...(known ? [marker] : []));
  const from = name === "typicality" && entropy != null ? ` (${entropy.toFixed(2)})` : "";
  const rank = known ? `; larger than that of ${percent(below)} of ${of} test images` : "";
  return element(
    "div",
    { class: "score" },
    element("div", { class: "name" }, element("span", {}, title), element("strong", {}, value.toFixed(3))),
    bar,
    element("small", {}, `${words}${from}${rank}`),
  );
}

/** Shows the answer of `neighbours`. */
export function showNearest({ images, distances, indices, compared }, by, pixelated) {
  $("#nearest").replaceChildren(
    ...images.map((url, i) =>
      element(
        "figure",
        {},
        element("img", { src: url, class: pixelated ? "pixels" : "", alt: `Training image ${indices[i]}, distance ${distances[i].toFixed(2)}` }),
        element("figcaption", {}, distances[i].toFixed(2)),
      ),
    ),
  );
  $("#nearest-note").textContent =
    by === "pixels"
      ? `Of all ${compared} training images. Distances are of pixels between 0 and 1.`
      : `Of ${compared} training images that are encoded. Distances are root mean squares of entries.`;
}
