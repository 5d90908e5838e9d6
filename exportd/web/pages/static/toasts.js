/** Short messages that come and go, and that assistive technology announces. */

import { h } from "./dom.js";

const SHOWN_MS = 8_000;

/** Where a page's or a dialog's messages appear. It has to be there before they do, to be announced. */
export function toastRegion() {
  return h("div", { className: "toasts" }, h("div", { role: "status" }), h("div", { role: "alert" }));
}

/** Something went well: said politely, and gone after a while. */
export function tell(text) {
  show("status", text, SHOWN_MS);
}

/** Something went wrong: said at once, and there until it is dismissed. */
export function warn(text) {
  show("alert", text);
}

function show(role, text, duration) {
  // Behind an open dialog nothing is seen or heard.
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
  // Who reads it, or is about to dismiss it, is not hurried.
  for (const event of ["pointerenter", "focusin"]) toast.addEventListener(event, () => clearTimeout(timer));
  for (const event of ["pointerleave", "focusout"]) toast.addEventListener(event, start);
  start();
}
