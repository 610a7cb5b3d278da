// A version as a file: the server converts it, which takes seconds, and the browser saves the zip.

import { request } from "./api.js";
import { html, Trouble, useState, useWork } from "./page.js";
import { bytes } from "./words.js";

const FORMATS = { onnx: "ONNX", openvino: "OpenVINO", store: "Imago store" };

export function Export({ name, version, disabled }) {
  const [format, setFormat] = useState("onnx");
  const [progress, setProgress] = useState(null); // {bytes, total} of the zip
  const [saved, setSaved] = useState(null); // {file, bytes, warning}
  const [run, busy, trouble] = useWork(async () => {
    setSaved(null);
    setProgress(null);
    const response = await request(`models/${name}/versions/${version}/export?format=${format}`);
    const zip = await received(response, setProgress);
    const [, file] = response.headers.get("Content-Disposition")?.match(/filename="(.+?)"/) ?? [null, `${name}-${version}.zip`];
    save(zip, file);
    setSaved({ file, bytes: zip.size, warning: response.headers.get("X-Licence-Warning") });
  });
  return html`<div class="export">
    <div class="row">
      <select aria-label="Export format of version ${version}" disabled=${busy} onChange=${(event) => setFormat(event.target.value)}>
        ${Object.entries(FORMATS).map(([value, label]) => html`<option value=${value} selected=${value === format}>${label}</option>`)}
      </select>
      <button type="button" aria-label="Export version ${version}" disabled=${busy || disabled} onClick=${run}>Export</button>
    </div>
    ${busy && html`<p><progress aria-label="Export of version ${version}" max="1" value=${progress?.total ? progress.bytes / progress.total : undefined}></progress></p>`}
    <p class="faint" role="status">${busy ? said(progress) : saved && `${saved.file}, ${bytes(saved.bytes)}, is downloaded.`}</p>
    ${saved?.warning && html`<p class="warnings">Licence: ${saved.warning}</p>`}
    <${Trouble} error=${trouble} />
  </div>`;
}

const said = (progress) => (progress ? `Downloading: ${bytes(progress.bytes)}` : "The server converts the model.");

/** The body of a response; `onProgress` gets {bytes, total} as it arrives. */
async function received(response, onProgress) {
  const reader = response.body.getReader();
  const total = Number(response.headers.get("Content-Length"));
  const blocks = [];
  for (let bytes = 0; ; ) {
    const { value, done } = await reader.read();
    if (done) return new Blob(blocks, { type: "application/zip" });
    blocks.push(value);
    onProgress({ bytes: (bytes += value.length), total });
  }
}

function save(blob, file) {
  const url = URL.createObjectURL(blob);
  Object.assign(document.createElement("a"), { href: url, download: file }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60000); // the download has begun by then
}
