// Train: a dataset, what is wrong with it, a job.

import { get, send, server, upload } from "./api.js";
import { Base } from "./bases.js";
import { ClassList } from "./classes.js";
import { Fields, bodyOf } from "./form.js";
import { Job } from "./job.js";
import { confirmed, html, Trouble, useLoad, useState, useWork } from "./page.js";
import { bytes, count, duration, moment, percent, plural } from "./words.js";

export function Train({ detail }) {
  return detail ? html`<${Job} key=${detail} id=${detail} />` : html`<${Begin} />`;
}

function Begin() {
  const [dataset, setDataset] = useState(null);
  const [how, setHow] = useState({});
  const [datasets, trouble, reload] = useLoad(allDatasets);
  const choose = (name) => (setDataset(name), setHow({}));
  return html`
    <p class="lead">From a folder of images to a served model: one folder per class, in a zip.</p>
    <h2>1. The images</h2>
    <${Trouble} error=${trouble} again=${reload} />
    ${datasets &&
    html`<${Upload} done=${(kept) => (reload(), choose(kept.name))} />
      <${Datasets} datasets=${datasets} chosen=${dataset} choose=${choose} />`}
    ${dataset && html`<${Check} key=${dataset} dataset=${dataset} how=${how} change=${setHow} />`}
    ${dataset && html`<${Start} key=${`start ${dataset}`} dataset=${dataset} how=${how} />`}
    ${datasets && html`<${Jobs} />`}
  `;
}

async function allDatasets(quiet) {
  const found = [];
  for (let more = true; more; ) {
    const after = found.length ? `&after=${encodeURIComponent(found.at(-1).name)}` : "";
    const page = await get(`datasets?limit=100${after}`, { quiet });
    found.push(...page.data);
    more = page.has_more;
  }
  return found;
}

// Upload

function Upload({ done }) {
  const [far, setFar] = useState(null);
  const [over, setOver] = useState(false);
  const [work, busy, trouble] = useWork(async (file) => {
    if (!/\.zip$/i.test(file.name)) throw new Error(`${file.name} is no zip; put the class folders into one.`);
    setFar(0);
    try {
      const kept = await uploaded(file, setFar);
      if (kept) done(kept);
    } finally {
      setFar(null);
    }
  });
  const dropped = (event) => {
    event.preventDefault();
    setOver(false);
    if (event.dataTransfer.files.length && !busy) work(event.dataTransfer.files[0]);
  };
  const dragged = (event) => (event.preventDefault(), setOver(true));
  return html`<div class="drop ${over && "over"}" onDrop=${dropped} onDragOver=${dragged} onDragLeave=${() => setOver(false)}>
      ${far === null
        ? html`<span>Drop a zip here, or</span>
            <label class="button">Choose a zip<input class="unseen" type="file" accept=".zip" onChange=${(e) => e.target.files.length && work(e.target.files[0])} /></label>`
        : html`<progress aria-label="Upload" max="1" value=${far}></progress> <span>${percent(far, 0)}</span>`}
    </div>
    <${Trouble} error=${trouble} />`;
}

async function uploaded(file, onProgress) {
  const name = file.name.toLowerCase().replace(/\.zip$/, "").replace(/[^a-z0-9._-]+/g, "-").replace(/^[-._]+/, "").slice(0, 60) || "images";
  try {
    return await upload(`datasets?name=${name}`, file, onProgress);
  } catch (error) {
    if (error.code !== "name_conflict") throw error;
    const text = `There is a dataset ${name}.zip already. Models that were trained on it stay as they are.`;
    return (await confirmed(`Replace ${name}.zip?`, text, "Replace")) && upload(`datasets?name=${name}&replace=true`, file, onProgress);
  }
}

function Datasets({ datasets, chosen, choose }) {
  if (!datasets.length) return html`<p class="faint">There are none on the server yet.</p>`;
  return html`<fieldset class="list">
    <legend class="unseen">Datasets on the server</legend>
    ${datasets.map(
      ({ name, kind, bytes: size, modified }) => html`<label key=${name}>
        <input type="radio" name="dataset" checked=${name === chosen} onChange=${() => choose(name)} />
        <span><strong>${name}</strong> <span class="faint">${kind}${size && `, ${bytes(size)}`}, ${moment(modified)}</span></span>
      </label>`,
    )}
  </fieldset>`;
}

// The audit

function Check({ dataset, how, change }) {
  const [found, trouble, again] = useLoad(() => audited(dataset, how), 0, [dataset, how]);
  const current = found?.how === how ? found : null;
  return html`<h2>2. What is in them</h2>
    <${Reading} how=${how} change=${change} />
    <${Trouble} error=${trouble} again=${again} />
    ${!current && !trouble && html`<p class="faint pending" role="status">Every file is read</p>`}
    ${current && !trouble && html`<${Audit} ...${current} />`}`;
}

const audited = async (dataset, how) => ({ ...(await send("POST", "datasets/validate", { ...how, dataset })), how });

const LAYOUTS = {
  auto: "recognised by their names",
  classes: "the classes",
  splits: "train, val and test, with class folders in them",
  csv: "described by a CSV at the top",
};

const NEAR_DUPLICATES = {
  group: "kept in one part",
  report: "listed only",
  off: "not looked for",
};

/** How the folders are read, where their names leave it in doubt; `how` is sent with the audit and with the job. */
function Reading({ how, change }) {
  const typed = (name, parse) => (event) => change({ ...how, [name]: event.target.value.trim() === "" ? undefined : parse(event.target.value.trim()) });
  const choice = (name, label, choices, standard) => html`<div class="field">
    <label for=${name}>${label}</label>
    <select id=${name} onChange=${typed(name, String)}>
      ${Object.entries(choices).map(([value, words]) => html`<option value=${value} selected=${value === (how[name] ?? standard)}>${words}</option>`)}
    </select>
  </div>`;
  const text = (name, label, placeholder, parse, inputmode) => html`<div class="field">
    <label for=${name}>${label}</label>
    <input id=${name} inputmode=${inputmode} placeholder=${placeholder} value=${how[name] ?? ""} onChange=${typed(name, parse)} autocomplete="off" />
  </div>`;
  return html`<div class="fields">
    ${choice("layout", "The folders are", LAYOUTS, "auto")}
    ${choice("near_duplicates", "Near duplicates are", NEAR_DUPLICATES, "group")}
    ${text("min_per_class", "Training images needed per class", "2", Number, "numeric")}
    ${text("encoding", "Encoding of names and tables", "recognised", String, "text")}
  </div>`;
}

function Audit({ audit, pictures = {}, estimate }) {
  const { parts, totals, ignored = [], image_kinds = {} } = audit;
  const kinds = Object.entries(image_kinds).map(([kind, images]) => `${count(images)} ${kind}`);
  return html`
    <p role="status">
      <strong>${plural(audit.images, "good image")}</strong> in ${plural(Object.keys(audit.class_counts.train).length, "class", "classes")}: ${count(parts.train)} to train on, ${count(parts.val)} to validate on${parts.test > 0 && `, ${count(parts.test)} to test on`}. A head is
      trained in about ${duration(estimate.total)}.
    </p>
    <p class="layout">Recognised as: <strong>${audit.layout}</strong></p>
    ${kinds.length > 0 && html`<p class="kinds">Images: ${kinds.join(", ")}</p>`}
    ${audit.warnings.length > 0 && html`<ul class="warnings">${audit.warnings.map((said) => html`<li>${said}</li>`)}</ul>`}
    ${ignored.map((left) => html`<${Listed} title=${`Ignored, ${left.reason}`} total=${left.count} pictures=${{}} items=${left.examples.map((path) => [[path]])} />`)}
    <${Listed} title="Bad files, left out" total=${totals.bad} pictures=${pictures} items=${audit.bad.map(({ path, reason }) => [[path], reason])} />
    <${Listed} title="The same picture under several labels" total=${totals.conflicts} pictures=${pictures} items=${audit.conflicts.map((paths) => [paths])} />
    <${Listed} title="Duplicates" total=${totals.duplicates} pictures=${pictures} items=${audit.duplicates.map((paths) => [paths, "identical pixels"])} />
    <${Listed} title="Near duplicates" total=${totals.near_duplicates} pictures=${pictures} items=${audit.near_duplicates.map((paths, place) => [paths, audit.near_rules?.[place]])} />
    <details>
      <summary>Images by class</summary>
      <${Classes} counts=${audit.class_counts.train} />
    </details>
  `;
}

function Listed({ title, total, items, pictures }) {
  if (!total) return null;
  return html`<details>
    <summary>${title}: ${count(total)}</summary>
    <ul class="paths">${items.map(([paths, reason]) => html`<li>${paths.map((path) => pictures[path] && html`<img src=${pictures[path]} alt="" /> `)}<code>${paths.join(" = ")}</code>${reason && html` <span class="faint">${reason}</span>`}</li>`)}</ul>
    ${total > items.length && html`<p class="faint">and ${count(total - items.length)} more</p>`}
  </details>`;
}

function Classes({ counts }) {
  const most = Math.max(...Object.values(counts));
  const bar = (name) => html`<span class="label">${name}</span><span class="number">${count(counts[name])}</span>
    <span class="bar"><i style=${{ width: `${(100 * counts[name]) / most}%` }}></i></span>`;
  return html`<${ClassList} names=${Object.keys(counts)} of="the data set" row=${bar} kind="bars narrow" />`;
}

// The start

const FIRST = ["name", "base", "mode", "deploy"];
const ASKED = ["dataset", "layout", "near_duplicates", "min_per_class", "encoding"]; // above, with the audit

function Start({ dataset, how }) {
  const [schema, trouble] = useLoad((quiet) => get("finetune/schema", { quiet }));
  const [values, setValues] = useState({ name: dataset.replace(/\.(zip|csv)$/, "").toLowerCase().replace(/[^a-z0-9._-]+/g, "-") });
  const [start, busy, failed] = useWork(async () => {
    const job = await send("POST", "finetune", { ...bodyOf(values), ...how, dataset });
    location.hash = `#train/${job.id}`;
  });
  const change = (path, value) => setValues((others) => ({ ...others, [path]: value }));
  const submit = (event) => {
    event.preventDefault();
    start();
  };
  const shared = { schema, values, change, error: failed };
  return html`<h2>3. The model</h2>
    <${Trouble} error=${trouble} />
    ${schema &&
    html`<form onSubmit=${submit}>
      <div class="fields">
        <${Fields} ...${shared} only=${["name"]} />
        <${Base} ...${shared} />
        <${Fields} ...${shared} only=${["mode", "deploy"]} />
      </div>
      <details>
        <summary>Everything else</summary>
        <div class="fields"><${Fields} ...${shared} without=${[...FIRST, ...ASKED]} /></div>
      </details>
      <${Trouble} error=${failed} />
      <button class="primary" disabled=${busy}>Start training</button>
    </form>`}`;
}

function Jobs() {
  const [found, trouble] = useLoad((quiet) => get("finetune?limit=20", { quiet }), 3000);
  if (!found?.data.length) return html`<${Trouble} error=${server.state === "ready" && trouble} />`;
  return html`<h2>Jobs</h2>
    <ul class="list">
      ${found.data.map(
        (job) => html`<li key=${job.id}>
          <a href="#train/${job.id}">${job.request.name}</a>
          <span class="badge ${job.status === "failed" && "bad"}">${job.status}</span>
          <span class="faint">${job.request.dataset}, ${moment(job.created_at)}${!job.terminal && `, ${percent(job.progress, 0)}`}</span>
        </li>`,
      )}
    </ul>`;
}
