// Begins: signs in, listens, shows the page that the address names.

import { get, live, setToken, signedIn } from "./api.js";
import { conflict } from "./conflict.js";
import { conflicts } from "./conflicts.js";
import { h, number } from "./dom.js";
import { history } from "./history.js";
import { overview } from "./overview.js";
import { settings } from "./settings.js";
import { state } from "./state.js";

const main = document.getElementById("main");
const nav = document.getElementById("nav");
const signout = document.getElementById("signout");
let leave = () => {}, hush = () => {};

const PAGES = [[/^#?\/?$/, overview], [/^#\/conflicts\/([0-9a-f]{24})$/, conflict], [/^#\/conflicts(?:\?.*)?$/, conflicts], [/^#\/history$/, history], [/^#\/settings$/, settings]];

function show(focus = true) {
  if (!state.session) return;
  leave();
  const hash = location.hash;
  const [match, page] = PAGES.map(([pattern, p]) => [hash.match(pattern), p]).find(([m]) => m) ?? [[], overview];
  for (const a of nav.children) {
    const href = a.getAttribute("href");
    const here = href === "#/" ? page === overview : hash.startsWith(href);
    if (here) a.setAttribute("aria-current", "page");
    else a.removeAttribute("aria-current");
  }
  leave = page(main, match[1]) ?? (() => {});
  if (focus) {
    main.focus({ preventScroll: true });
    scrollTo(0, 0);
  }
}

function connection(on) {
  const node = document.getElementById("live");
  node.className = `live ${on ? "on" : "off"}`;
  node.textContent = on ? "Live" : "No answer from Sangam; trying again…";
}

function heard(overview) {
  state.set(overview);
  const n = overview.status.unresolvedConflicts;
  const badge = document.getElementById("badge");
  badge.hidden = n === 0;
  badge.textContent = n > 999 ? "999+" : number(n);
  badge.setAttribute("aria-label", `${number(n)} open`);
  document.getElementById("site").textContent = overview.status.databases.join(", ");
}

async function begin() {
  try {
    state.session = await get("/api/sync/session");
  } catch (error) {
    if (error.status === 401) return signin(signedIn() ? "This token is not right. Look for a missing or an extra letter." : "");
    main.replaceChildren(h("section", { class: "card" }, h("h1", {}, "Sangam can’t be asked"), h("p", {}, error.message),
      h("div", { class: "actions" }, h("button", { type: "button", class: "main", onclick: () => location.reload() }, "Try again"))));
    return;
  }
  nav.hidden = false;
  signout.hidden = !signedIn();
  try {
    const about = await get("/openapi.json");
    state.canVerify = Boolean(about.paths["/api/sync/verify"]?.post);
    heard(await get("/api/sync/overview"));
  } catch {
    // The events bring it as soon as it can be told.
  }
  hush = live(heard, connection);
  show(false);
}

function signin(problem) {
  leave();
  leave = () => {};
  hush();
  nav.hidden = signout.hidden = true;
  state.session = state.overview = null;
  for (const id of ["live", "site"]) document.getElementById(id).textContent = "";
  setToken("");
  const input = h("input", { id: "token", name: "token", type: "password", required: true, autocomplete: "current-password", "aria-describedby": "token-help token-error", "aria-invalid": problem ? "true" : null });
  const error = h("p", { id: "token-error", class: "error", role: "alert" }, problem);
  main.replaceChildren(h("section", { class: "card signin" }, h("h1", {}, "Sign in"),
    h("form", { onsubmit: (event) => {
      event.preventDefault();
      setToken(input.value);
      begin();
    } },
    h("label", { for: "token" }, "Access token"), input, error,
    h("p", { id: "token-help", class: "hint" }, "Whoever set up Sangam chose it (api.token in sangam.toml, or SANGAM_API_TOKEN). It is kept for this tab only."),
    h("button", { class: "main" }, "Sign in"))));
  input.focus();
}

signout.addEventListener("click", () => signin(""));
document.addEventListener("signed-out", () => state.session && signin("Your token is no longer accepted. Please sign in again."));
window.addEventListener("hashchange", () => show());
begin();
