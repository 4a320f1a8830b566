// The figures of the trends view.
//
// lines: [name, label]; a name is a column of a step or one of its metrics. With several runs, a figure shows one line
// per run, the first that has values. `band`: from, to. `mix`: parts of a whole, one figure per run.

import { VERDICTS, fixed, number, percent } from "./format.js";

const seconds = (value) => (typeof value === "number" ? `${fixed(value, value < 10 ? 2 : 0)} s` : number(value));

export const PANELS = [
  { key: "reward", title: "Reward", lines: [["reward_mean", "mean"], ["reward/format", "format"], ["reward/accuracy", "accuracy"]] },
  { key: "length", title: "Length, tokens", lines: [["length_p50", "median"], ["length_mean", "mean"], ["length_max", "longest"]], band: ["length_p05", "length_p95", "5–95 %"] },
  { key: "verdicts", title: "Verdicts", format: percent, mix: VERDICTS.map((kind) => [`verdict_${kind}`, kind, kind]) },
  { key: "clip", title: "Clip ratio: cut at the limit", format: percent, lines: [["clip_ratio", "cut"]] },
  { key: "kl", title: "KL to the teacher, nats a token", lines: [["kl_mean", "mean of responses"], ["kd/kl_unmasked", "unmasked tokens"]] },
  { key: "entropy", title: "Entropy, nats", lines: [["entropy", "entropy"]] },
  { key: "repetition", title: "Repetition: 8-grams seen before", format: percent, lines: [["repetition_mean", "all"], ["repetition_overlong", "cut responses"]] },
  { key: "grad", title: "Gradient norm", lines: [["optim/grad_norm", "norm"]] },
  { key: "gap", title: "Engine gap: trainer − engine logprob", log: true, lines: [["engine/logprob_gap_mean", "mean"], ["engine/logprob_gap_max", "largest"]] },
  { key: "groups", title: "Groups without signal", lines: [["num_groups_all_wrong", "all wrong"], ["num_groups_all_right", "all right"]] },
  { key: "advantage", title: "Spread of advantages", lines: [["advantage_std", "standard deviation"]] },
  { key: "ref", title: "KL to the stage's first policy", lines: [["ref/kl", "KL"]] },
  { key: "loss", title: "Loss", lines: [["loss/total", "total"], ["loss/policy", "policy"], ["loss/sft", "SFT"]] },
  { key: "beta", title: "β: weight of the teacher", lines: [["beta", "β"]] },
  { key: "ratio", title: "Clipped importance ratios", format: percent, lines: [["ratio/clipped_frac", "clipped"], ["ratio/tis_capped_frac", "engine correction capped"]] },
  { key: "time", title: "Time of a step by phase", format: seconds, total: true, mix: [
    ["time/rollout_s", "rollout", "c0"], ["time/teacher_score_s", "teacher", "c1"], ["time/reference_score_s", "reference", "c2"],
    ["time/verify_s", "verify", "c3"], ["time/update_s", "update", "c4"], ["sync/seconds", "weight sync", "c5"]] },
  { key: "throughput", title: "Rollout tokens a second", lines: [["throughput/rollout_tokens_per_s", "tokens/s"]] },
];

export const valueOf = (row, name) => row[name] ?? row.metrics[name] ?? null;

/** Metrics that no figure above shows, one figure each. */
export function otherPanels(rows) {
  const shown = new Set(PANELS.flatMap((panel) => [...(panel.lines ?? panel.mix)].map(([name]) => name)));
  const same = new Set(["reward/mean", "response/length_mean", "response/length_max", "response/clip_ratio", "response/repetition_overlong", "step"]);
  const names = new Set(rows.flatMap((row) => Object.keys(row.metrics)));
  return [...names].filter((name) => !shown.has(name) && !same.has(name) && !name.startsWith("verdict/")).sort()
    .map((name) => ({ key: `metric:${name}`, title: name, lines: [[name, name]] }));
}
