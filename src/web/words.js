// How things are, in plain sentences. Nothing here touches the page.

import { bytes, count, duration, number, when } from "./dom.js";

export const KINDS = {
  both_modified: ["Changed in both places", "The same field was changed here and in the cloud, in different ways."],
  insert_insert: ["Created in both places", "A document with the same identity was created here and in the cloud, with different content."],
  delete_update: ["Deleted in one place, changed in the other", "One place deleted the document while the other one changed it."],
  unique_field: ["Same value used twice", "A value that may exist only once is used by two different documents."],
  rejected: ["Refused by a database", "One of the databases does not accept this document."],
  collection_dropped: ["Collection removed", "A whole collection was removed or renamed in one place. Nothing was deleted in the other."],
  mass_delete: ["Many documents deleted at once", "An unusually large part of a collection was deleted in one place. It was not passed on."],
};

export const STRATEGIES = {
  keep_local: ["Keep ours", "The version from this building goes to the cloud."],
  keep_remote: ["Keep the cloud’s", "The version from the cloud comes here."],
  merge: ["Combine both", "Fields that only one side changed are all kept; where both did, ours counts."],
  rename_local: ["Give ours another value", "Our document stays, with a new value that is still free."],
};

const SETTLED = {
  ...Object.fromEntries(Object.entries(STRATEGIES).map(([k, v]) => [k, v[0].toLowerCase()])),
  newest_wins: "newest kept, by rule", local_wins: "ours kept, by rule", remote_wins: "the cloud’s kept, by rule",
  keep_update: "the edit kept, by rule", undo: "taken back", handed_over: "handed over to another Sangam",
};
export const settled = (name) => SETTLED[name] ?? (name ?? "").replaceAll("_", " ");

export const kind = (name) => KINDS[name]?.[0] ?? (name ?? "").replaceAll("_", " ");
export const strategy = (name) => STRATEGIES[name]?.[0] ?? (name ?? "").replaceAll("_", " ");

export const REASONS = {
  offline: "the connection broke", dns: "no internet, or the cloud’s name can’t be found", refused: "the cloud refused the connection",
  timeout: "no answer in time", tls: "no secure connection could be set up", bad_credentials: "user or password were refused",
  ip_not_allowed: "this network’s address is not on the cloud’s list", paused_or_over_quota: "the cloud database is paused or full",
  not_a_replica_set: "the other server is no replica set",
};

export const TRIGGERS = {
  manual: "asked for", automatic: "changes came in", scheduled: "regular check", reconnect: "connection came back", startup: "start",
};
export const RUNS = { completed: ["done", "ok"], partial: ["done, with open questions", "wait"], failed: ["failed", "bad"], in_progress: ["at work", ""] };

const WORK = { first_sync: "Making both places equal for the first time", reconcile: "Comparing both places", verify: "Checking that both places are equal" };
export const work = (progress) => WORK[progress.what] ?? "At work";

const waits = (n) => `${count(n, "change")} ${n === 1 ? "is" : "are"} waiting safely`;

/// The one sentence: its level (ok, busy, wait, bad), a sign that does not rely on colour, and more.
export function sentence(o, collections, now = Date.now()) {
  const s = o.status;
  const waiting = Math.max(0, s.pendingDocuments + s.pendingInbox - s.heldDocuments);
  const oldest = s.oldestUnsynced ? `The oldest is from ${when(s.oldestUnsynced)}.` : "";
  if (!s.isCapturing) {
    return { level: "bad", sign: "stop", text: "Sangam can’t see the local database", more: ["Changes are not being noted right now. Is MongoDB running on this machine? Nothing is lost: when it is back, everything is compared."] };
  }
  const halted = (o.conflictsByKind.collection_dropped ?? 0) + (o.conflictsByKind.mass_delete ?? 0);
  if (halted > 0) {
    return { level: "bad", sign: "stop", text: `${count(halted, "collection")} ${halted === 1 ? "is" : "are"} on hold until you decide`, more: ["Much was deleted in one place. Nothing was deleted in the other. Look at it under Conflicts."] };
  }
  if (!s.isConfigured) {
    return { level: "wait", sign: "stop", text: "No cloud database is set up yet", more: [`Changes are noted all the same; ${waits(waiting)}.`, "Its address belongs into remote.uri in sangam.toml."] };
  }
  if (!s.isOnline) {
    const known = s.link.state !== "interrupted" || s.link.reason;
    if (!known) return { level: "busy", sign: "moving", text: "Connecting to the cloud…", more: [waiting ? `${waits(waiting)}.` : ""] };
    const more = [[oldest, room(o, waiting, now)].filter(Boolean).join(" ")];
    const reason = REASONS[s.link.reason];
    if (reason) more.push(`Why: ${reason}. Sangam keeps trying by itself.`);
    const tail = waiting ? `${waits(waiting)}` : "nothing is waiting";
    return { level: "wait", sign: "away", text: `No connection to the cloud since ${when(s.link.since, now)}; ${tail}`, more };
  }
  if (s.ha && s.ha.role !== "holder") return another(s.ha, now);
  if (s.isPaused) {
    return { level: "wait", sign: "paused", text: `Syncing is paused${waiting ? `; ${waits(waiting)}` : ""}`, more: ["Changes go on being noted. Press Resume when they may move again."] };
  }
  if (s.progress && s.progress.what !== "verify") {
    return { level: "busy", sign: "moving", text: work(s.progress), more: ["You can go on working meanwhile."] };
  }
  const proof = [proven(o, now)];
  if (s.unresolvedConflicts > 0) {
    const n = s.unresolvedConflicts;
    return { level: "wait", sign: "ask", text: `${count(n, "change")} ${n === 1 ? "needs" : "need"} your decision; everything else is in both places`, more: ["Only these documents wait. Decide under Conflicts whenever you have time."] };
  }
  if (o.verifyDifferences > 0) {
    return { level: "bad", sign: "stop", text: `The last check found ${count(o.verifyDifferences, "document")} that differ`, more: ["Press “Compare and mend” to bring both places together."] };
  }
  if (waiting > 0 && s.lagSeconds > 5) {
    return { level: "busy", sign: "moving", text: `${count(waiting, "change")} ${waiting === 1 ? "is" : "are"} on the way`, more: [oldest] };
  }
  const total = collections?.every((c) => c.local !== null) ? collections.reduce((sum, c) => sum + c.local, 0) : null;
  const text = total === null ? "Everything is in both places" : total === 0 ? "Both places are ready; there are no documents yet" : total === 1 ? "The one document is in both places" : `All ${number(total)} documents are in both places`;
  return { level: "ok", sign: "done", text, more: proof };
}

/// One of several on the pair, and not the one that works.
function another(ha, now) {
  if (ha.role !== "standby") return { level: "busy", sign: "moving", text: "This Sangam is taking over", more: ["In a moment it does the work."] };
  if (!ha.holder) return { level: "wait", sign: "paused", text: "This Sangam stands by; nobody does the work at the moment", more: ["It takes over by itself in a few seconds."] };
  const since = ha.since ? `, since ${when(ha.since, now)}` : "";
  return { level: "ok", sign: "paused", text: `This Sangam stands by; ${ha.holder} does the work${since}`, more: [`It takes over by itself if ${ha.holder} fails. Decide conflicts and give orders at ${ha.holder}.`] };
}

function proven(o, now) {
  if (o.lastVerified && (!o.lastCompared || o.lastVerified >= o.lastCompared)) return `Last proven equal ${when(o.lastVerified, now)}.`;
  if (o.lastCompared) return `Last compared in full ${when(o.lastCompared, now)}.`;
  return "";
}

/// For how long there is room at the rate of this outage.
function room(o, waiting, now) {
  const limit = Math.min(o.queueLimitDocuments, o.diskLimitDocuments ?? Infinity);
  const away = (now - new Date(o.status.link.since)) / 1000;
  if (waiting < 10 || away < 600) return waiting ? "There is plenty of room for more." : "";
  const left = ((limit - waiting) / waiting) * away;
  return left > 5 * 31557600 ? "At this rate there is room for years." : `At this rate there is room for about ${duration(left)}.`;
}

export const free = (o) => (o.diskHeadroomBytes === null ? "" : `${bytes(o.diskHeadroomBytes)} free`);
