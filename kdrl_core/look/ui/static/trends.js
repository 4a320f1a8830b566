// Trends over steps, of one run or of several in the same figures. A click on a point goes to that step.

import { steps as loadSteps } from "./api.js";
import { Chart } from "./chart.js";
import { choice, h, select, spelled } from "./dom.js";
import { count } from "./format.js";
import { PANELS, otherPanels, valueOf } from "./panels.js";
import { changed, go } from "./router.js";
import { smoothed } from "./scale.js";

const MAX_MIXES = 4;

export async function trendsView(container, params, context) {
  let charts = [], rows = await loadSteps(context.revision);
  const controls = h("div", { class: "controls" });
  const grid = h("div", { class: "charts" });
  const bus = new EventTarget();
  const notes = h("p", { class: "soft notes" });
  container.append(h("h1", {}, "Trends"), controls, grid, notes);

  const set = (changes) => go("trends", changed(params, changes));

  function draw() {
    const plan = planOf(rows, params, context.runs);
    const focused = [...controls.querySelectorAll("button, select")].indexOf(document.activeElement);
    controls.replaceChildren(...controlsOf(plan));
    if (focused >= 0) controls.querySelectorAll("button, select")[focused]?.focus();
    const [first, last] = plan.domain;
    const missing = [];
    const panels = [...PANELS, ...(params.has("more") ? otherPanels(plan.rows) : [])];
    const wanted = panels.flatMap((panel) => {
      const made = seriesOf(panel, plan).filter(({ series }) => series.length);
      if (!made.length) missing.push(panel.title.split(":")[0].split(",")[0]);
      return made.map(({ title, series }) => ({
        ...panel, title, series, domain: [first, last], stages: plan.stages, stack: Boolean(panel.mix), bus,
        onPick: ({ run, stage, step }) => go("rollouts", { run, stage, step_min: step, step_max: step }),
        onZoom: (from, to) => set({ from, to }),
      }));
    });
    if (wanted.length === charts.length && wanted.every(({ key, title }, i) => key === charts[i].key && title === charts[i].title))
      charts.forEach((chart, i) => chart.set(wanted[i]));
    else {
      charts.forEach((chart) => chart.destroy());
      charts = wanted.map((config) => new Chart(config));
      grid.replaceChildren(...charts.map((chart) => chart.element));
    }
    notes.textContent = rows.length ? `Click a point to see its step; drag to zoom.${missing.length ? ` Not recorded: ${missing.join(", ")}.` : ""}`
      : "No step is finished yet; this page fills as steps are published.";
  }

  function controlsOf(plan) {
    const runs = context.runs.map((run) => h("button", {
      type: "button", class: `chip c${context.runs.indexOf(run) % 8}`, "aria-pressed": String(plan.runs.includes(run.name)), dataset: { run: run.name },
      title: `${count(run.num_rollouts, "rollout")}; ${Object.entries(run.num_steps).map(([stage, done]) => `${stage}: ${count(done, "step")}`).join(", ")}`,
      onclick: () => set({ run: context.runs.map((one) => one.name).filter((name) => (name === run.name) !== plan.runs.includes(name)) }),
    }, h("i"), spelled(run.name)));
    const isZoomed = params.has("from") || params.has("to");
    return [
      h("div", { class: "chips", role: "group", "aria-label": "Runs" }, runs),
      h("label", {}, "stage ", select({ name: "stage", onchange: (event) => set({ stage: event.target.value, from: null, to: null }) },
        [["", "all"], ...plan.allStages], params.get("stage") ?? "")),
      choice("Lines", [["", "smooth"], ["1", "raw"]], params.get("raw") ?? "", (raw) => set({ raw })),
      choice("Metrics", [["", "main"], ["1", "all metrics"]], params.get("more") ?? "", (more) => set({ more })),
      h("button", { type: "button", class: "unzoom", disabled: !isZoomed, onclick: () => set({ from: null, to: null }) }, "whole range"),
    ];
  }

  draw();
  return {
    update(next) {
      params = next;
      draw();
    },
    async refresh() {
      rows = await loadSteps(context.revision);
      draw();
    },
    destroy: () => charts.forEach((chart) => chart.destroy()),
    keys: { Escape: () => set({ from: null, to: null }) },
  };
}

/** Which rows are drawn, and where each step lies on the common axis: stages follow one another. */
function planOf(rows, params, known) {
  const asked = params.getAll("run"), stage = params.get("stage");
  const runs = known.map((run) => run.name).filter((name) => !asked.length || asked.includes(name));
  const mine = rows.filter((row) => runs.includes(row.run));
  const allStages = [...new Set(known.flatMap((run) => run.stages))];
  const stages = [];
  let offset = 0;
  for (const name of allStages.filter((each) => !stage || each === stage)) {
    const length = Math.max(0, ...mine.filter((row) => row.stage === name).map((row) => row.step + 1));
    if (length) stages.push({ name, offset });
    offset += length;
  }
  const offsets = new Map(stages.map((one) => [one.name, one.offset]));
  const drawn = mine.filter((row) => offsets.has(row.stage)).map((row) => ({ ...row, x: offsets.get(row.stage) + row.step }));
  const end = Math.max(1, offset - 1);
  const at = (name, other) => (params.has(name) ? Math.min(end, Math.max(0, Number(params.get(name)) || 0)) : other);
  return { runs, stages, allStages, rows: drawn, known, domain: [at("from", 0), at("to", end)], smooth: !params.has("raw") };
}

function seriesOf(panel, plan) {
  const several = plan.runs.length > 1;
  const perRun = plan.runs.map((run) => ({ run, rows: plan.rows.filter((row) => row.run === run).sort((a, b) => a.x - b.x) }));
  const line = (rows, name, label, color, extra = {}) => {
    const kept = rows.filter((row) => valueOf(row, name) !== null);
    if (!kept.length) return [];
    const all = rows, y = all.map((row) => valueOf(row, name));
    const one = { label, color, x: all.map((row) => row.x), y, at: (i) => all[i], ...extra };
    if (!plan.smooth || panel.mix) return [one];
    return [{ ...one, faint: true, legend: false, low: null, high: null }, { ...one, y: smoothed(y), own: y }];
  };
  if (panel.mix)
    return perRun.slice(0, MAX_MIXES).map(({ run, rows }) => ({
      title: several ? `${panel.title} · ${run}` : panel.title,
      series: panel.mix.flatMap(([name, label, color]) => rows.some((row) => valueOf(row, name)) ? line(rows, name, label, color) : []),
    }));
  const band = (rows) => panel.band && { low: rows.map((row) => valueOf(row, panel.band[0])), high: rows.map((row) => valueOf(row, panel.band[1])) };
  const series = perRun.flatMap(({ run, rows }) => {
    const color = `c${plan.known.findIndex((one) => one.name === run) % 8}`;
    if (several) {
      const [name] = panel.lines.find(([each]) => rows.some((row) => valueOf(row, each) !== null)) ?? panel.lines[0];
      return line(rows, name, run, color);
    }
    return panel.lines.flatMap(([name, label], i) => line(rows, name, label, i === 0 ? color : `c${(plan.known.findIndex((one) => one.name === run) + i) % 8}`,
      i === 0 ? { ...band(rows) } : { dash: i > 1 }));
  });
  return [{ title: panel.title, series }];
}
