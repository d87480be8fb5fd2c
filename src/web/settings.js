// The settings that take effect at once. Everything is checked here first, and by the daemon again.

import { get, put } from "./api.js";
import { h, toast } from "./dom.js";
import { may, state } from "./state.js";

const POLICIES = [["manual", "Ask me"], ["newest_wins", "The newer change counts"], ["local_wins", "Ours counts"], ["remote_wins", "The cloud’s counts"]];

export function settings(main) {
  let ended = false;
  main.replaceChildren(h("h1", {}, "Settings"), h("p", { class: "quiet" }, "Loading…"));

  async function load() {
    try {
      const config = await get("/api/sync/config");
      if (!ended) render(config);
    } catch (error) {
      if (!ended) main.replaceChildren(h("h1", {}, "Settings"), h("p", { class: "error" }, error.message));
    }
  }

  function render(config) {
    const locked = !may("admin");
    const fields = [];
    const field = (key, name, hint, input, read) => {
      const error = h("p", { class: "error", id: `${key}-error`, role: "alert" });
      input.id = key;
      input.disabled = locked;
      input.setAttribute("aria-describedby", `${key}-hint ${key}-error`);
      fields.push({ key, input, error, read });
      const changed = config.changedHere?.includes(key) && h("span", { class: "hint" }, "changed here ", h("button", { type: "button", class: "plain", disabled: locked, "aria-label": `Use the file’s value for ${name}`, onclick: () => save({ [key]: null }) }, "use the file’s value"));
      const box = input.type === "checkbox"
        ? h("div", {}, h("label", { class: "check", for: key }, input, name), h("p", { class: "hint", id: `${key}-hint` }, hint))
        : h("div", {}, h("label", { for: key }, name), h("p", { class: "hint", id: `${key}-hint` }, hint), input);
      return h("div", {}, box, changed, error);
    };
    const whole = (min, max) => (input) => {
      const n = Number(input.value);
      if (!Number.isInteger(n) || n < min || n > max || input.value.trim() === "") throw new Error(`Please give a whole number from ${min} to ${max}.`);
      return n;
    };
    const globs = (input) => {
      const list = input.value.split(/[\n,]/).map((t) => t.trim()).filter(Boolean);
      if (!list.length) throw new Error("Please name at least one collection, or * for all.");
      return list;
    };
    const names = (input) => input.value.split(/[\n,]/).map((t) => t.trim()).filter(Boolean);
    const minutes = (input) => {
      if (input.value === shortMinutes) return config.syncIntervalMinutes;
      const n = Number(input.value);
      if (!(n >= 1 / 60 && n <= 1440)) throw new Error("Please give a number of minutes up to 1440 (a day).");
      return n;
    };
    const shortMinutes = String(Number(config.syncIntervalMinutes.toFixed(3)));
    const problem = h("p", { class: "error", role: "alert" });
    const form = h("form", { class: "form", noValidate: true, onsubmit: (e) => { e.preventDefault(); check(); } },
      field("autoSyncEnabled", "Sync by itself", "Off: changes wait until somebody presses Sync now.", h("input", { type: "checkbox", checked: config.autoSyncEnabled }), (i) => i.checked),
      field("conflictResolutionStrategy", "When both places changed the same thing", "What is not kept stays on record and can be put back.", h("select", {}, POLICIES.map(([value, name]) => h("option", { value, selected: value === config.conflictResolutionStrategy }, name))), (i) => i.value),
      field("collectionsToSync", "Collections to sync", "One a line; * stands for any text.", h("textarea", { rows: 4, value: config.collectionsToSync.join("\n") }), globs),
      field("collectionsFirst", "Collections that go first", "One a line, in this order: on a slow line they go before all others.", h("textarea", { rows: 2, value: config.collectionsFirst.join("\n") }), names),
      field("collectionsLast", "Collections that go last", "One a line, in this order: they go after all others.", h("textarea", { rows: 2, value: config.collectionsLast.join("\n") }), names),
      field("syncIntervalMinutes", "Ask the cloud for changes every … minutes", "Only where the cloud can’t tell of them by itself.", h("input", { inputMode: "decimal", value: shortMinutes }), minutes),
      field("batchSize", "Documents in one go", "Fewer for a very slow connection.", h("input", { inputMode: "numeric", value: String(config.batchSize) }), whole(1, 10000)),
      field("maxRetries", "Tries before a refused document is put aside", "It is tried again whenever it changes.", h("input", { inputMode: "numeric", value: String(config.maxRetries) }), whole(0, 1000)),
      problem, h("div", { class: "actions" }, h("button", { class: "main", disabled: locked }, "Save")));
    main.replaceChildren(h("h1", {}, "Settings"),
      locked ? h("p", { class: "notice" }, "Your token does not allow changing settings.") : "",
      h("section", { class: "card" }, form),
      h("section", { class: "card" }, h("h2", {}, "About"), h("p", {}, `Sangam ${state.overview?.status.version ?? ""}, site “${state.overview?.status.site ?? ""}”, signed in as ${state.session.name} (${{ read: "may look", operate: "may sync and decide", admin: "may do everything" }[state.session.role]}).`),
        h("p", { class: "quiet" }, "All other settings are in sangam.toml on the machine that runs Sangam; “sangam config” lists them.")));

    function check() {
      const changes = {};
      let first = null;
      for (const { key, input, error, read } of fields) {
        error.textContent = "";
        input.removeAttribute("aria-invalid");
        try {
          const value = read(input);
          if (JSON.stringify(value) !== JSON.stringify(config[key])) changes[key] = value;
        } catch (e) {
          error.textContent = e.message;
          input.setAttribute("aria-invalid", "true");
          first ??= input;
        }
      }
      if (first) return first.focus();
      if (!Object.keys(changes).length) return toast("Nothing was changed.");
      save(changes);
    }
    async function save(changes) {
      problem.textContent = "";
      try {
        await put("/api/sync/config", changes);
        toast("Saved. It is in force now.");
        load();
      } catch (error) {
        const named = fields.find((f) => error.message.includes(f.key));
        if (named) { named.error.textContent = error.message; named.input.setAttribute("aria-invalid", "true"); named.input.focus(); }
        else problem.textContent = error.message;
      }
    }
  }

  load();
  return () => { ended = true; };
}
