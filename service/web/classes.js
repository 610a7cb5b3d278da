// Class names, of which a model can have a thousand: a search box, and the first rows that match.

import { html, useState } from "./page.js";
import { count } from "./words.js";

export const MOST_ROWS = 30; // more are searched, not scrolled

const named = (name, index) => html`<span class="faint number">${index}</span> ${name}`;

/** An <ol> of at most MOST_ROWS names, each as `row(name, index)`, and a search box where there are more. */
export function ClassList({ names, of, row = named, kind = "found" }) {
  const [text, setText] = useState("");
  const words = text.toLowerCase().split(/\s+/);
  const matches = names.map((name, index) => [name, index]).filter(([name]) => words.every((word) => name.toLowerCase().includes(word)));
  const left = matches.length - MOST_ROWS;
  const searched = names.length > MOST_ROWS;
  return html`
    ${searched && html`<input type="search" class="search" aria-label="Search the ${count(names.length)} classes of ${of}" placeholder="Search ${count(names.length)} classes" value=${text} onInput=${(event) => setText(event.target.value)} autocomplete="off" />`}
    <ol class=${kind}>${matches.slice(0, MOST_ROWS).map(([name, index]) => html`<li key=${index}>${row(name, index)}</li>`)}</ol>
    ${searched && html`<p class="faint" role="status">${matches.length === 0 ? "No class matches." : left > 0 && `${count(left)} more`}</p>`}
  `;
}
