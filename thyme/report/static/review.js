"use strict";
// Rows one by one with a decision bar. Which row is looked at stands in the address.

const REVIEW_KEYS = [
  ["a", "accept, and on to the next row without a decision"], ["x", "reject, and on"], ["e", "edit the response"],
  ["u", "run the code again"], ["j / ↓", "next row"], ["k / ↑", "the one before"], ["o", "next row without a decision"], ["?", "these keys"], ["Esc", "close"],
];

let review = null;
let row = null; // what /api/row said
let drawn = 0;
let wanted = 0; // the row last asked for: keys may come faster than rows
const app = document.getElementById("app");
const bar = el("div", { class: "decision" });
const said = el("div", { class: "notes" });
const detail = el("div", { class: "detail", id: "detail" });
const count = el("span", { class: "faint", id: "count" });
const head = el("nav", {});
const rows = new LongList({ rowHeight: 26, draw: (index) => drawRow(index), pick: (index) => show(index) });
app.append(head, bar, said, el("main", {}, el("aside", {}, el("div", { class: "tools" }, count), rows.root), detail));

// What the list shows of a row, by index: asked for once it stays in sight, since the server has to read it.
const listed = new Map();
const CHUNK = 50;
let resting = 0;

function drawRow(index) {
  const entry = listed.get(index);
  if (!entry && !resting) resting = setTimeout(nameThoseInSight, 100);
  const { place, question, verdict: verdict_ } = entry || { place: "", question: "", verdict: "" };
  return [el("span", { class: "place" }, String(index + 1)), el("span", { class: verdict_ }, verdict_), el("span", { class: "said", title: place }, `${place} ${question}`)];
}

async function nameThoseInSight() {
  const [first, last] = rows.inSight();
  try {
    for (let at = first - (first % CHUNK); at < last; at += CHUNK) {
      let missing = false;
      for (let index = Math.max(at, first); index < Math.min(at + CHUNK, last); index += 1) missing ||= !listed.has(index);
      if (missing) (await ask(`/api/rows/${at}/${CHUNK}`)).forEach((entry, i) => listed.set(at + i, entry));
    }
    resting = 0;
    rows.paint();
  } catch (error) { // asked for again when the list moves
    fill(said, el("p", { class: "note error" }, error.message));
    setTimeout(() => { resting = 0; }, 1000);
  }
}

function drawHead() {
  const agreement = review.agreement.map((a) => `${a.one} and ${a.other}: ${a.agreed} of ${a.rows} alike${a.kappa === null ? "" : `, kappa ${a.kappa.toFixed(2)}`}`);
  fill(head, el("b", {}, review.title), el("span", {}, `reviewer: ${review.reviewer}`),
    el("span", { class: "faint" }, review.summary), el("span", { id: "agreement" }, agreement.join(" · ")),
    el("button", { type: "button", onclick: showKeys }, "?"));
  count.textContent = `${plural(review.decided, "decision")} · ${plural(review.rows, "row")}`;
}

function drawBar(editing = false) {
  const text = el("textarea", { id: "response", value: row.response, spellcheck: false });
  const note = el("input", { id: "note", placeholder: "note", value: row.own ? row.own.note : "" });
  const button = (id, label, act) => el("button", { type: "button", id, class: id, onclick: act }, label);
  fill(bar,
    button("accept", "accept (a)", () => decide("accept", note.value)), button("reject", "reject (x)", () => decide("reject", note.value)),
    editing ? button("save", "save the edit", () => decide("edit", note.value, text.value)) : button("edit", "edit (e)", () => { drawBar(true); document.getElementById("response").focus(); }),
    button("run", "run the code again (u)", () => runAgain(editing ? text.value : null)), note,
    row.own && el("span", { class: row.own.verdict, id: "own" }, `you: ${row.own.verdict}`),
    row.others.map((o) => el("span", { class: `other ${o.verdict}` }, `${o.reviewer}: ${o.verdict}${o.note ? ` (${o.note})` : ""}`)),
    !row.own && row.num_others > 0 && el("span", { class: "faint" }, `${plural(row.num_others, "other reviewer")} decided; shown once you have`),
    row.problems.map((p) => el("span", { class: "note" }, p)), editing && text);
}

async function show(index) {
  drawn += 1;
  const mine = drawn;
  wanted = index;
  try {
    const found = await ask(`/api/row/${index}`);
    if (mine !== drawn) return;
    row = found;
    keep();
    history.replaceState(null, "", `#/${index + 1}`);
    fill(said);
    drawBar();
    fill(detail, questionCard("a", row.view.question), el("div", { class: "band" }, el("article", { class: "half" }, rolloutColumn("a", row.view, "none", { isRow: true })),
      el("article", { id: "again", class: "half" }, el("p", { class: "faint" }, review.can_rerun ? "u runs the code again" : `code is not run here: ${review.why_not}`))));
    rows.select(index);
  } catch (error) {
    fill(said, el("p", { class: "note error" }, error.message));
  }
  document.body.dataset.ready = String(mine);
}

// The row at hand in the list.
function keep() {
  const entry = { place: row.place, question: row.view.question.text, verdict: row.own ? row.own.verdict : "" };
  listed.set(row.index, entry);
}

async function decide(verdict_, note, response) {
  const index = row.index;
  try {
    row = await ask(`/api/row/${index}/decide`, { verdict: verdict_, note, ...(response === undefined ? {} : { response }) });
    keep();
    review = await ask("/api/review");
    drawHead();
    rows.paint();
    if (verdict_ === "edit") await show(index);
    else await nextOpen();
  } catch (error) {
    fill(said, el("p", { class: "note error" }, error.message));
  }
}

// The next row that this reviewer has not decided; where there is none the one at hand stays, with its decision.
async function nextOpen() {
  try {
    const index = await ask(`/api/next/${row.index}`);
    await show(index === null ? row.index : index);
  } catch (error) {
    fill(said, el("p", { class: "note error" }, error.message));
  }
}

async function runAgain(response) {
  const place = document.getElementById("again");
  fill(place, el("p", { class: "faint" }, "running …"));
  try {
    const found = await ask(`/api/row/${row.index}/run`, response === null ? {} : { response });
    fill(place, el("h4", {}, `run again: ${plural(found.codes, "code block")}`), found.rounds.map((round, i) => roundAgain(round, i)));
  } catch (error) {
    fill(place, el("p", { class: "note error" }, error.message));
  }
}

function roundAgain(round, i) {
  return el("section", { class: "card" }, el("h4", {}, `round ${i + 1}`),
    el("p", { class: round.status === "ok" ? "status" : "status bad" }, `${round.status} · ${Math.round(1000 * round.wall_s)} ms`),
    round.fixes.length > 0 && el("ul", { class: "fixes" }, round.fixes.map((fix) => el("li", {}, `repaired: ${fix}`))),
    round.error && el("pre", { class: "error" }, round.error),
    round.text_differs ? el("pre", { class: "diff" }, round.diff.map(([kind, line]) => el("div", { class: kind }, `${{ removed: "- ", added: "+ ", same: "  " }[kind]}${line}`)))
      : el("p", { class: "same" }, "the same text"),
    round.pictures.map((p) => el("div", {}, el("p", { class: p.same ? "same" : "bad differs" }, p.words),
      el("div", { class: "pair" }, p.before && picture("a", p.before, { caption: "in the row" }), p.now && picture("a", p.now, { caption: "now" }),
        p.difference && picture("a", p.difference, { caption: "difference" })))));
}

function showKeys() {
  document.body.append(el("div", { class: "overlay", role: "dialog", onclick: closeOverlay },
    el("table", { class: "keys" }, REVIEW_KEYS.map(([key, what]) => el("tr", {}, el("th", {}, key), el("td", {}, what))))));
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    if (!closeOverlay() && row) drawBar();
    return;
  }
  if (!row || event.ctrlKey || event.metaKey || event.altKey || ["INPUT", "TEXTAREA", "SELECT"].includes(event.target.tagName)) return;
  const move = (by) => show(Math.max(0, Math.min(review.rows - 1, wanted + by)));
  const note = () => document.getElementById("note").value;
  const actions = {
    a: () => decide("accept", note()), x: () => decide("reject", note()), u: () => runAgain(null), o: nextOpen,
    e: () => { drawBar(true); document.getElementById("response").focus(); },
    j: () => move(1), ArrowDown: () => move(1), k: () => move(-1), ArrowUp: () => move(-1), "?": showKeys,
  };
  if (event.key in actions) {
    event.preventDefault();
    actions[event.key]();
  }
});

async function start() {
  try {
    review = await ask("/api/review");
  } catch (error) {
    fill(said, el("p", { class: "note error" }, error.message));
    return;
  }
  drawHead();
  rows.show(Array.from({ length: review.rows }, (_, i) => i), 0);
  const asked = Number(location.hash.replace(/^#\/?/, "")) || 1;
  await show(Math.max(0, Math.min(review.rows - 1, asked - 1)));
}

window.addEventListener("hashchange", () => show((Number(location.hash.replace(/^#\/?/, "")) || 1) - 1));
start();
