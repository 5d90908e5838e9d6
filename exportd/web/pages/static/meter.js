const WINDOW_MS = 5_000;

/** The recent rate of a growing number of bytes. */
export class SpeedMeter {
  #samples = [];

  add(received, now = performance.now()) {
    if (received < this.#samples.at(-1)?.received) this.#samples = [];
    this.#samples.push({ at: now, received });
    while (now - this.#samples[0].at > WINDOW_MS) this.#samples.shift();
  }

  /** Bytes per second; 0 if unknown. */
  get speed() {
    const [first, last] = [this.#samples[0], this.#samples.at(-1)];
    return last?.at > first?.at ? (1000 * (last.received - first.received)) / (last.at - first.at) : 0;
  }
}
