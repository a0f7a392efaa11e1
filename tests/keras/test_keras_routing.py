"""`routing_model` shows what the layers of a finished model do, wherever the model came from."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("keras.ops", reason="Keras 3 is not installed")

import keras

from moekit.config.errors import ConfigError
from moekit.keras import MixtureOfExperts, routing_model

E, K, D = 4, 2, 6


def numpy(value) -> np.ndarray:
    return keras.ops.convert_to_numpy(value)


def functional() -> keras.Model:
    """Two sparse layers, called without their routing."""
    inputs = keras.Input((5, D))
    hidden = MixtureOfExperts(E, 3, K, name="first")(keras.layers.LayerNormalization(name="norm")(inputs))
    return keras.Model(inputs, keras.layers.Dense(2)(MixtureOfExperts(E, 3, K, name="second")(hidden)))


def tokens(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(3, 5, D)).astype("float32")


def stirred(model: keras.Model) -> keras.Model:
    """Weights so large that no two logits lie near each other."""
    rng = np.random.default_rng(1)
    for variable in model.trainable_variables:
        variable.assign(rng.normal(size=variable.shape))
    return model


def assert_shows(model: keras.Model, x: np.ndarray) -> None:
    """The routing of both layers is what calling them by hand gives."""
    found = routing_model(model)(x)
    assert set(found) == {"first", "second"}
    hidden = model.get_layer("norm")(x)
    for name in ("first", "second"):
        hidden, expected = model.get_layer(name)(hidden, return_routing=True)
        assert set(found[name]) == set(expected)
        for part, value in expected.items():
            np.testing.assert_allclose(
                numpy(found[name][part]), numpy(value), rtol=1e-5, atol=1e-6, err_msg=part
            )


def test_it_shows_a_functional_model_and_follows_its_training():
    model = stirred(functional())
    x = tokens()
    watch = routing_model(model)
    before = numpy(watch(x)["first"]["router_probs"])
    assert_shows(model, x)
    variable = model.get_layer("first").router_weight
    variable.assign(-1.0 * numpy(variable))
    assert_shows(model, x)
    assert np.abs(numpy(watch(x)["first"]["router_probs"]) - before).max() > 0.1


def test_it_shows_a_loaded_model(tmp_path):
    model = stirred(functional())
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_shows(loaded, tokens())
    ours, theirs = routing_model(model)(tokens()), routing_model(loaded)(tokens())
    np.testing.assert_array_equal(
        numpy(ours["second"]["expert_indices"]), numpy(theirs["second"]["expert_indices"])
    )


def test_it_leaves_the_model_as_it_was(tmp_path):
    model = stirred(functional())
    x = tokens()
    before, names = numpy(model(x)), [layer.name for layer in model.layers]
    routing_model(model)
    np.testing.assert_array_equal(numpy(model(x)), before)
    assert [layer.name for layer in model.layers] == names
    model.save(tmp_path / "model.keras")
    np.testing.assert_allclose(numpy(keras.saving.load_model(tmp_path / "model.keras")(x)), before, rtol=1e-5)


def test_masks_arrive_those_that_keras_passes_and_those_that_are_given():
    ids = np.array([[3, 1, 4, 0, 0]], dtype="int32")
    words = keras.Input((5,), dtype="int32")
    vectors = keras.layers.Embedding(9, D, mask_zero=True)(words)
    passed = keras.Model(words, MixtureOfExperts(E, 3, K, name="experts")(vectors))
    given_mask = keras.Input((5,), dtype="bool")
    plain = keras.Input((5, D))
    given = keras.Model(
        [plain, given_mask], MixtureOfExperts(E, 3, K, name="experts")(plain, mask=given_mask)
    )
    for model, x in ((passed, ids), (given, [tokens()[:1], ids > 0])):
        routing = routing_model(model)(x)["experts"]
        assert int(numpy(routing["tokens_per_expert"]).sum()) == 3 * K
        assert (numpy(routing["expert_indices"])[0, 3:] == -1).all()


def test_a_sequential_model_has_a_routing_once_it_has_an_input():
    model = keras.Sequential([MixtureOfExperts(E, 3, K, name="experts"), keras.layers.Dense(2)])
    with pytest.raises(ConfigError, match="has no symbolic inputs"):
        routing_model(model)
    model = keras.Sequential([keras.Input((5, D)), *model.layers])
    assert numpy(routing_model(model)(tokens())["experts"]["expert_indices"]).shape == (3, 5, K)


def test_without_a_sparse_layer_it_says_so():
    inputs = keras.Input((D,))
    with pytest.raises(ConfigError, match=r"among its layers; got .*plain"):
        routing_model(keras.Model(inputs, keras.layers.Dense(2, name="plain")(inputs)))
