/** The daemon's API, by `fetch`. */

import { createParser } from "./vendor/eventsource-parser/index.js";

// The server sends a comment at least every fifteen seconds.
const SILENCE_MS = 40_000;
const LONGEST_WAIT_MS = 30_000;
// A browser opens at most six connections to a host, and downloads need some of them. Further elements poll.
const MOST_STREAMS = 2;
const LOOK_MS = 3_000;

let streams = 0;

/** An error response: `code`, `status`, and in `details` the rest of its body. */
export class ApiError extends Error {
  constructor(status, details, retryAfterSeconds) {
    super(details.message ?? `The server answered ${status}`);
    this.status = status;
    this.code = details.code ?? `HTTP_${status}`;
    this.details = details;
    this.retryAfterMs = 1000 * (retryAfterSeconds || 0);
  }

  /** Whether the error is temporary. */
  get isPassing() {
    return [429, 502, 503, 504].includes(this.status) && this.code !== "QUOTA_EXCEEDED";
  }
}

/** No response arrived, or its connection broke. */
export class ConnectionLost extends Error {
  constructor(cause) {
    super("The connection is lost", { cause });
    this.code = "CONNECTION_LOST";
    this.isPassing = true;
    this.retryAfterMs = 0;
  }
}

export class Client {
  #token;

  /**
   * `base`: the URL of the API. `token`: a function that returns the bearer token, or a promise of it. After a
   * 401 the client calls it again, with `{isRefused: true}`, for another token.
   */
  constructor(base, token) {
    this.base = new URL(base, document.baseURI).href.replace(/\/$/, "");
    this.#token = token;
  }

  /** A page of the caller's jobs, newest first: `{jobs, nextCursor}`. */
  async listJobs({ status, cursor, signal } = {}) {
    const query = new URLSearchParams(Object.entries({ status, cursor }).filter(([, value]) => value));
    return (await this.#request(`/export-jobs?${query}`, { signal })).json();
  }

  async findJob(jobId, { signal } = {}) {
    return (await this.#request(this.#path(jobId), { signal })).json();
  }

  /** A link that needs no token: `{url, expiresAt, resumeUntil}`. The URL is absolute. */
  async makeLink(jobId) {
    const link = await (await this.#request(this.#path(jobId, "/download-link"), { method: "POST" })).json();
    return { ...link, url: new URL(link.url, this.base).href };
  }

  /** Exports again. Returns the new job. */
  async exportAgain(jobId) {
    return (await this.#request(this.#path(jobId, "/re-export"), { method: "POST" })).json();
  }

  /** The package from byte `start` on. If `etag` is given, only of that version. */
  async openPackage(jobId, { start = 0, etag, signal }) {
    const headers = start ? { Range: `bytes=${start}-`, ...(etag && { "If-Range": etag }) } : {};
    return this.#request(this.#path(jobId, "/download"), { headers, signal });
  }

  /**
   * The job's states, now and at each change, until `signal` aborts. Calls `onLost` when the connection is lost,
   * and reconnects. Throws an ApiError that is not temporary.
   */
  async *follow(jobId, { signal, onLost = () => {} }) {
    let failures = 0;
    let lastId;
    while (!signal.aborted) {
      const isCrowded = streams >= MOST_STREAMS;
      const mine = new AbortController();
      const abort = () => mine.abort();
      signal.addEventListener("abort", abort);
      streams += 1;
      let pause = LOOK_MS;
      try {
        const headers = { Accept: "text/event-stream", ...(lastId && { "Last-Event-ID": lastId }) };
        const response = await this.#request(this.#path(jobId, "/events"), { headers, signal: mine.signal });
        for await (const event of readEvents(response, isCrowded ? LOOK_MS : SILENCE_MS)) {
          failures = 0;
          lastId = event.id;
          yield JSON.parse(event.data);
          if (isCrowded) break;
        }
      } catch (error) {
        if (signal.aborted) return;
        if (!error.isPassing) throw error;
        // A polling element ends its stream after a few seconds. That is no lost connection.
        if (!isCrowded) {
          failures += 1;
          onLost(error);
          pause = pauseAfter(failures, error);
        }
      } finally {
        streams -= 1;
        signal.removeEventListener("abort", abort);
        mine.abort();
      }
      await wait(pause, signal);
    }
  }

  #path(jobId, rest = "") {
    return `/export-jobs/${encodeURIComponent(jobId)}${rest}`;
  }

  async #request(path, { method = "GET", headers = {}, signal } = {}) {
    const token = await this.#token({ isRefused: false });
    let response = await this.#send(path, method, headers, signal, token);
    if (response.status === 401) {
      const other = await this.#token({ isRefused: true });
      if (other && other !== token) response = await this.#send(path, method, headers, signal, other);
    }
    if (response.ok) return response;
    const details = await response.json().catch(() => ({}));
    throw new ApiError(response.status, details, Number(response.headers.get("Retry-After")));
  }

  async #send(path, method, headers, signal, token) {
    const sent = token ? { ...headers, Authorization: `Bearer ${token}` } : headers;
    try {
      return await fetch(this.base + path, {
        method,
        headers: sent,
        signal,
        cache: "no-store",
        credentials: "omit",
        referrerPolicy: "no-referrer",
      });
    } catch (error) {
      throw asLost(error);
    }
  }
}

/** The chunks of a body. Throws ConnectionLost if the connection breaks, or is silent for `silenceMs`. */
export async function* readChunks(response, silenceMs = SILENCE_MS) {
  const reader = response.body.getReader();
  try {
    for (;;) {
      let timer;
      const silence = new Promise((_, reject) => {
        timer = setTimeout(() => reject(new ConnectionLost()), silenceMs);
      });
      const { done, value } = await Promise.race([reader.read(), silence]).finally(() => clearTimeout(timer));
      if (done) return;
      yield value;
    }
  } catch (error) {
    throw asLost(error);
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function* readEvents(response, silenceMs) {
  const events = [];
  const parser = createParser({ onEvent: (event) => events.push(event) });
  const decoder = new TextDecoder();
  for await (const chunk of readChunks(response, silenceMs)) {
    parser.feed(decoder.decode(chunk, { stream: true }));
    yield* events.splice(0);
  }
}

function asLost(error) {
  return error instanceof TypeError ? new ConnectionLost(error) : error;
}

/** How long to wait after a number of failures in a row. `error` is the last one. */
export function pauseAfter(failures, error) {
  return Math.max(error.retryAfterMs, Math.min(LONGEST_WAIT_MS, 500 * 2 ** failures));
}

/** Waits until the time is over, the network is back, or `signal` aborts. */
export function wait(milliseconds, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(done, milliseconds);
    function done() {
      clearTimeout(timer);
      window.removeEventListener("online", done);
      signal?.removeEventListener("abort", done);
      resolve();
    }
    window.addEventListener("online", done);
    signal?.addEventListener("abort", done);
    if (signal?.aborted) done();
  });
}
