"""Learning-rate schedules against values worked out by hand."""

import pytest

from moekit.config.errors import ConfigError
from moekit.config.train import ScheduleConfig
from moekit.train.schedules import learning_rate_scale


def scales(total, **fields):
    config = ScheduleConfig(**fields)
    return [learning_rate_scale(step, total, config) for step in range(total)]


def test_cosine_by_hand():
    # warm-up 1/2, 2/2; then p = 0, 1/4, 2/4, 3/4 of the decay with 0.5 * (1 + cos(pi p)):
    # cos 0 = 1, cos 45° = 0.70711, cos 90° = 0, cos 135° = -0.70711
    expected = [0.5, 1.0, 1.0, 0.853553, 0.5, 0.146447]
    assert scales(6, kind="cosine", warmup_steps=2, final_scale=0.0) == pytest.approx(expected, abs=1e-6)
    # final_scale 0.2 squeezes the same curve into 0.2..1: 0.2 + 0.8 * 0.853553 = 0.882843, ...
    expected = [0.5, 1.0, 1.0, 0.882843, 0.6, 0.317157]
    assert scales(6, kind="cosine", warmup_steps=2, final_scale=0.2) == pytest.approx(expected, abs=1e-6)


def test_wsd_by_hand():
    # 10 steps, 2 of warm-up, the last 4 decay with 1 - sqrt(p), p = 0, 1/4, 2/4, 3/4:
    # 1 - 0, 1 - 0.5, 1 - 0.707107, 1 - 0.866025
    expected = [0.5, 1, 1, 1, 1, 1, 1, 0.5, 0.292893, 0.133975]
    got = scales(10, kind="wsd", warmup_steps=2, decay_share=0.4, final_scale=0.0)
    assert got == pytest.approx(expected, abs=1e-6)
    # with a floor of 0.1: 0.1 + 0.9 * 0.5 = 0.55, ...
    got = scales(10, kind="wsd", warmup_steps=2, decay_share=0.4, final_scale=0.1)
    assert got[6:] == pytest.approx([1.0, 0.55, 0.363604, 0.220577], abs=1e-6)


def test_wsd_whose_decay_would_begin_in_the_warm_up_decays_right_after_it():
    got = scales(8, kind="wsd", warmup_steps=4, decay_share=1.0, final_scale=0.0)
    assert got == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 0.5, 0.292893, 0.133975], abs=1e-6)


def test_constant_by_hand():
    assert scales(5, kind="constant", warmup_steps=2) == [0.5, 1.0, 1.0, 1.0, 1.0]
    assert scales(3, kind="constant", warmup_steps=0) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 7, 20, 50])
@pytest.mark.parametrize("final", [0.0, 0.05, 1.0])
def test_no_step_is_lost_and_the_peak_is_1(kind, warmup, final):
    got = scales(20, kind=kind, warmup_steps=warmup, final_scale=final)
    assert got[0] > 0
    assert min(got) > 0
    assert max(got) == (
        1.0 if warmup <= 20 else 20 / 50
    )  # a run shorter than its warm-up stops on the way up
    rising, falling = got[:warmup], got[max(0, warmup - 1) :]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
def test_the_end_lies_one_step_behind_the_last_and_stays(kind):
    config = ScheduleConfig(kind=kind, warmup_steps=10, final_scale=0.1)
    assert learning_rate_scale(1000, 1000, config) == learning_rate_scale(5000, 1000, config) == 0.1
    assert 0.1 < learning_rate_scale(999, 1000, config) < 0.11


def test_impossible_steps_are_refused():
    with pytest.raises(ConfigError, match=r"train\.steps must be 1 or more; got 0"):
        learning_rate_scale(0, 0, ScheduleConfig())
    with pytest.raises(ConfigError, match="step must be 0 or more; got -1"):
        learning_rate_scale(-1, 10, ScheduleConfig())
