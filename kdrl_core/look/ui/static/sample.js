// One response: prompt, answer, verdict, all numbers, and its tokens as a heat map.

import { get, steps as loadSteps } from "./api.js";
import { h, spelled } from "./dom.js";
import { number, signed, verdictClass } from "./format.js";
import { HeatMap } from "./heatmap.js";
import { changed, go, link, note } from "./router.js";
import { queryOf, sampleParams } from "./rollouts.js";

const NUMBERS = [
  ["reward", number], ["format_reward", number], ["accuracy_reward", number], ["advantage", (value) => signed(value, 3)], ["kd_weight", number],
  ["length", number], ["finish_reason", String], ["repetition_rate", number], ["kl_mean", number], ["kl_sum", number], ["log_ratio_sum", (value) => signed(value, 2)],
];
const SHOWN_APART = new Set(["run", "stage", "step", "prompt_id", "sample", "prompt", "response", "ground_truth", "extracted", "reason", "verdict", "response_preview"]);
const LABELS = { format_reward: "format", accuracy_reward: "accuracy", kd_weight: "KD weight", finish_reason: "ended", repetition_rate: "repetition",
  rollout_s: "rollout, s", teacher_score_s: "teacher, s", verify_s: "verify, s", update_s: "update, s", entropy_mean: "entropy, mean",
  kl_mean: "KL, mean", kl_sum: "KL, sum", log_ratio_sum: "Σ R", policy_version: "policy version" };

export async function sampleView(container, params, context, signal) {
  const id = idOf(params);
  const [record, steps] = await Promise.all([get("rollout", { ...id, sample: params.get("sample") }, signal), loadSteps(context.revision)]);
  const step = steps.find((row) => row.run === record.run && row.stage === record.stage && row.step === record.step);
  const heat = new HeatMap({ record, step, chosen: params.get("colour") ?? "ratio", onChoose: colour });
  const list = new URLSearchParams(params.get("list") ?? ""), at = params.has("at") ? Number(params.get("at")) : null;
  const toList = () => go("rollouts", params.has("list") ? list : { run: id.run, stage: id.stage, step_min: id.step, step_max: id.step });
  const group = { run: id.run, stage: id.stage, step: id.step, prompt: id.prompt_id };

  function colour(kind) {
    heat.paint(kind);
    params = changed(params, { colour: kind });
    note("sample", params);
  }

  async function move(by) {
    if (at === null ? Number(params.get("sample")) + by < 0 : at + by < 0) return;
    if (at === null) {
      go("sample", changed(params, { sample: Number(params.get("sample")) + by }));
      return;
    }
    const { rows } = await get("rollouts", queryOf(list, { offset: at + by, limit: 1 }));
    if (rows.length) go("sample", changed(new URLSearchParams(params), { ...sampleParams(rows[0], at + by, list), colour: heat.kind }));
  }

  container.append(
    h("div", { class: "title-line" },
      h("h1", {}, h("a", { href: link("rollouts", params.has("list") ? list : group) }, "Rollouts"), ` › ${spelled(id.stage)} step ${id.step} › `,
        h("a", { href: link("group", group) }, spelled(id.prompt_id)), ` › #${record.sample}`),
      h("span", { class: "pager" },
        h("button", { type: "button", onclick: () => move(-1), "aria-label": "Previous" }, "‹"),
        at !== null && h("span", { class: "soft" }, `row ${number(at + 1)}`),
        h("button", { type: "button", onclick: () => move(1), "aria-label": "Next" }, "›"),
        h("a", { class: "button", href: link("group", group) }, "group"),
        h("a", { class: "button", href: link("compare", { prompt: id.prompt_id, run_a: id.run, stage_a: id.stage, step_a: id.step }) }, "compare"))),
    h("div", { class: "verdict-line" }, h("span", { class: verdictClass(record.verdict) }, spelled(record.verdict ?? "not judged")), " ", h("span", {}, spelled(record.reason ?? ""))),
    h("dl", { class: "answers" },
      h("div", { class: "wide" }, h("dt", {}, "answer found"), h("dd", {}, h("code", {}, spelled(record.extracted ?? "none")))),
      h("div", { class: "wide" }, h("dt", {}, "ground truth"), h("dd", {}, h("code", {}, spelled(record.ground_truth ?? "–")))),
      numbers(record).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, spelled(value))))),
    h("h2", {}, "Prompt"), h("pre", { class: "text prompt" }, spelled(record.prompt ?? "")),
    h("h2", {}, "Response"), heat.element,
    h("details", { class: "raw" }, h("summary", {}, "as text"), h("pre", { class: "text" }, spelled(record.response ?? ""))));

  return {
    keys: {
      j: () => move(1), ArrowDown: () => move(1), k: () => move(-1), ArrowUp: () => move(-1), Escape: toList, g: () => go("group", group),
      ...Object.fromEntries([1, 2, 3, 4, 5, 6].map((key) => [String(key), () => heat.choose(key - 1)])),
    },
  };
}

const idOf = (params) => ({ run: params.get("run") ?? "", stage: params.get("stage") ?? "", step: Number(params.get("step")), prompt_id: params.get("prompt") ?? "" });

/** The main numbers first, then what each function of the reward returned, then all others of the record. */
function numbers(record) {
  const first = NUMBERS.filter(([name]) => record[name] !== undefined && record[name] !== null).map(([name, format]) => [name, format(record[name])]);
  const known = new Set(NUMBERS.map(([name]) => name));
  const rest = Object.entries(record).filter(([name, value]) => !known.has(name) && !SHOWN_APART.has(name) && value !== null && typeof value !== "object")
    .map(([name, value]) => [name, name === "seed" ? String(value) : typeof value === "number" ? number(value) : String(value)]);
  const returned = (record.reward_values ?? []).filter(({ value }) => value !== null).map(({ name, value }) => [name, number(value)]);
  return [...first, ...returned, ...rest].map(([name, value]) => [LABELS[name] ?? name, value]);
}
