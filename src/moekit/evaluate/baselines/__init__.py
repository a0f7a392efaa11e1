"""Classical baselines of tasks, each through the library of its field, behind one function.

    Examples, inputs, targets ─► fit_baseline(name) ─► FittedBaseline ─► predict(examples) ─► Answers per target
                                                            └─► report(): settings chosen, libraries, seconds

Whatever a baseline chooses (C, rounds, neighbours), it chooses on the validation examples; test examples never reach
`fit_baseline`. Read `base`, then one family.
"""
