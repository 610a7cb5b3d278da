// Try: images in, classes out.

import { get, storedKey } from "./api.js";
import { add, ask, remove, shelf } from "./classify.js";
import { ClassList, MOST_ROWS } from "./classes.js";
import { codeFor } from "./code.js";
import { html, Trouble, useEffect, useLoad, useRef, useState } from "./page.js";
import { count, milliseconds, percent, plural } from "./words.js";

const chosen = { models: null, topK: 5, explain: false }; // outlives a change of view
const TOP_KS = [1, 3, 5, 10];

export function Try({ query }) {
  const [, renew] = useState(0);
  const [listed, trouble, reload] = useLoad((quiet) => get("models", { quiet }), 10000);
  useEffect(() => heard(shelf, "change", () => renew((n) => n + 1)), []);
  useEffect(() => heard(document, "paste", (event) => take(event.clipboardData.files)), []);
  const ready = listed?.models.filter((model) => model.state === "ready") ?? [];
  useEffect(() => {
    choose(ready, query.model);
    ask(question(ready));
    renew((n) => n + 1);
  }, [listed, query.model]);
  const change = (what) => {
    Object.assign(chosen, what);
    ask(question(ready));
    renew((n) => n + 1);
  };
  return html`
    <p class="lead">Drop images anywhere on this page, paste them, or choose them here.</p>
    <${Sources} />
    <${Trouble} error=${trouble} again=${reload} />
    <${Options} models=${ready} change=${change} />
    <${Tally} />
    <ul class="cards">
      ${shelf.images.map((image) => html`<${Card} key=${image.url} image=${image} />`)}
    </ul>
    ${shelf.images.length > 0 && html`<${Code} />`}
  `;
}

function heard(target, event, listener) {
  target.addEventListener(event, listener);
  return () => target.removeEventListener(event, listener);
}

const take = (files) => add([...files]); // whatever is no image, the server says so

function choose(ready, wanted) {
  const names = ready.map((model) => model.name);
  if (wanted && names.includes(wanted) && chosen.wanted !== wanted) Object.assign(chosen, { models: [wanted], wanted });
  const standing = chosen.models?.filter((name) => names.includes(name)) ?? [];
  if (names.length) chosen.models = standing.length ? standing : [(ready.find((m) => m.default) ?? ready[0]).name];
}

function question(ready) {
  if (!ready.length) return shelf.question;
  const fields = [...chosen.models.map((name) => ["model", name]), ["top_k", chosen.topK]];
  if (chosen.explain) fields.push(["explain", "true"]);
  return String(new URLSearchParams(fields));
}

function Sources() {
  const [over, setOver] = useState(false);
  useEffect(() => heard(window, "dragover", (event) => (event.preventDefault(), setOver(true))), []);
  useEffect(() => heard(window, "dragleave", (event) => event.relatedTarget || setOver(false)), []);
  useEffect(() => heard(window, "drop", (event) => dropped(event, setOver)), []);
  return html`<div class="drop ${over && "over"}">
    <${Picker} label="Choose images" multiple primary />
    <${Picker} label="Take a photograph" capture="environment" />
  </div>`;
}

function dropped(event, setOver) {
  event.preventDefault();
  setOver(false);
  take(event.dataTransfer.files);
}

function Picker({ label, primary, ...attributes }) {
  const picked = (event) => {
    take(event.target.files);
    event.target.value = "";
  };
  return html`<label class="button ${primary && "primary"}"
    >${label}<input class="unseen" type="file" accept="image/*" onChange=${picked} ...${attributes}
  /></label>`;
}

function Options({ models, change }) {
  if (!chosen.models) return null;
  const toggle = (name) => {
    const others = chosen.models.filter((one) => one !== name);
    const next = others.length === chosen.models.length ? [...others, name] : others;
    change({ models: next.length ? next : chosen.models });
  };
  return html`<form class="options">
    <fieldset>
      <legend>Models</legend>
      ${models.map(
        ({ name }) =>
          html`<label class="chip"
            ><input type="checkbox" checked=${chosen.models.includes(name)} onChange=${() => toggle(name)} />${name}</label
          >`,
      )}
    </fieldset>
    <label>Classes <select onChange=${(event) => change({ topK: Number(event.target.value) })}>
        ${TOP_KS.map((k) => html`<option selected=${k === chosen.topK}>${k}</option>`)}
      </select></label>
    <label><input type="checkbox" checked=${chosen.explain} onChange=${(e) => change({ explain: e.target.checked })} /> Heat map</label>
  </form>
  ${models.filter(({ name, classes }) => chosen.models.includes(name) && classes.length > MOST_ROWS).map(
    ({ name, classes }) => html`<details key=${name}>
      <summary>Search the ${count(classes.length)} classes of ${name}</summary>
      <${ClassList} names=${classes} of=${name} />
    </details>`,
  )}`;
}

function Tally() {
  const { images } = shelf;
  const of = (...states) => images.filter((image) => states.includes(image.state)).length;
  const parts = [[of("answered"), "answered"], [of("refused"), "refused"], [of("waiting", "asking", "held"), "to come"]];
  const said = parts.filter(([n]) => n).map(([n, word]) => `${n} ${word}`).join(", ");
  return html`<p class="tally">
    <span role="status">${images.length > 0 && `${plural(images.length, "image")}: ${said}`}</span>
    ${images.length > 0 && html`<button type="button" onClick=${() => remove(images)}>Clear all</button>`}
  </p>`;
}

const PENDING = { waiting: "waiting", asking: "asking", held: "held until the server can take it" };

function Card({ image }) {
  const [shown, show] = useState(null); // the class whose heat map is seen: "model/index"
  const [unseen, setUnseen] = useState(false);
  const first = image.answers.flatMap((answer) => answer.result.predictions?.map((p) => [key(answer, p), p]) ?? []);
  const explained = first.find(([id, p]) => p.explanation && (shown === null || id === shown))?.[1];
  return html`<li class="card ${image.state}">
    <div class="frame">
      ${unseen
        ? html`<p class="faint">no preview</p>`
        : html`<div class="picture">
            <img src=${image.url} alt="" decoding="async" onError=${() => setUnseen(true)} />
            ${explained && html`<${HeatMap} ...${explained.explanation} label=${explained.label} />`}
          </div>`}
    </div>
    <div class="title">
      <h2>${image.file.name}</h2>
      <button type="button" class="quiet" aria-label="Remove ${image.file.name}" onClick=${() => remove([image])}>×</button>
    </div>
    ${image.error && html`<p class="trouble">${image.error}</p>`}
    <div class="answers">
      ${image.answers.map((answer) => html`<${Answer} answer=${answer} shown=${explained} show=${show} />`)}
    </div>
    ${PENDING[image.state] ? html`<p class="faint pending">${PENDING[image.state]}</p>` : html`<${Times} image=${image} />`}
  </li>`;
}

const key = (answer, prediction) => `${answer.model}/${prediction.index}`;

function Answer({ answer, shown, show }) {
  const { model, version, result } = answer;
  return html`<section>
    <h3>${model} <span class="faint">version ${version}</span></h3>
    ${result.error && html`<p class="trouble">${result.error.message}</p>`}
    <${Decision} decision=${result.decision} />
    ${result.in_distribution?.within === false &&
    html`<p class="badge" title="distance ${result.in_distribution.distance}, threshold ${result.in_distribution.threshold}">Unlike its training images</p>`}
    <ol class="bars">
      ${result.predictions?.map(
        (prediction) => html`<li>
          <span class="label">${prediction.explanation
            ? html`<button type="button" class="link" aria-pressed=${prediction === shown} onClick=${() => show(key(answer, prediction))}>
                ${prediction.label}
              </button>`
            : prediction.label}</span>
          <span class="number">${percent(prediction.probability)}</span>
          <span class="bar"><i style=${{ width: `${100 * prediction.probability}%` }}></i></span>
        </li>`,
      )}
    </ol>
  </section>`;
}

const DECISIONS = {
  accept: ["Accept", "good", "The image is like the training images, and the best class is certain enough for the precision asked for."],
  review: ["Review", "", "The model is not certain enough for the precision asked for: a person looks at the image."],
  reject: ["Reject", "bad", "The image is farther from the training images than 99 % of the held-out images: it shows none of these classes."],
};

function Decision({ decision }) {
  if (!(decision in DECISIONS)) return null;
  const [label, kind, reason] = DECISIONS[decision];
  return html`<p class="decision badge ${kind}" title=${reason}>${label}</p>`;
}

function Times({ image: { ms, stages } }) {
  if (ms === undefined) return null;
  const parts = Object.entries(stages ?? {}).map(([name, time]) => `${name} ${milliseconds(time)}`);
  return html`<p class="faint times">${[milliseconds(ms), ...parts].join(" · ")}</p>`;
}

/** The grid over the middle of the picture, which is what the network sees. */
function HeatMap({ grid, share, crop_mode, label }) {
  const canvas = useRef(null);
  useEffect(() => paint(canvas.current, grid, share, crop_mode), [grid]);
  return html`<canvas ref=${canvas} class="heat" role="img" aria-label="What speaks for ${label}"></canvas>`;
}

const LONGER_SIDE = 400; // of the canvas, which has the picture's shape, so that CSS fits both into their frame alike

function paint(canvas, grid, share, mode) {
  const image = canvas.previousElementSibling;
  const draw = () => {
    const { naturalWidth: w, naturalHeight: h } = image;
    const scale = LONGER_SIDE / Math.max(w, h);
    Object.assign(canvas, { width: Math.ceil(w * scale), height: Math.ceil(h * scale) });
    const [across, down] = [(w * scale) / grid[0].length, (h * scale) / grid.length]; // pixels of the canvas per cell
    const cell = { squash: [across, down], border: Array(2).fill(Math.max(across, down)) }[mode] ?? Array(2).fill(Math.min(across, down));
    const [width, height] = [share * cell[0] * grid[0].length, share * cell[1] * grid.length];
    canvas.getContext("2d").drawImage(heatOf(grid), (canvas.width - width) / 2, (canvas.height - height) / 2, width, height);
  };
  image.complete ? draw() : image.addEventListener("load", draw, { once: true });
}

/** The grid as a picture of one pixel each. */
function heatOf(grid) {
  const picture = new OffscreenCanvas(grid[0].length, grid.length);
  const pixels = new ImageData(picture.width, picture.height);
  grid.flat().forEach((heat, i) => pixels.data.set([255, 220 * (1 - heat), 0, 190 * heat], 4 * i));
  picture.getContext("2d").putImageData(pixels, 0, 0);
  return picture;
}

/** Whether those without a key are refused. */
const wantsKey = async () => Boolean(storedKey()) && (await fetch("models")).status === 401;

function Code() {
  const [needsKey] = useLoad(wantsKey);
  const { curl, python } = codeFor(shelf.images.map(({ file }) => file.name), shelf.question, needsKey);
  return html`<details>
    <summary>The same from your own code</summary>
    <${Snippet} title="curl" text=${curl} />
    <${Snippet} title="Python" text=${python} />
  </details>`;
}

function Snippet({ title, text }) {
  const code = useRef(null);
  const [said, say] = useState("Copy");
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(text); // there is none without HTTPS, but on localhost
      say("Copied");
    } catch {
      getSelection().selectAllChildren(code.current);
      say(document.execCommand("copy") ? "Copied" : "Selected: copy it now");
    }
  };
  return html`<div class="snippet">
    <h3>${title}</h3>
    <button type="button" onClick=${copy} aria-label="Copy as ${title}">${said}</button>
    <pre ref=${code} tabindex="0">${text}</pre>
  </div>`;
}
