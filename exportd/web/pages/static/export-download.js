/**
 * `<export-download job-id="…">`: the button that downloads an export's package, for any page.
 *
 * Attributes: `job-id`; `base`, the URL of the API (by default `/api/tool-registry` on the host of this
 * script); `commands`, to offer command lines too. Property `token`: the bearer token, or a function that returns
 * it or a promise of it. The element calls it with `{isRefused: true}` if the last token was rejected.
 *
 * Events, which bubble, with `jobId` in their `detail`: `export-started` (`by`: `browser` or `page`),
 * `export-progress` (`received`, `total`), `export-completed` (`by`, `isVerified`), `export-failed` (`code`,
 * `message`), `export-again` (`newJobId`; the element then shows that job), `export-changed` (`job`).
 */

import { BrowserDownload, handToBrowser } from "./browser-download.js";
import { Client } from "./client.js";
import { h } from "./dom.js";
import { sheet } from "./export-download-style.js";
import { Transfer } from "./transfer.js";
import {
  describeExpiry,
  explain,
  formatBytes,
  formatDuration,
  formatMoment,
  formatPercent,
} from "./words.js";

const START_PATIENCE_MS = 15_000;

class ExportDownload extends HTMLElement {
  static observedAttributes = ["job-id", "base"];

  #token = null;
  #client = null;
  #job = null;
  #error = null;
  /** The current connection error, or null. */
  #trouble = null;
  /** At most one of these two is set: a transfer in the page, or a download by the browser. */
  #transfer = null;
  #browser = null;
  #link = null;
  #isAsking = false;
  #isSlowToStart = false;
  #life = null;
  #following = null;
  #stop = null;
  #parts = null;
  #status = "";

  get token() {
    return this.#token;
  }

  set token(token) {
    this.#token = token;
    // A new token may be accepted where the last one was rejected.
    if (this.isConnected) this.#restart();
  }

  get jobId() {
    return this.getAttribute("job-id");
  }

  set jobId(jobId) {
    this.setAttribute("job-id", jobId);
  }

  /** True while a download runs inside the page. Leaving the page would interrupt it. */
  get isBusy() {
    return Boolean(this.#transfer?.isBusy);
  }

  connectedCallback() {
    this.#build();
    // A value that the host set before this script ran hides the property.
    if (Object.hasOwn(this, "token")) {
      this.#token = this.token;
      delete this.token;
    }
    this.#restart();
  }

  disconnectedCallback() {
    this.#life?.abort();
    this.#transfer?.removeEventListener("change", this.#transferChanged);
  }

  attributeChangedCallback(_, before, after) {
    if (this.isConnected && this.#parts && before !== after) this.#restart();
  }

  /** Shows the job from the beginning. */
  async #restart() {
    this.#life?.abort();
    const life = (this.#life = new AbortController());
    this.#transfer?.removeEventListener("change", this.#transferChanged);
    this.#job =
      this.#error =
      this.#trouble =
      this.#transfer =
      this.#browser =
      this.#link =
      this.#following =
        null;
    this.#isAsking = this.#isSlowToStart = false;
    this.#parts.commands.open = false;
    const base = this.getAttribute("base") ?? new URL("/api/tool-registry", import.meta.url);
    this.#client = new Client(base, (why) =>
      typeof this.#token === "function" ? this.#token(why) : this.#token,
    );
    this.#render();
    if (!this.jobId || !this.#token) return;
    const transfer = await Transfer.find(this.#client, this.jobId);
    if (life.signal.aborted) return;
    if (transfer) this.#adopt(transfer);
    await this.#follow().catch(() => {});
  }

  /**
   * Follows the job until its state is final. Returns a promise of the first state. It rejects with the error that
   * the element also shows.
   */
  #follow() {
    if (this.#following) return this.#following;
    const { signal } = this.#life;
    const stop = (this.#stop = new AbortController());
    signal.addEventListener("abort", () => stop.abort(), { signal: stop.signal });
    this.#following = new Promise((resolve, reject) => {
      (async () => {
        const onLost = (error) => this.#show({ trouble: error });
        try {
          for await (const state of this.#client.follow(this.jobId, { signal: stop.signal, onLost })) {
            if (stop.signal.aborted) return;
            this.#take(state);
            resolve(state);
            if (!this.#isWatched()) break;
          }
        } catch (error) {
          if (stop.signal.aborted) return;
          this.#fail(error);
          reject(error);
        } finally {
          stop.abort();
          if (!signal.aborted) this.#following = null;
        }
      })();
    });
    return this.#following;
  }

  #isWatched() {
    const isUnderWay = ["pending", "processing"].includes(this.#job?.status);
    return isUnderWay || this.#isAsking || (this.#browser && this.#browser.state !== "done");
  }

  #take(state) {
    this.#trouble = null;
    // The message of a failed attempt stays, unless the package's state now explains it.
    if (!this.#error?.isOfTheDownload || this.#job?.package?.state !== state.package?.state)
      this.#error = null;
    this.#job = state;
    if (this.#browser) {
      const before = this.#browser.state;
      this.#browser.take(state);
      const { state: now, received, total } = this.#browser;
      if (now === "running") this.#tell("export-progress", { received, total });
      if (now === "done" && before !== "done")
        this.#tell("export-completed", { by: "browser", isVerified: false });
    }
    this.#tell("export-changed", { job: state });
    this.#render();
  }

  async #downloadByBrowser() {
    this.#ask();
    try {
      // Read the job's state before the browser starts, so that later states can be compared with it.
      await this.#follow();
      this.#link = await this.#client.makeLink(this.jobId);
      this.#browser = new BrowserDownload(this.#job);
      this.#transfer = null;
      handToBrowser(this.#link.url);
      this.#tell("export-started", { by: "browser" });
      this.#expectStart(this.#browser);
    } catch (error) {
      this.#fail(error, { isOfTheDownload: true });
    } finally {
      this.#show({ isAsking: false });
      if (!this.#isWatched()) this.#stop?.abort();
    }
  }

  #ask() {
    this.#error = null;
    this.#show({ isAsking: true });
  }

  #expectStart(browser) {
    this.#isSlowToStart = false;
    setTimeout(() => {
      if (this.#browser === browser && browser.state === "starting") this.#show({ isSlowToStart: true });
    }, START_PATIENCE_MS);
  }

  async #downloadInPage() {
    try {
      const transfer = await Transfer.start(
        this.#client,
        this.jobId,
        this.#job.package.fileName ?? "package.tar.gz",
      );
      this.#browser = null;
      this.#adopt(transfer);
      this.#tell("export-started", { by: "page" });
    } catch (error) {
      if (error.name !== "AbortError") this.#fail(error, { isOfTheDownload: true });
    }
  }

  #adopt(transfer) {
    this.#transfer?.removeEventListener("change", this.#transferChanged);
    this.#transfer = transfer;
    transfer.addEventListener("change", this.#transferChanged);
    this.#render();
  }

  #transferChanged = () => {
    const { state, error, received, total, isVerified } = this.#transfer;
    if (state === "running") this.#tell("export-progress", { received, total });
    if (state === "done") this.#tell("export-completed", { by: "page", isVerified });
    if (state === "failed") this.#tell("export-failed", { code: error.code, message: explain(error) });
    if (state === "cancelled") this.#transfer = null;
    if (error?.status === 410) this.#refresh();
    this.#render();
  };

  /** Reads the job again, because the known state is out of date. */
  #refresh() {
    this.#follow().catch(() => {});
  }

  async #exportAgain() {
    this.#ask();
    try {
      const { jobId } = await this.#client.exportAgain(this.jobId);
      this.#goOnWith(jobId);
    } catch (error) {
      // Somebody else exported it again first. Use that job.
      if (error.status === 409 && error.details.jobId !== this.jobId) this.#goOnWith(error.details.jobId);
      else this.#fail(error, { isOfTheDownload: true });
    } finally {
      this.#show({ isAsking: false });
    }
  }

  #goOnWith(jobId) {
    this.#tell("export-again", { newJobId: jobId });
    this.jobId = jobId;
  }

  /** Shows an error of the job in its place, and an error of an attempt beside it. */
  #fail(error, { isOfTheDownload = false } = {}) {
    this.#tell("export-failed", { code: error.code ?? "UNKNOWN", message: explain(error) });
    this.#error = { error, isOfTheDownload };
    if (isOfTheDownload && error.status === 410) this.#refresh();
    this.#render();
  }

  #tell(name, detail) {
    this.dispatchEvent(
      new CustomEvent(name, { detail: { jobId: this.jobId, ...detail }, bubbles: true, composed: true }),
    );
  }

  #show({ isAsking = this.#isAsking, isSlowToStart = this.#isSlowToStart, trouble = this.#trouble }) {
    [this.#isAsking, this.#isSlowToStart, this.#trouble] = [isAsking, isSlowToStart, trouble];
    this.#render();
  }

  /** What the element shows: a name of the state, a sentence, a progress bar, and the actions. */
  #view() {
    const { error, isOfTheDownload } = this.#error ?? {};
    if (!this.#token) return { name: "signed-out", status: "You are signed out." };
    if (error && !isOfTheDownload) {
      return {
        name: "failed",
        status: explain(error),
        actions: error.code === "UNAUTHENTICATED" ? [] : ["retry"],
      };
    }
    if (!this.#job) return { name: "loading", status: this.#trouble ? waiting(this.#trouble) : "Loading…" };
    const view = this.#viewOfTransfer() ?? this.#viewOfBrowser() ?? this.#viewOfJob();
    if (error) return { ...view, name: "failed", status: explain(error) };
    return this.#trouble && !this.#transfer ? { ...view, hint: waiting(this.#trouble) } : view;
  }

  #viewOfTransfer() {
    const transfer = this.#transfer;
    const bar = transfer && { received: transfer.received, total: transfer.total, speed: transfer.speed };
    switch (transfer?.state) {
      case "checking":
        return {
          name: "checking",
          status: "Looking at what has been saved…",
          bar,
          actions: ["pause", "cancel"],
        };
      case "running":
        return { name: "downloading", status: "Downloading", bar, actions: ["pause", "cancel"] };
      case "waiting":
        return { name: "waiting", status: waiting(transfer.error), bar, actions: ["pause", "cancel"] };
      case "paused":
        return { name: "paused", status: "Paused", bar, actions: ["resume", "cancel"] };
      case "failed": {
        const rest = transfer.canResume ? { bar, actions: ["resume", "cancel"] } : this.#viewOfJob();
        return { ...rest, name: "failed", status: explain(transfer.error) };
      }
      case "done": {
        const check = transfer.isVerified ? " and checked: its SHA-256 is right" : "";
        return { ...this.#viewOfJob(), name: "completed", status: `Downloaded${check}.` };
      }
    }
    return null;
  }

  #viewOfBrowser() {
    const browser = this.#browser;
    const bar = browser && { received: browser.received, total: browser.total, speed: browser.speed };
    switch (browser?.state) {
      case "starting": {
        const status = this.#isSlowToStart
          ? "Your browser has not begun to download."
          : "Your browser begins to download…";
        return { name: "starting", status, actions: this.#isSlowToStart ? ["open", "download"] : [] };
      }
      case "running": {
        const hint = "Your browser shows it among its downloads: pause and resume it there.";
        return { name: "downloading", status: "Your browser is downloading", bar, hint, actions: [] };
      }
      case "interrupted": {
        const hint = "Resume it among your browser's downloads, or download it anew.";
        return { ...this.#viewOfJob(), name: "interrupted", status: "The download stopped.", bar, hint };
      }
      case "done":
        return { ...this.#viewOfJob(), name: "completed", status: "Downloaded." };
    }
    return null;
  }

  #viewOfJob() {
    const job = this.#job;
    const again = job.reExportedAs ? ["newer"] : ["again"];
    switch (job.status) {
      case "pending":
        return { name: "pending", status: "Waiting to be made", bar: { fraction: null }, actions: [] };
      case "processing": {
        const fraction = job.percent === null ? null : job.percent / 100;
        return { name: "processing", status: "The export is being made", bar: { fraction }, actions: [] };
      }
      case "failed": {
        const reason = job.failureReason ? `: ${job.failureReason}` : "";
        return { name: "failed", status: `The export failed${reason}.`, actions: again };
      }
    }
    const { state, size, expiresAt } = job.package ?? {};
    const disabled = { name: "expired", actions: ["download", ...again], isDisabled: true };
    switch (state) {
      case "available": {
        const expiry = describeExpiry(expiresAt);
        const actions = ["download", ...(Transfer.isSupported ? ["save"] : [])];
        return {
          name: expiry.isSoon ? "expiring" : "ready",
          status: `Ready: ${size}`,
          hint: expiry.text,
          actions,
        };
      }
      case "expired":
        return { ...disabled, status: `The package expired on ${formatMoment(expiresAt)}.` };
      case "deleted":
        return {
          ...disabled,
          status: `The package ${expiresAt ? `expired on ${formatMoment(expiresAt)} and ` : ""}was deleted.`,
        };
      case "suspect":
        return {
          ...disabled,
          name: "suspect",
          status: "The package changed after it was made, so it is not handed out.",
        };
    }
    return { name: "unknown", status: `The export is ${job.status}.`, actions: ["retry"] };
  }

  #build() {
    if (this.#parts) return;
    const root = this.attachShadow({ mode: "open" });
    root.adoptedStyleSheets = [sheet];
    const act = (action) => () => {
      if (!this.#isAsking) action().catch((error) => this.#fail(error, { isOfTheDownload: true }));
    };
    const button = (part, text, action, kind = "secondary") =>
      h(
        "button",
        { part: `button ${kind} ${part}`, type: "button", className: kind, onclick: act(action) },
        text,
      );
    const actions = {
      download: button("download", "Download package", () => this.#downloadByBrowser(), "primary"),
      save: button("save", "Download in this page", () => this.#downloadInPage()),
      resume: button("resume", "Resume", () => this.#transfer.resume(), "primary"),
      pause: button("pause", "Pause", () => this.#transfer.pause()),
      cancel: button("cancel", "Cancel", () => this.#transfer.cancel()),
      again: button("again", "Export again", () => this.#exportAgain(), "primary"),
      newer: button(
        "newer",
        "Show the newer export",
        async () => this.#goOnWith(this.#job.reExportedAs),
        "primary",
      ),
      retry: button("retry", "Try again", () => this.#restart(), "primary"),
      open: h(
        "a",
        { part: "button primary open", className: "primary", target: "_blank", rel: "noopener" },
        "Open the link",
      ),
    };
    const parts = {
      actions,
      status: h("p", { part: "status", role: "status", id: "status" }),
      bar: h("progress", { part: "progress", max: 1 }),
      numbers: h("span", { part: "numbers" }),
      hint: h("p", { part: "hint" }),
      lines: h("div", {}),
      commands: h("details", { part: "commands" }, h("summary", {}, "By command line")),
    };
    actions.save.title = "With pause and resume, and a check of the SHA-256";
    actions.download.setAttribute("aria-describedby", "status");
    parts.row = h("div", { className: "row" }, parts.bar, parts.numbers);
    parts.commands.append(parts.lines);
    parts.commands.addEventListener("toggle", () => this.#showCommands());
    root.append(
      parts.status,
      parts.row,
      parts.hint,
      h("div", { className: "actions" }, Object.values(actions)),
      parts.commands,
    );
    this.#parts = parts;
  }

  #render() {
    const { actions, status, bar, numbers, hint, row, commands } = this.#parts;
    const focused = this.shadowRoot.activeElement;
    const view = { actions: [], hint: "", ...this.#view() };
    this.setAttribute("state", view.name);
    // A live region: a screen reader would repeat an unchanged text.
    if (this.#status !== view.status) status.textContent = this.#status = view.status;
    hint.textContent = view.hint;
    hint.hidden = !view.hint;
    row.hidden = !view.bar;
    if (view.bar) {
      const { received, total, speed } = view.bar;
      const fraction =
        view.bar.fraction === undefined ? (total ? received / total : null) : view.bar.fraction;
      if (fraction === null) bar.removeAttribute("value");
      else bar.value = fraction;
      bar.setAttribute("aria-label", view.status);
      numbers.textContent = describeProgress(fraction, received, total, speed);
    }
    for (const [name, element] of Object.entries(actions)) {
      element.hidden = !view.actions.includes(name);
    }
    actions.download.disabled = Boolean(view.isDisabled);
    if (this.#link) actions.open.href = this.#link.url;
    // Do not disable the button: it would lose the focus.
    actions.download.setAttribute("aria-busy", this.#isAsking);
    commands.hidden = !this.hasAttribute("commands") || this.#job?.package?.state !== "available";
    // Keep the keyboard focus where the removed button was.
    if (focused?.hidden || focused?.disabled) {
      Object.values(actions)
        .find((element) => !element.hidden && !element.disabled)
        ?.focus();
    }
  }

  async #showCommands() {
    const { commands, lines } = this.#parts;
    if (!commands.open || commands.hidden) return;
    lines.replaceChildren(h("p", {}, "Making a link…"));
    try {
      const { url, expiresAt } = await this.#client.makeLink(this.jobId);
      const { fileName, sha256 } = this.#job.package;
      const name = fileName ?? "package.tar.gz";
      lines.replaceChildren(
        h(
          "p",
          {},
          `The link starts a download until ${formatMoment(expiresAt)}. The same line again resumes it.`,
        ),
        commandLine("curl", `curl -f -C - --retry 9 --retry-all-errors -o '${name}' '${url}'`),
        ...(sha256 ? [commandLine("sha256sum", `echo '${sha256}  ${name}' | sha256sum -c`)] : []),
      );
    } catch (error) {
      lines.replaceChildren(h("p", { role: "alert" }, explain(error)));
    }
  }
}

function waiting(error) {
  return `${explain(error)} Trying again…`;
}

function describeProgress(fraction, received, total, speed) {
  const words = fraction === null ? [] : [formatPercent(fraction)];
  if (total) words.push(`${formatBytes(received)} of ${formatBytes(total)}`);
  if (speed >= 1) {
    words.push(`${formatBytes(Math.round(speed))}/s`);
    if (received < total) words.push(`${formatDuration((total - received) / speed)} left`);
  }
  return words.join(" · ");
}

function commandLine(name, text) {
  const copy = h("button", { type: "button", part: "button secondary copy", className: "secondary" }, "Copy");
  copy.setAttribute("aria-label", `Copy the ${name} line`);
  copy.onclick = async () => {
    try {
      await navigator.clipboard.writeText(text);
      copy.textContent = "Copied";
    } catch {
      // If the browser forbids it, the user can copy the selected text by hand.
      getSelection().selectAllChildren(code);
    }
  };
  const code = h("code", { tabIndex: 0 }, text);
  return h("div", { className: "command" }, code, copy);
}

customElements.define("export-download", ExportDownload);
