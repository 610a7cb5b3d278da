// The frame: four views, which the part of the address behind # chooses, and what holds for all of them.

import { onKeyWanted, server, watchServer } from "./api.js";
import { Models } from "./models.js";
import { Dialogs, html, keyFor, render, useEffect, useServer, useState } from "./page.js";
import { Server } from "./server.js";
import { Train } from "./train.js";
import { Try } from "./try.js";

const VIEWS = { try: ["Try", Try], models: ["Models", Models], train: ["Train", Train], server: ["Server", Server] };

/** `#train/ftjob-1?x=y` -> ["train", "ftjob-1", {x: "y"}] */
function place() {
  const [path, query = ""] = location.hash.slice(1).split("?");
  const [view, detail = ""] = path.split("/");
  return [view in VIEWS ? view : "try", decodeURIComponent(detail), Object.fromEntries(new URLSearchParams(query))];
}

function usePlace() {
  const [found, set] = useState(place());
  useEffect(() => {
    const moved = () => set(place());
    addEventListener("hashchange", moved);
    return () => removeEventListener("hashchange", moved);
  }, []);
  return found;
}

function Notice() {
  const state = useServer();
  const said = {
    ready: "",
    starting: `The server is not ready: ${server.reason}.`,
    away: "The server does not answer. This page goes on by itself once it is back.",
  }[state];
  return html`<p class="notice" role="status" hidden=${!said}>${said}</p>`;
}

function App() {
  const [view, detail, query] = usePlace();
  const [title, View] = VIEWS[view];
  useEffect(() => {
    document.title = `${title} - Imago`;
  }, [title]);
  return html`
    <a class="skip" href="#main" onClick=${skip}>Skip to the content</a>
    <header>
      <a class="brand" href="#try"><img src="web/icon.svg" alt="" width="26" height="26" />Imago</a>
      <nav aria-label="Views">
        ${Object.entries(VIEWS).map(
          ([name, [label]]) =>
            html`<a href="#${name}" aria-current=${name === view ? "page" : undefined}>${label}</a>`,
        )}
      </nav>
      <a class="docs" href="docs">API</a>
    </header>
    <${Notice} />
    <main id="main" tabindex="-1">
      <h1>${title}</h1>
      <${View} detail=${detail} query=${query} />
    </main>
    <${Dialogs} />
  `;
}

function skip(event) {
  event.preventDefault();
  document.getElementById("main").focus();
}

onKeyWanted(keyFor);
watchServer();
render(html`<${App} />`, document.body);
