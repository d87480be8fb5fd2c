// Drives the dashboard in Chromium. Arguments: address, token. Wishes to the databases go out as JSON
// lines; the answers come in. With SANGAM_SHOTS=FOLDER it takes the pictures of the README.

import assert from "node:assert/strict";
import fs from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";
import readline from "node:readline";

const modules = createRequire(`${process.env.SANGAM_NODE_MODULES}/`);
const { chromium } = modules("playwright-core");
const AXE = modules.resolve("axe-core/axe.min.js");
const [, , address, token] = process.argv;
const shots = process.env.SANGAM_SHOTS;
const started = Date.now();
/// Of the 10,000 conflicts, so many are settled; SANGAM_SETTLE=10000 for all of them.
const SETTLED = Number(process.env.SANGAM_SETTLE ?? 450);

const answers = readline.createInterface({ input: process.stdin })[Symbol.asyncIterator]();
async function wish(what, more = {}) {
  console.log(JSON.stringify({ do: what, ...more }));
  const { ok, error } = JSON.parse((await answers.next()).value);
  if (error) throw new Error(error);
  return ok;
}
const step = (text) => console.log(`${((Date.now() - started) / 1000).toFixed(1)} s  ${text}`);

const browser = await chromium.launch({ executablePath: process.env.SANGAM_CHROMIUM ?? "/usr/bin/chromium", args: ["--no-sandbox", "--disable-dev-shm-usage"] });
const problems = [];
let page;

async function open(options = {}, at = address) {
  // axe-core is put into the page by the test; the page's own policy would refuse it.
  const context = await browser.newContext({ viewport: { width: 1280, height: 900 }, locale: "en-GB", timezoneId: "Asia/Kolkata", reducedMotion: "reduce", ...options });
  context.setDefaultTimeout(45000);
  if (process.env.SANGAM_WEB) await context.route(`${at}/*`, asOnDisk);
  const tab = await context.newPage();
  tab.on("console", (m) => { if (["error", "warning"].includes(m.type()) && !/40[019]|503|ERR_/.test(m.text())) problems.push(m.text()); });
  tab.on("pageerror", (e) => problems.push(String(e)));
  tab.on("request", (r) => {
    if (!r.url().startsWith(at)) problems.push(`asked elsewhere: ${r.url()}`);
    if (r.url().includes(token)) problems.push(`the token is in an address: ${r.url()}`);
  });
  return tab;
}

/// With SANGAM_WEB=src/web the page is as it is on disk now, without compiling.
async function asOnDisk(route) {
  const name = new URL(route.request().url()).pathname.slice(1) || "index.html";
  const file = path.join(process.env.SANGAM_WEB, name);
  if (!fs.existsSync(file)) return route.continue();
  const real = await route.fetch();
  const type = { js: "text/javascript", css: "text/css", html: "text/html", svg: "image/svg+xml" }[name.split(".").at(-1)];
  return route.fulfill({ status: 200, headers: { ...real.headers(), "content-type": type, "content-encoding": "identity" }, body: fs.readFileSync(file) });
}

async function signIn(tab, given = token, at = address) {
  await tab.goto(`${at}/`);
  await tab.getByLabel("Access token").fill(given);
  await tab.getByRole("button", { name: "Sign in" }).click();
}

const says = (text, tab = page) => tab.locator("#sentence", { hasText: text }).waitFor();
const fits = async (tab, what) => {
  const wide = await tab.evaluate(() => document.documentElement.scrollWidth - innerWidth);
  assert.ok(wide <= 0, `${what}: the page is ${wide} px wider than the screen`);
};

async function accessible(tab, what) {
  await tab.evaluate(fs.readFileSync(AXE, "utf8"));
  const found = await tab.evaluate(() => globalThis.axe.run(document, { runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"] }));
  const told = found.violations.map((v) => `${what}: ${v.id} (${v.help}): ${v.nodes.slice(0, 3).map((n) => `${n.html} ${n.failureSummary}`).join(" | ")}`);
  assert.deepEqual(told, [], told.join("\n"));
}

async function shot(tab, name, options = {}) {
  if (shots) await hush(tab);
  if (shots) await tab.screenshot({ path: `${shots}/${name}.png`, ...options });
}

const hush = (tab) => tab.evaluate(() => document.getElementById("toasts").replaceChildren());
const names = ["Asha Rao", "Vikram Nair", "Meera Iyer", "Rohan Das", "Lakshmi Pillai", "Arjun Menon", "Kavya Shetty", "Dev Patel"];
const date = (day, hour) => ({ $date: new Date(Date.UTC(2026, 10, day, hour)).toISOString() });

try {
  step("a temple's data on both sides");
  await wish("insert", { side: "local", coll: "devotees", docs: names.map((name, i) => ({ _id: `d${i}`, name, phone: `+91 98450 1000${i}`, updatedAt: date(3, i) })) });
  await wish("insert", { side: "local", coll: "bookings", docs: names.flatMap((name, i) => [0, 1, 2].map((n) => ({ _id: `b${i}-${n}`, name, hall: n ? "East hall" : "Main hall", date: `2026-12-1${n}`, guests: 40 + i, status: "confirmed", updatedAt: date(4 + n, i), updatedBy: "front desk" }))) });
  await wish("insert", { side: "remote", coll: "donations", docs: names.map((name, i) => ({ _id: `g${i}`, name, amount: 500 * (i + 1), currency: "INR", updatedAt: date(5, i) })) });

  page = await open();
  step("a wrong token is refused, in words, and nothing is shown");
  await signIn(page, "wrong");
  await page.getByText("This token is not right").waitFor();
  assert.equal(await page.locator("#nav").isVisible(), false);
  assert.equal(await page.evaluate(() => sessionStorage.length + localStorage.length), 0, "a wrong token is not kept");
  await accessible(page, "sign-in");
  await shot(page, "sign-in");
  await page.getByLabel("Access token").fill(token);
  await page.keyboard.press("Enter");
  await says("All 40 documents are in both places");
  assert.equal(await page.evaluate(() => document.cookie + localStorage.length), "0", "the token is kept for the tab alone");
  await page.locator("#live", { hasText: "Live" }).waitFor();
  await page.getByRole("row", { name: /bookings/ }).waitFor();
  await accessible(page, "overview");
  await fits(page, "overview");
  if (shots) await page.waitForTimeout(1500);
  await shot(page, "overview-light", { fullPage: true });

  step("the link is cut: the page says so, and what waits");
  await wish("cut");
  await says("No connection to the cloud since");
  await wish("update", { side: "local", coll: "bookings", filter: { _id: "b0-0" }, change: { $set: { guests: 99 } } });
  await says("1 change is waiting safely");
  await accessible(page, "offline");
  await shot(page, "offline", { fullPage: true });
  await wish("heal");
  await says("All 40 documents are in both places");
  await wish("equal");

  step("the button that only checks asks the real thing");
  await page.getByRole("button", { name: "Check only" }).click();
  await page.getByRole("dialog").getByRole("button", { name: "Check" }).click();
  await page.locator(".toast", { hasText: "Both places are equal." }).waitFor();
  await page.locator(".more", { hasText: "proven equal" }).or(page.locator("#sentence", { hasText: "proven equal" })).first().waitFor();
  const proof = (await wish("status")).lastProof;
  assert.ok(proof, "the daemon remembers the proof");

  step("a conflict appears by itself");
  await page.getByRole("button", { name: "Pause" }).click();
  await page.getByRole("dialog").getByRole("button", { name: "Pause" }).click();
  await says("Syncing is paused");
  const filter = { _id: "b1-0" };
  await wish("update", { side: "local", coll: "bookings", filter, change: { $set: { status: "confirmed", guests: 120, hall: "East hall", updatedAt: date(20, 9), updatedBy: "front desk" } } });
  await wish("update", { side: "remote", coll: "bookings", filter, change: { $set: { status: "cancelled", guests: 80, updatedAt: date(20, 11), updatedBy: "web" } } });
  await page.getByRole("button", { name: "Resume" }).click();
  await says("1 change needs your decision");
  await page.locator("#badge", { hasText: "1" }).waitFor();
  await page.getByRole("link", { name: /^Conflicts/ }).click();
  await page.getByRole("link", { name: /Vikram Nair/ }).waitFor();
  await accessible(page, "conflicts");
  await page.getByRole("link", { name: /Vikram Nair/ }).click();
  await page.getByRole("heading", { name: "Side by side" }).waitFor();
  const table = page.locator(".compare");
  await table.getByRole("row", { name: /guests/ }).filter({ hasText: "120" }).filter({ hasText: "80" }).waitFor();
  assert.equal(await table.getByRole("row", { name: /^date/ }).count(), 0, "equal fields are left out");
  await page.getByLabel("Show equal fields too").check();
  await table.getByRole("row", { name: /^date/ }).waitFor();
  await page.getByLabel("Show equal fields too").uncheck();

  step("a second Sangam stands by, says who works, and takes no orders");
  const there = await wish("second");
  const second = await open({}, there);
  await signIn(second, token, there);
  await says("This Sangam stands by; office does the work, since", second);
  for (const name of ["Sync now", "Pause", "Compare and mend", "Check only"]) {
    assert.ok(await second.getByRole("button", { name }).isDisabled(), `a standby offers: ${name}`);
  }
  await second.getByRole("row", { name: /bookings/ }).waitFor();
  await accessible(second, "standby");
  await fits(second, "standby");
  await shot(second, "standby", { fullPage: true });
  await second.getByRole("link", { name: /^Conflicts/ }).click();
  await second.getByText("Decide at office").waitFor();
  await second.getByRole("link", { name: /Vikram Nair/ }).click();
  await second.getByText("Decide at office").waitFor();
  assert.equal(await second.getByRole("radio").count(), 0, "a standby offers a decision");
  await shot(second, "standby-conflict", { fullPage: true });

  step("each way of settling it is previewed before anything is written");
  for (const name of [/Keep ours/, /Combine both/, /Keep the cloud/]) {
    await page.getByRole("radio", { name }).check();
    await page.getByText("What would happen:").first().waitFor();
  }
  const before = await wish("find", { side: "local", coll: "bookings", filter });
  assert.equal(before.guests, 120, "a preview writes nothing");
  await accessible(page, "conflict");
  await fits(page, "conflict");
  await shot(page, "conflict-light", { fullPage: true });
  await page.getByLabel("Note for the record").fill("the family called");
  await page.getByRole("button", { name: "Settle it like this" }).click();
  await page.getByText("No open conflicts").waitFor();
  await wish("equal");
  assert.equal((await wish("find", { side: "local", coll: "bookings", filter })).status, "cancelled");

  step("and taken back");
  await page.locator(".toast").getByRole("button", { name: "Undo" }).click();
  await page.locator(".toast", { hasText: "Taken back" }).waitFor();
  await wish("equal");
  assert.equal((await wish("find", { side: "remote", coll: "bookings", filter })).guests, 120, "ours is back, in both places");
  await page.getByLabel("Show", { exact: true }).selectOption("true");
  await page.getByRole("link", { name: /Vikram Nair.*taken back/ }).click();
  await page.getByText("What was put aside by that").waitFor();
  await page.getByRole("link", { name: "The decision that was taken back" }).click();
  await page.getByText("Settled, then taken back").waitFor();
  await table.getByRole("row", { name: /guests/ }).filter({ hasText: "120" }).waitFor();
  await accessible(page, "settled conflict");

  step("history and settings");
  await page.getByRole("link", { name: "History" }).click();
  await page.getByRole("heading", { name: "Sync runs" }).waitFor();
  await page.getByRole("cell", { name: /connection came back/ }).first().waitFor();
  await accessible(page, "history");
  await fits(page, "history");
  await shot(page, "history", { fullPage: true });
  await page.getByRole("link", { name: "Settings" }).click();
  await page.getByLabel("Documents in one go").fill("0");
  await page.getByRole("button", { name: "Save" }).click();
  await page.getByText("whole number from 1 to 10000").waitFor();
  await accessible(page, "settings with a mistake");
  await page.getByLabel("Documents in one go").fill("500");
  await page.getByRole("button", { name: "Save" }).click();
  await page.getByText("changed here").waitFor();
  await shot(page, "settings", { fullPage: true });

  step("by keyboard alone");
  await page.goto(`${address}/#/`);
  await page.reload();
  await says("All 40 documents are in both places");
  await page.keyboard.press("Tab");
  assert.equal(await page.evaluate(() => document.activeElement.textContent), "Skip to content");
  for (let i = 0; i < 12; i += 1) {
    await page.keyboard.press("Tab");
    if (await page.evaluate(() => document.activeElement.textContent === "Sync now")) break;
  }
  await page.keyboard.press("Enter");
  await page.locator(".toast", { hasText: "Done" }).waitFor();

  step("dark, and on a phone");
  for (const [what, options] of [["dark", { colorScheme: "dark" }], ["phone", { viewport: { width: 390, height: 844 }, isMobile: true, hasTouch: true, deviceScaleFactor: 2 }], ["phone-dark", { viewport: { width: 320, height: 640 }, colorScheme: "dark", isMobile: true }]]) {
    const tab = await open(options);
    await signIn(tab);
    await says("All 40 documents are in both places", tab);
    await tab.getByRole("row", { name: /bookings/ }).waitFor();
    if (shots) await tab.waitForTimeout(1500);
    await accessible(tab, what);
    await fits(tab, what);
    await shot(tab, `overview-${what}`, { fullPage: what !== "phone" });
    if (shots && what === "phone") await shot(tab, "overview-phone-whole", { fullPage: true });
    for (const name of ["Conflicts", "History", "Settings"]) {
      await tab.getByRole("link", { name: new RegExp(`^${name}`) }).click();
      await tab.getByRole("heading", { level: 1, name }).waitFor();
      await tab.waitForTimeout(300);
      await accessible(tab, `${what} ${name}`);
      await fits(tab, `${what} ${name}`);
    }
    if (what === "phone") {
      await tab.getByRole("link", { name: "Conflicts" }).click();
      await tab.getByLabel("Show", { exact: true }).selectOption("true");
      await tab.getByRole("link", { name: /Vikram Nair/ }).last().click();
      await tab.getByRole("heading", { name: "Side by side" }).waitFor();
      await fits(tab, "conflict on a phone");
      await accessible(tab, "conflict on a phone");
      await shot(tab, "conflict-phone", { fullPage: true });
    }
    await tab.context().close();
  }

  step("the first one stops: the second one takes over, and gives the work back");
  await second.goto(`${there}/#/`);
  await wish("stop");
  await says("All 40 documents are in both places", second);
  assert.ok(await second.getByRole("button", { name: "Sync now" }).isEnabled(), "whoever works takes orders");
  await page.getByText("No answer from Sangam").waitFor();
  await wish("start");
  await says("This Sangam stands by; attic does the work, since");
  await wish("stop the second");
  await says("All 40 documents are in both places");
  await second.context().close();

  step("ten thousand conflicts");
  await page.getByRole("button", { name: "Pause" }).click();
  await page.getByRole("dialog").getByRole("button", { name: "Pause" }).click();
  await says("Syncing is paused");
  const many = (n, v) => Array.from({ length: n }, (_, i) => ({ _id: i, name: `Visitor ${i}`, seat: v }));
  for (const [side, v] of [["local", "here"], ["remote", "there"]]) {
    await wish("insert", { side, coll: "rooms", docs: many(SETTLED, v) });
    if (SETTLED < 10000) await wish("insert", { side, coll: "seats", docs: many(10000 - SETTLED, v) });
  }
  await page.getByRole("button", { name: "Resume" }).click();
  await page.getByRole("link", { name: /^Conflicts/ }).click();
  await page.getByText("10,000 open conflicts").waitFor({ timeout: 60000 });
  const began = Date.now();
  await page.reload();
  await page.getByText("10,000 open conflicts").waitFor();
  await page.getByRole("link", { name: /Visitor/ }).nth(49).waitFor();
  step(`the list of 10,000 is there after ${Date.now() - began} ms`);
  await page.getByRole("button", { name: "Show more" }).click();
  await page.getByRole("link", { name: /Visitor/ }).nth(99).waitFor();
  await page.getByLabel("What happened").selectOption("insert_insert");
  await page.getByRole("button", { name: "Preview" }).click();
  await page.getByText("Of the first 200: 200 would be settled").waitFor();
  await accessible(page, "many conflicts");
  await shot(page, "conflicts-many");

  step("many are settled in one go, and it is seen how far it is");
  const settling = Date.now();
  const settled = SETTLED.toLocaleString("en-GB");
  await page.getByLabel("Collection").selectOption("rooms");
  await page.getByRole("button", { name: `Settle all ${settled}` }).click();
  await page.getByRole("dialog").getByRole("button", { name: "Settle them" }).click();
  await page.getByRole("button", { name: new RegExp(`^[1-9][0-9,]* of ${settled}`) }).waitFor();
  await shot(page, "conflicts-settling");
  await page.locator(".toast", { hasText: `${settled} conflicts settled.` }).waitFor({ timeout: 600000 });
  await page.getByText("None of this sort").waitFor();
  step(`${settled} were settled in ${Date.now() - settling} ms`);

  assert.deepEqual(problems, [], problems.join("\n"));
  step("done");
} catch (error) {
  console.log(String(error.stack ?? error));
  if (page) {
    console.log((await page.locator("body").innerText().catch(() => "")).slice(0, 1500));
    await page.screenshot({ path: `${process.env.SANGAM_SHOTS ?? "target"}/browser-failure.png` }).catch(() => {});
  }
  console.log(problems.join("\n"));
  process.exitCode = 1;
} finally {
  await browser.close();
  process.stdin.destroy();
}
