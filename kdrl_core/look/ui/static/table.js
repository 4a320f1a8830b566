// A table of any number of rows: only rows in sight have elements, and the server sends pages of rows on demand.
//
// Browsers limit an element to about 17 million pixels, half a million rows. Beyond MAX_PX the scroll bar is
// coarse (a pixel is several rows), while wheel, keys and touch still move by rows.

import { h } from "./dom.js";

const ROW_PX = 34;
const MAX_PX = 4_000_000;
const PAGE = 100;
const PAGES_KEPT = 60;
const SPARE = 4;

export class VirtualTable {
  /** columns: {key, label, width, sort, end, cell(row) → node or text}; fetch(offset, limit, signal) → {total, rows}. */
  constructor({ columns, label, fetch, onSort, onOpen, onMark, onTotal, onError }) {
    Object.assign(this, { columns, fetch, onSort, onOpen, onMark, onTotal, onError });
    this.rows = h("div", { class: "rows", role: "rowgroup" });
    this.head = h("div", { class: "row head", role: "row" });
    this.spacer = h("div", { class: "spacer" });
    this.layer = h("div", { class: "layer" }, this.head, this.rows);
    this.element = h("div", { class: "table", role: "grid", "aria-label": label, tabindex: 0 }, this.layer, this.spacer);
    this.element.addEventListener("scroll", () => this.#scrolled());
    this.element.addEventListener("wheel", (event) => this.#wheel(event), { passive: false });
    this.rows.addEventListener("click", (event) => {
      const row = event.target.closest(".row");
      if (!row || event.target.closest("a")) return;
      this.mark(Number(row.dataset.index));
      this.open();
    });
    this.resize = new ResizeObserver(() => this.draw());
    this.resize.observe(this.element);
    this.reset({ sort: "", descending: false, marked: 0 });
  }

  destroy() {
    this.resize.disconnect();
    this.stop?.abort();
  }

  /** Forget all rows, and show those of the new filter from `marked` on. */
  reset({ sort, descending, marked = 0 }) {
    this.stop?.abort();
    this.stop = new AbortController();
    this.pages = new Map();
    this.total = null;
    this.marked = marked;
    this.first = 0;
    this.sort = { sort, descending };
    this.#drawHead();
    this.draw();
    this.#load(Math.floor(marked / PAGE));
  }

  get #visible() {
    return Math.max(1, Math.floor((this.element.clientHeight - ROW_PX) / ROW_PX));
  }

  get #height() {
    return Math.min(MAX_PX, (this.total ?? 0) * ROW_PX);
  }

  /** Rows that a pixel of the scroll bar stands for. */
  get #ratio() {
    const room = this.#height - this.#visible * ROW_PX;
    return room > 0 ? Math.max(0, this.total - this.#visible) / room : 0;
  }

  rowAt(index) {
    return this.pages.get(Math.floor(index / PAGE))?.[index % PAGE] ?? null;
  }

  mark(index) {
    if (!this.total) return;
    this.marked = Math.max(0, Math.min(this.total - 1, index));
    const top = Math.ceil(this.first), bottom = this.first + this.#visible - 1;
    if (this.marked < top) this.scrollTo(this.marked);
    else if (this.marked > bottom) this.scrollTo(this.marked - this.#visible + 1);
    else this.draw();
    this.onMark?.(this.marked);
  }

  move(by) {
    this.mark(this.marked + by);
  }

  open() {
    const row = this.rowAt(this.marked);
    if (row) this.onOpen(this.marked, row);
  }

  keys() {
    const page = () => this.#visible - 1;
    return {
      j: () => this.move(1), ArrowDown: () => this.move(1), k: () => this.move(-1), ArrowUp: () => this.move(-1),
      PageDown: () => this.move(page()), PageUp: () => this.move(-page()), Home: () => this.mark(0),
      End: () => this.mark(this.total - 1), Enter: () => this.open(),
    };
  }

  scrollTo(first) {
    this.first = Math.max(0, Math.min((this.total ?? 0) - this.#visible, first));
    this.ownTop = this.#ratio ? Math.round(this.first / this.#ratio) : 0;
    this.element.scrollTop = this.ownTop;
    this.draw();
  }

  #scrolled() {
    const top = this.element.scrollTop;
    if (Math.abs(top - (this.ownTop ?? 0)) > 1) {
      this.first = top * this.#ratio;
      this.ownTop = top;
    }
    this.draw();
  }

  #wheel(event) {
    if (this.#height < MAX_PX || event.deltaY === 0 || event.ctrlKey) return;
    event.preventDefault();
    const pixels = event.deltaY * { 0: 1, 1: ROW_PX, 2: ROW_PX * this.#visible }[event.deltaMode];
    this.scrollTo(this.first + pixels / ROW_PX);
  }

  #drawHead() {
    const least = this.columns.reduce((sum, one) => sum + parseFloat(one.width.replace("minmax(", "")), 0);
    this.element.style.setProperty("--columns", this.columns.map((one) => one.width).join(" "));
    this.element.style.setProperty("--least", `${least + 12 * this.columns.length}px`);
    this.head.replaceChildren(...this.columns.map((one) => {
      const isSorted = this.sort.sort === one.sort;
      const order = isSorted ? (this.sort.descending ? "descending" : "ascending") : "none";
      return h("div", { class: `cell${one.end ? " end" : ""}`, role: "columnheader", "aria-sort": one.sort ? order : null },
        one.sort ? h("button", { type: "button", onclick: () => this.onSort(one.sort, isSorted ? !this.sort.descending : Boolean(one.end)) }, one.label) : one.label);
    }));
  }

  draw() {
    this.spacer.style.setProperty("height", `${Math.max(0, this.#height - this.#visible * ROW_PX)}px`);
    this.element.setAttribute("aria-rowcount", this.total === null ? -1 : this.total + 1);
    this.rows.classList.toggle("stale", this.total === null);
    if (this.total === null) {
      if (!this.rows.querySelector(".cell")) this.rows.replaceChildren(...Array.from({ length: Math.min(12, this.#visible) }, () => h("div", { class: "row waiting", role: "row" })));
      return;
    }
    if (this.total === 0) {
      this.rows.replaceChildren(h("div", { class: "empty" }, "No rollout fits these filters."));
      return;
    }
    const start = Math.floor(this.first), end = Math.min(this.total, start + this.#visible + SPARE);
    const drawn = [];
    for (let index = start; index < end; index++) drawn.push(this.#row(index));
    this.rows.style.setProperty("transform", `translateY(${(start - this.first) * ROW_PX}px)`);
    this.rows.replaceChildren(...drawn);
    this.element.setAttribute("aria-activedescendant", `row-${this.marked}`);
    this.#want(start, end);
  }

  #row(index) {
    const row = this.rowAt(index);
    const cells = row ? this.columns.map((one) => h("div", { class: `cell${one.end ? " end" : ""} of-${one.key}`, role: "gridcell" }, one.cell(row))) : [];
    return h("div", { class: `row${row ? "" : " waiting"}`, role: "row", "aria-rowindex": index + 2,
      id: `row-${index}`, "aria-selected": String(index === this.marked), dataset: { index } }, cells);
  }

  /** Ask for the pages in sight once the scrolling rests for a moment. */
  #want(start, end) {
    clearTimeout(this.timer);
    const missing = [];
    for (let page = Math.floor(start / PAGE); page <= Math.floor((end - 1) / PAGE); page++)
      if (!this.pages.has(page)) missing.push(page);
    if (missing.length) this.timer = setTimeout(() => missing.forEach((page) => this.#load(page)), 50);
  }

  async #load(page) {
    const { signal } = this.stop;
    if (this.pages.get(page) !== undefined) return;
    this.pages.set(page, null);
    try {
      const found = await this.fetch(page * PAGE, PAGE, signal);
      if (signal.aborted) return;
      this.pages.set(page, found.rows);
      while (this.pages.size > PAGES_KEPT) this.pages.delete(this.pages.keys().next().value);
      const isFirst = this.total === null;
      this.total = found.total;
      this.onTotal(found.total);
      if (isFirst && this.marked >= found.total) this.marked = Math.max(0, found.total - 1);
      if (isFirst && this.marked >= this.#visible) {
        this.draw(); // the spacer first: there is nowhere to scroll to without it
        this.scrollTo(this.marked - Math.floor(this.#visible / 2));
      } else this.draw();
    } catch (error) {
      if (signal.aborted) return;
      this.pages.delete(page);
      this.onError(error);
    }
  }
}
