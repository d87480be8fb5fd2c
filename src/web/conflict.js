// One conflict: both versions side by side, what each way of settling it would come to, and undo.

import { get, post } from "./api.js";
import { h, time, toast, when } from "./dom.js";
import { elsewhere, may, refusal, state } from "./state.js";
import { KINDS, STRATEGIES, kind, settled } from "./words.js";
import { label, plain } from "./values.js";

export function conflict(main, id) {
  let ended = false, all = false, timer;
  const path = `/api/sync/conflicts/${id}`;
  const back = h("p", {}, h("a", { href: "#/conflicts" }, "← All conflicts"));
  main.replaceChildren(back, h("p", { class: "quiet" }, "Loading…"));

  async function load(message) {
    let c;
    try {
      c = await get(path);
    } catch (error) {
      if (!ended) main.replaceChildren(back, h("section", { class: "card" }, h("h1", {}, "This conflict can’t be shown"), h("p", {}, error.message)));
      return;
    }
    if (ended) return;
    const [title, explained] = KINDS[c.kind] ?? [kind(c.kind), c.notes ?? ""];
    main.replaceChildren(back,
      h("div", {}, h("h1", {}, label(c)), h("p", {}, h("strong", {}, title), h("span", { class: "quiet" }, ` · ${c.collection} · `), time(c.timestamp)), h("p", { class: "quiet" }, explained)),
      message ? h("p", { class: "notice", role: "alert" }, message) : "",
      c.resolved ? outcome(c) : "",
      c.undoes ? replaced(c) : c.fields?.length ? compare(c) : h("section", { class: "card" }, h("h2", {}, "What happened"), h("p", {}, c.notes ?? explained)),
      c.resolved ? "" : decide(c));
  }

  function compare(c) {
    const rows = c.fields.filter((f) => f.name !== "_id");
    const differing = rows.filter((f) => f.differs);
    const cell = (f, side, name) => {
      const there = f[side] !== undefined && f[side] !== null || (f[side] === null && side in f && c[`${side}Document`]?.[f.name] === null);
      const changed = f.differs && side !== "base" && (f.changedBy === side || f.changedBy === "both");
      return h("td", { class: changed ? "changed" : "", "data-label": name }, changed && h("span", { class: "tag" }, "changed"), there ? plain(f[side]) : h("span", { class: "none" }, "not there"));
    };
    const body = h("tbody", {});
    const render = () => body.replaceChildren(...(all || !differing.length ? rows : differing).map((f) => h("tr", {}, h("th", { scope: "row" }, f.name), cell(f, "local", "Here"), cell(f, "base", "Before"), cell(f, "remote", "Cloud"))));
    render();
    const toggle = differing.length && differing.length < rows.length && h("label", { class: "check", for: "all" }, h("input", { type: "checkbox", id: "all", checked: all, onchange: (e) => { all = e.target.checked; render(); } }), "Show equal fields too");
    const gone = [c.localDocument === null && "It no longer exists here.", c.remoteDocument === null && "It no longer exists in the cloud."].filter(Boolean);
    const who = (change, place) => change?.at && `${place}: ${when(change.at)}${change.by ? ` by ${plain(change.by)}` : ""}`;
    const said = [who(c.changes?.local, "Changed here"), who(c.changes?.remote, "Changed in the cloud")].filter(Boolean);
    return h("section", { class: "card" }, h("div", { class: "head" }, h("h2", {}, "Side by side"), toggle),
      gone.map((t) => h("p", { class: "notice" }, t)), said.length ? h("p", { class: "quiet" }, said.join(" · ")) : "",
      h("div", { class: "scroll" }, h("table", { class: "compare stack" }, h("thead", {}, h("tr", {}, ["Field", "Here", "Before", "Cloud"].map((n) => h("th", { scope: "col" }, n)))), body)));
  }

  function decide(c) {
    if (elsewhere() !== null) return h("section", { class: "card" }, h("h2", {}, "Your decision"), h("p", { class: "notice" }, refusal()));
    const advice = c.recommendations ?? [];
    const offered = c.strategies ?? [...new Set(advice.map((a) => a.strategy))].map((strategy) => ({ strategy, possible: true, needsValue: false, summary: advice.find((a) => a.strategy === strategy).reason }));
    // What can't be done is not offered, unless that is all there is to say.
    const possible = offered.filter((s) => s.possible);
    const known = possible.length ? possible : offered;
    if (!known.length) return h("section", { class: "card" }, h("h2", {}, "Your decision"), h("p", {}, "The cloud can’t be reached now. Decide when the connection is back; nothing is lost meanwhile."));
    const best = advice.find((a) => known.some((s) => s.strategy === a.strategy && s.possible))?.strategy;
    known.sort((a, b) => (b.strategy === best) - (a.strategy === best));
    let chosen = null;
    const value = h("input", { id: "value", oninput: later, autocomplete: "off" });
    const valueBox = h("label", { for: "value", hidden: true }, `New value for ${c.field ?? "the field"}`, value);
    const notes = h("input", { id: "notes", maxLength: 500, autocomplete: "off" });
    const preview = h("div", { "aria-live": "polite" });
    const go = h("button", { type: "button", class: "main", disabled: true, onclick: settle }, "Settle it like this");
    const request = (more) => ({ strategy: chosen.strategy, ...(value.value && !valueBox.hidden && { newValue: value.value }), ...(c.version && { version: c.version }), ...more });
    const choice = (s) => h("label", { class: "choice", for: s.strategy },
      h("input", { type: "radio", name: "strategy", id: s.strategy, disabled: !s.possible || !may("operate"), onchange: () => choose(s) }),
      h("strong", {}, STRATEGIES[s.strategy]?.[0] ?? s.strategy, s.strategy === best && h("span", { class: "pill" }, "suggested")),
      h("span", { class: "why" }, s.possible && STRATEGIES[s.strategy] && c.fields?.length ? STRATEGIES[s.strategy][1] : s.summary));

    function choose(s) {
      chosen = s;
      valueBox.hidden = !s.needsValue;
      if (s.needsValue && !value.value) value.value = s.suggestedValue ?? "";
      look();
    }
    function later() {
      go.disabled = true;
      clearTimeout(timer);
      timer = setTimeout(look, 400);
    }
    async function look() {
      const mine = chosen;
      go.disabled = true;
      if (!c.fields?.length) {
        preview.replaceChildren(h("p", {}, mine.summary));
        go.disabled = false;
        return;
      }
      try {
        const r = await post(`${path}/resolve`, request({ dryRun: true }));
        if (ended || mine !== chosen) return;
        go.disabled = false;
        const result = r.result?.document;
        const fields = c.fields.filter((f) => f.differs && f.name !== "_id");
        const other = r.result?.otherDocument;
        preview.replaceChildren(h("div", { class: "notice good" }, h("p", {}, h("strong", {}, "What would happen: "), mine.strategy === "keep_local" || mine.strategy === "keep_remote" || mine.strategy === "merge" ? (result ? "both places then have" : "the document is then deleted in both places") : r.message),
          result && h("dl", {}, fields.map((f) => [h("dt", {}, f.name), h("dd", {}, f.name in result ? plain(result[f.name]) : "not there")]))),
        ...[["The document afterwards", result], ["The other document afterwards", other]].filter(([, d]) => d).map(([name, d]) => h("details", {}, h("summary", {}, name), h("pre", { tabIndex: 0, role: "region", "aria-label": name }, JSON.stringify(d, null, 2)))));
      } catch (error) {
        if (ended || mine !== chosen) return;
        if (error.body?.conflict) return load("This document has changed since you opened the page. Here is how it stands now.");
        preview.replaceChildren(h("p", { class: "notice bad" }, error.message));
      }
    }
    async function settle() {
      go.disabled = true;
      go.textContent = "Settling…";
      try {
        const r = await post(`${path}/resolve`, request(notes.value && { notes: notes.value }));
        toast(`Settled: ${(STRATEGIES[chosen.strategy]?.[0] ?? chosen.strategy).toLowerCase()}.`, { name: "Undo", run: undo });
        if (!ended) location.hash = "#/conflicts";
      } catch (error) {
        if (ended) return;
        if (error.body?.conflict) return load("This document has changed since you opened the page, so nothing was written. Here is how it stands now.");
        preview.replaceChildren(h("p", { class: "notice bad", role: "alert" }, error.message));
        go.textContent = "Settle it like this";
        go.disabled = false;
      }
    }
    const form = h("section", { class: "card" }, h("h2", {}, "Your decision"),
      refusal() && h("p", { class: "notice" }, refusal()),
      h("fieldset", { class: "choices" }, h("legend", { class: "sr" }, "Which version counts?"), known.map(choice)),
      h("div", { class: "form gap" }, valueBox, h("label", { for: "notes" }, "Note for the record (optional)", notes)), preview,
      h("div", { class: "actions" }, go));
    return form;
  }

  /// An undo is on record, too: what it put aside can itself be put back.
  function replaced(c) {
    const rows = c.fields.filter((f) => f.name !== "_id" && f.local !== undefined && f.local !== null);
    return h("section", { class: "card" }, h("h2", {}, "What was put aside by that"),
      h("p", {}, h("a", { href: `#/conflicts/${c.undoes}` }, "The decision that was taken back")),
      rows.length ? h("dl", {}, rows.map((f) => [h("dt", {}, f.name), h("dd", {}, plain(f.local))])) : "");
  }

  function outcome(c) {
    const button = h("button", { type: "button", disabled: !may("operate"), onclick: async () => { button.disabled = true; await undo(); } }, "Take it back");
    const undone = c.undoneAt;
    return h("section", { class: "notice good" }, h("p", {}, h("strong", {}, undone ? "Settled, then taken back: " : c.undoes ? "A decision was " : "Settled: "), settled(c.resolutionStrategy), c.resolvedBy ? ` (${c.resolvedBy}, ${when(c.resolvedAt)})` : ""),
      c.notes && !c.undoes ? h("p", { class: "quiet" }, c.notes) : "", undone ? "" : h("div", { class: "actions" }, button));
  }

  async function undo() {
    try {
      await post(`${path}/undo`);
      toast("Taken back: the earlier version goes to both places again.");
    } catch (error) {
      toast(error.message);
    }
    if (!ended) load();
  }

  let before = elsewhere();
  const stop = state.watch(() => {
    if (elsewhere() === before) return;
    before = elsewhere();
    load();
  });
  load();
  return () => { ended = true; stop(); clearTimeout(timer); };
}
