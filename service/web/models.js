// Models: what is served and on what, and which version.

import { events, get, request, send } from "./api.js";
import { ClassList, MOST_ROWS } from "./classes.js";
import { Export } from "./export.js";
import { confirmed, html, Trouble, useLoad, useState, useWork } from "./page.js";
import { accuracy, bytes, count, moment, percent, plural } from "./words.js";

export function Models() {
  const [listed, trouble, reload] = useLoad((quiet) => get("models", { quiet }), 5000);
  return html`
    <p class="lead">What is served, on which backbones, and how good it is.</p>
    <${Trouble} error=${trouble} again=${reload} />
    ${listed && html`<${Sharing} models=${listed.models} />`}
    <ul class="rows">
      ${listed?.models.map((model) => html`<${Model} key=${model.name} model=${model} reload=${reload} />`)}
    </ul>
    <${Unserved} served=${listed?.models.map((model) => model.name)} reload=${reload} />
    <${Pull} reload=${reload} />
  `;
}

/** What it saves that models stand on the same backbones. */
function Sharing({ models }) {
  const uses = models.flatMap((model) => model.backbones);
  const backbones = new Map(uses.map((backbone) => [backbone.sha256, backbone]));
  const memory = (some) => some.reduce((sum, backbone) => sum + backbone.memory_bytes, 0);
  const [held, apart] = [memory([...backbones.values()]), memory(uses)];
  const saved =
    uses.length > backbones.size
      ? ` Each alone would be ${bytes(apart)}: sharing saves ${bytes(apart - held)}, and ${plural(uses.length - backbones.size, "forward pass", "forward passes")} when all are asked.`
      : "";
  return html`<p>
    <strong>${plural(models.length, "model")} on ${plural(backbones.size, "backbone")}</strong>, ${bytes(held)} in memory.${saved}
  </p>`;
}

function Model({ model, reload }) {
  return html`<li class="card">
    <div class="title">
      <h2>
        ${model.name} ${model.version && html`<span class="faint">version ${model.version}</span>`}
        ${model.default && html` <span class="badge">default</span>`}
        ${model.state !== "ready" && html` <span class="badge bad">${model.state}</span>`}
      </h2>
      <a href="#try?model=${model.name}">Try it</a>
    </div>
    ${model.error && html`<p class="trouble">${model.error}</p>`}
    ${model.version && html`<${Figures} model=${model} />`}
    <${Versions} model=${model} reload=${reload} />
  </li>`;
}

function Figures({ model }) {
  return html`<dl>
    <div><dt>Accuracy</dt><dd>${accuracy(model.metrics)}</dd></div>
    <div><dt>${plural(model.classes.length, "class", "classes")}</dt><dd>${firstOf(model.classes)}</dd></div>
    ${model.backbones.map((backbone) => html`<${Backbone} backbone=${backbone} />`)}
    <div><dt>Head</dt><dd>${bytes(model.head_bytes)}</dd></div>
    ${model.licences?.length > 0 && html`<div><dt>Licence of the weights</dt><dd>${model.licences.map((licence) => licence ?? "unknown").join(", ")}</dd></div>`}
  </dl>
  ${model.classes.length > MOST_ROWS && html`<details><summary>Search the classes</summary><${ClassList} names=${model.classes} of=${model.name} /></details>`}`;
}

const FIRST_NAMES = 6; // of those that are searched

function firstOf(classes) {
  if (classes.length <= MOST_ROWS) return classes.join(", ");
  return `${classes.slice(0, FIRST_NAMES).join(", ")} and ${count(classes.length - FIRST_NAMES)} more`;
}

function Backbone({ backbone }) {
  const [, height, width] = backbone.input;
  return html`<div>
    <dt>Backbone</dt>
    <dd>
      ${backbone.architecture}, ${width} x ${height} pixels, ${bytes(backbone.memory_bytes)}
      ${Object.entries(backbone.runtime).map(([device, info]) => html`<br /><span class="faint">${speed(device, info)}</span>`)}
      ${backbone.shared_with.length > 0 && html`<br /><span class="good">shared with ${backbone.shared_with.join(", ")}${backbone.shared_with_count > backbone.shared_with.length ? ` and ${backbone.shared_with_count - backbone.shared_with.length} more` : ""}</span>`}
    </dd>
  </div>`;
}

function speed(device, info) {
  const chosen = info.candidates.find((one) => one.engine === info.engine && one.precision === info.precision && one.rates);
  const best = Math.max(0, ...Object.values(chosen?.rates ?? {}));
  return `${info.engine} ${info.precision} on ${device}${best ? `, up to ${count(Math.round(best))} images/s` : ""}`;
}

// Versions

function Versions({ model, reload }) {
  const [open, setOpen] = useState(false);
  return html`<details open=${open} onToggle=${(event) => setOpen(event.target.open)}>
    <summary>Versions</summary>
    ${open && html`<${VersionTable} name=${model.name} served=${model.version} reload=${reload} />`}
  </details>`;
}

function VersionTable({ name, served, reload }) {
  const [found, trouble, again] = useLoad((quiet) => get(`models/${name}/versions`, { quiet }), 0, [name, served]);
  const [work, busy, failed] = useWork(async (title, text, action, method, path, body) => {
    if (!(await confirmed(title, text, action))) return;
    await send(method, path, body);
    reload();
    if (path !== `models/${name}`) again();
  });
  if (!found) return html`<${Trouble} error=${trouble} again=${again} />`;
  const base = `models/${name}`;
  const before = found.versions.find((one) => one.state === "previous");
  const activate = ({ version }) =>
    work(`Serve version ${version} of ${name}?`, "It is loaded and tried first. Requests under way are still answered by the other.", "Activate", "POST", `${base}/activate`, { version });
  const rollBack = () =>
    work(`Roll ${name} back to version ${before.version}?`, "It is the version that served before.", "Roll back", "POST", `${base}/rollback`);
  const remove = ({ version }) =>
    work(`Remove version ${version} of ${name}?`, "It is deleted from the store, and cannot be brought back.", "Remove", "DELETE", `${base}/versions/${version}`);
  const removeAll = () =>
    work(`Remove ${name}?`, "All its versions are deleted from the store, and cannot be brought back.", "Remove the model", "DELETE", base);
  return html`
    <${Trouble} error=${failed} />
    <ul class="versions">
      ${found.versions.map(
        (one) => html`<li key=${one.version}>
          <div>
            <strong>Version ${one.version}</strong> ${one.state !== "stored" && html`<span class="badge">${one.state}</span>`}
            <br />${one.error ? html`<span class="bad">${one.error}</span>` : accuracy(one.metrics)}
            <br /><span class="faint">${one.created_at && moment(one.created_at)}${one.command && html` · <code>${one.command}</code>`}</span>
          </div>
          ${one.version !== served &&
          html`<div class="row">
            <button type="button" disabled=${busy || one.error} onClick=${() => activate(one)}>Activate</button>
            <button type="button" class="danger" disabled=${busy} onClick=${() => remove(one)}>Remove</button>
          </div>`}
          <${Export} name=${name} version=${one.version} disabled=${Boolean(one.error)} />
        </li>`,
      )}
    </ul>
    <div class="row">
      ${before && html`<button type="button" disabled=${busy} onClick=${rollBack}>Roll back to version ${before.version}</button>`}
      <button type="button" class="danger" disabled=${busy} onClick=${removeAll}>Remove the model</button>
    </div>
  `;
}

/** Models of the store of which no version serves. */
function Unserved({ served, reload }) {
  const [stored, setStored] = useState(null);
  const [look, busy, trouble] = useWork(async () => setStored(await send("POST", "v2/repository/index", {})));
  const changed = () => (look(), reload());
  const names = [...new Set(stored?.map((one) => one.name))].filter((name) => !served?.includes(name));
  return html`
    <h2>In the store, and not served</h2>
    <${Trouble} error=${trouble} />
    ${stored
      ? html`${names.length === 0 && html`<p class="faint">Nothing: every model of the store is served.</p>`}
          <ul class="rows">
            ${names.map((name) => html`<li class="card" key=${name}><h2>${name}</h2><${VersionTable} name=${name} reload=${changed} /></li>`)}
          </ul>`
      : html`<button type="button" disabled=${busy} onClick=${look}>Look</button>`}
  `;
}

// Pull

const SUGGESTED = ["resnet18", "resnet50", "alexnet", "vgg13", "densenet121", "inception_v3", "mobilenet_v3_large", "efficientnet_b0", "convnext_tiny", "imagenet-ensemble"];

function Pull({ reload }) {
  const [far, setFar] = useState(null);
  const [said, say] = useState("");
  const [pull, busy, trouble] = useWork(async (name) => {
    say("");
    setFar({ bytes: 0, total: null });
    try {
      const { model, version, warnings = [] } = await pulled(name, setFar);
      say([`${model} version ${version} is in the store.`, ...warnings].join(" "));
      reload();
    } finally {
      setFar(null);
    }
  });
  const submit = (event) => {
    event.preventDefault();
    pull(event.target.elements.name.value.trim());
  };
  return html`
    <h2>Pull a published model</h2>
    <form class="row" onSubmit=${submit}>
      <label>Architecture <input name="name" list="architectures" required pattern="[A-Za-z0-9][A-Za-z0-9:@\\/._?=&\\-]*" autocapitalize="none" /></label>
      <datalist id="architectures">${SUGGESTED.map((name) => html`<option value=${name}></option>`)}</datalist>
      <button disabled=${busy}>Pull</button>
    </form>
    ${far && html`<p><progress aria-label="Download" max="1" value=${far.total ? far.bytes / far.total : undefined}></progress> ${bytes(far.bytes)}${far.total && ` of ${bytes(far.total)}, ${percent(far.bytes / far.total, 0)}`}</p>`}
    <p role="status">${said}</p>
    <${Trouble} error=${trouble} />
  `;
}

async function pulled(name, onProgress) {
  const options = { method: "POST", body: JSON.stringify({ name }), headers: { "Content-Type": "application/json" } };
  for await (const { event, data } of events((await request("models/pull", options)).body)) {
    if (event === "error") throw new Error(data.message);
    if (event === "end") return data;
    onProgress(data);
  }
  throw new Error("The server has left before the download was there; pull again, and it goes on where it was.");
}
