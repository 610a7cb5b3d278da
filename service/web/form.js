// A form of a JSON schema: only what was changed is sent, so that the server's own defaults hold.

import { html } from "./page.js";

/** `values` ({"budget.max_epochs": 3}) -> the body ({budget: {max_epochs: 3}}) */
export function bodyOf(values) {
  const body = {};
  for (const [path, value] of Object.entries(values)) {
    if (value === undefined) continue;
    const [last, ...groups] = path.split(".").reverse();
    const place = groups.reduceRight((at, name) => (at[name] ??= {}), body);
    place[last] = value;
  }
  return body;
}

/** Fields of `schema` but those that `without` names; objects become groups. `change(path, value)`, undefined for the default. */
export function Fields({ schema, root = schema, path = "", only, without = [], values, change, error }) {
  const names = only ?? Object.keys(schema.properties).filter((name) => !without.includes(name));
  return names.map((name) => {
    const field = resolved(schema.properties[name], root);
    const at = path + name;
    if (field.properties)
      return html`<fieldset class="group" key=${at}>
        <legend>${words(name)}</legend>
        <${Fields} schema=${field} root=${root} path=${`${at}.`} values=${values} change=${change} error=${error} />
      </fieldset>`;
    const required = schema.required?.includes(name);
    return html`<${Field} key=${at} at=${at} field=${field} required=${required} value=${values[at]} change=${change} error=${error} />`;
  });
}

function resolved(field, root) {
  const { $ref } = field;
  return $ref ? { ...root.$defs[$ref.split("/").pop()], ...field } : field;
}

const words = (name) => name.replaceAll("_", " ");

function Field({ at, field, required, value, change, error }) {
  const name = at.split(".").pop();
  const wrong = error?.param === at;
  const set = (given) => change(at, given);
  return html`<div class="field">
    <label for=${at}>${words(name)}</label>
    <${Control} id=${at} field=${field} required=${required} value=${value} set=${set} wrong=${wrong} />
    ${field.description && html`<p class="faint" id="${at}-note">${field.description}</p>`}
    ${wrong && html`<p class="trouble">${error.message}</p>`}
  </div>`;
}

function Control({ id, field, required, value, set, wrong }) {
  const kinds = field.anyOf ?? [field];
  const kind = kinds.find((one) => one.type !== "null");
  const common = { id, required, "aria-describedby": `${id}-note`, "aria-invalid": wrong };
  const choices = kind.type === "boolean" ? [true, false] : kind.enum;
  if (choices) return html`<${Choice} common=${common} choices=${choices} standard=${field.default} value=${value} set=${set} />`;
  const hint = required ? "" : placeholder(id, field.default);
  const pattern = kind.pattern?.replaceAll("-]", "\\-]"); // in a class, browsers want a hyphen escaped
  const typed = (event) => set(parse(event.target.value.trim(), kinds));
  const number = ["number", "integer"].includes(kind.type);
  const limits = number && { inputmode: "decimal" };
  return html`<input ...${common} ...${limits} pattern=${pattern} placeholder=${hint} value=${shown(value)} onChange=${typed} autocomplete="off" />`;
}

function Choice({ common, choices, standard, value, set }) {
  const say = (choice) => ({ true: "yes", false: "no" })[choice] ?? choice;
  const chosen = choices.indexOf(value ?? standard);
  const picked = (event) => set(event.target.value === "" ? undefined : choices[event.target.value]);
  return html`<select ...${common} onChange=${picked}>
    ${standard === null && html`<option value="" selected=${chosen < 0}>auto</option>`}
    ${choices.map((choice, i) => html`<option value=${i} selected=${i === chosen}>${say(choice)}</option>`)}
  </select>`;
}

/** What holds where nothing is typed. */
function placeholder(at, standard) {
  if (standard === null) return at.startsWith("hyperparameters.") ? "auto" : "not set";
  return typeof standard === "object" ? "none" : String(standard);
}

const shown = (value) => (Array.isArray(value) ? value.join(", ") : value && typeof value === "object" ? pairs(value) : (value ?? ""));
const pairs = (value) => Object.entries(value).map((pair) => pair.join("=")).join(", ");

/** What was typed, as the schema wants it; what is no number is sent as it is, and the server says so. */
function parse(text, kinds) {
  if (text === "") return undefined;
  const has = (type) => kinds.some((kind) => kind.type === type);
  if (has("number") || has("integer")) return Number.isNaN(Number(text)) ? text : Number(text);
  if (has("array") && text.includes(",")) return text.split(",").map((part) => part.trim());
  if (has("object")) return Object.fromEntries(text.split(",").map((pair) => pair.split("=").map((word) => word.trim())));
  return text;
}
