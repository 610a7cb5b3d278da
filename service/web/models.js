import { html } from "./page.js";

export const Models = () => html`<p>Models</p>`;
