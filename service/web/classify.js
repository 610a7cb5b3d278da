// The images that were chosen, and what the models say of them. They outlive a change of view.
//
// add -> waiting -> asking, at most PARALLEL at a time -> answered | refused
//                   held, while the server is away or full; then asked again

import { Away, ready, Refused, request, sleep } from "./api.js";

const PARALLEL = 4; // requests under way: enough to fill a batch, and answers still come one by one
const COME_BACK = new Set(["queue_full", "not_ready", "draining"]);

export const shelf = Object.assign(new EventTarget(), {
  images: [], // {file, url, state, answers: [{model, version, result}], error, stages, ms}
  question: "", // the query of the requests
});

const changed = () => shelf.dispatchEvent(new Event("change"));
let underWay = 0;

export function add(files) {
  for (const file of files) shelf.images.push({ file, url: URL.createObjectURL(file), answers: [], state: "waiting" });
  pump();
}

export function remove(images) {
  images.forEach((image) => URL.revokeObjectURL(image.url));
  shelf.images = shelf.images.filter((image) => !images.includes(image));
  changed();
}

/** All images are asked again, unless this is what they were asked. */
export function ask(question) {
  if (question === shelf.question) return;
  shelf.question = question;
  shelf.images.forEach((image) => (image.state = "waiting"));
  pump();
}

function pump() {
  changed();
  if (!shelf.question) return;
  for (const image of shelf.images) {
    if (underWay >= PARALLEL) return;
    if (image.state === "waiting" && !image.busy) classify(image);
  }
}

async function classify(image) {
  underWay += 1;
  image.busy = true;
  const question = shelf.question;
  image.state = "asking";
  try {
    const answer = await patiently(image, question);
    if (question === shelf.question) Object.assign(image, answer, { state: "answered", error: null });
  } catch (error) {
    if (question === shelf.question) Object.assign(image, { state: "refused", answers: [], error: error.message });
  } finally {
    underWay -= 1;
    image.busy = false;
    pump();
  }
}

/** Throws Refused where it is no use to ask again. */
async function patiently(image, question) {
  for (;;) {
    try {
      return await once(image, question);
    } catch (error) {
      if (!(error instanceof Away || COME_BACK.has(error.code))) throw error;
      image.state = "held";
      changed();
      if (error instanceof Refused) await sleep(1000 * (error.retryAfter ?? 1));
      await ready();
      if (question !== shelf.question || !shelf.images.includes(image)) throw error;
      image.state = "asking";
    }
  }
}

async function once(image, question) {
  const began = performance.now();
  const headers = { "Content-Type": "application/octet-stream" };
  const response = await request(`predict?${question}`, { method: "POST", body: image.file, headers });
  const body = await response.json();
  const answers = (body.models ?? [body]).map(({ model, version, results: [result] }) => ({ model, version, result }));
  return { answers, stages: stagesOf(response.headers.get("Server-Timing")), ms: performance.now() - began };
}

/** `decode;dur=1.50, queue;dur=0.20` -> {decode: 1.5, queue: 0.2} */
function stagesOf(header) {
  return Object.fromEntries([...(header ?? "").matchAll(/(\w+);dur=([\d.]+)/g)].map(([, name, ms]) => [name, Number(ms)]));
}
