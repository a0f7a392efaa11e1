"""Automatic design: which experts, routers and settings serve a task best within a budget.

    Subject ─► Bench (data read once) ─► Space.sample ─► run_trial ─► Optuna's study ─► finals ─► report, best.yaml

`budget` reads limits, `space` and `hyper` say what may be chosen, `trial` trains one choice, `search` holds the study,
`finals` compares the chosen with the default on fresh seeds, `front` and `report` say what was found.
"""
