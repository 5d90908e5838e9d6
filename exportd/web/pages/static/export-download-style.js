/** The component's style sheet. Script builds it, so that a host's Content-Security-Policy may forbid inline styles. */
export const sheet = new CSSStyleSheet();

sheet.replaceSync(`
:host {
  --_accent: var(--export-download-accent, light-dark(#1d4ed8, #8ab4ff));
  --_on-accent: var(--export-download-on-accent, light-dark(#fff, #0b1220));
  --_text: var(--export-download-text, light-dark(#1b2330, #e6eaf2));
  --_muted: var(--export-download-muted, light-dark(#566175, #a5b0c3));
  --_line: var(--export-download-line, light-dark(#c3cad6, #3c485c));
  --_warning: var(--export-download-warning, light-dark(#8a4b00, #f5b759));
  --_error: var(--export-download-error, light-dark(#b3261e, #ff9b93));
  --_success: var(--export-download-success, light-dark(#13693c, #7fd8a4));
  --_radius: var(--export-download-radius, 8px);
  display: block;
  color: var(--_text);
  font: inherit;
  line-height: 1.45;
}
:host([hidden]), [hidden] { display: none !important; }
p { margin: 0 0 .5em; }
[part="status"] { font-weight: 600; }
[part="hint"] { color: var(--_muted); font-size: .9em; }
:host([state="expiring"]) [part="hint"] { color: var(--_warning); font-weight: 600; }
:host([state="failed"]) [part="status"], :host([state="suspect"]) [part="status"] { color: var(--_error); }
:host([state="completed"]) [part="status"] { color: var(--_success); }
:host([state="expired"]) [part="status"], :host([state="waiting"]) [part="status"] { color: var(--_warning); }
.row { margin: 0 0 .75em; }
progress {
  appearance: none;
  display: block;
  width: 100%;
  height: .6rem;
  border: 0;
  border-radius: 99px;
  overflow: hidden;
  background: var(--_line);
}
progress::-webkit-progress-bar { background: var(--_line); }
progress::-webkit-progress-value { background: var(--_accent); border-radius: 99px; transition: inline-size .3s linear; }
progress::-moz-progress-bar { background: var(--_accent); border-radius: 99px; }
progress:indeterminate {
  background: linear-gradient(90deg, var(--_line) 25%, var(--_accent) 50%, var(--_line) 75%) 0 0 / 300% 100%;
  animation: slide 1.8s linear infinite;
}
progress:indeterminate::-webkit-progress-bar { background: none; }
progress:indeterminate::-moz-progress-bar { background: none; }
@keyframes slide { from { background-position: 150% 0; } to { background-position: 0 0; } }
[part="numbers"] { display: block; margin-top: .35em; color: var(--_muted); font-size: .9em; font-variant-numeric: tabular-nums; }
.actions { display: flex; flex-wrap: wrap; gap: .5rem; }
button, a.primary {
  font: inherit;
  font-weight: 600;
  min-height: 2.75rem;
  padding: .4em 1em;
  border: 1px solid var(--_line);
  border-radius: var(--_radius);
  background: none;
  color: var(--_text);
  text-decoration: none;
  cursor: pointer;
  box-sizing: border-box;
}
.primary { border-color: var(--_accent); background: var(--_accent); color: var(--_on-accent); }
button:hover:not(:disabled), a.primary:hover { filter: brightness(1.08); }
button:focus-visible, a:focus-visible, summary:focus-visible, code:focus-visible { outline: 3px solid var(--_accent); outline-offset: 2px; }
button:disabled { border-color: var(--_line); background: none; color: var(--_muted); cursor: not-allowed; }
button[aria-busy="true"] { cursor: progress; }
details { margin-top: 1em; }
summary { cursor: pointer; color: var(--_muted); padding: .4em 0; border-radius: 4px; }
.command { display: flex; gap: .5rem; align-items: start; margin-top: .5em; }
code {
  flex: 1;
  min-width: 0;
  padding: .6em .75em;
  border: 1px solid var(--_line);
  border-radius: var(--_radius);
  font: .85em/1.5 ui-monospace, monospace;
  overflow-wrap: anywhere;
}
@media (prefers-reduced-motion: reduce) {
  progress:indeterminate { animation: none; }
  progress::-webkit-progress-value { transition: none; }
}
`);
