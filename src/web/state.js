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

/// The name of the Sangam that takes orders instead of this one; "" if nobody does just now, null if this one does.
export function elsewhere() {
  const ha = state.overview?.status.ha;
  if (!ha || ha.role === "holder") return null;
  return ha.role === "standby" ? ha.holder ?? "" : "";
}

const allowed = (role) => ROLES.indexOf(state.session?.role) >= ROLES.indexOf(role);

/// Whether this person may, here and now: a Sangam that stands by takes no orders from anybody.
export const may = (role) => allowed(role) && (role !== "operate" || elsewhere() === null);

/// Why nothing can be decided here; "" if it can.
export function refusal() {
  const other = elsewhere();
  if (other !== null) return other ? `This Sangam stands by. Decide at ${other}, which does the work.` : "Nobody does the work at the moment. In a few seconds this can be decided again.";
  return allowed("operate") ? "" : "Your token only allows looking.";
}

/// The link in a few words.
export function link(s) {
  if (!s.isConfigured) return "no cloud set up";
  if (s.isOnline) return "connected";
  return s.link.state === "interrupted" && !s.link.reason ? "connecting…" : `away since ${when(s.link.since)}`;
}
