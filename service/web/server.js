// Server: what /metrics says, as it changes.

import { request } from "./api.js";
import { sample } from "./metrics.js";
import { html, Trouble, useLoad } from "./page.js";
import { Plot } from "./plot.js";
import { bytes, milliseconds } from "./words.js";

const EVERY_MS = 2000;
const KEPT = 300; // samples: ten minutes
const past = []; // outlives a change of view

export function Server() {
  const [, trouble] = useLoad(look, EVERY_MS);
  const now = past.at(-1);
  const x = past.map(({ at }) => at);
  const line = (label, of, say) => {
    const values = past.map(of);
    return { label, values, said: values.at(-1) == null ? "-" : say(values.at(-1)) };
  };
  const number = (value) => value.toFixed(value < 10 ? 1 : 0);
  const megabytes = (mb) => bytes(mb * 2 ** 20);
  const gpus = now?.device == null ? [] : [["Megabytes of memory in use on the GPUs", [line("GPU memory", (s) => s.device && s.device / 2 ** 20, megabytes)]]];
  const plots = now && [
    ["Images answered a second", [line("images/s", (s) => s.images, number)]],
    ["Images waiting", [line("waiting images", (s) => s.waiting, number)]],
    ["Images in a batch, on average", [line("images a batch", (s) => s.batch, number)]],
    [
      "Milliseconds by stage, on average",
      ["decode", "queue", "compute"].map((stage) => line(`${stage} ms`, (s) => s.stages[stage], milliseconds)),
    ],
    ["Requests a second, and of these refused or failed", [line("requests/s", (s) => s.requests, number), line("refused or failed/s", (s) => s.failed, number)]],
    ["Megabytes of memory of the server's process", [line("memory", (s) => s.memory / 2 ** 20, megabytes)]],
    ...gpus,
    ["Processor cores in use by the server's process", [line("cores busy", (s) => s.cores, (cores) => cores.toFixed(2))]],
  ];
  return html`
    <p class="lead">The last minutes, looked at every ${EVERY_MS / 1000} s while this view is open; <a href="metrics">/metrics</a> has all of it.</p>
    <${Trouble} error=${trouble} />
    ${past.length < 2 && html`<p class="faint pending" role="status">Measuring</p>`}
    <div class="plots">
      ${plots?.map(([label, series]) => html`<${Plot} key=${label} label=${`${label}: ${series.map((s) => `${s.label} ${s.said}`).join(", ")}`} x=${x} series=${series} height=${130} time spark />`)}
    </div>
  `;
}

let before = null;

async function look(quiet) {
  const counted = sample(await (await request("metrics", { quiet })).text(), Date.now() / 1000);
  if (before && counted.started === before.started) past.push(counted.since(before));
  before = counted;
  past.splice(0, past.length - KEPT);
}
