// The G answers to one prompt at one step, side by side.

import { get } from "./api.js";
import { choice, h, oneLine, select, spelled } from "./dom.js";
import { count, fixed, number, percent, signed, verdictClass } from "./format.js";
import { changed, go, link, note } from "./router.js";

const ORDERS = { sample: (a, b) => a.sample - b.sample, reward: (a, b) => (b.reward ?? 0) - (a.reward ?? 0) || a.sample - b.sample, length: (a, b) => b.length - a.length || a.sample - b.sample };
const MAX_PROMPTS = 500;

export async function groupView(container, params, context, signal) {
  const place = { run: params.get("run") ?? "", stage: params.get("stage") ?? "", step: Number(params.get("step")) };
  const prompt = params.get("prompt") ?? "";
  const [{ responses }, prompts] = await Promise.all([get("group", { ...place, prompt_id: prompt }, signal), promptsOf(place, signal)]);
  if (!responses.length) throw new Error(`run ${place.run} has no prompt ${prompt} at ${place.stage} step ${place.step}`);
  const grid = h("div", { class: "cards" });
  const orders = h("div");
  let marked = Math.max(0, Number(params.get("row")) || 0), shown = [];

  function draw() {
    const order = params.get("order") ?? "sample";
    shown = [...responses].sort(ORDERS[order] ?? ORDERS.sample);
    orders.replaceChildren(choice("Order", [["sample", "by number"], ["reward", "by reward"], ["length", "by length"]], order, (value) => {
      params = changed(params, { order: value, row: null });
      note("group", params);
      marked = 0;
      draw();
    }));
    grid.replaceChildren(...shown.map((one, i) => card(one, place, i === marked)));
  }

  function mark(by) {
    marked = Math.max(0, Math.min(shown.length - 1, marked + by));
    [...grid.children].forEach((each, i) => each.setAttribute("aria-current", String(i === marked)));
    grid.children[marked].scrollIntoView({ block: "nearest" });
    note("group", (params = changed(params, { row: marked || null })));
  }

  const goTo = (other) => go("group", changed(params, { prompt: other, row: null }));
  const neighbour = (by) => {
    const other = prompts[prompts.indexOf(prompt) + by];
    if (other) goTo(other);
  };
  container.append(
    h("div", { class: "title-line" },
      h("h1", {}, h("a", { href: link("rollouts", { run: place.run, stage: place.stage, step_min: place.step, step_max: place.step }) }, "Rollouts"), ` › ${spelled(place.stage)} step ${place.step} › group`),
      h("span", { class: "pager" },
        h("button", { type: "button", "aria-label": "Previous prompt", onclick: () => neighbour(-1) }, "‹"),
        select({ "aria-label": "Prompt", onchange: (event) => goTo(event.target.value) }, prompts.includes(prompt) ? prompts : [prompt, ...prompts], prompt),
        h("button", { type: "button", "aria-label": "Next prompt", onclick: () => neighbour(1) }, "›"),
        h("a", { class: "button", href: link("compare", { prompt, run_a: place.run, stage_a: place.stage, step_a: place.step }) }, "compare"))),
    h("pre", { class: "text prompt" }, spelled(responses[0].prompt ?? "")),
    h("p", { class: "facts" }, summaryOf(responses)), orders, grid);
  draw();
  return { keys: {
    j: () => mark(1), ArrowDown: () => mark(1), k: () => mark(-1), ArrowUp: () => mark(-1), ArrowRight: () => mark(1), ArrowLeft: () => mark(-1),
    "[": () => neighbour(-1), "]": () => neighbour(1),
    Enter: () => (location.hash = sampleLink(shown[marked], place)),
    Escape: () => go("rollouts", { run: place.run, stage: place.stage, step_min: place.step, step_max: place.step }),
  } };
}

const sampleLink = (one, { run, stage, step }) => link("sample", { run, stage, step, prompt: one.prompt_id, sample: one.sample });

/** Prompts of a step, found by their responses with number 0. */
async function promptsOf({ run, stage, step }, signal) {
  const { rows } = await get("rollouts", { run, stage, step_min: step, step_max: step, sample: 0, sort: "prompt_id", limit: MAX_PROMPTS }, signal);
  return rows.map((row) => row.prompt_id);
}

/** One line about a group: truth, how many are right, reward, lengths, KL. */
export function summaryOf(responses) {
  const of = (name) => responses.map((one) => one[name]).filter((value) => typeof value === "number");
  const mean = (values) => (values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null);
  const lengths = of("length"), right = responses.filter((one) => one.verdict === "correct").length;
  const facts = [["truth", oneLine(responses[0]?.ground_truth ?? "–")], ["right", `${right} of ${responses.length} (${percent(right / responses.length)})`], ["reward", fixed(mean(of("reward")), 3)],
    ["length", lengths.length ? `${number(Math.min(...lengths))}–${number(Math.max(...lengths))}` : "–"], ["KL", fixed(mean(of("kl_mean")), 3)]];
  return facts.map(([name, value]) => [h("span", { class: "soft" }, `${name} `), h("span", {}, value), "  "]);
}

export function card(one, place, isMarked = false) {
  return h("article", { class: "card", "aria-current": String(isMarked), dataset: { sample: one.sample } },
    h("header", {}, h("a", { href: sampleLink(one, place) }, `#${one.sample}`), h("span", { class: verdictClass(one.verdict) }, spelled(one.verdict ?? "–")),
      h("span", { class: "soft" }, `reward ${number(one.reward)}  Â ${signed(one.advantage)}`)),
    h("pre", { class: "text", tabindex: 0 }, spelled(one.response), one.is_cut ? h("i", { class: "soft" }, " … cut here") : null),
    h("footer", { class: "soft" }, `${count(one.length, "token")}${one.finish_reason === "length" ? ", cut at the limit" : ""} · KL ${fixed(one.kl_mean, 3)}`,
      h("span", { class: "reason" }, spelled(one.reason ?? ""))));
}
