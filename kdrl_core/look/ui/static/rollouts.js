// The table of rollouts: of a step, or of everything. Filters, order and the marked row are in the address.

import { get, steps as loadSteps } from "./api.js";
import { h, oneLine, spelled } from "./dom.js";
import { Filters, filterOf } from "./filters.js";
import { count, fixed, number, percent, signed, verdictClass } from "./format.js";
import { changed, go, link, note } from "./router.js";
import { VirtualTable } from "./table.js";

const NOTE_MS = 150;

export async function rolloutsView(container, params, context) {
  const filters = new Filters(context, (changes) => go("rollouts", changed(params, { ...changes, row: null })));
  const total = h("span", { class: "total", role: "status" });
  const strip = h("div", { class: "strip" });
  const newer = h("button", { type: "button", class: "newer", hidden: true, onclick: () => reload() }, "new rows: show");
  const table = new VirtualTable({
    label: "Rollouts",
    columns: columnsOf(context),
    fetch: (offset, limit, signal) => get("rollouts", queryOf(params, { offset, limit }), signal),
    onSort: (sort, descending) => go("rollouts", changed(params, { sort, descending: descending ? "1" : null, row: null })),
    onOpen: (index, row) => go("sample", sampleParams(row, index, params)),
    onMark: (index) => {
      clearTimeout(table.noteTimer);
      table.noteTimer = setTimeout(() => note("rollouts", (params = changed(params, { row: index || null }))), NOTE_MS);
    },
    onTotal: (found) => (total.textContent = count(found, "rollout")),
    onError: (error) => total.replaceChildren(h("span", { class: "failure" }, spelled(error.message))),
  });

  function reload() {
    newer.hidden = true;
    total.textContent = params.get("text") ? "searching …" : "…";
    filters.show(params);
    table.reset({ sort: params.get("sort") ?? "step", descending: params.has("descending"), marked: Math.max(0, Number(params.get("row")) || 0) });
    showStep();
  }

  async function showStep() {
    const step = stepOf(params);
    strip.hidden = step === null;
    if (step === null) return;
    const rows = await loadSteps(context.revision);
    const found = rows.filter((row) => row.step === step && (!params.get("run") || row.run === params.get("run")) && (!params.get("stage") || row.stage === params.get("stage")));
    strip.replaceChildren(
      h("button", { type: "button", "aria-label": "Previous step", onclick: () => moveStep(-1) }, "‹"),
      h("strong", {}, `step ${number(step)}`),
      h("button", { type: "button", "aria-label": "Next step", onclick: () => moveStep(1) }, "›"),
      ...found.slice(0, 4).map((row) => summary(row, found.length > 1)));
  }

  function moveStep(by) {
    const step = stepOf(params);
    if (step === null || step + by < 0) return;
    go("rollouts", changed(params, { step_min: step + by, step_max: step + by, row: null }));
  }

  container.append(
    h("div", { class: "title-line" }, h("h1", {}, "Rollouts"), total, newer), filters.element, strip, table.element);
  return {
    shown: () => (reload(), table.element.focus({ preventScroll: true })),
    update(next) {
      clearTimeout(table.noteTimer);
      params = next;
      reload();
    },
    refresh: () => (newer.hidden = false),
    destroy: () => (clearTimeout(table.noteTimer), table.destroy()),
    keys: {
      ...table.keys(), "[": () => moveStep(-1), "]": () => moveStep(1),
      "/": () => ((filters.element.open = true), filters.search.focus()),
      Escape: () => go("trends", params.get("run") ? { run: params.get("run") } : {}),
    },
  };
}

function stepOf(params) {
  const [from, to] = [params.get("step_min"), params.get("step_max")];
  return from !== null && from !== "" && from === to ? Number(from) : null;
}

/** The query for the server. */
export function queryOf(params, page) {
  const query = filterOf(params);
  query.set("sort", params.get("sort") ?? "step");
  if (params.has("descending")) query.set("descending", "true");
  for (const [name, value] of Object.entries(page)) query.set(name, value);
  return query;
}

/** The address of a response, with the list that it is in. */
export function sampleParams(row, index, list) {
  const { run, stage, step, prompt_id, sample } = row;
  return { run, stage, step, prompt: prompt_id, sample, at: index, list: changed(list, { row: index || null }).toString() };
}

function summary(row, several) {
  const facts = [["reward", fixed(row.reward_mean, 3)], ["length", `${number(row.length_p50)} (5–95 %: ${number(row.length_p05)}–${number(row.length_p95)})`],
    ["cut", percent(row.clip_ratio)], ["KL", number(row.kl_mean)], ["right", percent(row.verdict_correct)],
    ["groups all wrong", number(row.num_groups_all_wrong)], ["all right", number(row.num_groups_all_right)]];
  return h("span", { class: "facts" }, several && h("b", {}, `${spelled(row.run)} ${spelled(row.stage)} `),
    facts.map(([name, value]) => [h("span", { class: "soft" }, `${name} `), h("span", {}, value), "  "]));
}

/** On a narrow screen, only columns that tell responses apart; the sample view has the rest. */
function columnsOf(context) {
  const several = context.runs.length > 1, isNarrow = matchMedia("(max-width: 700px)").matches;
  const narrow = { step: "46px", verdict: "90px", length: "58px", response: "minmax(140px, 1fr)" };
  return [
    several && { key: "run", label: "run", sort: "run", width: "minmax(60px, 110px)", cell: (row) => spelled(row.run) },
    { key: "stage", label: "stage", sort: "stage", width: "64px", cell: (row) => spelled(row.stage) },
    { key: "step", label: "step", sort: "step", width: "58px", end: true, cell: (row) => number(row.step) },
    { key: "prompt", label: "prompt", sort: "prompt_id", width: "124px", cell: (row) =>
      h("a", { href: link("group", { run: row.run, stage: row.stage, step: row.step, prompt: row.prompt_id }), title: "all answers to this prompt at this step", tabindex: -1 }, oneLine(row.prompt_id)) },
    { key: "sample", label: "#", sort: "sample", width: "40px", end: true, cell: (row) => number(row.sample) },
    { key: "verdict", label: "verdict", sort: "verdict", width: "98px", cell: (row) => h("span", { class: verdictClass(row.verdict) }, spelled(row.verdict ?? "–")) },
    { key: "reward", label: "reward", sort: "reward", width: "70px", end: true, cell: (row) => number(row.reward) },
    { key: "advantage", label: "Â", sort: "advantage", width: "60px", end: true, cell: (row) => signed(row.advantage) },
    { key: "length", label: "length", sort: "length", width: "70px", end: true, cell: (row) => [number(row.length), row.finish_reason === "length" && h("span", { class: "cut", title: "cut at the limit" }, " ✂")] },
    { key: "kl", label: "KL", sort: "kl_mean", width: "66px", end: true, cell: (row) => fixed(row.kl_mean, 3) },
    { key: "repetition", label: "rep.", sort: "repetition_rate", width: "58px", end: true, cell: (row) => percent(row.repetition_rate) },
    { key: "extracted", label: "answer", sort: "extracted", width: "90px", cell: (row) => oneLine(row.extracted ?? "–") },
    { key: "response", label: "response", width: "minmax(240px, 1fr)", cell: (row) => oneLine(row.response_preview) },
  ].filter((column) => column && (!isNarrow || column.key in narrow)).map((column) => (isNarrow ? { ...column, width: narrow[column.key] } : column));
}
