"""Which verbs there are, and what each takes beside its settings."""

VERBS = {
    "demo": "thyme.demo.verb",
    "ask": "thyme.verbs.ask",
    "base": "thyme.verbs.base",
    "sft": "thyme.verbs.sft",
    "anneal": "thyme.verbs.anneal",
    "rl": "thyme.verbs.rl",
    "resume": "thyme.verbs.resume",
    "rollout": "thyme.verbs.rollout",
    "eval": "thyme.verbs.eval",
    "ablate": "thyme.verbs.ablate",
    "plan": "thyme.verbs.plan",
    "export": "thyme.verbs.export",
    "serve": "thyme.verbs.serve",
    "data build": "thyme.verbs.data_build",
    "data compose": "thyme.verbs.data_compose",
    "data synth": "thyme.verbs.data_synth",
    "data check": "thyme.verbs.data_check",
    "data convert": "thyme.verbs.data_convert",
    "data dedup": "thyme.verbs.data_dedup",
    "data stats": "thyme.verbs.data_stats",
    "data review": "thyme.verbs.data_review",
    "profile rollout": "thyme.verbs.profile_rollout",
    "profile train": "thyme.verbs.profile_train",
    "view": "thyme.verbs.view",
    "report": "thyme.verbs.report",
    "sandbox run": "thyme.verbs.sandbox_run",
    "bench": "thyme.verbs.bench",
    "doctor": "thyme.verbs.doctor",
    "completion": "thyme.verbs.completion",
}
"""Verb -> the module that has its Config and `run(config)`."""

RECIPE_VERBS = {
    *("demo", "base", "sft", "anneal", "rl", "rollout", "eval", "ablate", "plan", "data build"),
    *("profile rollout", "profile train"),
}
"""Verbs that take a recipe before their settings."""

JSON_VERBS = set(VERBS) - {"demo", "serve", "data review", "view", "completion"}
"""Verbs that come to a result: `--json` prints it for programs."""
