// Sync runs and outages.

import { get } from "./api.js";
import { bytes, duration, h, number, time } from "./dom.js";
import { linkTable } from "./overview.js";
import { state } from "./state.js";
import { RUNS, TRIGGERS } from "./words.js";

export function history(main) {
  let limit = 25, ended = false, last = "";
  const list = h("div", {}, h("p", { class: "empty" }, "Loading…"));
  const more = h("button", { type: "button", hidden: true, onclick: () => { limit = Math.min(1000, limit * 2); load(); } }, "Show more");
  const links = h("div", {});
  main.replaceChildren(h("h1", {}, "History"),
    h("section", { class: "card" }, h("h2", {}, "Sync runs"), list, h("div", { class: "actions" }, more)),
    h("section", { class: "card" }, h("h2", {}, "Connection to the cloud"), links));
  const sum = (by) => Object.values(by ?? {}).reduce((a, b) => a + b, 0);
  const cell = (name, value, kind = "num") => h("td", { class: kind, "data-label": name }, value);

  async function load() {
    try {
      const [runs, past] = await Promise.all([get(`/api/sync/logs?limit=${limit}`), get("/api/sync/history?hours=24")]);
      if (ended) return;
      more.hidden = runs.length < limit || limit >= 1000;
      list.replaceChildren(runs.length ? table(runs) : h("p", { class: "empty" }, "There was no sync run yet."));
      links.replaceChildren(linkTable(past.link));
    } catch (error) {
      if (!ended) list.replaceChildren(h("p", { class: "error" }, error.message));
    }
  }

  function table(runs) {
    return h("div", { class: "scroll" }, h("table", { class: "stack" },
      h("thead", {}, h("tr", {}, ["When", "Why", "Outcome"].map((n) => h("th", { scope: "col" }, n)), ["Sent", "Fetched", "Conflicts", "Size", "Took"].map((n) => h("th", { scope: "col", class: "num" }, n)))),
      h("tbody", {}, runs.map((r) => {
        const [name, mark] = RUNS[r.status] ?? [r.status, ""];
        return h("tr", {}, h("th", { scope: "row" }, time(r.startTime)), cell("Why", TRIGGERS[r.trigger] ?? r.trigger, ""),
          cell("Outcome", [h("span", { class: `pill ${mark}` }, name), r.errors.map((e) => h("div", { class: "small" }, e))].flat(), ""),
          cell("Sent", number(sum(r.localToRemote))), cell("Fetched", number(sum(r.remoteToLocal))), cell("Conflicts", number(sum(r.conflicts))),
          cell("Size", r.bytesTransferred ? bytes(r.bytesTransferred) : "–"), cell("Took", r.durationSeconds < 1 ? "a moment" : duration(r.durationSeconds)));
      }))));
  }

  const stop = state.watch(() => {
    const now = state.overview?.status.lastSyncTime ?? "";
    if (now !== last) { last = now; load(); }
  });
  last = state.overview?.status.lastSyncTime ?? "";
  load();
  return () => { ended = true; stop(); };
}
