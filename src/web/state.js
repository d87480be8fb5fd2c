// What the pages share: the newest overview, and who is looking.

import { when } from "./dom.js";

const watchers = new Set();
const ROLES = ["read", "operate", "admin"];

export const state = {
  overview: null,
  session: null,
  canVerify: false,
  /// Calls back at every change, until the answer is called.
  watch(each) {
    watchers.add(each);
    return () => watchers.delete(each);
  },
  set(overview) {
    this.overview = overview;
    for (const each of watchers) each();
  },
};

export const may = (role) => ROLES.indexOf(state.session?.role) >= ROLES.indexOf(role);

/// The link in a few words.
export function link(s) {
  if (!s.isConfigured) return "no cloud set up";
  if (s.isOnline) return "connected";
  return s.link.state === "interrupted" && !s.link.reason ? "connecting…" : `away since ${when(s.link.since)}`;
}
