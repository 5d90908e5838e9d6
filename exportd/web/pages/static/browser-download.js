import { SpeedMeter } from "./meter.js";

/**
 * A download by the browser's own download manager. A page cannot see it, so the server reports its progress.
 *
 * `state`: `starting` until the server reports it; `running`; `interrupted`: the browser may resume it; `done`.
 */
export class BrowserDownload {
  state = "starting";
  /** Bytes that the client acknowledged, of `total`. */
  received = 0;

  #countBefore;
  #receivedBefore;
  #meter = new SpeedMeter();

  /** `before`: the job's state before the download began. */
  constructor(before) {
    this.total = before.package.sizeBytes;
    this.#countBefore = before.downloadCount;
    this.#receivedBefore = before.bytesReceived;
  }

  get speed() {
    return this.#meter.speed;
  }

  /** Updates the download from the job's new state. */
  take({ downloads, downloadCount, bytesReceived }) {
    if (downloads.length) {
      this.state = "running";
      this.received = this.#sum(downloads, bytesReceived);
      this.#meter.add(this.received);
    } else if (downloadCount > this.#countBefore && bytesReceived <= this.#receivedBefore) {
      // The server clears the progress when the parts complete the package.
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

/** Passes a URL to the browser's download manager. Call it in a click, or soon after one. */
export function handToBrowser(url) {
  const anchor = document.createElement("a");
  anchor.href = url;
  anchor.rel = "noopener noreferrer";
  if (new URL(url).origin === location.origin) anchor.download = "";
  // The browser closes a tab that becomes a download. An error appears in that tab and not in this page.
  else anchor.target = "_blank";
  anchor.click();
}
