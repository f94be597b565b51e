"use strict";
// The page of a run: what is looked at stands in the address, so that a link leads back to it.

const FILTERS = {
  failed: ["failed code", (t, i) => t.failed[i] > 0],
  wrong: ["wrong", (t, i) => t.right[i] === false],
  silent: ["no answer", (t, i) => t.answer[i] === null && t.has_ended[i]],
  repetition: ["repetition", (t, i) => t.status[i] === "repetition"],
  evidence: ["no evidence", (t, i) => t.right[i] === true && t.evidence[i] === 0],
  mismatch: ["high mismatch", (t, i) => t.mismatch[i] !== null && t.mismatch[i] > runs.a.max_mismatch],
};
const KEYS = [
  ["j / ↓", "next rollout of the list"], ["k / ↑", "the one before"], ["n / p", "next group, the one before"],
  ["] / [", "next step, the one before"], ["c", "colour of tokens"], ["1 … 6", "filters"], ["/", "search"],
  ["g s r t", "curves, steps, rollouts, scores"], ["?", "these keys"], ["Esc", "close"],
];

let runs = {};
let state = {};
let table = null; // of state.file
let shown = []; // positions in the table that pass the filters
let stamps = {}; // of what the page shows
const answers = new Answers(400);
const app = document.getElementById("app");

function readAddress() {
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
  const [view, file, line] = path.split("/").map(decodeURIComponent);
  const asked = new URLSearchParams(query || "");
  return {
    view: ["scores", "curves", "steps", "rollouts"].includes(view) ? view : !view && hasScores() ? "scores" : "rollouts",
    file: file || null, line: line ? Number(line) : null,
    filters: (asked.get("show") || "").split(",").filter((name) => name in FILTERS),
    colour: COLOURS.includes(asked.get("colour")) ? asked.get("colour") : "none",
    words: asked.get("q") || "", metrics: asked.get("metrics") || "",
  };
}

function address(s) {
  const path = s.view === "rollouts" ? [s.view, s.file, s.line] : [s.view];
  const asked = new URLSearchParams();
  if (s.filters.length) asked.set("show", s.filters.join(","));
  if (s.colour !== "none") asked.set("colour", s.colour);
  if (s.words) asked.set("q", s.words);
  if (s.metrics) asked.set("metrics", s.metrics);
  const query = asked.toString();
  return `#/${path.filter((part) => part !== null && part !== undefined).map(encodeURIComponent).join("/")}${query ? `?${query}` : ""}`;
}

// Where the look changes the history remembers; where only a filter is typed it does not.
function go(change, replaces = false) {
  const next = address({ ...state, ...change });
  if (next === location.hash) return Promise.resolve();
  history[replaces ? "replaceState" : "pushState"](null, "", next);
  return update();
}

const fileOf = (run, key) => run.files.find((file) => file.key === key);
const hasScores = () => Object.values(runs).some((run) => run.scores.length);
const stampOf = (key) => { const file = fileOf(runs.a, key); return file ? file.stamp : "gone"; };
const tableAddress = (run, key) => `/api/${run}/table/${encodeURIComponent(key)}`;
const rolloutAddress = (run, key, line) => `/api/${run}/rollout/${encodeURIComponent(key)}/${line}`;

// The frame: made once, filled anew by `update`.

const list = new LongList({ rowHeight: 26, draw: drawRow, pick: (position) => go({ line: table.line[shown[position]] }) });
const parts = {
  head: el("nav", {}), notes: el("div", { class: "notes" }), main: el("main", {}),
  search: el("input", { type: "search", id: "search", placeholder: "question, answer, id", oninput: () => go({ words: parts.search.value }, true) }),
  count: el("span", { class: "faint", id: "count" }), detail: el("div", { class: "detail", id: "detail" }),
};
app.append(parts.head, parts.notes, parts.main);

function drawRow(i) {
  const total = table.total[i];
  return [
    el("span", { class: "place" }, `${table.group[i]}·${table.index[i]}`), verdict(table.right[i], table.has_ended[i]),
    el("span", { class: "total" }, total === null ? "" : number(total)),
    el("span", { class: table.failed[i] ? "codes bad" : "codes" }, table.codes[i] ? `${table.codes[i]} code` : ""),
    el("span", { class: `chip status-${table.status[i]}` }, table.status[i].replaceAll("_", " ")),
    el("span", { class: "said" }, table.answer[i] === null ? "" : table.answer[i]),
  ];
}

function drawHead() {
  const tab = (view, name) => el("button", { type: "button", class: state.view === view ? "tab on" : "tab", onclick: () => go({ view }) }, name);
  const place = runs.a.files.findIndex((file) => file.key === state.file);
  const files = el("select", { id: "file", onchange: () => go({ view: "rollouts", file: files.value, line: null }) },
    runs.a.files.map((file) => el("option", { value: file.key, selected: file.key === state.file }, fileName(file))));
  const step = (by) => el("button", { type: "button", title: by > 0 ? "next step: ]" : "step before: [", disabled: !runs.a.files[place + by], onclick: () => moveFile(by) }, by > 0 ? "▶" : "◀");
  const colours = el("select", { id: "colour", title: "colour of tokens: c", onchange: () => go({ colour: colours.value }) },
    COLOURS.map((name) => el("option", { value: name, selected: name === state.colour }, name === "none" ? "no token colours" : name)));
  fill(parts.head,
    el("b", {}, Object.entries(runs).map(([key, run]) => el("span", { class: "run-name", style: { color: RUN_COLOURS[key] } }, run.name, " "))),
    hasScores() && tab("scores", "scores"), tab("curves", "curves"), tab("steps", "steps"), tab("rollouts", "rollouts"),
    step(-1), files, step(1),
    el("span", { class: "filters" }, Object.entries(FILTERS).map(([name, [label]], place_) => el("button", {
      type: "button", class: state.filters.includes(name) ? "filter on" : "filter", title: `filter: ${place_ + 1}`, data: { filter: name },
      onclick: () => toggleFilter(name),
    }, label))),
    colours, el("button", { type: "button", title: "keys: ?", onclick: showKeys }, "?"),
    !embedded && runs.a.finished !== true && el("span", { class: "live", title: "the page follows the folder" }, "live"), legend(state.colour));
}

function toggleFilter(name) {
  const filters = state.filters.includes(name) ? state.filters.filter((n) => n !== name) : [...state.filters, name];
  return go({ filters, view: "rollouts" });
}

function moveFile(by) {
  const file = runs.a.files[runs.a.files.findIndex((f) => f.key === state.file) + by];
  return file && go({ view: "rollouts", file: file.key, line: null });
}

function nearestFile(step) {
  const steps = runs.a.files.filter((file) => file.step !== null);
  if (!steps.length) return;
  const best = steps.reduce((a, b) => (Math.abs(b.step - step) < Math.abs(a.step - step) ? b : a));
  go({ view: "rollouts", file: best.key, line: null });
}

// What the address asks for is drawn; a later call overtakes an earlier one that still waits for an answer.

let turn = 0;
async function update() {
  turn += 1;
  const mine = turn;
  const before = state;
  state = readAddress();
  if (!fileOf(runs.a, state.file)) state.file = runs.a.files.length ? runs.a.files.at(-1).key : null;
  drawHead();
  fill(parts.notes, Object.entries(runs).flatMap(([key, run]) => run.notes.map((note) => el("p", { class: "note" }, key === "a" ? note : `${run.name}: ${note}`))));
  try {
    if (state.view === "rollouts") await showRollouts(mine, before);
    else if (state.view === "scores") parts.main.replaceChildren(scoresView(runs));
    else await showMetrics(mine);
  } catch (error) {
    if (mine === turn) parts.main.replaceChildren(el("p", { class: "note error" }, error.message));
  }
  document.body.dataset.ready = String(mine);
}

async function showMetrics(mine) {
  const keys = Object.keys(runs);
  const found = await Promise.all(keys.map((key) => answers.get(`/api/${key}/metrics`, runs[key].metrics_stamp)));
  const alarms = await answers.get("/api/a/alarms", runs.a.metrics_stamp);
  if (mine !== turn) return;
  const metrics = Object.fromEntries(keys.map((key, place) => [key, found[place]]));
  if (state.view === "steps") parts.main.replaceChildren(stepsView(runs.a, metrics.a, (file) => go({ view: "rollouts", file, line: null })));
  else parts.main.replaceChildren(curvesView(runs, metrics, alarms, state.metrics, {
    onStep: nearestFile, onFilter: (words) => { history.replaceState(null, "", address({ ...state, metrics: words })); state.metrics = words; },
  }));
}

async function showRollouts(mine, before) {
  if (state.file === null) {
    parts.main.replaceChildren(el("p", { class: "page" }, "no rollouts yet: rollouts/ is empty"));
    return;
  }
  if (!table || before.file !== state.file) parts.count.textContent = "reading …";
  const next = await answers.get(tableAddress("a", state.file), stampOf(state.file));
  if (mine !== turn) return;
  table = next;
  const words = state.words.trim().toLowerCase();
  const holds = (text) => text !== null && text.toLowerCase().includes(words);
  shown = [];
  for (let i = 0; i < table.line.length; i += 1) {
    const passes = state.filters.every((name) => FILTERS[name][1](table, i));
    if (passes && (!words || holds(table.question[i]) || holds(table.answer[i]) || holds(table.question_id[i]))) shown.push(i);
  }
  if (parts.search.value !== state.words) parts.search.value = state.words;
  parts.count.textContent = `${shown.length} of ${table.of || table.line.length}`;
  if (!parts.main.contains(list.root)) {
    parts.main.replaceChildren(el("aside", {}, el("div", { class: "tools" }, parts.search, parts.count), el("div", { id: "problems" }), list.root), parts.detail);
  }
  fill(parts.main.querySelector("#problems"), table.problems.map((p) => el("p", { class: "note" }, p)));
  let place = table.line.indexOf(state.line);
  if (place < 0) place = shown.length ? shown[0] : -1;
  const position = shown.indexOf(place);
  list.show(shown, position);
  if (position >= 0) list.reveal(position);
  if (place < 0) {
    parts.detail.replaceChildren(el("p", { class: "faint" }, table.line.length ? "no rollout passes the filters" : "no rollouts in this file yet"));
    return;
  }
  await showGroup(mine, place);
}

function lineAtHand() {
  const i = table.line.indexOf(state.line);
  return i >= 0 ? i : shown.length ? shown[0] : -1;
}

// Rollouts of one question; files of evaluations numbered their groups anew for each part that was asked at once.
const groupOf = (rows, i) => `${rows.group[i]} ${rows.question_id[i]}`;

// The group of a rollout: its members side by side; of two runs the other's rollouts of the same question beside them.
async function showGroup(mine, place) {
  const group = table.line.map((_, i) => i).filter((i) => groupOf(table, i) === groupOf(table, place));
  const key = JSON.stringify([state.file, group.map((i) => table.line[i]), state.colour, table.stamp]);
  if (parts.detail.dataset.key !== key) {
    const first = await answers.get(rolloutAddress("a", state.file, table.line[place]), stampOf(state.file))
      .then((view) => questionCard("a", view.question), (error) => el("p", { class: "note error" }, error.message));
    const band = columns("a", state.file, group.map((i) => table.line[i]), stampOf(state.file));
    const others = runs.b ? await otherBand(table.question_id[place]) : null;
    if (mine !== turn) return;
    parts.detail.dataset.key = key;
    fill(parts.detail, first, el("div", { class: runs.b ? "bands two" : "bands" }, band, others));
    parts.detail.scrollTop = 0;
  }
  const passing = new Set(shown);
  for (const column of parts.detail.querySelectorAll(".band-a > article")) {
    const i = table.line.indexOf(Number(column.dataset.line));
    column.classList.toggle("dim", !passing.has(i));
    column.classList.toggle("at-hand", i === place);
    if (i === place) column.parentElement.scrollLeft = Math.max(0, column.offsetLeft - column.parentElement.offsetLeft - 40);
  }
}

async function otherBand(question) {
  const found = await ask(`/api/b/find?${new URLSearchParams({ question, near: state.file })}`);
  if (!found) return el("div", { class: "band band-b" }, el("p", { class: "note" }, `${runs.b.name} has no rollout of this question`));
  const theirs = await ask(tableAddress("b", found.file));
  const group = groupOf(theirs, theirs.line.indexOf(found.line));
  const lines = theirs.line.filter((_, i) => groupOf(theirs, i) === group);
  return columns("b", found.file, lines, fileOf(runs.b, found.file)?.stamp || "");
}

function columns(run, file, lines, stamp) {
  const colour = state.colour;
  const load = async (article) => {
    try {
      const view = await answers.get(rolloutAddress(run, file, Number(article.dataset.line)), stamp);
      fill(article, rolloutColumn(run, view, colour));
    } catch (error) {
      article.replaceChildren(el("p", { class: "note error" }, error.message));
    }
  };
  const watch = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      watch.unobserve(entry.target);
      load(entry.target);
    }
  }, { rootMargin: "0px 600px" });
  const articles = lines.map((line) => el("article", { data: { line } }, el("p", { class: "faint" }, "…")));
  articles.forEach((article) => watch.observe(article));
  return el("div", {}, runs.b && el("h3", { style: { color: RUN_COLOURS[run] } }, `${runs[run].name} · ${file}`), el("div", { class: `band band-${run}` }, articles));
}

// Keys.

function moveInList(by) {
  if (!shown.length) return null;
  const at = shown.indexOf(lineAtHand());
  const position = Math.max(0, Math.min(shown.length - 1, at + by));
  return go({ view: "rollouts", file: state.file, line: table.line[shown[position]] });
}

function moveGroup(by) {
  const at = shown.indexOf(lineAtHand());
  if (at < 0) return null;
  const group = (position) => groupOf(table, shown[position]);
  let position = at;
  while (shown[position + by] !== undefined && group(position) === group(at)) position += by;
  while (by < 0 && position > 0 && group(position - 1) === group(position)) position -= 1;
  return go({ view: "rollouts", file: state.file, line: table.line[shown[position]] });
}

function showKeys() {
  document.body.append(el("div", { class: "overlay", role: "dialog", onclick: closeOverlay },
    el("table", { class: "keys" }, KEYS.map(([key, what]) => el("tr", {}, el("th", {}, key), el("td", {}, what))))));
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    if (!closeOverlay() && document.activeElement) document.activeElement.blur();
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey || ["INPUT", "TEXTAREA", "SELECT"].includes(event.target.tagName)) return;
  const filters = Object.keys(FILTERS);
  const actions = {
    j: () => moveInList(1), ArrowDown: () => moveInList(1), k: () => moveInList(-1), ArrowUp: () => moveInList(-1),
    n: () => moveGroup(1), p: () => moveGroup(-1), "]": () => moveFile(1), "[": () => moveFile(-1),
    c: () => go({ colour: COLOURS[(COLOURS.indexOf(state.colour) + 1) % COLOURS.length] }),
    "/": () => parts.search.focus(), g: () => go({ view: "curves" }), s: () => go({ view: "steps" }), r: () => go({ view: "rollouts" }), t: () => hasScores() && go({ view: "scores" }), "?": showKeys,
  };
  filters.forEach((name, place) => { actions[String(place + 1)] = () => toggleFilter(name); });
  if (event.key in actions) {
    event.preventDefault();
    actions[event.key]();
  }
});

// A run that is under way: the folder is asked again, and what has changed is drawn anew. A reader who has chosen
// nothing yet is taken to the newest step.
async function follow() {
  try {
    const next = await ask("/api/runs");
    const before = runs;
    runs = next;
    parts.head.classList.remove("lost");
    const changed = Object.keys(next).some((key) => next[key].stamp !== before[key].stamp);
    if (changed && !document.querySelector(".overlay")) await update();
  } catch {
    parts.head.classList.add("lost");
  }
  setTimeout(follow, 1000);
}

async function start() {
  try {
    runs = await ask("/api/runs");
  } catch (error) {
    app.replaceChildren(el("p", { class: "note error" }, error.message));
    return;
  }
  window.addEventListener("popstate", update);
  window.addEventListener("hashchange", update);
  await update();
  if (!embedded) setTimeout(follow, 1000);
}

start();
