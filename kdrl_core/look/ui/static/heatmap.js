// A response as one span per token, coloured by a number that each token has. CSS makes the colours: a span has the sign
// as a class and the size, 0 to 100, as --v. So light and dark mode need no second pass.

import { choice, h, spelled } from "./dom.js";
import { number, signed } from "./format.js";

const SHOWN_PERCENTILE = 0.98;

/** The numbers that can colour tokens: values or why there are none, and the meaning of the scale's ends. */
export function colourings(record, step) {
  const student = record.logprobs ?? record.rollout_logprobs;
  const teacher = record.teacher_logprobs;
  const pairs = (a, b) => a.map((value, i) => (isNumber(value) && isNumber(b[i]) ? value - b[i] : null));
  const ratio = teacher && student ? pairs(teacher, student) : null;
  const advantage = isNumber(record.advantage) ? record.advantage : null;
  const beta = step?.metrics?.beta, weight = record.kd_weight ?? 1;
  const noTeacher = "no teacher scored this step";
  return {
    ratio: { label: "log-ratio", values: ratio, missing: ratio ? null : noTeacher, diverging: true,
      about: "R = log π_T − log π_θ, nats", low: "teacher finds it less likely", high: "more likely" },
    entropy: { label: "entropy", values: record.entropies ?? null, missing: record.entropies ? null : "not recorded by this run",
      about: "entropy of the student's next token, nats", low: "sure", high: "undecided" },
    advantage: { label: "advantage", values: advantage === null ? null : student.map(() => advantage), missing: advantage === null ? "this step has no advantages" : null,
      diverging: true, atLeast: 1, about: "Â, the same for every token of a response", low: "made less likely", high: "more likely" },
    signal: { label: "Â + βR", values: ratio && advantage !== null && isNumber(beta) ? ratio.map((r) => (r === null ? null : advantage + beta * weight * r)) : null,
      missing: !ratio ? noTeacher : advantage === null || !isNumber(beta) ? "β or Â is not recorded" : null, diverging: true,
      about: `the token's weight in the update (Eq. 27), β = ${number(beta)}${weight === 0 ? ", teacher masked" : ""}`, low: "made less likely", high: "more likely" },
    surprise: { label: "surprise", values: student ? student.map((value) => (isNumber(value) ? -value : null)) : null, missing: student ? null : "no logprobs recorded",
      about: "−log π_θ, nats", low: "expected", high: "rare" },
    none: { label: "plain", values: null, missing: null, about: "" },
  };
}

const isNumber = (value) => typeof value === "number";

/** The value that has full colour; 2 % of the values lie beyond it. */
function limitOf(values, atLeast = 0.05) {
  const sizes = values.filter(isNumber).map(Math.abs).sort((a, b) => a - b);
  return Math.max(atLeast, sizes[Math.floor((sizes.length - 1) * SHOWN_PERCENTILE)] ?? 0);
}

export class HeatMap {
  /** tokens: texts; `numbers(i)`: [name, value] of a token, for the line above the text. */
  constructor({ record, step, chosen, onChoose }) {
    this.record = record;
    this.kinds = colourings(record, step);
    this.onChoose = onChoose;
    this.buttons = h("div", { class: "colour-buttons" });
    this.legend = h("div", { class: "scale" });
    this.readout = h("div", { class: "token-readout", "aria-live": "off" });
    this.spans = textsOf(record).map((token, i) => h("span", { class: "token", dataset: { i } }, shown(token)));
    this.text = h("div", { class: "tokens", tabindex: 0, role: "region", "aria-label": "Response, token by token" }, this.spans);
    this.text.addEventListener("pointerover", (event) => this.#point(event.target));
    this.text.addEventListener("click", (event) => this.#point(event.target));
    this.element = h("div", { class: "heatmap" }, h("div", { class: "heat-head" }, this.buttons, this.legend, this.readout), this.text);
    this.paint(this.kinds[chosen]?.missing === null ? chosen : this.#first());
    this.#tell(null);
  }

  #first() {
    return Object.keys(this.kinds).find((kind) => this.kinds[kind].missing === null);
  }

  choose(position) {
    const kind = Object.keys(this.kinds)[position];
    if (kind && this.kinds[kind].missing === null) this.onChoose(kind);
  }

  paint(kind) {
    this.kind = kind;
    const { values, diverging, about, low, high, atLeast } = this.kinds[kind];
    const limit = values ? limitOf(values, atLeast) : 1;
    this.spans.forEach((span, i) => {
      const value = values?.[i];
      span.className = `token ${isNumber(value) ? (!diverging ? "seq" : value < 0 ? "neg" : "pos") : ""}`;
      span.style.setProperty("--v", isNumber(value) ? Math.round(100 * Math.min(1, Math.abs(value) / limit)) : 0);
    });
    this.buttons.replaceChildren(choice("Colour of the tokens",
      Object.entries(this.kinds).map(([name, one]) => [name, one.label, one.missing]), kind, (name) => this.onChoose(name)));
    const ends = !values ? [] : diverging ? [`−${number(limit)}`, `+${number(limit)}`] : ["0", number(limit)];
    this.legend.replaceChildren(...(values ? [h("span", { class: "soft" }, low, " "), h("b", {}, ends[0]),
      h("span", { class: `ramp ${diverging ? "diverging" : "seq"}`, "aria-hidden": "true" }), h("b", {}, ends[1]), h("span", { class: "soft" }, " ", high),
      h("span", { class: "about" }, about)] : [h("span", { class: "soft" }, "no colours")]));
  }

  #point(target) {
    const span = target.closest?.(".token");
    if (!span || span === this.pointed) return;
    this.pointed?.removeAttribute("aria-current");
    this.pointed = span;
    span.setAttribute("aria-current", "true");
    this.#tell(Number(span.dataset.i));
  }

  #tell(i) {
    if (i === null) {
      this.readout.replaceChildren(h("span", { class: "soft" }, `${this.spans.length} tokens; point at one to see its numbers`));
      return;
    }
    const { record, kinds } = this;
    const facts = [["id", record.token_ids?.[i]], ["log π_θ", fix((record.logprobs ?? record.rollout_logprobs)?.[i])], ["log π_T", fix(record.teacher_logprobs?.[i])],
      ["R", signed(kinds.ratio.values?.[i], 4)], ["entropy", fix(record.entropies?.[i])], ["engine", fix(record.rollout_logprobs?.[i])], ["Â + βR", signed(kinds.signal.values?.[i], 4)]];
    this.readout.replaceChildren(h("span", { class: "soft" }, `${i} `), h("code", {}, JSON.stringify(spelled(textsOf(record)[i]))),
      ...facts.filter(([, value]) => value !== undefined && value !== null && value !== "–").map(([name, value]) => h("span", { class: "fact" }, h("i", {}, name), " ", String(value))));
  }
}

const fix = (value) => (isNumber(value) ? value.toFixed(4).replace("-", "−") : value);

/** The text of each token; without a tokenizer, its id. */
const textsOf = (record) => record.tokens ?? (record.token_ids ?? []).map((id) => `[${id}]`);

/** A line break is shown as a sign and breaks the line; an empty token (a byte of a character) as a dot. */
function shown(token) {
  if (token === "") return "·";
  return spelled(token).replace(/\n/g, "⏎\n");
}
