// Elements from data. Text only ever becomes text nodes: nothing here, or anywhere else, reads a string as HTML.

const SVG = "http://www.w3.org/2000/svg";

function build(element, props, children) {
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "dataset") Object.assign(element.dataset, value);
    else if (name === "css") for (const [key, each] of Object.entries(value)) element.style.setProperty(key, each);
    else if (name === "value") element.value = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export const h = (tag, props, ...children) => build(document.createElement(tag), props, children);
export const svg = (tag, props, ...children) => build(document.createElementNS(SVG, tag), props, children);

const CONTROL = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;

/** `text` with escapes in place of control characters, invisible ones, and those that change the reading order. */
export function spelled(text) {
  return String(text ?? "").replace(CONTROL, (found) => {
    const code = found.codePointAt(0).toString(16);
    return code.length > 2 ? `\\u${code.padStart(4, "0")}` : `\\x${code.padStart(2, "0")}`;
  });
}

/** The same on one line: line breaks and tabs become signs. */
export const oneLine = (text) => spelled(String(text ?? "").replace(/\r?\n/g, "⏎").replace(/\t/g, "⇥"));

/** An option list; `options` are values or [value, label]. */
export function select(props, options, chosen) {
  const list = options.map((option) => (Array.isArray(option) ? option : [option, option]));
  const element = h("select", props, list.map(([value, label]) => h("option", { value }, spelled(label))));
  element.value = chosen ?? "";
  return element;
}

/** A group of buttons, one of them pressed. `options`: [value, label, why it is missing]. */
export function choice(label, options, chosen, onPick) {
  return h("div", { class: "choice", role: "group", "aria-label": label },
    options.map(([value, text, missing]) => h("button", {
      type: "button",
      "aria-pressed": String(value === chosen),
      "aria-disabled": missing ? "true" : null,
      title: missing ?? null,
      dataset: { value },
      onclick: () => missing || onPick(value),
    }, text, missing ? h("small", {}, ` – ${missing}`) : null)));
}
