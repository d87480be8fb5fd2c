// Values of documents, as a person reads them. They come as extended JSON.

const exact = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });
const NAMES = ["name", "fullName", "title", "displayName", "username", "devotee", "email", "label", "code", "subject"];

export function plain(value) {
  if (value === null) return "(empty)";
  if (typeof value === "string") return value;
  if (typeof value !== "object") return String(value);
  const keys = Object.keys(value);
  if (keys.length === 1) {
    const [key] = keys, inner = value[key];
    if (key === "$date") {
      const at = new Date(typeof inner === "object" ? Number(inner.$numberLong) : inner);
      return Number.isNaN(at.getTime()) ? String(inner) : exact.format(at);
    }
    if (["$oid", "$numberDecimal", "$numberLong", "$numberInt", "$numberDouble", "$uuid", "$symbol"].includes(key)) return String(inner);
  }
  return JSON.stringify(value, null, 1);
}

/// The name of what a conflict is about: a field that names it, else its `_id`.
export function label(c) {
  for (const doc of [c.localDocument, c.remoteDocument, c.baseDocument]) {
    const name = doc && NAMES.map((n) => doc[n]).find((v) => typeof v === "string" && v.trim());
    if (name) return name.length > 80 ? `${name.slice(0, 79)}…` : name;
  }
  const id = c.localId ?? c.remoteId;
  return id === null || id === undefined ? c.collection : plain(id);
}
