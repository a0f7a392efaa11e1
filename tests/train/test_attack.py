"""Attacks: against closed forms, never out of reach, on every kind of input, and leaving the model as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from moekit.config.adversarial import AttackConfig
from moekit.config.errors import ConfigError, DataError
from moekit.config.model import model_config_from_dict
from moekit.config.task import FieldsInput, TaskModelConfig
from moekit.data.encoding.base import Continuous, pixels_of
from moekit.data.encoding.fields import FieldsEncoder
from moekit.data.examples import Examples
from moekit.models import build_model
from moekit.models.task_model import TaskModel
from moekit.train.attack import Place, ascend, draws, moved, places_of, under_attack

WEIGHT = torch.tensor([[0.5, -2.0, 0.0, 1.0], [1.5, 0.1, -0.2, 0.3]])


def attacked(place: Place, config: AttackConfig, weight: torch.Tensor = WEIGHT) -> torch.Tensor:
    return ascend(lambda change: (change["x"] * weight).sum(), {"x": place}, config, draws(0))["x"]


@pytest.mark.parametrize("random_start", [True, False])
def test_a_linear_model_is_moved_by_the_signs_of_its_weights(random_start):
    unit = torch.tensor([1.0, 2.0, 1.0, 0.5])
    config = AttackConfig(epsilon=0.3, steps=10, random_start=random_start)
    got = attacked(Place(torch.randn(2, 4), unit), config)
    known = WEIGHT != 0  # where the weight is nothing, any change within reach is as good
    assert torch.allclose(got[known], (0.3 * WEIGHT.sign() * unit)[known], atol=1e-6)


def test_in_l2_a_linear_model_is_moved_along_its_weights():
    got = attacked(
        Place(torch.randn(2, 4), torch.ones(1)), AttackConfig(epsilon=0.3, norm="l2", random_start=False)
    )
    assert torch.allclose(got, 0.3 * WEIGHT / WEIGHT.norm(dim=1, keepdim=True), atol=1e-6)
    # a number with a larger unit goes further: the length is counted in units
    unit = torch.tensor([1.0, 2.0, 1.0, 0.5])
    got = attacked(Place(torch.randn(2, 4), unit), AttackConfig(epsilon=0.3, norm="l2", random_start=False))
    expected = 0.3 * WEIGHT * unit / (WEIGHT * unit).norm(dim=1, keepdim=True) * unit
    assert torch.allclose(got, expected, atol=1e-6)


def test_pixels_stop_at_black_and_white():
    x = torch.tensor([[0.05, 0.05, 0.5, 0.95], [0.2, 0.9, 0.1, 1.0]])
    place = Place(x, torch.ones(1), torch.zeros(1), torch.ones(1))
    got = attacked(place, AttackConfig(epsilon=0.1, steps=20))
    known = WEIGHT != 0
    assert torch.allclose((x + got)[known], (x + 0.1 * WEIGHT.sign()).clamp(0, 1)[known], atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("seed", range(4))
def test_no_step_leaves_the_ball_or_the_range(norm, seed):
    chance = torch.Generator().manual_seed(seed)
    x = torch.rand(3, 2, 5, generator=chance) * 1.4 - 0.2  # some are not valid as they are
    place = Place(x, torch.ones(1), torch.zeros(1), torch.ones(1))
    config = AttackConfig(epsilon=0.4, norm=norm, step_size=0.3, steps=6)
    seen = []

    def objective(changes):
        seen.append(changes["x"].detach())
        return (changes["x"] * torch.randn(x.shape, generator=chance)).sum()

    last = ascend(objective, {"x": place}, config, draws(seed))["x"]
    for change in [*seen, last, place.noise(config, draws(seed))]:
        size = change.abs().amax() if norm == "linf" else change.flatten(1).norm(dim=1).amax()
        assert size <= 0.4 + 1e-6
        assert ((x + change) >= x.clamp(max=0) - 1e-6).all()
        assert ((x + change) <= x.clamp(min=1) + 1e-6).all()
    assert len(seen) == 6
    assert seen[0].abs().sum() > 0  # it began somewhere else


def test_a_start_in_l2_is_drawn_evenly_from_the_ball():
    place = Place(torch.zeros(4000, 3), torch.ones(1))
    lengths = place.anywhere(2.0, "l2", draws(0)).norm(dim=1)
    # of a ball in three dimensions, an eighth lies within half of its radius
    assert lengths.max() <= 2.0
    assert float((lengths < 1.0).float().mean()) == pytest.approx(1 / 8, abs=0.02)


def test_an_epsilon_of_pixels_counts_from_black_to_white():
    images = np.zeros((2, 4, 4, 3), np.uint8)
    mean, deviation = np.array([10.0, 20.0, 30.0], np.float32), np.array([5.0, 50.0, 100.0], np.float32)
    found = pixels_of(images, "pixels", mean, deviation, None)
    standard = (torch.tensor([51.0] * 3) - torch.from_numpy(mean)) / torch.from_numpy(deviation)
    x = standard.view(1, 3, 1, 1).expand(2, 3, 4, 4)
    change = Place(x, found.unit, found.low, found.high).inside(torch.full_like(x, 1e3), 0.1, "linf")
    levels = (x + change) * torch.from_numpy(deviation).view(3, 1, 1) + torch.from_numpy(mean).view(3, 1, 1)
    assert torch.allclose(levels, torch.full_like(levels, 51.0 + 25.5), atol=1e-3)
    floats = pixels_of(np.linspace(-1, 3, 48).reshape(1, 4, 4, 3), "pixels", mean, deviation, None)
    assert torch.allclose(floats.unit.flatten(), torch.from_numpy(4 / deviation))
    with pytest.raises(DataError, match="all pixels are 7: they do not say what is valid"):
        pixels_of(np.full((1, 2, 2, 3), 7.0), "pixels", mean, deviation, None)


def task(**stems) -> TaskModel:
    torch.manual_seed(0)
    return TaskModel(TaskModelConfig.from_dict({
        "d_model": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": 32, "moe": {"n_experts": 4, "d_expert": 8},
        "stems": stems, "heads": {"label": {"kind": "classify", "labels": ["a", "b"]}},
    })).eval()  # fmt: skip


WORDS = {"kind": "tokens", "vocab_size": 9}
FRAMES = {"kind": "frames", "n_features": 2, "stride": 2}
FIELDS = {"kind": "fields", "n_numbers": 2, "sizes": [3]}


def test_padding_is_moved_nowhere_and_a_missing_number_stays_missing():
    model = task(words=WORDS, sound=FRAMES, fields=FIELDS)
    inputs = {
        "words": {"ids": torch.tensor([[3, 4, 0], [5, 6, 7]])},
        "sound": {"frames": torch.randn(2, 4, 2), "lengths": torch.tensor([4, 1])},
        "fields": {"numbers": torch.tensor([[torch.nan, 1.0], [0.5, 2.0]]),
                   "categories": torch.zeros(2, 1, dtype=torch.long)},
    }  # fmt: skip
    arguments = {"inputs": inputs, "targets": {"label": torch.tensor([0, 1])}}
    continuous = {
        "words": None,
        "sound": Continuous("frames", torch.ones(1), lengths="lengths"),
        "fields": Continuous("numbers", torch.ones(1)),
    }
    config = AttackConfig(epsilon=0.5, steps=3)
    places = places_of(model, arguments, config, continuous)

    def objective(changes):
        return model(**moved(arguments, places, changes)).loss

    with under_attack(model):
        changes = ascend(objective, places, config, draws(0))
    assert changes["words"].shape == (2, 3, 16)
    assert not changes["words"][0, 2].any()
    assert changes["words"][0, :2].any()
    assert not changes["sound"][1, 1:].any()
    assert changes["sound"][1, :1].all()
    assert changes["sound"][0].all()
    now = moved(arguments, places, changes)["inputs"]["fields"]["numbers"]
    assert now.isnan().tolist() == [[True, False], [False, False]]
    assert (now - inputs["fields"]["numbers"]).nan_to_num().abs().max() <= 0.5 + 1e-6
    assert objective(changes) > model(**arguments).loss
    assert torch.equal(inputs["sound"]["frames"], arguments["inputs"]["sound"]["frames"])


def test_vectors_are_measured_by_the_typical_length_of_a_token():
    model = task(words=WORDS)
    with torch.no_grad():
        model.stems["words"].weight.copy_(torch.arange(9.0)[:, None].expand(9, 16))
    arguments = {"inputs": {"words": {"ids": torch.tensor([[3, 4, 0]])}}, "targets": {}}
    typical = ((9 + 16) / 2) ** 0.5  # of a number, over the two tokens that are no padding
    for norm, unit in (("linf", typical), ("l2", typical * 4)):
        config = AttackConfig(epsilon=0.1, norm=norm)
        (place,) = places_of(model, arguments, config, {}).values()
        assert float(place.unit) == pytest.approx(unit)
        noise = place.noise(config, draws(0))[0, :2]
        sizes = noise.abs() if norm == "linf" else noise.norm(dim=1)  # each token's own length
        assert torch.allclose(sizes, torch.full_like(sizes, 0.1 * unit))


def test_numbers_with_bins_are_no_numbers_to_move():
    examples = Examples({"height": [1.0, 2.0, 3.0, 4.0], "kind": ["a", "b", "a", "b"]})

    def continuous(bins):
        config = FieldsInput.from_dict({"numbers": ["height"], "categories": ["kind"], "bins": bins})
        return FieldsEncoder.fit(config, examples).encode(examples).continuous()

    assert continuous(0).array == "numbers"
    assert continuous(2) is None


def test_an_attack_leaves_the_model_and_all_other_draws_as_they_were():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(), nn.Flatten(), nn.Linear(72, 3))
    model[0].bias.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x, generator = torch.rand(4, 1, 8, 8), torch.get_rng_state()
    with under_attack(model):
        changes = ascend(
            lambda change: model(x + change["x"])[:, 0].sum(),
            {"x": Place(x, torch.ones(1))},
            AttackConfig(),
            draws(0),
        )
        assert not model.training
    assert model.training
    assert changes["x"].requires_grad is False
    assert torch.equal(torch.get_rng_state(), generator)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    learning = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert learning == {name: name != "0.bias" for name in learning}
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["decoder", "transformer_xl"])
def test_a_language_model_is_attacked_at_the_vectors_of_its_tokens(kind):
    sizes = {"vocab_size": 30, "d_model": 16, "n_layers": 1, "n_heads": 2, "d_ff": 16, "max_seq_len": 8}
    torch.manual_seed(0)
    model = build_model(model_config_from_dict({"kind": kind, **sizes})).eval()
    ids = torch.randint(0, 30, (2, 6))
    arguments = {"token_ids": ids, "targets": ids.roll(-1, 1), "segment_ids": torch.zeros_like(ids)}
    arguments["segment_ids"][1, 4:] = -1  # padding
    config = AttackConfig(epsilon=0.5, steps=4)
    places = places_of(model, arguments, config, {})

    def objective(changes):
        return model(**moved(arguments, places, changes)).loss

    changes = ascend(objective, places, config, draws(0))
    assert not changes["tokens"][1, 4:].any()
    assert objective(changes) > model(**arguments).loss
    still = {"tokens": torch.zeros_like(changes["tokens"])}
    assert torch.equal(objective(still), model(**arguments).loss)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"inputs": ["picture"]}, "inputs names 'picture', which the backbone does not read"),
        ({"space": "input"}, "space must be auto or embedding for input 'words'"),
    ],
)
def test_what_cannot_be_attacked_is_named(config, message):
    arguments = {"inputs": {"words": {"ids": torch.tensor([[3, 4, 0]])}}}
    with pytest.raises(ConfigError, match=message):
        places_of(task(words=WORDS), arguments, AttackConfig.from_dict(config), {"words": None})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"valid_range": [1, 0]}, "valid_range must hold a smaller and a larger number"),
        ({"objective": "routing", "random_start": False}, "random_start must be true with objective: routing"),
        ({"epsilon": 0}, "epsilon"),
    ],
)  # fmt: skip
def test_attacks_that_cannot_be(fields, message):
    with pytest.raises(ConfigError, match=message):
        AttackConfig.from_dict(fields)
