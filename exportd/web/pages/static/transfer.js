/**
 * A download in the page, into a file that the user chose (File System Access API). It can be paused, can be resumed
 * after a reload too, and checks the SHA-256. Only the current chunk is in memory.
 */

import { ConnectionLost, pauseAfter, readChunks, wait } from "./client.js";
import { SpeedMeter } from "./meter.js";
import { createStore, del, get, set } from "./vendor/idb-keyval/index.js";
import { sha256 } from "./vendor/noble-hashes/sha2.js";

// The browser writes into a copy until the file is closed, and a reload loses the copy. Opening the file again copies
// it, so it is closed each time it has grown by half. In all, the browser copies two to three times its size.
const LEAST_COMMIT_BYTES = 32 * 1024 * 1024;
const BETWEEN_EVENTS_MS = 100;

const live = new Map();
let store;

/** A failure in the browser, by its code in words.js. */
class TransferError extends Error {
  constructor(code, cause) {
    super(code, { cause });
    this.code = code;
    this.isPassing = false;
  }
}

/**
 * Fires `change`. `state`: `paused`; `checking`: reads the file again; `running`; `waiting`: tries again after
 * `error`; `done`; `failed`, with `error`; `cancelled`.
 */
export class Transfer extends EventTarget {
  state = "paused";
  error = null;
  /** Written bytes, of `total` (null: not known yet). */
  received = 0;
  total = null;
  /** After completion: true if the server sent a digest. The file then matches it. */
  isVerified = false;

  #client;
  #jobId;
  #key;
  #handle;
  #etag;
  #digest = null;
  #hash = null;
  #file = null;
  #committed = 0;
  #stop = null;
  #running = Promise.resolve();
  #meter = new SpeedMeter();
  #toldAt = 0;

  constructor(client, jobId, handle, saved) {
    super();
    this.#client = client;
    this.#jobId = jobId;
    this.#key = keyOf(client, jobId);
    this.#handle = handle;
    if (saved) {
      this.#etag = saved.etag;
      this.#digest = saved.digest;
      this.total = saved.total;
      this.received = this.#committed = saved.received;
    } else {
      this.#hash = sha256.create();
    }
    live.set(this.#key, this);
  }

  static get isSupported() {
    return "showSaveFilePicker" in window;
  }

  /** Asks where to save, and starts. Call it in a click. Throws AbortError if the user chooses nothing. */
  static async start(client, jobId, fileName) {
    const handle = await window.showSaveFilePicker({
      id: "exportd",
      startIn: "downloads",
      suggestedName: fileName,
    });
    const transfer = new Transfer(client, jobId, handle);
    transfer.#begin();
    return transfer;
  }

  /** The job's running transfer, or the one that an earlier visit left unfinished, or null. */
  static async find(client, jobId) {
    const key = keyOf(client, jobId);
    if (live.has(key) || !Transfer.isSupported) return live.get(key) ?? null;
    const saved = await get(key, savedTransfers()).catch(() => undefined);
    // Another call may have finished first.
    return live.get(key) ?? (saved ? new Transfer(client, jobId, saved.handle, saved) : null);
  }

  get isBusy() {
    return ["checking", "running", "waiting"].includes(this.state);
  }

  /** Whether the transfer can be resumed. */
  get canResume() {
    return live.get(this.#key) === this;
  }

  /** The recent rate, in bytes per second. */
  get speed() {
    return this.#meter.speed;
  }

  /** Stops, and keeps the file. */
  async pause() {
    this.#stop?.abort();
    await this.#running;
  }

  /** Resumes. Call it in a click: after a reload the browser asks for permission to write the file. */
  async resume() {
    if (this.isBusy) return;
    if ((await this.#handle.requestPermission({ mode: "readwrite" })) === "granted") this.#begin();
  }

  /** Stops, and deletes the file and its record. */
  async cancel() {
    await this.pause();
    await this.#forget();
    await this.#handle.remove?.().catch(() => {});
    this.#enter("cancelled");
  }

  async #forget() {
    live.delete(this.#key);
    await del(this.#key, savedTransfers()).catch(() => {});
  }

  #begin() {
    this.#stop = new AbortController();
    this.#running = this.#run(this.#stop.signal);
  }

  async #run(signal) {
    try {
      if (!this.#hash) await this.#readBack(signal);
      for (let failures = 0; ; ) {
        const before = this.received;
        try {
          await this.#receive(signal);
          break;
        } catch (error) {
          await this.#commit();
          if (signal.aborted) break;
          if (!error.isPassing) throw error;
          failures = this.received > before ? 1 : failures + 1;
          this.#enter("waiting", error);
          await wait(pauseAfter(failures, error), signal);
          if (signal.aborted) break;
        }
      }
      if (signal.aborted) this.#enter("paused");
      else await this.#finish();
    } catch (error) {
      this.#enter(signal.aborted ? "paused" : "failed", signal.aborted ? null : error);
    }
  }

  /** Hashes the bytes that an earlier visit wrote. */
  async #readBack(signal) {
    this.#enter("checking");
    const file = await this.#handle.getFile().catch(cannotWrite);
    this.#hash = sha256.create();
    this.received = 0;
    if (!this.#etag || file.size > this.total) return;
    const reader = file.stream().getReader();
    for (;;) {
      const { done, value } = await reader.read().catch(cannotWrite);
      if (done) break;
      if (signal.aborted) {
        this.#hash = null;
        return;
      }
      this.#hash.update(value);
      this.received += value.length;
      this.#progressed();
    }
    this.#committed = this.received;
  }

  async #receive(signal) {
    if (this.received === this.total) return;
    this.#enter("running");
    const response = await this.#client.openPackage(this.#jobId, {
      start: this.received,
      etag: this.#etag,
      signal,
    });
    if (response.status !== 206) this.#startAgain();
    else if (!response.headers.get("Content-Range")?.startsWith(`bytes ${this.received}-`)) {
      throw new TransferError("PACKAGE_CHANGED");
    }
    this.#etag = response.headers.get("ETag");
    this.#digest = response.headers.get("Repr-Digest") ?? "";
    this.total = this.received + Number(response.headers.get("Content-Length"));
    await this.#save();
    this.#file ??= await this.#open();
    for await (const chunk of readChunks(response)) {
      await this.#write(chunk);
      if (this.received - this.#committed >= Math.max(LEAST_COMMIT_BYTES, this.#committed / 2)) {
        await this.#commit();
        this.#file = await this.#open();
      }
    }
    if (this.received !== this.total) throw new ConnectionLost();
  }

  #startAgain() {
    this.received = this.#committed = 0;
    this.#hash = sha256.create();
  }

  async #open() {
    try {
      const file = await this.#handle.createWritable({
        keepExistingData: this.received > 0,
        mode: "exclusive",
      });
      if (this.received) await file.seek(this.received);
      return file;
    } catch (error) {
      return cannotWrite(error);
    }
  }

  async #write(chunk) {
    try {
      await this.#file.write(chunk);
    } catch (error) {
      this.#lostFile();
      cannotWrite(error);
    }
    this.#hash.update(chunk);
    this.received += chunk.length;
    this.#progressed();
  }

  /** Closes the file, so that the browser keeps the written bytes. */
  async #commit() {
    if (!this.#file) return;
    const file = this.#file;
    this.#file = null;
    try {
      await file.close();
    } catch (error) {
      this.#lostFile();
      cannotWrite(error);
    }
    this.#committed = this.received;
    await this.#save();
  }

  /** Discards the bytes written since the file was last closed. */
  #lostFile() {
    this.#file = null;
    this.#hash = null;
    this.received = this.#committed;
  }

  #save() {
    const saved = {
      handle: this.#handle,
      etag: this.#etag,
      digest: this.#digest,
      total: this.total,
      received: this.#committed,
    };
    // A private window may forbid storage. The transfer then works, but does not survive a reload.
    return set(this.#key, saved, savedTransfers()).catch(() => {});
  }

  async #finish() {
    await this.#commit();
    const expected = /sha-256=:([^:]+):/.exec(this.#digest)?.[1];
    const found = btoa(String.fromCharCode(...this.#hash.digest()));
    await this.#forget();
    if (expected && expected !== found) {
      await this.#handle.remove?.().catch(() => {});
      throw new TransferError("DIGEST_MISMATCH");
    }
    this.isVerified = Boolean(expected);
    this.#enter("done");
  }

  #enter(state, error = null) {
    this.state = state;
    this.error = error;
    this.#meter = new SpeedMeter();
    this.#meter.add(this.received);
    this.dispatchEvent(new Event("change"));
  }

  #progressed() {
    const now = performance.now();
    if (now - this.#toldAt < BETWEEN_EVENTS_MS) return;
    this.#toldAt = now;
    this.#meter.add(this.received, now);
    this.dispatchEvent(new Event("change"));
  }
}

function keyOf(client, jobId) {
  return `${client.base} ${jobId}`;
}

function savedTransfers() {
  store ??= createStore("exportd-transfers", "transfers");
  return store;
}

function cannotWrite(error) {
  throw new TransferError("FILE_NOT_WRITABLE", error);
}
