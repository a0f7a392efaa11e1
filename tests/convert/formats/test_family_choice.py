"""Which architecture expresses a model: neither too generous nor too strict, and errors that name the feature."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import BEFORE, MOE, PLAIN, config_of, loaded, logits, relative, small

from moekit.config.errors import ConfigError
from moekit.config.model import ModelConfig
from moekit.convert.exporting import chosen_family, export_model, folded
from moekit.convert.formats.families import FAMILIES, family_named, fitting_families
from moekit.convert.formats.features import PLAIN as PLAIN_VALUES
from moekit.convert.formats.features import features
from moekit.convert.formats.hf_folder import write_hf_folder

TYPES = [family.model_type for family in FAMILIES]
ATTENTION = {"llama", "mistral", "qwen2", "qwen3", "mixtral", "olmoe", "qwen3_moe", "qwen2_moe", "glm4_moe",
             "ernie4_5_moe", "gpt_oss"}  # fmt: skip
DEEPSEEK = {"deepseek_v2", "deepseek_v3"}
SHARED = {"deepseek_v2", "deepseek_v3", "glm4_moe", "ernie4_5_moe"}
BIASED_CHOICE = {"deepseek_v3", "glm4_moe", "ernie4_5_moe"}
SPARSE = {name for name in PLAIN if "moe" in PLAIN[name]}
ROPE = {"kind": "yarn", "factor": 4.0, "original_max_seq_len": 16}

# a change to the plain model of every family; the families that express the model then; the feature that others name.
# A change that concerns sparse layers is tried on sparse families alone, one of grouped heads where there are such.
CHANGES: dict[str, tuple[dict[str, Any], set[str], str, set[str]]] = {
    "nothing": ({}, set(TYPES), "", set(TYPES)),
    "tied": ({"tie_embeddings": True}, set(TYPES), "", set(TYPES)),
    "odd head": ({"d_head": 10}, ATTENTION - {"olmoe"}, "head_width", ATTENTION),
    "norm per head": ({"qk_norm": "head"}, {"qwen3", "qwen3_moe", "glm4_moe"}, "qk_norm", ATTENTION),
    "norm over all": ({"qk_norm": "full"}, {"olmoe"}, "qk_norm", ATTENTION),
    "no norm": ({"qk_norm": "none"}, ATTENTION - {"qwen3", "qwen3_moe", "olmoe"}, "qk_norm", ATTENTION),
    "biases in": ({"attention_bias": True, "attention_out_bias": False}, {"qwen2", "qwen2_moe", "glm4_moe"},
                  "attention_biases", set(TYPES)),
    "all biases": ({"attention_bias": True, "attention_out_bias": True},
                   {"llama", "qwen3", "qwen3_moe", "olmoe", "gpt_oss", *DEEPSEEK}, "attention_biases", set(TYPES)),
    "bias out": ({"attention_bias": False, "attention_out_bias": True}, set(), "attention_biases", set(TYPES)),
    "no biases": ({"attention_bias": False, "attention_out_bias": False}, set(TYPES) - {"qwen2", "gpt_oss"},
                  "attention_biases", set(TYPES)),
    "sinks": ({"attention_sinks": True}, {"gpt_oss"}, "attention_sinks", ATTENTION),
    "no sinks": ({"attention_sinks": False}, ATTENTION - {"gpt_oss"}, "attention_sinks", ATTENTION),
    "window": ({"sliding_window": 5}, {"mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe", "qwen2_moe", "gpt_oss"},
               "sliding_window", ATTENTION),
    "window by number": ({"sliding_window": 5, "sliding_layers": [0, 1]},
                         {"mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe", "qwen2_moe", "gpt_oss"},
                         "sliding_window", ATTENTION),
    "window in some": ({"sliding_window": 5, "sliding_layers": [1]}, {"qwen2", "qwen3", "qwen2_moe", "gpt_oss"},
                       "sliding_window", ATTENTION),
    "part rotated": ({"rotary_share": 0.5}, {"glm4_moe"}, "rotary_share", ATTENTION),
    "stretched": ({"rope_scaling": ROPE}, set(TYPES) - {"glm4_moe"}, "rope_scaling", set(TYPES)),
    "stretched by a factor": ({"rope_scaling": {"kind": "linear", "factor": 3.0}}, set(TYPES) - {"glm4_moe"},
                              "rope_scaling", set(TYPES)),
    "another activation": ({"activation": "geglu"}, set(), "activation", set(TYPES) - SPARSE),
    "biases of MLPs": ({"mlp_bias": True}, {"llama"}, "mlp_bias", set(TYPES) - SPARSE),
    "a dense model": ({"moe": None}, set(), "feed_forward", SPARSE),
    "a sparse model": ({"moe": MOE}, set(), "feed_forward", set(TYPES) - SPARSE),
    "first layer dense": ({"n_dense_layers": 1}, {"qwen3_moe", "qwen2_moe", *SHARED}, "dense_layers", SPARSE),
    "every second sparse": ({"n_layers": 4, "moe_every": 2}, {"qwen3_moe", "qwen2_moe"}, "dense_layers", SPARSE),
    "dense by number": ({"n_layers": 3, "dense_layers": [1]}, {"qwen3_moe", "qwen2_moe"}, "dense_layers", SPARSE),
    "experts in 8 bits": ({"moe": {"d_expert": 32, "quantization": {"bits": 8, "group_size": 32}}}, set(),
                          "quantization", {"mixtral", "olmoe", "qwen3_moe"}),
    "families of experts": ({"moe": {"families": True}}, set(), "expert_families", SPARSE),
    "merged experts": ({"moe": {"merged_into": [0, 1, 2, 3, 4, 5, 6, 7, 7]}}, set(), "merged_experts", SPARSE),
    "maps in 8 bits": ({"linear_quantization": {"bits": 8, "group_size": 32}}, set(), "linear_quantization",
                       set(TYPES)),
    "softmax before": ({"moe": {"router": BEFORE}}, {"olmoe", "qwen3_moe", "qwen2_moe", "deepseek_v2"}, "router",
                       SPARSE),
    "softmax after": ({"moe": {"router": "softmax"}}, {"mixtral", "olmoe", "qwen3_moe", "qwen2_moe", "ernie4_5_moe"},
                      "router|logit_bias", SPARSE),
    "sigmoid": ({"moe": {"router": "sigmoid"}}, {"deepseek_v3", "glm4_moe"}, "router", SPARSE),
    "sigmoid as it is": ({"moe": {"router": {"name": "sigmoid", "normalize": False}}}, {"deepseek_v3", "glm4_moe"},
                         "router", SPARSE),
    "groups": ({"moe": {"router": {"name": "group_limited", "n_groups": 4, "top_groups": 2, "score": "sigmoid"}}},
               {"deepseek_v3", "glm4_moe"}, "router", SPARSE),
    "groups by softmax": (
        {"moe": {"router": {"name": "group_limited", "n_groups": 4, "top_groups": 2, "score": "softmax",
                            "normalize": False}, "balance": {"bias_update_rate": 0.0}}},
        {"deepseek_v2"}, "router", SPARSE),
    "expert choice": ({"moe": {"router": "expert_choice", "balance": None}, "allow_noncausal_router": True}, set(),
                      "router", SPARSE),
    "biased choice": ({"moe": {"balance": {"bias_update_rate": 0.01}}}, BIASED_CHOICE, "selection_bias", SPARSE),
    "routers differ": ({"moe_by_layer": {1: {"router": {"name": "sigmoid", "normalize": False}}}}, set(),
                       "layer_routers|router", SPARSE - {"expert_choice"}),
    "one shared": ({"moe": {"n_shared_experts": 1, "shared_gate": False}}, SHARED, "shared_experts", SPARSE),
    "two shared": ({"moe": {"n_shared_experts": 2, "shared_gate": False}}, SHARED, "shared_experts", SPARSE),
    "gated shared": ({"moe": {"n_shared_experts": 1, "shared_gate": True}}, {"qwen2_moe"}, "shared_experts", SPARSE),
    "odd shared": ({"moe": {"n_shared_experts": 1, "d_shared": 40}}, {"qwen2_moe"}, "shared_width|shared_experts",
                   SPARSE),
    "none shared": ({"moe": {"n_shared_experts": 0, "shared_gate": False}},
                    {"mixtral", "olmoe", "qwen3_moe", "ernie4_5_moe", "gpt_oss"}, "shared_experts", SPARSE),
    "scaled": ({"moe": {"weight_scale": 1.7}}, {"deepseek_v2", "deepseek_v3", "glm4_moe"}, "weight_scale", SPARSE),
    "experts with biases": ({"moe": {"bias": True, "activation": "swiglu"}}, set(), "experts", SPARSE),
    "relu experts": ({"moe": {"bias": False, "activation": "relu"}}, set(), "experts", SPARSE),
    "winner": ({"moe": {"combine": "winner"}}, set(), "combine", SPARSE),
    "zero experts": ({"moe": {"null_experts": {"zero": 1}}}, set(), "null_experts", SPARSE),
    "bias behind the experts": ({"moe": {"output_bias": True}}, set(), "output_bias", SPARSE),
    "linear path": ({"moe": {"linear_path": True}}, set(), "linear_path", SPARSE),
    "capacity": ({"moe": {"capacity_factor": 1.0}}, set(), "capacity_factor", SPARSE),
    "sizes differ": ({"moe_by_layer": {1: {"n_experts": 6}}}, set(), "layer_sizes", SPARSE),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_feature_at_a_time(change: str) -> None:
    """What a family cannot express it names, and nothing else is refused."""
    fields, expressing, feature, tried = CHANGES[change]
    assert expressing <= tried
    for family in sorted(tried):
        wrong = family_named(family).misfits(config_of(family, **fields))
        if family in expressing:
            assert wrong == [], family
        else:
            assert any(words.startswith(tuple(feature.split("|"))) for words in wrong), (family, wrong)


EXPRESSED = [(change, sorted(known)) for change, (_, known, _, _) in CHANGES.items() if known]
ONE_EACH = [(change, known[number % len(known)]) for number, (change, known) in enumerate(EXPRESSED)]
OTHERS = [
    (change, family) for change, known in EXPRESSED for family in known if (change, family) not in ONE_EACH
]


def truly_expressed(change: str, family: str, folder: Path) -> None:
    pytest.importorskip("transformers", minversion="5.0")
    model = small(config_of(family, **CHANGES[change][0]))
    write_hf_folder(model, family_named(family), folder)
    assert relative(logits(model), logits(loaded(folder))) <= 1e-5


@pytest.mark.parametrize(("change", "family"), ONE_EACH)
def test_what_is_claimed_is_true(change: str, family: str, tmp_path: Path) -> None:
    """transformers computes what the family said it can express."""
    truly_expressed(change, family, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("change", "family"), OTHERS)
def test_what_is_claimed_is_true_of_every_family(change: str, family: str, tmp_path: Path) -> None:
    truly_expressed(change, family, tmp_path)


def test_every_feature_is_tried() -> None:
    """A feature that no change names could be accepted by mistake."""
    named = "|".join(feature for _, _, feature, _ in CHANGES.values())
    untried = {feature for feature in PLAIN_VALUES if feature not in named}
    assert untried == {"latent_attention"}, "tried below"
    found = [features(config_of(family)) for family in TYPES]
    assert set().union(*found) == set(PLAIN_VALUES)


def test_latent_attention_belongs_to_deepseek() -> None:
    latent = config_of("deepseek_v3")
    grouped = latent.replace(latent_attention=None)
    for family in FAMILIES:
        if family.model_type in DEEPSEEK:
            assert "latent_attention 'no'" in family.misfits(grouped)
        else:
            assert "latent_attention 'yes'" in family.misfits(latent)


@pytest.mark.parametrize("family", PLAIN)
def test_the_best_supported_family_is_chosen(family: str) -> None:
    fitting = [found.model_type for found in fitting_families(config_of(family))]
    assert fitting[0] == family
    assert fitting == [name for name in TYPES if name in fitting], "in the order of preference"


def test_the_error_names_the_feature_and_the_nearest() -> None:
    config = config_of("olmoe", moe_by_layer={1: {"linear_path": True}})
    with pytest.raises(ConfigError) as caught:
        fitting_families(config)
    assert str(caught.value) == (
        "no architecture of transformers expresses this model. The nearest is olmoe, but for: "
        "linear_path 'yes' in layer 1"
    )
    config = config_of(
        "qwen3_moe", n_layers=3, moe_by_layer={0: {"combine": "winner"}, 2: {"combine": "winner"}}
    )
    with pytest.raises(ConfigError, match=r"nearest is qwen3_moe, but for: combine 'winner' in layers 0, 2$"):
        fitting_families(config)


def test_a_named_architecture_that_does_not_fit() -> None:
    config = config_of("qwen2_moe")
    assert chosen_family(config, None).model_type == "qwen2_moe"
    with pytest.raises(ConfigError) as caught:
        chosen_family(config, "mixtral")
    assert str(caught.value).startswith("architecture mixtral does not express this model: ")
    assert "attention_biases 'in'" in str(caught.value)
    assert "shared_experts 'gated'" in str(caught.value)
    with pytest.raises(ConfigError, match="architecture must be one of those that moekit writes; got 'bort'"):
        chosen_family(config, "bort")


def test_equal_options_in_other_words_are_equal() -> None:
    """Options left out and options spelled out are the same router."""
    spelled_out = {"name": "softmax", "normalize": "before", "logit_bias": False}
    config = config_of("olmoe", moe_by_layer={1: {"router": spelled_out}})
    assert family_named("olmoe").misfits(config) == []


def test_an_embedding_scale_is_folded_in(tmp_path: Path) -> None:
    """No architecture has the factor; a scaled table and a matrix of its own say the same."""
    pytest.importorskip("transformers", minversion="5.0")
    config = config_of("llama", tie_embeddings=True, embedding_scale=5.5)
    model = small(config)
    plain = folded(model)
    assert plain.config.embedding_scale == 1.0
    assert not plain.config.tie_embeddings
    assert relative(logits(model), logits(plain)) <= 1e-6
    assert relative(logits(model), logits(small(config.replace(embedding_scale=1.0)))) > 0.1
    write_hf_folder(plain, family_named("llama"), tmp_path)
    assert relative(logits(model), logits(loaded(tmp_path))) <= 1e-5
    untouched = small(config.replace(embedding_scale=1.0))
    assert folded(untouched) is untouched


def test_nothing_is_written_where_nothing_fits(tmp_path: Path) -> None:
    from moekit.convert.formats.folder import write_model_folder

    (tmp_path / "ours").mkdir()
    write_model_folder(small(config_of("olmoe", moe={"linear_path": True})), tmp_path / "ours", [], {})
    with pytest.raises(ConfigError, match="linear_path"):
        export_model(tmp_path / "ours", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_zero_biases_stand_in_where_a_family_always_has_them(tmp_path: Path) -> None:
    """DeepSeek-V3 without a bias on the choice: its folder has one of zeros."""
    pytest.importorskip("transformers", minversion="5.0")
    model = small(config_of("deepseek_v3"))
    assert "backbone.layers.0.feed_forward.router.expert_bias" not in model.state_dict()
    write_hf_folder(model, family_named("deepseek_v3"), tmp_path)
    back = loaded(tmp_path)
    assert not back.model.layers[0].mlp.gate.e_score_correction_bias.any()
    assert relative(logits(model), logits(back)) <= 1e-5


def test_a_sparse_layer_of_its_own_size_in_a_dense_twin() -> None:
    """`features` speaks of the layers it concerns, from 0."""
    config = ModelConfig.from_dict(
        {
            "n_layers": 4,
            "moe_every": 2,
            "moe": MOE,
            "moe_by_layer": {3: {"activation": "relu"}},
            "mlp_bias": True,
        }
    )
    found = features(config)
    assert found["experts"] == {"swiglu": [1], "relu": [3]}
    assert found["mlp_bias"] == {"yes": [0, 2]}
    assert found["dense_layers"] == {"some": [0, 1, 2, 3]}
    with torch.device("meta"):
        assert found["layer_sizes"] == {"equal": [1, 3]}
