/** The page: the caller's exports, newest first, and a dialog for each. */

import { Client } from "./client.js";
import { h } from "./dom.js";
import "./export-download.js";
import { currentToken, signIn, takeFragment } from "./session.js";
import { tell, toastRegion, warn } from "./toasts.js";
import { describeExpiry, explain, formatMoment } from "./words.js";

const LOOK_MS = 2_000;
const UNDER_WAY = ["pending", "processing"];
const STATUS_WORDS = {
  pending: "Waiting",
  processing: "Being made",
  completed: "Completed",
  failed: "Failed",
};
const PACKAGE_WORDS = { available: "Ready", expired: "Expired", deleted: "Expired", suspect: "Withheld" };

const find = (id) => document.getElementById(id);
const [list, more, stateBox, signInForm, filter, trouble] = [
  "exports",
  "more",
  "state",
  "sign-in",
  "status-filter",
  "trouble",
].map(find);
const base = document.querySelector('meta[name="exportd-base"]').content;
const client = new Client(base, currentToken);
/** By job id, in the order shown: the job, its row, and its dialog after it was opened. */
const entries = new Map();
let cursor = null;
let loading = null;
let looking = null;

async function load({ isMore = false } = {}) {
  loading?.abort();
  const { signal } = (loading = new AbortController());
  showState(null);
  if (!isMore) {
    cursor = null;
    clearList();
    showSkeleton();
  }
  more.disabled = true;
  try {
    const page = await client.listJobs({ status: filter.value, cursor, signal });
    if (signal.aborted) return;
    showTrouble(null);
    if (!isMore) list.replaceChildren();
    const first = page.jobs.map(addEntry)[0];
    if (isMore) first?.row.querySelector("button").focus();
    cursor = page.nextCursor;
    if (!entries.size) showEmpty();
    keepLooking();
  } catch (error) {
    if (signal.aborted) return;
    if (!isMore) list.replaceChildren();
    if (error.code === "UNAUTHENTICATED") return signOut("That token is not valid, or no longer.");
    if (isMore) warn(explain(error));
    else showError(error);
  } finally {
    if (!signal.aborted) {
      list.removeAttribute("aria-busy");
      more.hidden = !cursor;
      more.disabled = false;
    }
  }
}

function clearList() {
  for (const { dialog } of entries.values()) if (!dialog?.open && !isBusy(dialog)) dialog?.remove();
  entries.clear();
  more.hidden = true;
}

function addEntry(job) {
  const row = h("li", { className: "export" });
  const entry = { job, row, dialog: document.querySelector(`dialog[data-job="${job.jobId}"]`) };
  entries.set(job.jobId, entry);
  list.append(row);
  renderRow(entry);
  return entry;
}

/** Updates a job, and shows what changed. */
function update(job) {
  const entry = entries.get(job.jobId);
  if (!entry) return;
  const isSame = JSON.stringify(describeRow(entry.job)) === JSON.stringify(describeRow(job));
  entry.job = job;
  if (!isSame) renderRow(entry);
}

function describeRow(job) {
  const { expiresAt, state, size } = job.package ?? {};
  const expiry = state === "available" ? describeExpiry(expiresAt) : null;
  const facts = [
    [job.status === "completed" ? "Made" : "Asked for", job.createdAt && formatMoment(job.createdAt)],
    ["Size", size],
    ["Downloaded", job.status === "completed" && countTimes(job.downloadCount)],
    ["By", job.userId],
  ];
  return {
    status:
      UNDER_WAY.includes(job.status) || job.status === "failed"
        ? STATUS_WORDS[job.status]
        : (PACKAGE_WORDS[state] ?? job.status),
    kind: state ?? job.status,
    fraction: job.status === "processing" && job.percent !== null ? job.percent / 100 : null,
    facts: facts.filter(([, value]) => value),
    expiry:
      expiry?.text ??
      (["expired", "deleted"].includes(state) && expiresAt ? describeExpiry(expiresAt).text : ""),
    isSoon: Boolean(expiry?.isSoon),
  };
}

function countTimes(count) {
  return ["never", "once", "twice"][count] ?? `${count} times`;
}

function renderRow({ job, row }) {
  const { status, kind, fraction, facts, expiry, isSoon } = describeRow(job);
  const hadFocus = row.contains(document.activeElement);
  const tool = job.tool || "Export";
  const open = h(
    "button",
    { type: "button", onclick: () => openDialog(job.jobId) },
    kind === "available" ? "Download…" : "Details…",
  );
  // The accessible name begins with the visible text, so that users of voice control can say it.
  open.setAttribute(
    "aria-label",
    `${open.textContent} ${tool}, ${job.createdAt ? formatMoment(job.createdAt) : job.jobId}`,
  );
  const bar =
    UNDER_WAY.includes(job.status) &&
    h("progress", { max: 1, ...(fraction !== null && { value: fraction }) });
  if (bar) bar.setAttribute("aria-label", `${tool}: ${status}`);
  row.replaceChildren(
    ...[
      h("h2", {}, tool),
      h("p", { className: `badge ${kind}` }, fraction === null ? status : `${status}: ${job.percent} %`),
      bar,
      h(
        "dl",
        {},
        facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))),
      ),
      expiry && h("p", { className: isSoon ? "expiry soon" : "expiry" }, expiry),
      job.failureReason && h("p", { className: "error" }, job.failureReason),
      open,
    ].filter(Boolean),
  );
  if (hadFocus) open.focus();
}

/** Polls the jobs that are not finished, one after the other, while the page is visible. */
async function keepLooking() {
  if (looking) return;
  looking = true;
  try {
    for (;;) {
      await new Promise((resolve) => setTimeout(resolve, LOOK_MS));
      const underWay = [...entries.values()].filter(({ job }) => UNDER_WAY.includes(job.status));
      if (!underWay.length || !currentToken()) return;
      if (document.hidden) continue;
      for (const { job } of underWay) {
        if (!entries.has(job.jobId)) continue;
        update(await client.findJob(job.jobId));
      }
      showTrouble(null);
    }
  } catch (error) {
    if (error.code === "UNAUTHENTICATED") return signOut("You were signed out: the token is over.");
    showTrouble(error);
  } finally {
    looking = null;
  }
  // The error may be temporary, so try again.
  keepLooking();
}

async function openDialog(jobId) {
  let job = entries.get(jobId)?.job;
  if (!job) {
    try {
      job = await client.findJob(jobId);
    } catch (error) {
      return warn(explain(error));
    }
  }
  const dialog = document.querySelector(`dialog[data-job="${jobId}"]`) ?? makeDialog(job);
  dialog.showModal();
}

function makeDialog(job) {
  const download = h("export-download", { base: client.base, commands: "" });
  download.setAttribute("job-id", job.jobId);
  download.setAttribute("base", client.base);
  download.token = currentToken;
  const title = h("h2", { id: `title-${job.jobId}` }, job.tool || "Export");
  const close = h("button", { type: "button", className: "close", onclick: () => dialog.close() }, "Close");
  const dialog = h("dialog", {}, h("header", {}, title, close), download, toastRegion());
  dialog.dataset.job = job.jobId;
  dialog.setAttribute("aria-labelledby", title.id);
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  dialog.addEventListener("close", () => {
    // A download in the page continues when its dialog closes. The dialog shows it again when it opens.
    if (!download.isBusy) dialog.remove();
  });
  download.addEventListener("export-again", ({ detail }) => {
    dialog.dataset.job = detail.newJobId;
    tell("It is being exported again.");
    load();
  });
  download.addEventListener("export-changed", ({ detail }) => update(detail.job));
  download.addEventListener("export-completed", ({ detail }) => {
    tell(`${title.textContent}: downloaded${detail.isVerified ? " and checked" : ""}.`);
    if (!dialog.open) dialog.remove();
  });
  download.addEventListener("export-failed", ({ detail }) => {
    if (detail.code === "UNAUTHENTICATED") signOut("You were signed out: the token is over.");
    else warn(`${title.textContent}: ${detail.message}`);
  });
  document.body.append(dialog);
  return dialog;
}

function isBusy(dialog) {
  return Boolean(dialog?.querySelector("export-download")?.isBusy);
}

function showState(...children) {
  stateBox.replaceChildren(...children.filter(Boolean));
  stateBox.hidden = !children.some(Boolean);
}

function showSkeleton() {
  list.setAttribute("aria-busy", "true");
  list.replaceChildren(...[1, 2, 3].map(() => h("li", { className: "export skeleton", ariaHidden: "true" })));
}

function showEmpty() {
  showState(
    h("h2", {}, filter.value ? "No export is in this state" : "No exports yet"),
    h(
      "p",
      {},
      filter.value ? "Others may be: show all." : "What you export in your application appears here.",
    ),
  );
}

function showError(error) {
  const heading = !navigator.onLine
    ? "You are offline"
    : error.isPassing
      ? "The service cannot be reached"
      : "Your exports cannot be shown";
  showState(
    h("h2", {}, heading),
    h("p", {}, explain(error)),
    h("button", { type: "button", className: "primary", onclick: () => load() }, "Try again"),
  );
}

/** Keeps the list, and says that it may be out of date. */
function showTrouble(error) {
  trouble.hidden = !error && navigator.onLine;
  const sentence = navigator.onLine ? error && explain(error) : "You are offline.";
  trouble.textContent = trouble.hidden ? "" : `${sentence} What you see may be out of date. Trying again…`;
}

function signOut(reason = "") {
  loading?.abort();
  signIn("");
  for (const dialog of document.querySelectorAll("dialog")) dialog.close();
  clearList();
  list.replaceChildren();
  showState();
  showTrouble(null);
  find("token-error").textContent = reason;
  showSignedIn();
}

function showSignedIn() {
  const isSignedIn = Boolean(currentToken());
  signInForm.hidden = isSignedIn;
  find("sign-out").hidden = filter.parentElement.hidden = !isSignedIn;
  return isSignedIn;
}

function begin() {
  const { jobId } = takeFragment(() =>
    confirm("You are signed in. Sign out, and sign in with the token of this address?"),
  );
  if (!showSignedIn()) return;
  load();
  if (jobId) openDialog(jobId);
}

signInForm.addEventListener("submit", (event) => {
  event.preventDefault();
  signIn(find("token").value);
  find("token").value = find("token-error").textContent = "";
  if (showSignedIn()) load();
});
find("sign-out").addEventListener("click", () => signOut());
filter.addEventListener("change", () => load());
more.addEventListener("click", () => load({ isMore: true }));
window.addEventListener("hashchange", begin);
window.addEventListener("offline", () => showTrouble(null));
window.addEventListener("online", () => (entries.size ? showTrouble(null) : currentToken() && load()));
window.addEventListener("beforeunload", (event) => {
  if ([...document.querySelectorAll("dialog")].some(isBusy)) event.preventDefault();
});
document.body.append(toastRegion());
begin();
