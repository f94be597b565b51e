"use strict";
// A list of any length: only the rows in sight are in the page.

class LongList {
  // `draw(item, position)` gives a row's children; `pick(position)` is told of a click.
  constructor({ rowHeight, draw, pick }) {
    Object.assign(this, { rowHeight, draw, pick, items: [], selected: -1 });
    this.inner = el("div", { class: "inner" });
    this.root = el("div", { class: "long-list", tabIndex: 0, role: "listbox" }, this.inner);
    this.root.addEventListener("scroll", () => this.paint(), { passive: true });
    new ResizeObserver(() => this.paint()).observe(this.root);
  }

  show(items, selected) {
    this.items = items;
    this.inner.style.height = `${items.length * this.rowHeight}px`;
    this.select(selected, true);
  }

  select(position, keepsPlace = false) {
    this.selected = position;
    if (position >= 0 && !keepsPlace) this.reveal(position);
    this.paint();
  }

  reveal(position) {
    const top = position * this.rowHeight;
    const { scrollTop, clientHeight } = this.root;
    if (top < scrollTop) this.root.scrollTop = top;
    else if (top + this.rowHeight > scrollTop + clientHeight) this.root.scrollTop = top + this.rowHeight - clientHeight;
  }

  // The first position in sight, or nearly, and the one behind the last.
  inSight() {
    const first = Math.max(0, Math.floor(this.root.scrollTop / this.rowHeight) - 5);
    return [first, Math.min(this.items.length, first + Math.ceil((this.root.clientHeight || 600) / this.rowHeight) + 10)];
  }

  paint() {
    const [first, last] = this.inSight();
    const rows = [];
    for (let position = first; position < last; position += 1) {
      rows.push(el("div", {
        class: position === this.selected ? "row selected" : "row", role: "option",
        style: { top: `${position * this.rowHeight}px`, height: `${this.rowHeight}px` },
        data: { position }, onclick: () => this.pick(position),
      }, this.draw(this.items[position], position)));
    }
    this.inner.replaceChildren(...rows);
  }
}
