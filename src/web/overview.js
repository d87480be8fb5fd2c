// The first page: how things are, what can be done, and the figures behind it.

import { get, post } from "./api.js";
import { chart } from "./charts.js";
import { ask, count, duration, fill, h, number, svg, time, toast, when } from "./dom.js";
import { elsewhere, link, may, state } from "./state.js";
import { REASONS, free, sentence, work } from "./words.js";

/// Shapes, so that the level can be told without colour.
const SIGNS = {
  done: "M5 12.5l4.5 4.5L19 7.5", moving: "M4 9h13l-3.5-3.5M20 15H7l3.5 3.5", paused: "M9 6v12M15 6v12", away: "M4 4l16 16M7 15a6 6 0 0 1 3-3M12 19h0M4 11a11 11 0 0 1 4-2.6M12 8a11 11 0 0 1 8 3",
  ask: "M8.5 9a3.5 3.5 0 1 1 5 3.2c-1 .5-1.5 1.1-1.5 2.3M12 18.5h0", stop: "M12 5v9M12 18.5h0",
};
const RANGES = [["Day", 24], ["Week", 168], ["Month", 720], ["Year", 8760]];

export function overview(main) {
  let hours = 24, history = null, collections = null, ended = false, busy = "";
  const picture = svg("path", {});
  const sign = h("div", { class: "sign", "aria-hidden": "true" }, svg("svg", { viewBox: "0 0 24 24" }, picture));
  const title = h("h1", { id: "sentence", "aria-live": "polite" });
  const more = h("div", { class: "more" });
  const progress = h("div", { class: "progress" });
  const button = (name, run, kind = "") => h("button", { type: "button", class: kind, onclick: run }, name);
  const sync = button("Sync now", () => act("sync", "/api/sync/sync", (run) => `Done: ${count(sum(run.localToRemote), "document")} sent, ${number(sum(run.remoteToLocal))} fetched.`), "main");
  const pause = button("Pause", async () => {
    const paused = state.overview?.status.isPaused;
    if (!paused && !(await ask("Pause syncing?", "Changes go on being noted, but nothing moves until you press Resume.", "Pause"))) return;
    await act("pause", paused ? "/api/sync/resume" : "/api/sync/pause", () => "");
  });
  const mend = button("Compare and mend", async () => {
    const text = ["Both places are read in full and compared, and what differs is brought together. This can take a while and uses the internet connection.", "You can go on working meanwhile."];
    if (await ask("Compare everything now?", text, "Compare")) await act("reconcile", "/api/sync/reconcile", () => "Compared: both places are equal.");
  });
  const verify = state.canVerify && button("Check only", async () => {
    if (await ask("Check that both places are equal?", "Both places are read in full and compared; nothing is changed.", "Check")) {
      await act("verify", "/api/sync/verify", (v) => (differing(v) ? `${count(differing(v), "document")} differ.` : "Both places are equal."));
    }
  });
  const hero = h("section", { class: "card hero", "aria-labelledby": "sentence" },
    h("div", { class: "words" }, sign, h("div", {}, title, more)), progress, h("div", { class: "actions" }, sync, pause, mend, verify));
  const notices = h("div", {});
  const places = h("section", { class: "card", "aria-label": "Both places" });
  const ranges = h("div", { class: "segments", role: "group", "aria-label": "Time shown" },
    RANGES.map(([name, n]) => h("button", { type: "button", "aria-pressed": String(n === hours), onclick: (e) => {
      hours = n;
      for (const b of ranges.children) b.setAttribute("aria-pressed", String(b === e.currentTarget));
      loadHistory();
    } }, name)));
  const [waiting, lag, moved] = [h("div"), h("div"), h("div")];
  const table = h("div", { class: "scroll" }, h("p", { class: "empty" }, "Loading…"));
  const links = h("div", {});
  const queue = h("div", {});
  main.replaceChildren(hero, notices, places,
    h("section", { class: "card" }, h("div", { class: "head" }, h("h2", {}, "Over time"), ranges), h("div", { class: "charts" }, waiting, lag, moved)),
    h("section", { class: "card" }, h("h2", {}, "Collections"), table),
    h("div", { class: "two" }, h("section", { class: "card" }, h("h2", {}, "Connection to the cloud"), links), h("section", { class: "card" }, h("h2", {}, "What is waiting"), queue)));

  async function act(name, path, done) {
    busy = name;
    render();
    try {
      const said = done(await post(path));
      if (said) toast(said);
    } catch (error) {
      toast(error.message);
    }
    busy = "";
    if (!ended) { render(); loadCollections(); }
  }

  function render() {
    const o = state.overview;
    if (!o || ended) return;
    const s = o.status;
    const now = sentence(o, collections);
    hero.className = `card hero ${now.level}`;
    picture.setAttribute("d", SIGNS[now.sign]);
    if (title.textContent !== now.text) title.textContent = now.text;
    document.title = now.level === "ok" ? "Sangam" : `${now.text} – Sangam`;
    fill(more, now.more, () => now.more.filter(Boolean).map((t) => h("p", {}, t)));
    const p = s.progress;
    progress.hidden = !p;
    if (p) {
      fill(progress, p.what, () => [h("label", { for: "work" }, ""), h("progress", { id: "work" }), h("p", { class: "quiet small" })]);
      const [name, bar, text] = progress.children;
      name.textContent = elsewhere() === null ? work(p) : "Reading what both places have";
      bar.max = Math.max(1, p.total);
      bar.value = Math.min(p.documents, p.total);
      text.textContent = `${number(p.documents)} of about ${count(p.total, "document")}, at ${p.collection}${p.secondsLeft ? `; about ${duration(p.secondsLeft)} left` : ""}`;
    }
    pause.textContent = s.isPaused ? "Resume" : "Pause";
    sync.textContent = busy === "sync" ? "Syncing…" : "Sync now";
    mend.textContent = busy === "reconcile" ? "Comparing…" : "Compare and mend";
    if (verify) verify.textContent = busy === "verify" ? "Checking…" : "Check only";
    for (const b of [sync, mend, verify]) if (b) b.disabled = busy !== "" || !may("operate") || !s.isOnline || s.isPaused;
    pause.disabled = !may("operate") || busy === "pause";
    fill(notices, s.notices, () => s.notices.length > 0 && h("section", { class: "notice", "aria-label": "Please note" }, h("ul", {}, s.notices.map((n) => h("li", {}, upper(n))))));
    renderPlaces(s, o);
  }

  function renderPlaces(s, o) {
    const total = (side) => (collections && collections.every((c) => c[side] !== null) ? number(collections.reduce((n, c) => n + c[side], 0)) : "–");
    const key = [s.pendingDocuments, s.pendingInbox, s.link.state, s.link.reason, s.link.since, total("local"), total("remote"), free(o)];
    fill(places, key, () => {
      const way = (to, n) => h("div", { class: `way ${to ? "to" : "from"} ${s.isOnline ? "" : "cut"}` },
        h("span", { class: "tip", "aria-hidden": "true" }, to ? "" : "←"), h("span", { class: "rule" }), h("span", { class: "tip", "aria-hidden": "true" }, to ? "→" : ""),
        h("span", { class: "tells" }, n === 0 ? (to ? "nothing to send" : "nothing to fetch") : to ? `${number(n)} to send` : `${number(n)} to fetch`));
      return h("div", { class: "places" },
        h("div", { class: "place" }, h("div", { class: "name" }, "In this building"), h("div", { class: "number" }, total("local")), h("div", { class: "quiet small" }, ["documents", free(o)].filter(Boolean).join(" · "))),
        h("div", { class: "between" }, way(true, s.pendingDocuments), h("span", { class: `state ${s.isOnline ? "online" : "away"}` }, link(s)), way(false, s.pendingInbox)),
        h("div", { class: "place cloud" }, h("div", { class: "name" }, "In the cloud"), h("div", { class: "number" }, total("remote")), h("div", { class: "quiet small" }, s.isOnline ? "documents" : "not reached now")));
    });
  }

  function renderHistory() {
    const to = Date.now(), from = to - hours * 36e5;
    const changes = [...history.link].reverse();
    const away = changes.flatMap((c, i) => (c.online ? [] : [[new Date(c.at).getTime(), i + 1 < changes.length ? new Date(changes[i + 1].at).getTime() : to]])).filter(([a, b]) => b > from && a < to);
    const common = { samples: history.samples, stepSeconds: history.stepSeconds, from, to, away };
    chart(waiting, { ...common, title: "Changes waiting", write: number, lines: [{ field: "outbox", name: "to send", mark: "a" }, { field: "inbox", name: "to fetch", mark: "b" }] });
    chart(lag, { ...common, title: "How far behind", seconds: true, write: (v) => (v < 1 ? "none" : duration(v)), lines: [{ field: "lag", name: "delay", mark: "a" }] });
    chart(moved, { ...common, title: "Documents moved", write: number, sum: true, lines: [{ field: "sent", name: "sent", mark: "a" }, { field: "fetched", name: "fetched", mark: "b" }] });
    fill(links, history.link.slice(0, 6), () => linkTable(history.link.slice(0, 6)));
  }

  async function loadHistory() {
    try {
      history = await get(`/api/sync/history?hours=${hours}`);
      if (!ended) renderHistory();
    } catch (error) {
      if (!ended) links.replaceChildren(h("p", { class: "error" }, error.message));
    }
  }

  async function loadCollections() {
    try {
      collections = await get("/api/sync/collections");
      if (ended) return;
      render();
      fill(table, collections, () => collectionTable(collections));
    } catch (error) {
      if (!ended) fill(table, error.message, () => h("p", { class: "error" }, error.message));
    }
    try {
      const list = await get("/api/sync/queue?limit=8");
      if (!ended) fill(queue, list, () => queueList(list));
    } catch {
      // The table above says it already.
    }
  }

  let pending = "";
  const stop = state.watch(() => {
    render();
    const s = state.overview?.status;
    const now = s && JSON.stringify([s.pendingDocuments, s.pendingInbox, s.lastSyncTime, s.isOnline, s.unresolvedConflicts]);
    if (now && now !== pending) {
      const first = pending === "";
      pending = now;
      clearTimeout(soon);
      if (!first) soon = setTimeout(() => { loadCollections(); loadHistory(); }, 700);
    }
  });
  let soon;
  render();
  loadCollections();
  loadHistory();
  const each = setInterval(() => { loadHistory(); loadCollections(); }, 60000);
  return () => { ended = true; stop(); clearInterval(each); clearTimeout(soon); document.title = "Sangam"; };
}

const sum = (by) => Object.values(by ?? {}).reduce((a, b) => a + b, 0);
const upper = (text) => text.charAt(0).toUpperCase() + text.slice(1);
const differing = (v) => (v.total ? v.total.onlyLocal + v.total.onlyRemote + v.total.different : 0);

export function linkTable(changes) {
  if (!changes.length) return h("p", { class: "empty" }, "Nothing recorded yet.");
  const rows = changes.map((c, i) => {
    const until = i === 0 ? Date.now() : new Date(changes[i - 1].at);
    return h("tr", {}, h("th", { scope: "row" }, time(c.at)),
      h("td", { "data-label": "State" }, h("span", { class: `pill ${c.online ? "ok" : "wait"}` }, c.online ? "connected" : "away"), c.online ? "" : ` ${REASONS[c.reason] ?? ""}`),
      h("td", { class: "num", "data-label": "For" }, duration((until - new Date(c.at)) / 1000)));
  });
  return h("table", { class: "stack" }, h("thead", {}, h("tr", {}, ["Since", "State"].map((n) => h("th", { scope: "col" }, n)), h("th", { scope: "col", class: "num" }, "For"))), h("tbody", {}, rows));
}

function collectionTable(list) {
  if (!list.length) return h("p", { class: "empty" }, "There are no collections to sync yet. As soon as your app writes something, it appears here.");
  const cell = (label, value, kind = "num") => h("td", { class: kind, "data-label": label }, value);
  return h("table", { class: "stack" },
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Collection"), ["Here", "Cloud", "Waiting"].map((n) => h("th", { scope: "col", class: "num" }, n)), h("th", { scope: "col" }, "Last moved"))),
    h("tbody", {}, list.map((c) => h("tr", {},
      h("th", { scope: "row" }, c.collection, " ", c.halted && h("span", { class: "pill bad" }, "on hold"), c.goes && h("span", { class: "pill" }, `goes ${c.goes}`)),
      cell("Here", c.local === null ? "–" : number(c.local)), cell("Cloud", c.remote === null ? "–" : number(c.remote)),
      cell("Waiting", c.pending ? h("span", { class: "pill wait" }, number(c.pending)) : "0"), cell("Last moved", time(c.lastChange), "")))));
}

function queueList(list) {
  if (!list.entries.length) return h("p", { class: "empty" }, "Nothing is waiting.");
  const names = { waiting: ["waiting", ""], conflict: ["needs a decision", "wait"], failed: ["refused", "bad"] };
  const more = list.outbox + list.inbox - list.entries.length;
  return [h("ul", { class: "list" }, list.entries.map((e) => h("li", { class: "row" },
    h("span", {}, h("span", { class: "title" }, e.collection), " ", e.queue === "outbox" ? "to the cloud" : "from the cloud"),
    h("span", { class: "side" }, h("span", { class: `pill ${names[e.state]?.[1] ?? ""}` }, names[e.state]?.[0] ?? e.state)),
    h("span", { class: "quiet small" }, `since ${when(e.since)}`, e.reason ? `: ${e.reason}` : "")))), more > 0 && h("p", { class: "quiet" }, `and ${number(more)} more`)];
}
