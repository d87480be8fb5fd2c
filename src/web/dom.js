// Building elements, and how numbers and times are written. Text only ever becomes text nodes.

export function h(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "class") node.className = value;
    else if (name in node && !name.includes("-") && name !== "list") node[name] = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  add(node, children);
  return node;
}

function add(node, children) {
  for (const child of children.flat(9)) {
    if (child !== null && child !== undefined && child !== false) node.append(child);
  }
}

export function svg(tag, props = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(props)) node.setAttribute(name, value);
  add(node, children);
  return node;
}

/// Replaces the children only if what they are made from has changed, so that focus and selection stay.
export function fill(node, key, make) {
  const text = JSON.stringify(key);
  if (node.dataset.key === text) return;
  node.dataset.key = text;
  const made = [make()].flat(9).filter((n) => n !== null && n !== undefined && n !== false);
  node.replaceChildren(...made);
}

const numbers = new Intl.NumberFormat();
export const number = (n) => numbers.format(n ?? 0);
export const count = (n, one, many = `${one}s`) => `${number(n)} ${n === 1 ? one : many}`;

const clock = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit" });
const weekday = new Intl.DateTimeFormat(undefined, { weekday: "long" });
const day = new Intl.DateTimeFormat(undefined, { day: "numeric", month: "long" });
const year = new Intl.DateTimeFormat(undefined, { day: "numeric", month: "long", year: "numeric" });
const exact = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });

/// "today at 14:02", "last night at 02:00", "Tuesday at 14:02", "3 May at 09:10".
export function when(value, now = new Date()) {
  const at = new Date(value);
  const days = Math.round((new Date(now).setHours(0, 0, 0, 0) - new Date(at).setHours(0, 0, 0, 0)) / 864e5);
  const hour = at.getHours();
  let name;
  if (days === 0) name = hour < 5 && new Date(now).getHours() >= 6 ? "last night" : "today";
  else if (days === 1) name = hour >= 21 ? "last night" : "yesterday";
  else if (days > 1 && days < 7) name = weekday.format(at);
  else name = (at.getFullYear() === new Date(now).getFullYear() ? day : year).format(at);
  return `${name} at ${clock.format(at)}`;
}

export const time = (value) => {
  if (!value) return h("span", { class: "quiet" }, "–");
  return h("time", { dateTime: new Date(value).toISOString(), title: exact.format(new Date(value)) }, when(value));
};
export const shortTime = (ms, span) =>
  span <= 864e5 * 1.5 ? clock.format(ms) : (span > 864e5 * 300 ? year : day).format(ms);

export function duration(seconds) {
  const s = Math.max(0, seconds);
  for (const [size, one] of [[31557600, "year"], [2629800, "month"], [604800, "week"], [86400, "day"], [3600, "hour"], [60, "minute"]]) {
    if (s >= size * 1.5 || (size <= 3600 && s >= size)) return count(Math.round(s / size), one);
  }
  return count(Math.round(s), "second");
}

export function bytes(n) {
  let value = n, i = 0;
  const units = ["bytes", "KB", "MB", "GB", "TB"];
  while (value >= 1000 && i < 4) { value /= 1000; i += 1; }
  return `${value < 10 && i > 0 ? value.toFixed(1) : Math.round(value)} ${units[i]}`;
}

export function toast(text, action) {
  const box = document.getElementById("toasts");
  const button = action && h("button", { type: "button", onclick: () => { node.remove(); action.run(); } }, action.name);
  const node = h("div", { class: "toast" }, h("span", {}, text), button);
  box.append(node);
  while (box.children.length > 3) box.firstChild.remove();
  setTimeout(() => node.remove(), action ? 20000 : 7000);
}

/// Asks before something is done. Resolves to whether it was confirmed.
export function ask(title, text, yes, danger = false) {
  return new Promise((resolve) => {
    const dialog = h("dialog", { "aria-labelledby": "ask-title" },
      h("h2", { id: "ask-title" }, title),
      [text].flat().map((t) => h("p", {}, t)),
      h("div", { class: "actions" },
        h("button", { type: "button", class: danger ? "danger" : "main", onclick: () => dialog.close("yes") }, yes),
        h("button", { type: "button", onclick: () => dialog.close("no") }, "Cancel")));
    dialog.addEventListener("close", () => { dialog.remove(); resolve(dialog.returnValue === "yes"); });
    document.body.append(dialog);
    dialog.showModal();
  });
}
