"use strict";
// The figures of an evaluation, as table.md has them: of two runs one below the other.

function scoresView(runs) {
  return el("div", { class: "page" }, Object.entries(runs).filter(([, run]) => run.scores.length).map(([key, run]) => el("section", {},
    Object.keys(runs).length > 1 && el("h3", { style: { color: RUN_COLOURS[key] } }, run.name),
    run.scores.map((part) => part.rows ? scoresTable(part) : el("p", {}, part.text)))));
}

function scoresTable({ head, rows }) {
  return el("table", { class: "scores" }, el("tr", {}, head.map((name) => el("th", {}, name))),
    rows.map((cells) => el("tr", {}, cells.map((cell) => el("td", {}, cell)))));
}
