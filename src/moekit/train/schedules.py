"""Learning-rate schedules: pure functions of the step, so that a resumed run needs no scheduler state.

scale
1 ┤   ╭────╮              ╭─────────────╮            ╭────────────────
  │  ╱      ╲            ╱               ╲          ╱
  │ ╱         ╲         ╱                  ╲       ╱
0 ┼╱────────────╰      ╱─────────────────────╰    ╱───────────────────
   warm-up + cosine     warm-up, stable, decay      warm-up + constant
"""

from __future__ import annotations

import math

from moekit.config.errors import require
from moekit.config.train import ScheduleConfig


def learning_rate_scale(step: int, total_steps: int, config: ScheduleConfig) -> float:
    """Factor on the peak learning rate in optimizer step `step` (from 0) of `total_steps`.

    The warm-up is linear and its first step is already at 1 / warmup_steps, so that no step is lost; it
    reaches 1 in its last step. The decay covers the steps after it and would reach `final_scale` in step
    `total_steps`, one after the last, so that a decay to 0 loses no step either. Steps from `total_steps` on
    get `final_scale` (a constant schedule stays at 1).

    - `cosine`: half a cosine from 1 to `final_scale` (Loshchilov & Hutter 2017, arXiv:1608.03983).
    - `wsd`: 1 until the last `decay_share` of all steps (Hu et al. 2024, arXiv:2404.06395), then
      `final_scale + (1 - final_scale) * (1 - sqrt(p))` at share p of the decay, which Hägele et al. 2024
      (arXiv:2405.18392) found better than a linear decay.
    - `constant`: 1.

    Errors: `ConfigError` where `step` is negative or `total_steps` is below 1.

    >>> config = ScheduleConfig(kind="cosine", warmup_steps=2, final_scale=0.0)
    >>> [round(learning_rate_scale(step, 6, config), 3) for step in range(7)]
    [0.5, 1.0, 1.0, 0.854, 0.5, 0.146, 0.0]
    """
    require(step >= 0, "step", step, "must be 0 or more")
    require(total_steps >= 1, "train.steps", total_steps, "must be 1 or more")
    warmup, final = config.warmup_steps, config.final_scale
    if step < min(warmup, total_steps):
        return (step + 1) / warmup
    if config.kind == "constant":
        return 1.0
    if step >= total_steps:
        return final
    if config.kind == "cosine":
        share = (step - warmup) / (total_steps - warmup)
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * share))
    start = max(warmup, total_steps - round(config.decay_share * total_steps))
    if step < start:
        return 1.0
    return final + (1 - final) * (1 - math.sqrt((step - start) / (total_steps - start)))
