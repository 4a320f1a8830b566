// The same prompt in two runs, or at two steps of one.

import { get } from "./api.js";
import { h, select, spelled } from "./dom.js";
import { Chart } from "./chart.js";
import { fixed } from "./format.js";
import { card, summaryOf } from "./group.js";
import { changed, go, link, note } from "./router.js";

export async function compareView(container, params, context, signal) {
  const runs = context.runs.map((run) => run.name);
  const prompt = params.get("prompt") ?? (await anyPrompt(context, signal));
  if (!prompt) {
    container.append(h("h1", {}, "Compare"), h("p", { class: "soft" }, "No step is finished yet: there is nothing to compare."));
    return {};
  }
  const histories = new Map(await Promise.all(runs.map(async (run) => [run, (await get("prompt", { run, prompt_id: prompt }, signal)).steps])));
  const sides = choose(params, runs, histories);
  const groups = await Promise.all(sides.map((side) => (side && side.step !== null ? get("group", { run: side.run, stage: side.stage, step: side.step, prompt_id: prompt }, signal) : { responses: [] })));
  if (!params.has("prompt")) note("compare", addressOf(prompt, sides));

  const set = (which, change) => {
    const next = sides.map((side, i) => (i === which ? { ...side, ...change } : side));
    go("compare", addressOf(prompt, next));
  };
  const other = h("input", { name: "prompt", value: prompt, size: 24, spellcheck: "false", autocomplete: "off", "aria-label": "Prompt id",
    onchange: (event) => go("compare", changed(new URLSearchParams(), { prompt: event.target.value.trim(), run_a: sides[0]?.run, run_b: sides[1]?.run })) });
  const figure = historyFigure(runs, histories, (place) => set(nearestSide(sides, place), place));
  const text = groups.flatMap((group) => group.responses)[0]?.prompt;
  container.append(
    h("div", { class: "title-line" }, h("h1", {}, "Compare"), h("label", {}, "prompt ", other)),
    text === undefined ? h("p", { class: "failure" }, `No run here has a prompt ${spelled(prompt)}.`) : h("pre", { class: "text prompt" }, spelled(text)),
    figure?.element ?? "",
    h("div", { class: "sides" }, sides.map((side, i) => column(side, i, groups[i].responses, { runs, histories, prompt, set }))));
  return { destroy: () => figure?.destroy(), keys: { Escape: () => history.back(), "/": () => other.focus() } };
}

/** A prompt of the newest step of the first run. */
async function anyPrompt(context, signal) {
  for (const run of context.runs) {
    const { rows } = await get("rollouts", { run: run.name, stage: run.stages.at(-1) ?? "", sort: "step", descending: "true", limit: 1 }, signal);
    if (rows.length) return rows[0].prompt_id;
  }
  return null;
}

/** The two sides: from the address; else two runs, or two steps of the only run. */
function choose(params, runs, histories) {
  const seen = runs.filter((run) => histories.get(run).length);
  const first = params.get("run_a") ?? seen[0];
  if (first === undefined) return [null, null];
  const second = params.get("run_b") ?? seen.find((run) => run !== first) ?? first;
  const asked = (letter, run) => (histories.get(run) ?? []).find((one) =>
    one.stage === params.get(`stage_${letter}`) && String(one.step) === params.get(`step_${letter}`));
  const place = (run, one) => ({ run, stage: one?.stage ?? "", step: one?.step ?? null });
  const [ofFirst, ofSecond] = [histories.get(first) ?? [], histories.get(second) ?? []];
  const a = asked("a", first) ?? (first === second ? ofFirst[0] : ofFirst.at(-1));
  const b = asked("b", second) ?? ofSecond.findLast((one) => first !== second || one !== a) ?? a;
  return [place(first, a), place(second, b)];
}

const addressOf = (prompt, sides) => ({ prompt, ...Object.fromEntries(sides.flatMap((side, i) =>
  ["run", "stage", "step"].map((name) => [`${name}_${"ab"[i]}`, side?.[name]]))) });

const nearestSide = (sides, place) => (sides[0]?.run === place.run && sides[1]?.run !== place.run ? 0 : 1);

function column(side, which, responses, { runs, histories, prompt, set }) {
  if (!side) return h("section", {});
  const steps = histories.get(side.run) ?? [];
  const labelOf = (one) => `${one.stage} step ${one.step} · reward ${fixed(one.reward_mean, 2)}`;
  return h("section", { class: `side c${runs.indexOf(side.run) % 8}`, dataset: { side: "ab"[which] } },
    h("div", { class: "side-head" },
      select({ "aria-label": "Run", onchange: (event) => set(which, { run: event.target.value, stage: null, step: null }) }, runs, side.run),
      select({ "aria-label": "Step", onchange: (event) => {
        const [stage, step] = event.target.value.split("/");
        set(which, { stage, step: Number(step) });
      } }, steps.map((one) => [`${one.stage}/${one.step}`, labelOf(one)]), `${side.stage}/${side.step}`),
      responses.length ? h("a", { class: "button", href: link("group", { run: side.run, stage: side.stage, step: side.step, prompt }) }, "group") : null),
    responses.length ? h("p", { class: "facts" }, summaryOf(responses)) : h("p", { class: "soft" }, `${spelled(side.run)} never drew this prompt.`),
    responses.map((one) => card(one, side)));
}

/** The prompt's mean reward each time that it was drawn; a click shows that step on a side. */
function historyFigure(runs, histories, onPick) {
  const stages = [...new Set([...histories.values()].flat().map((one) => one.stage))].sort();
  const offsets = new Map();
  let end = 0;
  for (const stage of stages) {
    offsets.set(stage, end);
    end += Math.max(...[...histories.values()].flat().filter((one) => one.stage === stage).map((one) => one.step + 1));
  }
  if (!end) return null;
  const series = runs.map((run, i) => {
    const steps = histories.get(run).map((one) => ({ ...one, run, x: offsets.get(one.stage) + one.step })).sort((a, b) => a.x - b.x);
    return { label: run, color: `c${i % 8}`, x: steps.map((one) => one.x), y: steps.map((one) => one.reward_mean), at: (at) => ({ run, stage: steps[at].stage, step: steps[at].step }) };
  }).filter((one) => one.x.length);
  return new Chart({ key: "prompt-reward", title: "Mean reward of this prompt each time it was drawn", series, domain: [0, Math.max(1, end - 1)],
    stages: stages.map((name) => ({ name, offset: offsets.get(name) })), points: true, bus: new EventTarget(), onPick, onZoom: () => {} });
}
