const WINDOW_MS = 5_000;

/** How fast a number of bytes grows, lately. */
export class SpeedMeter {
  #samples = [];

  add(received, now = performance.now()) {
    if (received < this.#samples.at(-1)?.received) this.#samples = [];
    this.#samples.push({ at: now, received });
    while (now - this.#samples[0].at > WINDOW_MS) this.#samples.shift();
  }

  /** Bytes a second; 0 where that is not known. */
  get speed() {
    const [first, last] = [this.#samples[0], this.#samples.at(-1)];
    return last?.at > first?.at ? (1000 * (last.received - first.received)) / (last.at - first.at) : 0;
  }
}
