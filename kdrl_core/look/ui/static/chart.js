// A figure over steps, in SVG. All figures of a page share a crosshair; a click goes to the step, a drag zooms.
//
// series: { label, color: class, x, y, low, high, faint, dash, at(i) → place } with x ascending; null is a gap.

import { h, spelled, svg } from "./dom.js";
import { number } from "./format.js";
import { extent, logTicks, nearest, scale, thinned, ticks } from "./scale.js";

const HEIGHT = 168;
const EDGE = { left: 46, right: 10, top: 8, bottom: 20 };
const STAGE_NAMES_PX = 10;
const DRAG_PX = 6;

export class Chart {
  constructor(config) {
    this.readout = h("output", { class: "readout" });
    this.tip = h("div", { class: "tip", hidden: true });
    this.canvas = svg("svg", { class: "plot", height: HEIGHT, role: "img" });
    this.body = h("div", { class: "plot-body", tabindex: 0 }, this.canvas, this.tip);
    this.legend = h("div", { class: "legend" });
    this.element = h("figure", { class: "chart", dataset: { chart: config.key } },
      h("figcaption", {}, h("span", { class: "title" }, config.title), this.readout), this.legend, this.body);
    this.set(config);
    this.#listen();
    this.resize = new ResizeObserver(() => this.draw());
    this.resize.observe(this.body);
  }

  /** Show other data, or another range, in the same place: a pointer or the focus stays where it is. */
  set({ key, title, series, domain, stages = [], log = false, stack = false, points = false, total = false, format = number, bus, onPick, onZoom }) {
    Object.assign(this, { key, title, domain, stages, log, stack, points, total, format, bus, onPick, onZoom });
    this.series = stack ? stacked(series) : series;
    this.top = EDGE.top + (stages.length > 1 ? STAGE_NAMES_PX : 0);
    this.canvas.setAttribute("aria-label", this.#summary());
    this.legend.replaceChildren(...this.#legend());
    this.draw();
    this.#say(this.hover ?? null);
  }

  destroy() {
    this.resize.disconnect();
    this.bus.removeEventListener("hover", this.onHover);
  }

  #summary() {
    const [first] = this.series, last = first?.y.findLast((value) => typeof value === "number");
    return `${this.title}: ${first ? `${first.x.length} steps, last ${this.format(last)}` : "no data"}`;
  }

  #legend() {
    const shown = this.series.filter((one) => one.legend !== false);
    const labels = shown.length > 1 ? shown : [];
    return labels.map((one) => h("span", { class: `key ${one.color}${one.dash ? " dash" : ""}` }, h("i"), spelled(one.label)));
  }

  draw() {
    const width = this.body.clientWidth;
    if (!width) return;
    const [from, to] = this.domain;
    const values = [];
    for (const one of this.series) {
      const [a, b] = rangeOf(one.x, from, to);
      for (let i = a; i < b; i++) values.push(one.y[i], one.low?.[i], one.high?.[i]);
    }
    if (this.stack) values.push(0);
    const room = extent(values, { log: this.log });
    if (this.stack) room[1] = Math.max(...values.filter((value) => typeof value === "number"), 1e-9);
    const x = (this.x = scale([from, to === from ? from + 1 : to], [EDGE.left, width - EDGE.right]));
    const y = (this.y = scale(room, [HEIGHT - EDGE.bottom, this.top], this.log));
    this.width = width;
    const parts = [this.#axes(room, x, y, width), this.#dividers(x, from, to)];
    for (const one of [...this.series].reverse()) parts.push(this.#shape(one, x, y, width));
    this.cross = svg("line", { class: "cross", y1: this.top, y2: HEIGHT - EDGE.bottom, visibility: "hidden" });
    this.dots = svg("g", { class: "dots" });
    this.zoom = svg("rect", { class: "zoom", y: this.top, height: HEIGHT - this.top - EDGE.bottom, visibility: "hidden" });
    this.canvas.setAttribute("width", width);
    this.canvas.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.canvas.replaceChildren(...parts.flat(), this.zoom, this.cross, this.dots);
  }

  #axes([low, high], x, y, width) {
    const lines = (this.log ? logTicks(low, high) : ticks(low, high)).map((value) => [
      svg("line", { class: "grid", x1: EDGE.left, x2: width - EDGE.right, y1: y(value), y2: y(value) }),
      svg("text", { class: "tick", x: EDGE.left - 6, y: y(value) + 4, "text-anchor": "end" }, this.format(value)),
    ]);
    const [from, to] = this.domain;
    const steps = ticks(from, Math.max(to, from + 1), Math.min(6, width / 70)).filter(Number.isInteger);
    const labels = steps.map((value) => svg("text",
      { class: "tick", x: x(value), y: HEIGHT - 5, "text-anchor": "middle" }, String(this.#stepOf(value))));
    return [...lines.flat(), ...labels];
  }

  /** Steps count from 0 in each stage; on the axis the stages follow one another. */
  #stepOf(value) {
    const stage = this.stages.findLast((one) => one.offset <= value);
    return stage ? value - stage.offset : value;
  }

  #dividers(x, from, to) {
    if (this.stages.length < 2) return [];
    return this.stages.filter((one) => one.offset <= to).flatMap((one) => [
      one.offset > from && svg("line", { class: "divider", x1: x(one.offset - 0.5), x2: x(one.offset - 0.5), y1: this.top, y2: HEIGHT - EDGE.bottom }),
      one.offset >= from && svg("text", { class: "tick stage", x: x(one.offset) + 4, y: this.top - 6 }, one.name),
    ].filter(Boolean));
  }

  #shape(one, x, y, width) {
    const [a, b] = rangeOf(one.x, ...this.domain);
    const drawn = thinned(one.x, one.y, a, b, width);
    const shapes = [];
    if (one.low) shapes.push(svg("path", { class: `${this.stack ? "area" : "band"} ${one.color}`, d: areaPath(one, drawn, x, y) }));
    if (!this.stack)
      shapes.push(svg("path", { class: `line ${one.color}${one.faint ? " faint" : ""}${one.dash ? " dash" : ""}`, d: linePath(one, drawn, x, y, this.log) }));
    if (this.points || drawn.length === 1)
      shapes.push(...drawn.filter((i) => typeof one.y[i] === "number" && !this.stack)
        .map((i) => svg("circle", { class: `point ${one.color}`, r: 3.5, cx: x(one.x[i]), cy: y(one.y[i]) })));
    return shapes;
  }

  #listen() {
    this.onHover = (event) => this.#say(event.detail);
    this.bus.addEventListener("hover", this.onHover);
    const hover = (x) => this.bus.dispatchEvent(new CustomEvent("hover", { detail: x === null ? null : { x, chart: this } }));
    const at = (event) => event.clientX - this.body.getBoundingClientRect().left;
    let start = null;
    this.body.addEventListener("pointerdown", (event) => (start = event.button === 0 ? at(event) : null));
    this.body.addEventListener("pointermove", (event) => {
      hover(this.#stepAt(at(event)));
      const isDrag = start !== null && event.buttons === 1 && Math.abs(at(event) - start) > DRAG_PX;
      this.zoom?.setAttribute("visibility", isDrag ? "visible" : "hidden");
      if (isDrag) {
        this.zoom.setAttribute("x", Math.min(start, at(event)));
        this.zoom.setAttribute("width", Math.abs(at(event) - start));
      }
    });
    this.body.addEventListener("pointerup", (event) => {
      if (start === null) return;
      const [a, b] = [Math.min(start, at(event)), Math.max(start, at(event))];
      start = null;
      if (b - a > DRAG_PX) this.onZoom(this.#stepAt(a), this.#stepAt(b));
      else this.#pick(this.#stepAt(b), event.clientY - this.canvas.getBoundingClientRect().top);
    });
    this.body.addEventListener("pointerleave", () => (hover(null), this.zoom?.setAttribute("visibility", "hidden")));
    this.body.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (move) hover(Math.min(this.domain[1], Math.max(this.domain[0], (this.at ?? this.domain[1]) + move)));
      else if (event.key === "Enter" && this.at !== null) this.#pick(this.at, 0);
      else return;
      event.preventDefault();
    });
    this.body.addEventListener("blur", () => hover(null));
  }

  #stepAt(pixel) {
    const [from, to] = this.domain;
    const share = (pixel - EDGE.left) / (this.width - EDGE.left - EDGE.right);
    const x = Math.min(to, Math.max(from, from + share * (to - from)));
    const [first] = this.series;
    return first?.x.length ? first.x[nearest(first.x, x)] : Math.round(x);
  }

  /** Series that have a value at x, with its index. */
  #valuesAt(x) {
    return this.series.flatMap((one) => {
      const i = one.x.length ? nearest(one.x, x) : -1;
      return i >= 0 && Math.abs(one.x[i] - x) < 0.5 && typeof one.y[i] === "number" ? [{ one, i }] : [];
    });
  }

  #pick(x, y) {
    const found = this.#valuesAt(x).sort((a, b) => Math.abs(this.y(a.one.y[a.i]) - y) - Math.abs(this.y(b.one.y[b.i]) - y));
    if (found.length) this.onPick(found[0].one.at(found[0].i));
  }

  #say(hover) {
    this.hover = hover;
    this.at = hover?.x ?? null;
    const found = hover ? this.#valuesAt(hover.x) : [];
    const main = hover ? found[this.total ? found.length - 1 : 0] : this.#last();
    const value = main ? this.format(this.total ? main.one.y[main.i] : shownValue(main)) : "–";
    this.readout.replaceChildren(hover && main ? h("small", {}, `step ${main.one.at(main.i).step} `) : "", h("b", {}, value));
    this.cross?.setAttribute("visibility", hover ? "visible" : "hidden");
    this.tip.hidden = !(hover?.chart === this && found.length > 1);
    this.dots?.replaceChildren();
    if (!hover || !this.x) return;
    this.cross.setAttribute("x1", this.x(hover.x));
    this.cross.setAttribute("x2", this.x(hover.x));
    if (!this.stack) this.dots.replaceChildren(...found.filter(({ one, i }) => !one.faint && (!this.log || one.y[i] > 0))
      .map(({ one, i }) => svg("circle", { class: one.color, r: 3, cx: this.x(one.x[i]), cy: this.y(one.y[i]) })));
    if (this.tip.hidden) return;
    this.tip.replaceChildren(...found.filter(({ one }) => !one.faint).map((each) =>
      h("div", { class: `key ${each.one.color}` }, h("i"), spelled(each.one.label), h("b", {}, this.format(shownValue(each))))));
    this.tip.classList.toggle("left", this.x(hover.x) > this.width / 2);
  }

  #last() {
    const one = this.series.at(this.total ? -1 : 0);
    const i = one ? one.y.findLastIndex((value) => typeof value === "number") : -1;
    return i < 0 ? null : { one, i };
  }
}

const shownValue = ({ one, i }) => (one.own ?? one.y)[i];

function rangeOf(xs, from, to) {
  let a = 0, b = xs.length;
  while (a < b && xs[a] < from) a++;
  while (b > a && xs[b - 1] > to) b--;
  return [a, b];
}

function linePath({ x: xs, y: ys }, drawn, x, y, log) {
  let path = "", isOpen = false;
  for (const i of drawn) {
    if (typeof ys[i] !== "number" || (log && ys[i] <= 0)) {
      isOpen = false;
      continue;
    }
    path += `${isOpen ? "L" : "M"}${x(xs[i]).toFixed(1)} ${y(ys[i]).toFixed(1)}`;
    if (!isOpen) path += "h0";
    isOpen = true;
  }
  return path;
}

function areaPath({ x: xs, low, high }, drawn, x, y) {
  let path = "";
  for (let a = 0; a < drawn.length; ) {
    let b = a;
    while (b < drawn.length && typeof low[drawn[b]] === "number" && typeof high[drawn[b]] === "number") b++;
    const part = drawn.slice(a, b);
    if (part.length)
      path += "M" + [...part.map((i) => `${x(xs[i]).toFixed(1)} ${y(high[i]).toFixed(1)}`),
        ...part.reverse().map((i) => `${x(xs[i]).toFixed(1)} ${y(low[i]).toFixed(1)}`)].join("L") + "Z";
    a = b + 1;
  }
  return path;
}

/** Series on top of one another: `own` is a series' value, low to high its place. */
function stacked(series) {
  let below = null;
  return series.map((one) => {
    const low = one.x.map((_, i) => (below ? below[i] : 0));
    const high = one.y.map((value, i) => low[i] + (typeof value === "number" ? value : 0));
    below = high;
    return { ...one, own: one.y, y: high, low, high };
  });
}
