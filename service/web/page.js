// What all views are built with: templates, loading, dialogs.

import { html, render, useCallback, useEffect, useRef, useState } from "./vendor/preact.js";
import { server } from "./api.js";

export { html, render, useCallback, useEffect, useRef, useState };

/** The server's state, as it changes. */
export function useServer() {
  const [, renew] = useState(0);
  useEffect(() => {
    const changed = () => renew((n) => n + 1);
    server.addEventListener("change", changed);
    return () => server.removeEventListener("change", changed);
  }, []);
  return server.state;
}

/** What `load` gives, now, every `everyMs` while somebody looks, and when the server is back: [data, error, reload]. */
export function useLoad(load, everyMs = 0, dependencies = []) {
  const [found, set] = useState([null, null]);
  const state = useServer();
  const current = useRef(0);
  const run = useCallback(async (quiet) => {
    const turn = ++current.current;
    try {
      const data = await load(quiet);
      if (turn === current.current) set([data, null]);
    } catch (error) {
      if (turn === current.current) set(([data]) => [data, error]);
    }
  }, dependencies);
  useEffect(() => {
    if (state !== "away") run(false);
    const timer = everyMs && setInterval(() => document.hidden || run(true), everyMs);
    return () => {
      clearInterval(timer);
      current.current += 1;
    };
  }, [run, everyMs, state]);
  return [...found, () => run(false)];
}

/** Work that a button starts: [start, busy, error]. */
export function useWork(work) {
  const [busy, setBusy] = useState(false);
  const [error, setError] = useState(null);
  const start = async (...given) => {
    setBusy(true);
    setError(null);
    try {
      return await work(...given);
    } catch (caught) {
      setError(caught);
    } finally {
      setBusy(false);
    }
  };
  return [start, busy, error];
}

export const Trouble = ({ error, again }) =>
  error &&
  html`<p class="trouble" role="alert">
    ${error.message}
    ${again && html` <button type="button" onClick=${again}>Try again</button>`}
  </p>`;

// Dialogs: one at a time, awaited like functions

let show = () => {};

/** A <dialog> around `content(close)`; resolves to what it is closed with, or null. */
export const dialog = (content) => new Promise((resolve) => show({ content, resolve }));

/** True once the person has said so. */
export const confirmed = (title, text, action) =>
  dialog(
    (close) => html`<form method="dialog" onSubmit=${() => close(true)}>
      <h2>${title}</h2>
      <p>${text}</p>
      <menu>
        <button type="button" onClick=${() => close(null)}>Cancel</button>
        <button class="primary">${action}</button>
      </menu>
    </form>`,
  );

export const keyFor = (reason) =>
  dialog(
    (close) => html`<form method="dialog" onSubmit=${(event) => close(event.target.elements.key.value.trim() || null)}>
      <h2>A key, please</h2>
      <p>${reason}</p>
      <label>Key <input name="key" type="password" autocomplete="off" required autofocus /></label>
      <p class="faint">
        The admin key is the setting IMAGO_ADMIN_KEY, or stands in admin.key in the server's data folder. It is kept in this tab alone.
      </p>
      <menu>
        <button type="button" onClick=${() => close(null)}>Cancel</button>
        <button class="primary">Go on</button>
      </menu>
    </form>`,
  );

export function Dialogs() {
  const [shown, set] = useState([]);
  show = (one) => set((others) => [...others, one]);
  const [first] = shown;
  const close = (value) => {
    first.resolve(value);
    set((others) => others.filter((one) => one !== first));
  };
  return first && html`<${Modal} key=${first} close=${close}>${first.content(close)}<//>`;
}

function Modal({ close, children }) {
  const element = useRef(null);
  useEffect(() => element.current.showModal(), []);
  return html`<dialog ref=${element} onCancel=${() => close(null)}>${children}</dialog>`;
}
