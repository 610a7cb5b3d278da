import { html } from "./page.js";

export const Server = () => html`<p>Server</p>`;
