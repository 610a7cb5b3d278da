// The one door to the server: the key, errors in the server's own words, and whether it answers at all.

const KEY = "imago.key"; // in sessionStorage alone: it goes with the tab
const LOOK_MS = 4000, LOOK_AWAY_MS = 1000; // how often the server is asked whether it is there
const RESUME_MS = 1000; // before a stream that broke off is taken up again

export class Refused extends Error {
  constructor(status, { code, message, param }, retryAfter) {
    super(message);
    Object.assign(this, { status, code, param, retryAfter: Number(retryAfter) || null });
  }
}

export class Away extends Error {
  constructor() {
    super("The server does not answer.");
  }
}

export const server = Object.assign(new EventTarget(), { state: "ready", reason: "" }); // or "starting", "away"

function become(state, reason = "") {
  if (state === server.state && reason === server.reason) return;
  Object.assign(server, { state, reason });
  server.dispatchEvent(new Event("change"));
}

export async function watchServer() {
  for (;;) {
    try {
      const answer = await fetch("health/ready");
      answer.ok ? become("ready") : become("starting", (await answer.json()).error.message);
    } catch {
      become("away");
    }
    await sleep(server.state === "ready" ? LOOK_MS : LOOK_AWAY_MS);
  }
}

/** Resolves when the server is ready. */
export function ready() {
  if (server.state === "ready") return Promise.resolve();
  return new Promise((resolve) => {
    const look = () => {
      if (server.state !== "ready") return;
      server.removeEventListener("change", look);
      resolve();
    };
    server.addEventListener("change", look);
  });
}

export const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

// The key

let ask = async () => null; // set by the page: a reason -> a key, or null
let asking = null;

export const onKeyWanted = (asker) => (ask = asker);
export const storedKey = () => sessionStorage.getItem(KEY);

async function askForKey(used, reason) {
  if (storedKey() !== used) return true; // another request has asked meanwhile
  asking ??= ask(reason).finally(() => (asking = null));
  const key = await asking;
  if (key) sessionStorage.setItem(KEY, key);
  return Boolean(key);
}

export function authorization() {
  const key = storedKey();
  return key ? { Authorization: `Bearer ${key}` } : {};
}

// Requests

/** A response that is good. Asks for a key where one is wanted, unless `quiet`. Throws Refused and Away. */
export async function request(path, { quiet = false, ...options } = {}) {
  for (;;) {
    const used = storedKey();
    const response = await reach(path, { ...options, headers: { ...options.headers, ...authorization() } });
    if (response.ok) return response;
    const error = await refusal(response.status, () => response.json(), response.headers.get("Retry-After"));
    const wantsKey = ["unauthorized", "forbidden"].includes(error.code);
    if (quiet || !wantsKey || !(await askForKey(used, error.message))) throw error;
  }
}

async function reach(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    become("away");
    throw new Away();
  }
}

async function refusal(status, body, retryAfter) {
  try {
    return new Refused(status, (await body()).error, retryAfter);
  } catch {
    return new Refused(status, { code: "unknown", message: `The server answered ${status}.` }, retryAfter);
  }
}

/** `method path` with a JSON body -> the JSON answer, or null where there is none. */
export async function send(method, path, body, options = {}) {
  const json = body === undefined ? {} : { body: JSON.stringify(body), headers: { "Content-Type": "application/json" } };
  const response = await request(path, { method, ...json, ...options });
  return response.status === 204 ? null : response.json();
}

export const get = (path, options) => send("GET", path, undefined, options);

/** Sends a file as it is; `onProgress` hears the share that has left. fetch cannot tell that. */
export function upload(path, file, onProgress) {
  return new Promise((resolve, reject) => {
    const xhr = new XMLHttpRequest();
    xhr.open("POST", path);
    xhr.setRequestHeader("Content-Type", "application/zip");
    for (const [name, value] of Object.entries(authorization())) xhr.setRequestHeader(name, value);
    xhr.upload.onprogress = (event) => event.lengthComputable && onProgress(event.loaded / event.total);
    xhr.onerror = () => reject(new Away());
    xhr.onload = async () => {
      if (xhr.status < 300) resolve(JSON.parse(xhr.responseText));
      else reject(await refusal(xhr.status, () => JSON.parse(xhr.responseText)));
    };
    xhr.send(file);
  });
}

// Server-sent events. EventSource sends no Authorization header.

/** Calls `onEvent(data)` with all events of a stream up to its end, over broken connections. Throws Refused. */
export async function follow(path, onEvent, signal) {
  let last = 0;
  while (!signal.aborted) {
    try {
      const headers = { Accept: "text/event-stream", "Last-Event-ID": String(last) };
      const response = await request(path, { headers, signal });
      for await (const { id, event, data } of events(response.body)) {
        if (event === "end") return;
        last = id || last;
        onEvent(data);
      }
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof Refused && error.status < 500) throw error;
    }
    await sleep(RESUME_MS);
    await ready();
  }
}

/** The events of a body: {id, event, data}. */
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const fields = Object.fromEntries(block.split("\n").map((line) => line.split(/: ?(.*)/s, 2)));
      if (fields.data) yield { ...fields, data: JSON.parse(fields.data) };
    }
  }
}
