// The way to the daemon. The token travels in a header only, never in an address; it is kept for this
// tab alone (sessionStorage) and forgotten when the tab is closed.

const NAME = "sangam-token";
let token = sessionStorage.getItem(NAME) ?? "";

export class Refused extends Error {
  constructor(status, detail, body) {
    super(detail);
    this.status = status;
    this.body = body;
  }
}

export const signedIn = () => token !== "";

export function setToken(value) {
  token = value.trim();
  if (token) sessionStorage.setItem(NAME, token);
  else sessionStorage.removeItem(NAME);
}

async function send(method, path, body, signal) {
  const headers = {};
  if (token) headers.authorization = `Bearer ${token}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, {
      method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body),
      cache: "no-store", credentials: "omit", redirect: "error", referrerPolicy: "no-referrer",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "Sangam does not answer. Is it running on its machine?");
  }
  if (answer.ok) return answer;
  const problem = await answer.json().catch(() => ({}));
  if (answer.status === 401) document.dispatchEvent(new Event("signed-out"));
  throw new Refused(answer.status, problem.detail ?? `The daemon answered with status ${answer.status}.`, problem);
}

export const get = async (path) => (await send("GET", path)).json();
export const post = async (path, body = {}) => (await send("POST", path, body)).json();
export const put = async (path, body) => (await send("PUT", path, body)).json();

/// A page of a list: its items, how many there are in all, where the next page begins.
export async function page(path) {
  const answer = await send("GET", path);
  const total = Number(answer.headers.get("x-total-count") ?? 0);
  return { items: await answer.json(), total, next: answer.headers.get("x-next") };
}

/// Calls `each` with every event until `stop` is called; connects again by itself. `state` hears
/// whether it is connected. EventSource can't send a header, so the stream is read by hand.
export function live(each, state) {
  const control = new AbortController();
  (async () => {
    let wait = 1000;
    while (!control.signal.aborted) {
      try {
        const answer = await send("GET", "/api/sync/events", undefined, control.signal);
        const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
        state(true);
        wait = 1000;
        let rest = "";
        // The daemon says something at least every 15 s; longer silence means that the way is dead.
        for (;;) {
          let timer;
          const late = new Promise((_, no) => { timer = setTimeout(() => no(new Error("silent")), 40000); });
          const { value, done } = await Promise.race([reader.read(), late]).finally(() => clearTimeout(timer));
          if (done) break;
          const parts = (rest + value).split("\n\n");
          rest = parts.pop();
          for (const part of parts) {
            const data = part.split("\n").filter((l) => l.startsWith("data:")).map((l) => l.slice(5)).join("");
            if (data) each(JSON.parse(data));
          }
        }
      } catch (error) {
        if (error.name === "AbortError" || error.status === 401) return;
      }
      state(false);
      await new Promise((go) => setTimeout(go, wait));
      wait = Math.min(wait * 2, 15000);
    }
  })();
  return () => control.abort();
}
