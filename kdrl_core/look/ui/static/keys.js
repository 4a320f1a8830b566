// Keys of the views. In a field only Escape counts, and it leaves the field.

import { h } from "./dom.js";

const KEYS = [
  ["t r c", "trends, rollouts, compare"],
  ["j k  ↓ ↑", "next and previous row, response or prompt"],
  ["Enter", "open the marked row or response"],
  ["Esc", "back"],
  ["[ ]", "previous and next step"],
  ["/", "full-text search"],
  ["g", "the group of a response: all answers to its prompt"],
  ["1 … 6", "colour of the tokens"],
  ["← →", "in a figure: step by step; Enter goes there"],
];

export function showKeys() {
  const dialog = document.getElementById("keys");
  if (dialog.open) return;
  dialog.replaceChildren(
    h("h2", {}, "Keys"),
    h("dl", {}, KEYS.map(([keys, what]) => [h("dt", {}, keys), h("dd", {}, what)])),
    h("button", { type: "button", onclick: () => dialog.close() }, "Close"));
  dialog.showModal();
}

/** Call the action for the key; true if there is one. */
export function keysOf(event, actions) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented || document.getElementById("keys").open) return false;
  const target = event.target;
  if (target.matches?.("input, select, textarea")) {
    if (event.key !== "Escape") return false;
    target.blur();
    return true;
  }
  const isOpener = target.matches?.("a[href], button, summary");
  if (event.key === "Enter" && isOpener) return false;
  const action = actions[event.key];
  if (!action) return false;
  action();
  return true;
}
