/** Short messages that disappear by themselves, and that assistive technology announces. */

import { h } from "./dom.js";

const SHOWN_MS = 8_000;

/** The element for a page's or a dialog's messages. Only messages in an existing live region are announced. */
export function toastRegion() {
  return h("div", { className: "toasts" }, h("div", { role: "status" }), h("div", { role: "alert" }));
}

/** A success: announced politely, and removed after a while. */
export function tell(text) {
  show("status", text, SHOWN_MS);
}

/** A failure: announced at once, and kept until the user dismisses it. */
export function warn(text) {
  show("alert", text);
}

function show(role, text, duration) {
  // Messages behind an open dialog are neither visible nor announced.
  const place = document.querySelector("dialog[open]") ?? document.body;
  const region = place.querySelector(`:scope > .toasts > [role="${role}"]`);
  for (const present of [...region.children]) if (present.dataset.text === text) present.remove();
  const dismiss = h("button", { type: "button", onclick: () => toast.remove() }, "×");
  dismiss.setAttribute("aria-label", "Dismiss");
  const toast = h("div", { className: "toast" }, h("p", {}, text), dismiss);
  toast.dataset.text = text;
  region.append(toast);
  if (!duration) return;
  let timer;
  const start = () => (timer = setTimeout(() => toast.remove(), duration));
  // The message stays while the pointer or the focus is on it.
  for (const event of ["pointerenter", "focusin"]) toast.addEventListener(event, () => clearTimeout(timer));
  for (const event of ["pointerleave", "focusout"]) toast.addEventListener(event, start);
  start();
}
