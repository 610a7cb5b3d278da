// The field `base` of a training request: the models at hand, with size, accuracy and speed.

import { Fields } from "./form.js";
import { html, useState } from "./page.js";
import { bytes, count } from "./words.js";

const OTHER = "other";

/** A choice among `schema.bases`; the plain text field for several names, and for the architectures of mode scratch. */
export function Base({ schema, values, change, error }) {
  const [typed, setTyped] = useState(false);
  const text = html`<${Fields} schema=${schema} values=${values} change=${change} error=${error} only=${["base"]} />`;
  if (values.mode === "scratch") return text;
  const chosen = schema.bases.find((base) => (values.base === undefined ? base.default : base.name === values.base));
  const pick = (value) => {
    setTyped(value === OTHER);
    const isDefault = schema.bases.find((base) => base.name === value)?.default;
    change("base", value === OTHER || value === "" || isDefault ? undefined : value);
  };
  const selected = typed ? OTHER : values.base === "auto" ? "auto" : (chosen?.name ?? "");
  const choices = [...schema.bases.map((base) => [base.name, labelled(base)]), ["auto", "auto: choose by cross-validation"], [OTHER, "Another name, or several"]];
  if (!schema.bases.some((base) => base.default)) choices.unshift(["", "The model that serves by default"]);
  const wrong = !typed && error?.param === "base";
  return html`<div class="field">
      <label for="base-choice">base</label>
      <select id="base-choice" aria-describedby="base-choice-note" aria-invalid=${wrong} onChange=${(event) => pick(event.target.value)}>
        ${choices.map(([value, label]) => html`<option value=${value} selected=${value === selected}>${label}</option>`)}
      </select>
      <div id="base-choice-note">
        <p class="chosen">${selected === "auto" ? "Each base trains a head on these images; the most accurate within the latency limit is used." : !typed && chosen && figures(chosen)}</p>
        <p class="faint">The model to start from. Best first: by published accuracy on ImageNet, then by speed measured on this server.</p>
      </div>
      ${wrong && html`<p class="trouble">${error.message}</p>`}
    </div>
    ${typed && text}`;
}

const speed = ({ images_per_s: rate }) => rate && `${count(Math.round(rate))} images/s`;
const accuracy = (base) => base.accuracy && `${base.accuracy.toFixed(1)} %`;
const listed = (parts) => parts.filter(Boolean).join(", ");

const labelled = (base) => `${base.name}${base.default ? " (default)" : ""}: ${listed([accuracy(base), bytes(base.bytes), speed(base)])}`;

function figures(base) {
  const backbones = base.architectures.length > 1 && `${base.architectures.length} backbones`;
  return listed([
    base.accuracy ? `${accuracy(base)} on ImageNet` : "no published accuracy",
    backbones,
    bytes(base.bytes),
    `${base.input} x ${base.input} pixels`,
    speed(base) ?? "speed not measured yet",
    !base.in_store && "converted when first used",
  ]);
}
