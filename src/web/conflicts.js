// The conflicts: a list that stays quick with ten thousand, and a way to settle many alike at once.

import { get, page, post } from "./api.js";
import { ask, count, fill, h, number, time, toast } from "./dom.js";
import { elsewhere, may, refusal, state } from "./state.js";
import { KINDS, STRATEGIES, kind, settled } from "./words.js";
import { label } from "./values.js";

const PAGE = 50;
/// So many are settled by one request: an answer comes within seconds, however many there are.
const SLICE = 200;
const kept = { resolved: "false", kind: "", collection: "" };

const field = (id, name, input) => h("div", { class: "field" }, h("label", { for: id }, name), input);

export function conflicts(main) {
  let items = [], total = 0, next = null, ended = false, asked = 0, collections = [], known = [], busy = false;
  const select = (id, name, options) => field(id, name, h("select", { id, onchange: (e) => { kept[id] = e.target.value; load(); } },
    options.map(([value, text]) => h("option", { value, selected: kept[id] === value }, text))));
  const collection = h("select", { id: "collection", onchange: (e) => { kept.collection = e.target.value; load(); } });
  const head = h("h1", {}, "Conflicts");
  const sub = h("p", { class: "quiet", "aria-live": "polite" });
  const list = h("div", {}, h("p", { class: "empty" }, "Loading…"));
  const more = h("button", { type: "button", hidden: true, onclick: () => load(true) }, "Show more");
  const bulk = h("div", {});
  const simple = h("button", { type: "button", onclick: auto }, "Settle the simple ones");
  main.replaceChildren(
    h("div", {}, head, h("p", { class: "quiet" }, "When the same thing was changed here and in the cloud, Sangam asks instead of guessing. Both versions are safe until you decide, and every decision can be taken back.")),
    h("section", { class: "card", "aria-label": "List" },
      h("div", { class: "filters" }, select("resolved", "Show", [["false", "open"], ["true", "settled"], ["", "all"]]),
        select("kind", "What happened", [["", "anything"], ...Object.entries(KINDS).map(([k, v]) => [k, v[0]])]),
        field("collection", "Collection", collection), simple),
      bulk, sub, list, h("div", { class: "actions" }, more)));

  function shown() {
    const none = kept.resolved === "false" && !kept.kind && !kept.collection;
    const word = { false: "open conflict", true: "settled conflict", "": "conflict" }[kept.resolved];
    sub.textContent = total ? `${count(total, word)}, newest first` : "";
    const open = total > 0 && kept.resolved === "false";
    simple.disabled = busy || !may("operate") || !open;
    more.hidden = !next;
    const names = [...new Set([...known, ...collections, ...items.map((c) => c.collection)])].sort();
    if (names.length !== collections.length || !collection.options.length) {
      collections = names;
      collection.replaceChildren(h("option", { value: "" }, "any"), ...names.map((n) => h("option", { value: n, selected: n === kept.collection }, n)));
    }
    fill(list, items.map((c) => [c._id, c.resolved]), () => (items.length
      ? h("ul", { class: "list" }, items.map(row))
      : h("p", { class: "empty" }, none ? "✓ No open conflicts. There is nothing to decide." : "None of this sort.")));
    renderBulk(open);
  }

  function row(c) {
    return h("li", {}, h("a", { class: "row", href: `#/conflicts/${c._id}` },
      h("span", { class: "title" }, label(c)),
      h("span", { class: "side" }, time(c.timestamp)),
      h("span", {}, kind(c.kind), c.field ? [": ", h("span", { class: "nowrap" }, c.field.split(",").join(", "))] : "", h("span", { class: "quiet" }, ` · ${c.collection}`)),
      h("span", { class: "side" }, c.resolved && h("span", { class: "pill ok" }, settled(c.resolutionStrategy)))));
  }

  function renderBulk(open) {
    // What is at work stays as it is, though the list gets shorter meanwhile.
    if (busy) return;
    const narrow = kept.kind || kept.collection;
    const documents = !["collection_dropped", "mass_delete"].includes(kept.kind);
    fill(bulk, [open && total, kept.kind, kept.collection, documents, refusal()], () => {
      if (!open || total === 0) return null;
      if (refusal()) return h("p", { class: "notice" }, refusal());
      if (total < 2) return null;
      const what = [kept.kind && `“${kind(kept.kind)}”`, kept.collection && `in ${kept.collection}`].filter(Boolean).join(" ");
      if (!narrow || !documents) return h("p", { class: "hint" }, "To settle many in the same way, choose what happened or a collection.");
      const choice = h("select", { id: "bulk" }, Object.entries(STRATEGIES).map(([k, v]) => h("option", { value: k }, v[0])));
      const says = h("p", { "aria-live": "polite" });
      const explain = () => { says.textContent = STRATEGIES[choice.value][1]; };
      choice.addEventListener("change", explain);
      explain();
      const body = (dryRun) => ({ strategy: choice.value, ...(kept.kind && { kind: kept.kind }), ...(kept.collection && { collection: kept.collection }), ...(dryRun && { dryRun: true, max: 200 }) });
      const preview = h("button", { type: "button", onclick: () => work(preview, async () => {
        const r = await post("/api/sync/conflicts/resolve", body(true));
        const of = Math.min(200, total);
        says.textContent = `Of the first ${number(of)}: ${number(r.resolved)} would be settled, ${number(r.skipped + r.failed)} would stay open.`;
      }) }, "Preview");
      const go = h("button", { type: "button", class: "main", onclick: async () => {
        if (!(await ask(`Settle ${count(total, "conflict")}?`, [`“${STRATEGIES[choice.value][0]}” for all ${what}.`, "What is not kept stays on record, and each can be taken back."], "Settle them"))) return;
        await work(go, async () => {
          const r = await slices("/api/sync/conflicts/resolve", body(false), go);
          toast(`${count(r.resolved, "conflict")} settled${r.skipped + r.failed ? `, ${number(r.skipped + r.failed)} stay open` : ""}.${r.rest}`);
        });
      } }, `Settle all ${number(total)}`);
      return h("section", { class: "bulk" }, h("h2", {}, `Settle all ${what}`), h("div", { class: "filters" }, field("bulk", "In this way", choice), preview, go), says);
    });
  }

  /// One slice after the other; leaving the page stops behind the one at work.
  async function slices(path, body, button) {
    const of = total, sum = { resolved: 0, skipped: 0, failed: 0, rest: "" };
    let after;
    do {
      const r = await post(path, { ...body, max: SLICE, ...(after && { after }) });
      for (const name of ["resolved", "skipped", "failed"]) sum[name] += r[name];
      const done = sum.resolved + sum.skipped + sum.failed;
      button.textContent = `${number(done)}${done <= of ? ` of ${number(of)}` : ""}…`;
      after = r.next;
    } while (after && !ended);
    if (after) sum.rest = " The others wait, since you left the page.";
    return sum;
  }

  async function work(button, run) {
    const name = button.textContent;
    busy = true;
    button.disabled = true;
    button.textContent = "Working…";
    try {
      await run();
    } catch (error) {
      toast(error.message);
    }
    busy = false;
    button.disabled = false;
    button.textContent = name;
    if (!ended) load();
  }

  async function auto() {
    const text = ["Sangam settles those that have one sensible answer: a value that is free again, a new account made an hour ago, a clearly newer version.", "What is not kept stays on record, and each can be taken back."];
    if (!(await ask("Settle the simple ones?", text, "Settle them"))) return;
    await work(simple, async () => {
      const r = await slices("/api/sync/conflicts/auto-resolve", {}, simple);
      toast(`${count(r.resolved, "conflict")} settled, ${number(r.skipped + r.failed)} left for you.${r.rest}`);
    });
  }

  async function load(on = false) {
    const mine = ++asked;
    const query = new URLSearchParams({ limit: PAGE });
    for (const name of ["resolved", "kind", "collection"]) if (kept[name]) query.set(name, kept[name]);
    if (on && next) query.set("after", next);
    more.disabled = true;
    try {
      const found = await page(`/api/sync/conflicts?${query}`);
      if (ended || mine !== asked) return;
      items = on ? [...items, ...found.items] : found.items;
      ({ total, next } = found);
      shown();
    } catch (error) {
      if (!ended) list.replaceChildren(h("p", { class: "error" }, error.message), h("button", { type: "button", onclick: () => load() }, "Try again"));
      delete list.dataset.key;
    }
    more.disabled = false;
  }

  const seen = () => JSON.stringify([state.overview?.status.unresolvedConflicts, elsewhere()]);
  let open = seen(), soon;
  const stop = state.watch(() => {
    const now = seen();
    if (now === open) return;
    open = now;
    clearTimeout(soon);
    // Whoever has scrolled on keeps what is there.
    if (items.length <= PAGE) soon = setTimeout(() => load(), 600);
  });
  load();
  // Also those whose conflicts are further down; without an answer, those that were seen do.
  get("/api/sync/collections").then((all) => {
    known = all.map((c) => c.collection);
    if (!ended) shown();
  }, () => {});
  return () => { ended = true; stop(); clearTimeout(soon); };
}
