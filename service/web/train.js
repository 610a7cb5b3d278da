import { html } from "./page.js";

export const Train = () => html`<p>Train</p>`;
