// The filters of the table, as a form. The address holds them, and each field shows its value in the address.

import { h, select, spelled } from "./dom.js";
import { VERDICTS } from "./format.js";

const RANGES = [["step", "step", 1], ["reward", "reward", "any"], ["length", "length", 1], ["kl", "KL", "any"]];
const NAMES = ["run", "stage", "step_min", "step_max", "prompt_id", "sample", "verdict", "finish_reason", "reward_min", "reward_max",
  "length_min", "length_max", "kl_min", "kl_max", "text"];

/** The part of an address that the server's filter takes. */
export function filterOf(params) {
  return new URLSearchParams([...params].filter(([name, value]) => NAMES.includes(name) && value !== ""));
}

export class Filters {
  constructor(context, onChange) {
    this.onChange = onChange;
    const stages = [...new Set(context.runs.flatMap((run) => run.stages))];
    const field = (name) => (event) => onChange({ [name]: event.target.value.trim() });
    this.search = h("input", { type: "search", name: "text", placeholder: "search prompts and responses", "aria-label": "Full-text search", onchange: field("text"), onsearch: field("text") });
    this.form = h("form", { class: "filters", role: "search", onsubmit: (event) => event.preventDefault() },
      h("div", { class: "line" }, this.search,
        context.runs.length > 1 && h("label", {}, "run ", select({ name: "run", onchange: field("run") }, [["", "all"], ...context.runs.map((run) => run.name)])),
        h("label", {}, "stage ", select({ name: "stage", onchange: field("stage") }, [["", "all"], ...stages])),
        this.#range(...RANGES[0])),
      h("div", { class: "line" },
        h("div", { class: "chips", role: "group", "aria-label": "Verdicts" }, VERDICTS.map((verdict) =>
          h("button", { type: "button", class: `chip ${verdict}`, dataset: { verdict }, "aria-pressed": "false", onclick: () => this.#toggle(verdict) }, h("i"), verdict))),
        h("label", {}, "ended ", select({ name: "finish_reason", onchange: field("finish_reason") }, [["", "any way"], ["stop", "by itself"], ["length", "at the limit"]])),
        ...RANGES.slice(1).map((range) => this.#range(...range)),
        h("label", {}, "prompt ", h("input", { name: "prompt_id", size: 12, spellcheck: "false", autocomplete: "off", placeholder: "any", onchange: field("prompt_id") })),
        this.clear = h("button", { type: "button", class: "clear", onclick: () => onChange(Object.fromEntries(NAMES.map((name) => [name, null]))) }, "clear")));
    this.element = h("details", { class: "filter-box", open: window.innerWidth > 700 }, h("summary", {}, "Filters ", this.summary = h("span", { class: "soft" })), this.form);
  }

  #range(name, label, step) {
    const input = (end) => h("input", { type: "number", step, name: `${name}_${end}`, "aria-label": `${label}: ${end === "min" ? "least" : "greatest"}`,
      placeholder: end, onchange: (event) => this.onChange({ [`${name}_${end}`]: event.target.value }) });
    return h("span", { class: "range" }, label, " ", input("min"), "–", input("max"));
  }

  #toggle(verdict) {
    this.onChange({ verdict: VERDICTS.filter((each) => (each === verdict) !== this.verdicts.includes(each)) });
  }

  show(params) {
    this.verdicts = params.getAll("verdict");
    for (const button of this.form.querySelectorAll("[data-verdict]"))
      button.setAttribute("aria-pressed", String(this.verdicts.includes(button.dataset.verdict)));
    for (const input of this.form.querySelectorAll("input, select")) input.value = params.get(input.name) ?? "";
    const set = filterOf(params);
    this.clear.disabled = [...set].length === 0;
    this.summary.textContent = [...set].map(([name, value]) => `${name} ${spelled(value)}`).join(" · ");
  }
}
