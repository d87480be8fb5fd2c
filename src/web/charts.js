// Small line charts as SVG. Each has a sentence that says the same, and a table for who can't see it.

import { fill, h, shortTime, svg } from "./dom.js";

const W = 600, H = 150, POINTS = 150;

/// Spans of equal length over the whole time; the highest value, or the sum of all, counts.
function spans(samples, field, { from, to, sum }) {
  const size = (to - from) / POINTS;
  const out = new Array(POINTS).fill(null);
  for (const s of samples) {
    const i = Math.floor((s.at * 1000 - from) / size);
    if (i < 0 || i >= POINTS) continue;
    out[i] = sum ? (out[i] ?? 0) + s[field] : Math.max(out[i] ?? 0, s[field]);
  }
  return out;
}

/// A round number just above: of things, or of seconds.
function nice(max, seconds) {
  const power = 10 ** Math.floor(Math.log10(Math.max(max, 1)));
  const steps = seconds ? [5, 15, 60, 300, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400, 172800, 604800, 1209600, 2629800, 7889400, 31557600] : [1, 1.5, 2, 3, 4, 6, 8, 10].map((f) => f * power);
  return steps.find((v) => v >= max) ?? max;
}

/// `lines`: [{field, name, mark: "a"|"b"}]; `write` turns a value into words.
export function chart(node, { title, samples, stepSeconds, lines, from, to, sum = false, seconds = false, write, away = [] }) {
  const key = [title, from, to, samples.length, samples.at(-1), away.length];
  fill(node, key, () => {
    const all = lines.map((l) => ({ ...l, values: spans(samples, l.field, { from, to, sum }) }));
    const gap = Math.max(1, Math.ceil(((stepSeconds * 1000) / (to - from)) * POINTS * 1.5));
    const max = nice(Math.max(...all.flatMap((l) => l.values.map((v) => v ?? 0)), seconds ? 5 : 4), seconds);
    const x = (i) => ((i + 0.5) / POINTS) * W;
    const y = (v) => H - (v / max) * (H - 6);
    const head = h("figcaption", {}, h("h3", {}, title));
    if (all.every((l) => l.values.every((v) => v === null))) {
      return h("figure", {}, head, h("p", { class: "empty" }, "Nothing recorded yet. A point is added every minute."));
    }
    const last = (l) => l.values.findLast((v) => v !== null) ?? 0;
    const spoken = all.map((l) => `${l.name}: ${sum ? "in all" : "now"} ${write(sum ? l.values.reduce((a, v) => a + (v ?? 0), 0) : last(l))}, at most ${write(Math.max(...l.values.map((v) => v ?? 0)))}`).join("; ");
    const keys = h("div", { class: "key" });
    const legend = (i) => all.map((l) => h("span", { class: l.mark }, `${l.name}: ${i === null ? (sum ? `${write(l.values.reduce((a, v) => a + (v ?? 0), 0))} in all` : write(last(l))) : write(l.values[i] ?? 0)}`));
    keys.replaceChildren(...legend(null));
    const cursor = svg("line", { class: "cursor", y1: 0, y2: H, visibility: "hidden" });
    const picture = svg("svg", { class: "chart", viewBox: `0 0 ${W} ${H}`, preserveAspectRatio: "none", role: "img", "aria-label": `${title}. ${spoken}` },
      away.map(([a, b]) => svg("rect", { class: "away", x: Math.max(0, ((a - from) / (to - from)) * W), width: Math.max(1, ((Math.min(b, to) - Math.max(a, from)) / (to - from)) * W), y: 0, height: H })),
      [0, 0.5, 1].map((f) => svg("line", { class: "grid", x1: 0, x2: W, y1: y(max * f), y2: y(max * f) })),
      all.flatMap((l) => runs(l.values, gap).flatMap((run) => {
        const points = run.map(([i, v]) => `${x(i).toFixed(1)},${y(v).toFixed(1)}`);
        const wide = run.length === 1 ? [`${(x(run[0][0]) - 2).toFixed(1)},${y(run[0][1]).toFixed(1)}`, ...points] : points;
        return [
          svg("polygon", { class: `area ${l.mark}`, points: [`${x(run[0][0]).toFixed(1)},${H}`, ...points, `${x(run.at(-1)[0]).toFixed(1)},${H}`].join(" ") }),
          svg("polyline", { class: `line ${l.mark}`, points: wide.join(" ") }),
        ];
      })),
      cursor);
    const start = shortTime(from, to - from), middle = h("span", {}, shortTime((from + to) / 2, to - from));
    picture.addEventListener("pointermove", (event) => {
      const box = picture.getBoundingClientRect();
      const i = Math.min(POINTS - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * POINTS)));
      for (const [name, value] of [["x1", x(i)], ["x2", x(i)], ["visibility", "visible"]]) cursor.setAttribute(name, value);
      keys.replaceChildren(...legend(i));
      middle.textContent = shortTime(from + ((to - from) * (i + 0.5)) / POINTS, Math.min(to - from, 864e5));
    });
    picture.addEventListener("pointerleave", () => {
      cursor.setAttribute("visibility", "hidden");
      keys.replaceChildren(...legend(null));
      middle.textContent = shortTime((from + to) / 2, to - from);
    });
    return h("figure", {}, head, keys, h("div", { class: "axis" }, h("span", {}, `up to ${write(max)}`)), picture,
      h("div", { class: "axis", "aria-hidden": "true" }, h("span", {}, start), middle, h("span", {}, "now")),
      h("details", { class: "small" }, h("summary", {}, "As a table"), table(all, { from, to, write, sum })));
  });
}

/// Parts of a line between gaps in which nothing was recorded.
function runs(values, gap) {
  const out = [];
  let before = null;
  values.forEach((v, i) => {
    if (v === null) return;
    if (before === null || i - before > gap) out.push([]);
    out.at(-1).push([i, v]);
    before = i;
  });
  return out;
}

function table(all, { from, to, write, sum }) {
  const parts = 10, size = POINTS / parts;
  const rows = Array.from({ length: parts }, (_, p) => {
    const cells = all.map((l) => {
      const values = l.values.slice(p * size, (p + 1) * size).filter((v) => v !== null);
      if (!values.length) return "–";
      return write(sum ? values.reduce((a, v) => a + v, 0) : Math.max(...values));
    });
    return h("tr", {}, h("th", { scope: "row" }, shortTime(from + ((to - from) * p) / parts, to - from)), cells.map((c) => h("td", { class: "num" }, c)));
  });
  return h("table", {}, h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "From"), all.map((l) => h("th", { scope: "col", class: "num" }, l.name)))), h("tbody", {}, rows));
}
