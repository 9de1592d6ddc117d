// Requests to the server, of which only the newest of a topic counts.

const tab = crypto.getRandomValues(new Uint32Array(3)).reduce((text, n) => text + n.toString(36).padStart(7, "0"), "");
let turn = 0;

/** A newer request made this one useless. */
export class Superseded extends Error {}

async function send(path, body, type) {
  let answer;
  const posted = { method: "POST", body, headers: { "Content-Type": type } };
  try {
    answer = await fetch(path, body === undefined ? {} : posted);
  } catch {
    throw new Error("flowtrain explore does not answer: was it ended?");
  }
  if (answer.ok) return answer;
  const { error } = await answer.json().catch(() => ({ error: answer.statusText }));
  throw answer.status === 409 ? new Superseded(error) : new Error(error);
}

/** The JSON answer to a question. */
export async function ask(topic, fields) {
  return (await request(topic, fields)).json();
}

/** A file that the server makes. */
export async function file(topic, fields) {
  return (await request(topic, fields)).blob();
}

function request(topic, fields) {
  turn += 1;
  return send(`api/${topic}`, JSON.stringify({ tab, turn, ...fields }), "application/json");
}

/** What the server says about an image file. */
export async function upload(blob) {
  return (await send("api/upload", blob, "application/octet-stream")).json();
}

/** What the server says of the model. */
export async function model() {
  return (await send("api/model")).json();
}

/** Lets the server download or decode the data. */
export async function getData() {
  return (await send("api/data", "", "application/json")).json();
}

const PATIENCE = 500; // ms after which a request makes way for a newer one

/**
 * Runs `run` for the newest value. While it runs, newer values wait, so that every move of a slider
 * that is quick enough is seen. One that takes long is overtaken: the server then drops it.
 */
export class Latest {
  constructor(run) {
    this.run = run;
    this.number = 0;
    this.running = 0;
  }

  push(value) {
    this.waiting = { value };
    clearTimeout(this.timer);
    const left = this.running ? this.began + PATIENCE - performance.now() : 0;
    if (left > 0) this.timer = setTimeout(() => this.next(), left);
    else this.next();
  }

  async next() {
    if (!this.waiting) return;
    const { value } = this.waiting;
    this.waiting = null;
    this.number += 1;
    const mine = this.number;
    this.running += 1;
    this.began = performance.now();
    try {
      await this.run(value, () => mine === this.number);
    } finally {
      this.running -= 1;
      if (mine === this.number) this.next();
    }
  }
}
