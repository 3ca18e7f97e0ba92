"use strict";
// Elements of a page, and lists of any length of which only what is in view exists. All text enters
// the page by textContent.

function element(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

const quote = (text) => element("span", { class: "text" }, text);
const nothing = (text) => element("p", { class: "none" }, text);
const field = (name, ...children) =>
  element("div", { class: "field" }, element("h5", {}, name), ...children);
const badge = (kind, text) => element("span", { class: `badge ${kind}` }, text);

/** A button with its text, which does something. */
function makeButton(attributes, text, act) {
  const button = element("button", { type: "button", ...attributes }, text);
  button.addEventListener("click", act);
  return button;
}

/**
 * Cells of one size in rows, as many as fit beside one another; the list scrolls, and only the rows
 * in view are elements.
 *
 * list: <ul> or <ol>, whose style says width, height and gap of a cell and its own greatest height.
 * make: (place) -> the element of a cell.
 * mark: (element, place), called whenever the cell may have changed its state.
 */
class CellList {
  constructor(list, width, height, make, mark) {
    Object.assign(this, { list, width, height, make, mark, count: 0, first: 0, last: 0 });
    list.style.gridTemplateColumns = `repeat(auto-fill, ${width}px)`;
    list.style.gridAutoRows = `${height}px`;
    list.addEventListener("scroll", () => this.draw());
    new ResizeObserver(() => this.draw()).observe(list);
  }

  /** Another content of this many cells. */
  fill(count) {
    this.count = count;
    this.list.scrollTop = 0;
    this.draw(true);
  }

  get columns() {
    return Math.max(1, Math.floor(this.list.clientWidth / this.width));
  }

  /** Makes the cells in view, unless they are there already. */
  draw(afresh = false) {
    const { list, columns, height, count } = this;
    const rows = Math.ceil(count / columns);
    const above = Math.max(0, Math.floor(list.scrollTop / height) - 4);
    const seen = Math.ceil(Math.min(list.clientHeight || 0, 2000) / height) + 9;
    const below = Math.min(rows, above + Math.max(seen, 24));
    const [first, last] = [above * columns, Math.min(count, below * columns)];
    if (!afresh && first === this.first && last === this.last && this.across === columns) return;
    Object.assign(this, { first, last, across: columns });
    const focused = list.contains(document.activeElement)
      ? document.activeElement.closest("li").dataset.place
      : undefined;
    const cells = [];
    if (above) cells.push(this.makeSpace(above));
    for (let place = first; place < last; place++) {
      const cell = element("li", { "data-place": place }, this.make(place));
      cell.setAttribute("aria-posinset", place + 1);
      cell.setAttribute("aria-setsize", count);
      this.mark(cell.firstChild, place);
      cells.push(cell);
    }
    if (below < rows) cells.push(this.makeSpace(rows - below));
    list.replaceChildren(...cells);
    const again = focused && list.querySelector(`[data-place="${focused}"]`);
    if (again) again.firstChild.focus({ preventScroll: true });
  }

  makeSpace(rows) {
    const space = element("li", { class: "space", "aria-hidden": "true" });
    space.style.gridRow = `span ${rows}`;
    return space;
  }

  /** Tells the cells in view again what they are. */
  refresh() {
    for (const cell of this.list.children) {
      if (cell.dataset.place !== undefined) this.mark(cell.firstChild, Number(cell.dataset.place));
    }
  }

  /** Scrolls, by no more than is needed, until a cell is in view. */
  reveal(place) {
    const { list, height } = this;
    const top = Math.floor(place / this.columns) * height;
    if (top < list.scrollTop) list.scrollTop = top;
    const over = top + height - (list.scrollTop + list.clientHeight);
    if (over > 0) list.scrollTop += over;
    this.draw();
  }
}
