"use strict";
// The steps of a run as a table: a row a file of rollouts, with what metrics.jsonl says of the step.

const STEP_COLUMNS = {
  "reward/mean": "reward", "reward/result/mean": "right", "rollout/code_share": "code", "sandbox/success_rate": "code ok",
  "rollout/ended/repetition": "repetition", "completion_length/mean": "tokens", "actor/entropy": "entropy", "mismatch/kl": "mismatch", "time/rollout": "rollout s",
};

function stepsView(run, metrics, onFile) {
  const stages = Object.entries(metrics.stages);
  const [, columns] = stages.find(([stage]) => stage === "rl") || stages.at(-1) || ["", { step: [] }];
  const at = new Map(columns.step.map((step, place) => [step, place]));
  const shown = Object.keys(STEP_COLUMNS).filter((name) => name in columns);
  const open = (file) => (event) => { event.preventDefault(); onFile(file.key); };
  return el("div", { class: "page" }, el("table", { class: "steps" },
    el("tr", {}, el("th", {}, "rollouts of"), el("th", {}, ""), shown.map((name) => el("th", { title: name }, STEP_COLUMNS[name]))),
    run.files.map((file) => el("tr", {},
      el("td", {}, el("a", { href: "#", onclick: open(file) }, fileName(file))),
      el("td", { class: "faint" }, file.rollouts === null ? "" : plural(file.rollouts, "rollout")),
      shown.map((name) => el("td", {}, file.step === null || !at.has(file.step) ? "" : number(columns[name][at.get(file.step)])))))),
  !run.files.length && el("p", {}, "no rollouts yet: rollouts/ is empty"));
}

function fileName(file) {
  if (file.step === null) return file.is_journal ? `${file.key.slice(1)} (under way)` : file.key;
  return file.is_journal ? `step ${file.step} (under way${file.rank ? `, rank ${file.rank}` : ""})` : `step ${file.step}`;
}
