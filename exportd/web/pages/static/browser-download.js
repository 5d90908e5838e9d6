import { SpeedMeter } from "./meter.js";

/**
 * A download that the browser's own download manager makes, as the server tells of it: a page cannot see it.
 *
 * `state`: `starting`, until the server has seen it; `running`; `interrupted`, which the browser may resume; `done`.
 */
export class BrowserDownload {
  state = "starting";
  /** Bytes that the server knows to have arrived, of `total`. */
  received = 0;

  #countBefore;
  #receivedBefore;
  #meter = new SpeedMeter();

  /** `before`: the job's state before it began. */
  constructor(before) {
    this.total = before.package.sizeBytes;
    this.#countBefore = before.downloadCount;
    this.#receivedBefore = before.bytesReceived;
  }

  get speed() {
    return this.#meter.speed;
  }

  /** Takes the job's next state. */
  take({ downloads, downloadCount, bytesReceived }) {
    if (downloads.length) {
      this.state = "running";
      this.received = this.#sum(downloads, bytesReceived);
      this.#meter.add(this.received);
    } else if (downloadCount > this.#countBefore && bytesReceived <= this.#receivedBefore) {
      // Parts that come together are cleared as they become whole.
      this.state = "done";
      this.received = this.total;
    } else if (this.state === "running" || bytesReceived > this.#receivedBefore) {
      this.state = "interrupted";
      this.received = bytesReceived;
    }
  }

  #sum(downloads, bytesReceived) {
    const whole = downloads.filter((download) => download.bytesRequested === this.total);
    if (whole.length) return Math.max(...whole.map((download) => download.bytesAcknowledged));
    const parts = downloads.reduce((sum, download) => sum + download.bytesAcknowledged, 0);
    return Math.min(this.total, bytesReceived + parts);
  }
}

/** Gives an address to the browser's download manager. Call it in a click, or soon after. */
export function handToBrowser(url) {
  const anchor = document.createElement("a");
  anchor.href = url;
  anchor.rel = "noopener noreferrer";
  if (new URL(url).origin === location.origin) anchor.download = "";
  // A tab that becomes a download closes by itself; one that shows an error costs this page nothing.
  else anchor.target = "_blank";
  anchor.click();
}
