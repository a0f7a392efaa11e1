"""Explaining a key: everything comes from the fields, for every key there is."""

from __future__ import annotations

import pytest
import yaml

from moekit.config.encoder import EncoderConfig
from moekit.config.errors import ConfigError
from moekit.config.explain import all_keys, describe_key, explain_key
from moekit.config.loading import load_run_config
from moekit.config.train import OptimizerConfig, RunConfig


def test_a_value_tells_type_default_range_and_meaning():
    (info,) = describe_key("train.schedule.final_scale")
    assert (info.type, info.default, info.allowed) == ("number", "0.05", "at least 0, at most 1")
    assert "learning rate" in info.description


@pytest.mark.parametrize(
    ("key", "allowed"),
    [
        ("train.optimizer.lr", "greater than 0"),
        ("train.steps", "at least 1"),
        ("data.validation_share", "greater than 0, less than 0.5"),
        ("train.schedule.decay_share", "greater than 0, at most 1"),
    ],
)
def test_ranges_say_whether_their_ends_belong_to_them(key, allowed):
    assert describe_key(key)[0].allowed == allowed


def test_a_key_of_two_kinds_of_model_is_told_apart():
    text = explain_key("model.d_ff")
    assert "model.d_ff  (kind: decoder)" in text
    assert "model.d_ff  (kind: transformer_xl)" in text
    assert "688" in text
    assert "1024" in text


def test_a_key_that_both_kinds_mean_alike_is_told_once():
    assert len(describe_key("model.init_std")) == 1


def test_a_group_lists_its_keys():
    (info,) = describe_key("train.optimizer")
    assert list(info.children) == list(OptimizerConfig.model_fields)
    assert info.default is None


def test_the_top_lists_the_groups():
    assert set(describe_key("")[0].children) == set(RunConfig.model_fields)


@pytest.mark.parametrize("key", list(all_keys()))
def test_every_key_explains_itself(key):
    text = explain_key(key)
    assert text.startswith(key)
    for info in describe_key(key):
        assert info.children or info.default is not None, f"{key} has neither keys nor a default"


@pytest.mark.parametrize("key", [key for key in all_keys() if not describe_key(key)[0].children])
def test_the_default_that_is_shown_is_the_one_that_holds(key):
    # writing the shown default by hand must change nothing
    for info in describe_key(key):
        if info.kind == "encoder":  # no run trains one
            field, value = key.removeprefix("model."), yaml.safe_load(info.default or "null")
            assert EncoderConfig.from_dict({field: value}) == EncoderConfig()
            continue
        base = ["model.kind=transformer_xl"] if info.kind == "transformer_xl" else []
        # groups that are null unless they are asked for
        optional = ("model.moe", "model.rope_scaling", "model.latent_attention", "train.lora", "train.distill",
                    "train.record", "train.elastic", "train.experts", "train.adversarial",
                    "model.moe.quantization", "model.linear_quantization")  # fmt: skip
        base += [f"{group}={{}}" for group in optional if key.startswith(f"{group}.")]
        assert load_run_config(None, [*base, f"{key}={info.default}"]) == load_run_config(None, base)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("train.stpes", "train.stpes is not a known key: did you mean 'steps'?"),
        ("train.lr", "A key of that name stands at: train.optimizer.lr"),
        ("train.steps.x", "train.steps is one value"),
        ("modle.moe", "did you mean 'model'?"),
    ],
)
def test_unknown_key_names_the_nearest(key, words):
    with pytest.raises(ConfigError, match=words.replace("?", r"\?")):
        describe_key(key)
