/** The page's texts for sizes, times, and errors by their code. */

const UNITS = ["B", "KB", "MB", "GB", "TB", "PB", "EB"];
const WARNING_DAYS = 3;
const DAY = 86_400_000;

/** "12.5 MB", in units of 1024. The server writes sizes in exactly the same way. */
export function formatBytes(count) {
  if (count < 1024) return `${count} B`;
  let unit = 0;
  // Otherwise 1023.95 would appear as 1024.0 of its unit.
  for (; (count >= 1023.95 || !unit) && unit < UNITS.length - 1; unit += 1) count /= 1024;
  return `${count.toFixed(1)} ${UNITS[unit]}`;
}

/** An estimated time: "40 s", "3 min", "2 h 5 min". */
export function formatDuration(seconds) {
  if (seconds < 59.5) return `${Math.max(1, Math.round(seconds))} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return `${minutes} min`;
  const rest = minutes % 60;
  return `${Math.floor(minutes / 60)} h${rest ? ` ${rest} min` : ""}`;
}

/** A time in the reader's time zone and locale. */
export function formatMoment(moment) {
  return new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" }).format(
    new Date(moment),
  );
}

/** Rounds down, so that 100 % appears only when every byte has arrived. */
export function formatPercent(fraction) {
  return `${Math.floor(100 * Math.min(1, fraction))} %`;
}

/** When a package expires, and whether that is soon: `{text, isSoon}`. */
export function describeExpiry(expiresAt, now = Date.now()) {
  if (!expiresAt) return { text: "Kept without end", isSoon: false };
  const left = new Date(expiresAt) - now;
  if (left <= 0) return { text: `Expired on ${formatMoment(expiresAt)}`, isSoon: false };
  if (left > WARNING_DAYS * DAY) return { text: `Expires on ${formatMoment(expiresAt)}`, isSoon: false };
  return { text: `Expires in ${formatDistance(left)}, on ${formatMoment(expiresAt)}`, isSoon: true };
}

function formatDistance(milliseconds) {
  const minutes = Math.max(1, Math.floor(milliseconds / 60_000));
  const [count, unit] =
    minutes < 60
      ? [minutes, "minute"]
      : minutes < 1440
        ? [Math.floor(minutes / 60), "hour"]
        : [Math.floor(minutes / 1440), "day"];
  return `${count} ${unit}${count === 1 ? "" : "s"}`;
}

const SENTENCES = {
  UNAUTHENTICATED: () => "You are signed out. Open this page again from your application.",
  DOWNLOAD_UNAUTHORIZED: () => "Only the person who made this export, or an administrator, may download it.",
  JOB_NOT_FOUND: () => "There is no such export. It may have been removed.",
  INVALID_JOB_ID: () => "There is no such export: its number is not valid.",
  PACKAGE_NOT_READY: () => "The export is not finished yet.",
  PACKAGE_EXPIRED: ({ expiresAt }) =>
    expiresAt && new Date(expiresAt) <= Date.now()
      ? `The package expired on ${formatMoment(expiresAt)}. Export it again to get a new one.`
      : "The package was deleted. Export it again to get a new one.",
  LINK_EXPIRED: () => "The download link is no longer valid. Start the download again.",
  FILE_NOT_FOUND: () =>
    "The package is missing on the server. Export it again, or contact the operator of this service.",
  STORAGE_ERROR: () => "The server cannot read the package. Contact the operator of this service.",
  PACKAGE_AVAILABLE: () => "The package is still available. It needs no new export.",
  EXPORT_IN_PROGRESS: () => "It is being exported again already.",
  RE_EXPORT_UNSUPPORTED: () => "Exports cannot be repeated from here. Start a new one in your application.",
  RATE_LIMITED: ({ limit, retryAfterSeconds }) =>
    limit?.startsWith("downloads")
      ? `Too many downloads run at once. Try again when one has ended, ${when(retryAfterSeconds)}.`
      : `Too many requests. Try again ${when(retryAfterSeconds)}.`,
  QUOTA_EXCEEDED: ({ retryAfterSeconds }) =>
    `You have downloaded as much as is allowed in a day. More is possible ${when(retryAfterSeconds)}.`,
  DATABASE_UNAVAILABLE: () => "The service is not available at the moment.",
  IDENTITY_PROVIDER_UNAVAILABLE: () => "Signing in cannot be checked at the moment.",
  SHUTTING_DOWN: () => "The service is restarting.",
  CONNECTION_LOST: () => "The connection is lost.",
  PACKAGE_CHANGED: () => "The package is not the one this download began with. Start again.",
  DIGEST_MISMATCH: () => "What was saved is not what the server has: the SHA-256 differs. Start again.",
  FILE_NOT_WRITABLE: () => "The file cannot be written. Is the disk full, or the file open elsewhere?",
};

function when(seconds) {
  if (!seconds) return "later";
  return seconds < 3600
    ? `in ${formatDuration(seconds)}`
    : `from ${formatMoment(Date.now() + 1000 * seconds)} on`;
}

/** The text for an error's `code`. An unknown code has the server's own message. */
export function explain(error) {
  const sentence = SENTENCES[error.code];
  if (sentence) return sentence(error.details ?? {});
  const reference = error.details?.requestId ? ` (request ${error.details.requestId})` : "";
  return `${error.message || "Something went wrong"}.${reference}`;
}
