"use strict";
// A rollout as a column: what was asked, a card a round, what it earned, its tokens in colours.

const COLOURS = ["none", "kind", "logprob", "entropy", "temperature", "mismatch"];

const TOKEN_COLOUR = {
  logprob: (t, i) => (t.sampled[i] ? heat("210, 40, 40", -t.logprob[i] / 4) : ""),
  entropy: (t, i) => (t.sampled[i] ? heat("40, 90, 210", t.entropy[i] / 2.5) : ""),
  temperature: (t, i) => (t.sampled[i] ? (t.temperature[i] === 0 ? "rgba(120, 120, 120, .35)" : heat("220, 130, 0", t.temperature[i] / 1.25)) : ""),
  mismatch: (t, i) => (t.mismatch && t.mismatch[i] !== null ? heat("180, 0, 180", Math.abs(t.mismatch[i]) / 0.5) : ""),
};

const LEGEND = {
  none: "",
  logprob: "log-prob at the temperature used: the redder, the less likely (4 nats and more are full)",
  entropy: "entropy at temperature 1: the bluer, the less certain (2.5 nats are full)",
  temperature: "grey is greedy; the more orange, the higher",
  mismatch: "trainer's log-prob less the engine's: the more violet, the farther apart (half a nat is full)",
};

const KINDS = { text: "text", code: "code", tag: "tag", answer: "answer", sandbox: "output", prompt: "prompt", end: "end" };

function legend(colour) {
  const kinds = colour === "kind" ? Object.entries(KINDS).map(([kind, name]) => el("span", { class: `token kind-${kind}` }, name)) : LEGEND[colour];
  return el("span", { class: "faint legend" }, kinds);
}

const heat = (rgb, share) => `rgba(${rgb}, ${Math.max(0, Math.min(0.85, share * 0.85)).toFixed(3)})`;

// What can be coloured: a mismatch is there only where the run recorded the trainer's log-probs.
function columnOf(tokens, colour) { return { kind: "kind", logprob: "logprob", entropy: "entropy", temperature: "temperature", mismatch: "mismatch" }[colour] in tokens; }

function tokenSpan(tokens, i, colour) {
  const about = (name, label) => (name in tokens && tokens[name][i] !== null ? `${label} ${number(tokens[name][i], 4)}` : null);
  const span = el("span", { class: `token kind-${colour === "kind" ? tokens.kind[i] : "plain"}` }, tokens.text[i]);
  const drawn = !("sampled" in tokens) || tokens.sampled[i];
  span.title = [
    `token ${tokens.id[i]}`, tokens.kind[i], about("round", "round"),
    drawn ? about("temperature", "temperature") : "not sampled", drawn && about("logprob", "log-prob"),
    drawn && about("raw", "at temperature 1"), drawn && about("entropy", "entropy"),
    about("mismatch", "trainer less engine"), drawn && about("version", "weights"),
  ].filter(Boolean).join(" · ");
  const paint = TOKEN_COLOUR[colour];
  if (paint) span.style.backgroundColor = paint(tokens, i);
  return span;
}

function tokensWhere(tokens, colour, wanted) {
  const out = el("pre", { class: "tokens" });
  for (let i = 0; i < tokens.id.length; i += 1) if (wanted(i)) out.append(tokenSpan(tokens, i, colour));
  return out;
}

const isGiven = (kind) => kind === "prompt" || kind === "image" || kind === "sandbox";

// A part that is opened rarely is made when it is.
function folded(summary, make, open = false) {
  const details = el("details", {}, el("summary", {}, summary));
  const unfold = () => { if (details.open && details.childElementCount === 1) details.append(make()); };
  details.addEventListener("toggle", unfold);
  details.open = open;
  unfold();
  return details;
}

function rewardTable(rewards) {
  if (!rewards) return el("p", { class: "faint" }, "not scored");
  return el("table", { class: "rewards" }, Object.entries(rewards)
    .filter(([, value]) => value !== null && value !== "")
    .map(([name, value]) => el("tr", { class: name === "total" ? "total" : "" }, el("th", {}, name), el("td", {}, number(value)))));
}

function resultParts(run, round, source) {
  const { result } = round;
  const ok = result.status === "ok";
  const before = new Map();
  for (const shown of result.pictures) {
    if (!shown.region) continue;
    const { source: name, width, height, path, box, how } = shown.region;
    if (!before.has(path)) before.set(path, { info: { name, width, height }, boxes: [] });
    before.get(path).boxes.push({ box, how, label: `${box.join(", ")} (${how})` });
  }
  if (!before.size && result.pictures.length && source) before.set(source.path, { info: source, boxes: [] });
  return [
    el("p", { class: ok ? "status" : "status bad" }, `${result.status}`,
      result.wall_s ? ` · ${Math.round(1000 * result.wall_s)} ms` : "", result.isolation ? ` · ${result.isolation}` : "",
      result.restarted ? " · variables were lost before it" : ""),
    result.fixes.length > 0 && el("ul", { class: "fixes" }, result.fixes.map((fix) => el("li", {}, `repaired: ${fix}`))),
    result.error && el("pre", { class: "error" }, result.error),
    result.stdout && el("pre", { class: "stdout" }, result.stdout),
    result.pictures.length > 0 && el("div", { class: "pair" },
      el("div", {}, [...before].map(([path, { info, boxes }]) => picture(run, info, { boxes, caption: `before: ${path}` }))),
      el("div", {}, result.pictures.map((shown) => picture(run, shown, {
        caption: shown.region ? `after: ${shown.region.box.join(", ")} (${shown.region.how})` : "after",
      })))),
  ];
}

function roundCard(run, view, number_, colour) {
  const round = view.rounds[number_];
  const { tokens } = view;
  const inColour = colour !== "none" && tokens && columnOf(tokens, colour);
  const mine = (i) => tokens.round && tokens.round[i] === number_ && !isGiven(tokens.kind[i]);
  const written = inColour ? tokensWhere(tokens, colour, mine) : round.parts.map((part) => {
    if (part.kind === "code") return codeBlock(round.code === null || round.code === undefined ? part.text : round.code);
    return el("p", { class: part.kind }, part.text);
  });
  return el("section", { class: "card" }, el("h4", {}, `round ${number_ + 1}`), written,
    round.result && el("div", { class: "result" }, resultParts(run, round, view.question.pictures.find((p) => !p.missing))));
}

function verdict(right, hasEnded = true) {
  if (!hasEnded) return el("span", { class: "verdict open" }, "…");
  if (right === null || right === undefined) return el("span", { class: "verdict none" }, "?");
  return el("span", { class: right ? "verdict right" : "verdict wrong" }, right ? "✓" : "✗");
}

function rolloutColumn(run, view, colour, { isRow = false } = {}) {
  const { tokens } = view;
  return [
    !isRow && el("header", {}, verdict(view.right, view.has_ended), el("b", {}, `rollout ${view.index}`),
      el("span", { class: `chip status-${view.status}` }, view.has_ended ? view.status.replaceAll("_", " ") : "under way"),
      el("span", { class: "faint" }, `${view.num_tokens} tokens`,
        view.wall_s ? ` · ${number(view.wall_s)} s` : "", view.mismatch === null ? "" : ` · mismatch ${number(view.mismatch)}`)),
    !isRow && el("p", { class: "answer" }, "answer: ", el("b", {}, view.answer === null ? "none" : String(view.answer)),
      el("span", { class: "faint" }, `   solution: ${view.question.solution}`)),
    view.notes.map((note) => el("p", { class: "note" }, note)),
    colour !== "none" && tokens && !columnOf(tokens, colour) && el("p", { class: "note" },
      colour === "mismatch" ? "no log-probs of the trainer were recorded for this rollout: a run has them where rl.mismatch masks or aborts, or several updates are made of a batch" : `no ${colour} was recorded`),
    tokens && folded("prompt and pictures as tokens", () => tokensWhere(tokens, colour, (i) => tokens.kind[i] === "prompt" || (tokens.kind[i] === "image" && tokens.round[i] === 0))),
    view.rounds.map((_, i) => roundCard(run, view, i, colour)),
    !isRow && rewardTable(view.rewards),
  ];
}

function questionCard(run, question) {
  return el("section", { class: "question" },
    el("div", { class: "thumbs" }, question.pictures.map((info) => picture(run, info, { size: 160, caption: info.path }))),
    el("div", {}, el("p", { class: "asked" }, question.text),
      el("p", {}, "solution: ", el("b", {}, question.solution)),
      el("p", { class: "faint" }, question.id, question.scenario ? ` · ${question.scenario}` : ""),
      Object.keys(question.meta).length > 0 && folded("meta", () => el("pre", {}, JSON.stringify(question.meta, null, 1)))));
}
