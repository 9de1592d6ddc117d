// Small helpers for the page: elements, tabs, sliders, grids of images.

export const $ = (selector, within = document) => within.querySelector(selector);
export const $$ = (selector, within = document) => [...within.querySelectorAll(selector)];

/** An element with attributes and children. Text is never read as HTML. */
export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value === true) made.setAttribute(key, "");
    else if (value !== false && value != null) made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

/** A line about what happens, for everyone, also for who hears the page. */
export function say(text, bad = false) {
  const status = $("#status");
  status.textContent = text;
  status.classList.toggle("bad", bad);
}

/** Tabs that the arrow keys move between. */
export function tabs(list, chosen = () => {}) {
  const all = () => $$("[role=tab]", list).filter((each) => !each.hidden);
  const choose = (one, focus = true) => {
    for (const each of $$("[role=tab]", list)) {
      const on = each === one;
      each.setAttribute("aria-selected", on);
      each.tabIndex = on ? 0 : -1;
      $("#" + each.getAttribute("aria-controls")).hidden = !on;
    }
    if (focus) one.focus();
    chosen(one.getAttribute("aria-controls"));
  };
  list.addEventListener("click", (event) => {
    const one = event.target.closest("[role=tab]");
    if (one) choose(one);
  });
  list.addEventListener("keydown", (event) => {
    const here = all().indexOf(document.activeElement);
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (here < 0 || !step) return;
    event.preventDefault();
    choose(all()[(here + step + all().length) % all().length]);
  });
  return (id) => choose($(`[aria-controls=${id}]`, list), false);
}

/** Shows a command, which breaks between its words, and hides where there is none. */
export function command(box, text) {
  box.hidden = !text;
  const words = (text ?? "").split(" ").map((word) => element("span", {}, word));
  $("code", box).replaceChildren(...words.flatMap((word, i) => (i ? [" ", word] : [word])));
}

let sliders = 0;

/** A slider with its name and value. `moved` gets the value at each move. A double click resets. */
export function slider(name, { min, max, step, value }, moved) {
  sliders += 1;
  const id = `slider-${sliders}`;
  const input = element("input", { id, type: "range", min, max, step, value });
  const output = element("output", { for: id });
  const show = () => (output.textContent = Number(input.value).toFixed(2));
  const set = (to) => {
    input.value = to;
    show();
  };
  input.addEventListener("input", () => {
    show();
    moved(Number(input.value));
  });
  input.addEventListener("dblclick", () => {
    set(value);
    moved(Number(value));
  });
  show();
  const made = element("div", { class: "slider" }, element("label", { for: id }, name), input, output);
  made.set = set;
  return made;
}

/** A grid of images as buttons. The arrow keys move through it, and only one is in the tab order. */
export class Grid {
  constructor(box, chosen) {
    this.box = box;
    this.chosen = chosen;
    this.items = [];
    box.addEventListener("keydown", (event) => this.key(event));
  }

  /** Shows an image as item number `index`. `source` says what it is of, `words` in words. */
  put(index, url, source, words) {
    let item = this.items[index];
    if (!item) {
      const image = element("img", { alt: "" });
      const button = element("button", { type: "button", tabindex: index ? -1 : 0, "aria-pressed": "false" }, image);
      item = { image, button };
      button.addEventListener("click", () => this.chosen(item.source, item.image.src, item.words));
      button.addEventListener("focus", () => this.only(button));
      this.items[index] = item;
      this.box.append(button);
    }
    Object.assign(item, { source, words });
    item.image.src = url;
    item.image.alt = words;
    item.image.classList.toggle("pixels", pixelated);
  }

  /** Opens item number `index`, without a click. */
  open(index) {
    const { source, image, words } = this.items[index];
    this.chosen(source, image.src, words, false);
  }

  shorten(count) {
    for (const item of this.items.splice(count)) item.button.remove();
  }

  mark(source, other) {
    const [a, b] = [source, other].map((each) => each && JSON.stringify(each));
    for (const item of this.items) {
      const own = JSON.stringify(item.source);
      item.button.setAttribute("aria-pressed", own === a);
      item.button.classList.toggle("second", own === b);
    }
  }

  only(button) {
    for (const item of this.items) item.button.tabIndex = item.button === button ? 0 : -1;
  }

  key(event) {
    const here = this.items.findIndex((item) => item.button === document.activeElement);
    if (here < 0) return;
    const columns = getComputedStyle(this.box).gridTemplateColumns.split(" ").length;
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[event.key];
    const to = event.key === "Home" ? 0 : event.key === "End" ? this.items.length - 1 : here + step;
    if (!(to in this.items)) return;
    event.preventDefault();
    this.items[to].button.focus();
  }
}

let pixelated = true;

/** Small images show their pixels, large ones are smoothed. */
export function setShape([, height, width]) {
  pixelated = Math.max(height, width) <= 128;
  document.documentElement.style.setProperty("--ratio", `${width} / ${height}`);
  document.documentElement.dataset.images = Math.max(height, width) <= 64 ? "small" : "large";
  for (const image of $$("#shown, .ends img")) image.classList.toggle("pixels", pixelated);
}

/** Saves a file as the browser saves downloads. */
export function save(blob, name) {
  const url = URL.createObjectURL(blob);
  const link = element("a", { href: url, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}
