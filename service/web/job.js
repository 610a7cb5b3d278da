// One job: how far it is, what it says, what came of it.

import { follow, get, request, send } from "./api.js";
import { confirmed, dialog, html, Trouble, useEffect, useLoad, useRef, useState, useWork } from "./page.js";
import { Plot } from "./plot.js";
import { accuracy, duration, percent } from "./words.js";

const PHASES = ["audit", "features", "select", "train", "calibrate", "evaluate", "publish", "deploy"];
const MOST_LINES = 500; // of the log

export function Job({ id }) {
  const [over, setOver] = useState(false);
  const [job, trouble, reload] = useLoad((quiet) => get(`finetune/${id}`, { quiet }), over ? 0 : 1000, [id, over]);
  const [events, broken] = useEvents(id);
  useEffect(() => setOver(Boolean(job?.terminal)), [job?.terminal]);
  return html`
    <p><a href="#train">All jobs</a></p>
    <${Trouble} error=${broken ?? trouble} again=${reload} />
    ${job &&
    html`<h2>${job.request.name} <span class="badge ${job.status === "failed" && "bad"}">${job.status}</span></h2>
      <p class="faint">from ${job.request.dataset}, mode ${job.request.mode}${job.request.base && `, base ${[job.request.base].flat().join(", ")}`}</p>
      ${job.terminal ? html`<${Outcome} job=${job} reload=${reload} />` : html`<${Progress} job=${job} reload=${reload} />`}
      <${Curves} events=${events} />
      <${Log} events=${events} />
      ${job.terminal && html`<${Delete} job=${job} />`}`}
  `;
}

/** All events of the job, as they come: [events, error]. */
function useEvents(id) {
  const [found, set] = useState([]);
  const [error, setError] = useState(null);
  useEffect(() => {
    const leaving = new AbortController();
    const heard = [];
    let drawn = 0;
    const hear = (event) => {
      heard.push(event);
      drawn ||= requestAnimationFrame(() => ((drawn = 0), set([...heard])));
    };
    follow(`finetune/${id}/events`, hear, leaving.signal).catch(setError);
    return () => leaving.abort();
  }, [id]);
  return [found, error];
}

function Progress({ job, reload }) {
  const [act, busy, trouble] = useWork(async (what, title, text, action) => {
    if (!(await confirmed(title, text, action))) return;
    await send("POST", `finetune/${job.id}/${what}`);
    reload();
  });
  const stop = () => act("stop", "Stop training here?", "The best so far is evaluated and published, as if it had ended by itself.", "Stop and keep the best");
  const cancel = () => act("cancel", "Cancel the job?", "What it has learned so far is discarded.", "Discard the job");
  const wait = job.queue_position ? `number ${job.queue_position} in the queue` : job.eta_seconds ? `about ${duration(job.eta_seconds)} to go` : "";
  return html`
    <ol class="phases">
      ${PHASES.filter((phase) => phase !== "select" || job.phase === phase).map((phase) => html`<li aria-current=${phase === job.phase ? "step" : undefined}>${phase}</li>`)}
    </ol>
    <p><progress aria-label="Progress of the job" max="1" value=${job.progress}></progress> ${percent(job.progress, 0)}${wait && `, ${wait}`}</p>
    <div class="row">
      <button type="button" disabled=${busy || job.status !== "running"} onClick=${stop}>Stop, keep the best</button>
      <button type="button" class="danger" disabled=${busy || job.status === "cancelling"} onClick=${cancel}>Cancel</button>
    </div>
    <${Trouble} error=${trouble} />
  `;
}

// What came of it

function Outcome({ job, reload }) {
  if (job.error) return html`<p class="trouble">${job.error.message}</p>`;
  if (job.status !== "succeeded") return null;
  return html`<${Success} job=${job} reload=${reload} />`;
}

function Success({ job, reload }) {
  const [report, trouble, again] = useLoad((quiet) => get(`finetune/${job.id}/report?format=json`, { quiet }), 0, [job.id]);
  return html`<div class="card result">
    <h3>${job.model} version ${job.version}${report && html`: ${accuracy(report)}`}</h3>
    <${Trouble} error=${trouble} again=${again} />
    ${report?.verdict && html`<p><strong>Compared with the version that served: ${report.verdict.verdict}.</strong> ${report.verdict.reason}</p>`}
    <${Deployment} job=${job} reload=${reload}>
      ${report && html`<button type="button" onClick=${() => openReport(job.id)}>Open the report</button>`}
    <//>
  </div>`;
}

const SAID = { activated: "It serves now.", manual: "It waits for you to put it to service.", never: "It is in the store, and was not to be served." };

/** What the gate decided, and what follows from it. */
function Deployment({ job, reload, children }) {
  const [served, , again] = useLoad(async (quiet) => (await get("models", { quiet })).models.find((one) => one.name === job.model)?.version, 0, [job.id]);
  const [serve, busy, trouble] = useWork(async () => {
    const text = served ? `Version ${served} serves now, and can be rolled back to.` : "No version of it serves yet.";
    if (!(await confirmed(`Serve ${job.model} version ${job.version}?`, text, "Activate"))) return;
    await send("POST", `models/${job.model}/activate`, { version: job.version });
    again();
    reload();
  });
  const [decision, ...reason] = job.deployment.split(": ");
  const said = SAID[decision] ?? `Not put to service: ${reason.join(": ")}`;
  const serves = served === job.version;
  return html`
    <p class=${serves ? "good" : ""}>${serves ? SAID.activated : decision === "activated" ? "It was put to service; another version serves now." : said}</p>
    <${Trouble} error=${trouble} />
    <div class="row">
      ${serves
        ? html`<a class="button primary" href="#try?model=${job.model}">Try it</a>`
        : html`<button type="button" class="primary" disabled=${busy} onClick=${serve}>Serve version ${job.version}</button>`}
      ${children}
      <a class="button" href="#models">All models</a>
    </div>
  `;
}

async function openReport(id) {
  const page = await (await request(`finetune/${id}/report?format=html`)).text();
  let style = "";
  const bare = page.replace(/<style>(.*?)<\/style>/s, (_, text) => ((style = text), ""));
  dialog(
    (close) => html`<div class="report">
      <button type="button" autofocus onClick=${() => close(null)}>Close the report</button>
      <iframe title="Report" sandbox="allow-same-origin" srcdoc=${bare} onLoad=${(event) => dress(event.target, style)}></iframe>
    </div>`,
  );
}

/** Gives the report its own style, which this page's policy allows in no text. No script of it could run. */
function dress(frame, style) {
  const sheet = new frame.contentWindow.CSSStyleSheet();
  sheet.replaceSync(style);
  frame.contentDocument.adoptedStyleSheets = [sheet];
}

// What it says

function Curves({ events }) {
  const epochs = events.filter((event) => event.epoch !== undefined);
  if (epochs.length < 2) return null;
  const x = epochs.map((event) => event.epoch);
  const of = (label, name, say) => {
    const values = epochs.map((event) => event[name] ?? null);
    const last = values.findLast((value) => value !== null);
    return { label, values, said: last === undefined ? "" : say(last) };
  };
  const plain = (value) => value.toFixed(3);
  const losses = [of("training loss", "loss", plain), of("validation loss", "val_loss", plain)];
  const right = [of("validation accuracy", "accuracy", percent)];
  return html`<div class="plots">
    <${Plot} label="Loss by epoch" x=${x} series=${losses} />
    <${Plot} label="Accuracy by epoch" x=${x} series=${right} />
  </div>`;
}

function Log({ events }) {
  const list = useRef(null);
  const lines = events.filter((event) => event.message || event.status).slice(-MOST_LINES);
  useEffect(() => list.current.scrollTo(0, list.current.scrollHeight), [lines.length]);
  return html`<h3>Log</h3>
    <ol class="log" ref=${list} tabindex="0" aria-label="Log">
      ${lines.map(
        ({ seq, at, level, status, message }) => html`<li key=${seq} class=${level}>
          <time datetime=${at}>${new Date(at).toLocaleTimeString()}</time> ${[status, message].filter(Boolean).join(": ")}
        </li>`,
      )}
    </ol>`;
}

function Delete({ job }) {
  const [remove, busy, trouble] = useWork(async () => {
    const text = "Its record, events and report are deleted. A model that came of it stays.";
    if (!(await confirmed("Delete this job?", text, "Delete"))) return;
    await send("DELETE", `finetune/${job.id}`);
    location.hash = "#train";
  });
  return html`<${Trouble} error=${trouble} />
    <p><button type="button" class="danger" disabled=${busy} onClick=${remove}>Delete the job</button></p>`;
}
