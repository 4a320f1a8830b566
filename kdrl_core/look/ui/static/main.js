// Draws the view that the address names, follows runs in progress, and hands keys to the view.

import { get } from "./api.js";
import { h, spelled } from "./dom.js";
import { keysOf, showKeys } from "./keys.js";
import { go, link, parse } from "./router.js";
import { compareView } from "./compare.js";
import { groupView } from "./group.js";
import { rolloutsView } from "./rollouts.js";
import { sampleView } from "./sample.js";
import { trendsView } from "./trends.js";

const VIEWS = { trends: trendsView, rollouts: rolloutsView, sample: sampleView, group: groupView, compare: compareView };
const NAV = [["trends", "Trends"], ["rollouts", "Rollouts"], ["compare", "Compare"]];
const POLL_MS = 4000;

const main = document.getElementById("main");
const banner = document.getElementById("banner");
const context = { runs: [], revision: 0 };
let current = null;

async function look() {
  const found = await get("runs");
  const isNew = context.revision !== found.revision;
  Object.assign(context, found);
  const going = found.runs.filter((run) => run.is_running).map((run) => run.name);
  const live = document.querySelector(".live");
  live.textContent = going.length ? `${going.join(", ")}: running` : "";
  live.classList.toggle("on", going.length > 0);
  showDamage(found.damaged);
  return isNew;
}

function showDamage(damaged) {
  banner.hidden = damaged.length === 0;
  if (banner.hidden || banner.dataset.shown === JSON.stringify(damaged)) return;
  banner.dataset.shown = JSON.stringify(damaged);
  banner.replaceChildren(
    h("details", { open: damaged.length < 3 },
      h("summary", {}, `${damaged.length} ${damaged.length === 1 ? "file is" : "files are"} left out; everything else is shown`),
      h("ul", {}, damaged.slice(0, 50).map(({ path, problem }) =>
        h("li", {}, h("code", {}, spelled(path)), " ", spelled(problem.startsWith(path) ? problem.slice(path.length) : problem))))));
}

function navigate({ view }) {
  const shown = { sample: "rollouts", group: "rollouts" }[view] ?? view;
  document.querySelector("nav").replaceChildren(...NAV.map(([name, label]) =>
    h("a", { href: link(name), "aria-current": name === shown ? "page" : null }, label)));
}

async function show() {
  const place = parse();
  if (current?.name === place.view && current.view?.update) {
    current.view.update(place.params);
    return;
  }
  current?.stop.abort();
  current?.view?.destroy?.();
  const mine = (current = { name: place.view, view: null, stop: new AbortController() });
  navigate(place);
  const container = h("div", { class: `view ${VIEWS[place.view] ? place.view : "unknown"}` });
  try {
    const make = VIEWS[place.view];
    if (!make) throw new Error(`there is no view ${place.view}; go to Trends, Rollouts or Compare`);
    mine.view = await make(container, place.params, context, mine.stop.signal);
  } catch (error) {
    if (error.name === "AbortError") return;
    container.replaceChildren(failure(error));
  }
  if (current === mine) {
    main.replaceChildren(container);
    if (document.body.dataset.view !== place.view) window.scrollTo(0, 0);
    mine.view?.shown?.();
    document.body.dataset.view = place.view;
    document.title = `${place.view} · kdrl`;
  }
}

export const failure = (error) => h("p", { class: "failure", role: "alert" }, spelled(error.message));

async function poll() {
  if (!document.hidden)
    try {
      if (await look()) current?.view?.refresh?.();
      document.body.classList.remove("lost");
    } catch (error) {
      document.body.classList.add("lost");
      document.querySelector(".live").textContent = error.message;
    }
  setTimeout(poll, POLL_MS);
}

document.querySelector(".help").addEventListener("click", showKeys);
document.addEventListener("keydown", (event) => {
  if (keysOf(event, { ...GLOBAL, ...current?.view?.keys })) event.preventDefault();
});
const GLOBAL = { t: () => go("trends"), r: () => go("rollouts"), c: () => go("compare"), "?": showKeys, Escape: () => go("trends") };

window.addEventListener("hashchange", show);
try {
  await look();
  await show();
} catch (error) {
  main.replaceChildren(failure(error));
}
setTimeout(poll, POLL_MS);
