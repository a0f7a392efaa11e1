"""The Keras layer computes what `moekit.MoE` computes, and behaves as a layer of Keras does.

Every test runs on the backend that KERAS_BACKEND names (torch where it is unset); `test_keras_backends.py` runs this
file on the others.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("keras.ops", reason="Keras 3 is not installed")

import keras
from keras import ops
from keras_gradients import gradients

import moekit
from moekit.config.errors import ConfigError, UntaughtRouterWarning
from moekit.keras import MixtureOfExperts, load_balance_loss, max_violation, router_z_loss
from moekit.keras.layer import ACTIVATIONS, KERNELS

D, F, E, K = 6, 5, 4, 2
# slices take any shape, and a backend that compiles for each of them takes minutes
KERNELS = tuple(kernel for kernel in KERNELS if kernel == "blocks" or keras.config.backend() == "torch")


def numpy(value) -> np.ndarray:
    return ops.convert_to_numpy(value)


def number(value) -> float:
    return float(numpy(value))


def tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def pair(d_model: int = D, seed: int = 0, **fields) -> tuple[moekit.MoE, MixtureOfExperts]:
    """moekit's layer and Keras's with the same weights."""
    torch.manual_seed(seed)
    fields = {"n_experts": E, "d_expert": F, "top_k": K, **fields}
    kernel, normalize = fields.pop("kernel", "auto"), fields.pop("normalize", "after")
    router = {"name": "softmax", "normalize": normalize}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UntaughtRouterWarning)
        ours = moekit.MoE(d_model=d_model, router=router, kernel="reference", **fields)
        theirs = MixtureOfExperts(**fields, normalize=normalize, kernel=kernel)
    theirs.build((None, d_model))
    state = ours.state_dict()
    if fields.get("bias"):  # zeros say nothing
        for name in ("experts.b_in", "experts.b_out"):
            state[name].normal_()
    # the logits of untrained routers lie so near each other that rounding could swap a choice
    state["router.weight"].mul_(50)
    for name, value in state.items():
        getattr(theirs, name.replace("experts.", "").replace(".", "_")).assign(value.numpy())
    return ours, theirs


def assert_equal_layers(ours, theirs, x, mask=None) -> None:
    """Answers, losses and routing."""
    expected = ours(torch.tensor(x), token_mask=None if mask is None else torch.tensor(mask))
    y, routing = theirs(x, mask=mask, return_routing=True)
    np.testing.assert_allclose(numpy(y), expected.hidden_states.detach().numpy(), rtol=1e-5, atol=2e-6)
    for name, value in expected.aux_losses.items():
        assert number(routing[name]) == pytest.approx(value.item(), rel=1e-5), name
    assert numpy(routing["tokens_per_expert"]).tolist() == expected.routing.tokens_per_expert.tolist()
    real = slice(None) if mask is None else mask.ravel()
    logits = numpy(routing["router_logits"]).reshape(-1, ours.config.n_experts)[real]
    expected_logits = expected.routing.router_logits.detach().numpy()[real]
    np.testing.assert_allclose(logits, expected_logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_moekit_with_every_activation(activation, kernel):
    assert_equal_layers(*pair(activation=activation, bias=True, kernel=kernel), 2 * tokens(3, 7, D))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "fields",
    [
        {"normalize": "before"},
        {"normalize": "ones"},
        {"top_k": 1, "normalize": "before"},
        {"top_k": E},
        {"n_experts": 1, "top_k": 1},
        {"n_experts": 33, "top_k": 3},
        {"d_out": 3, "bias": True},
    ],
    ids=str,
)
def test_equals_moekit_with_every_rule(fields, kernel):
    assert_equal_layers(*pair(**fields, kernel=kernel), tokens(2, 13, D))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", [(1, D), (5, D), (1, 1, D), (2, 3, 2, D), (257, D)], ids=str)
def test_equals_moekit_at_every_shape(shape, kernel):
    mask = np.random.default_rng(1).random(shape[:-1]) < 0.6
    ours, theirs = pair(kernel=kernel)
    assert_equal_layers(ours, theirs, tokens(*shape))
    assert_equal_layers(ours, theirs, tokens(*shape), mask)


@pytest.mark.parametrize("kernel", KERNELS)
def test_all_tokens_at_one_expert(kernel):
    ours, theirs = pair(top_k=1, normalize="before", kernel=kernel)
    weight = np.zeros((E, D), "float32")
    weight[2, 0] = 100.0
    theirs.router_weight.assign(weight)
    ours.router.weight.data = torch.tensor(weight)
    x = np.abs(tokens(11, D)) + 0.1
    assert_equal_layers(ours, theirs, x)
    _, routing = theirs(x, return_routing=True)
    assert numpy(routing["tokens_per_expert"]).tolist() == [0, 0, 11, 0]
    assert number(routing["load_balance"]) == pytest.approx(E)
    assert number(max_violation(routing["tokens_per_expert"])) == E - 1


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("normalize", ["after", "before", "ones"])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_equal_moekits(kernel, normalize, masked):
    ours, theirs = pair(normalize=normalize, kernel=kernel, bias=True)
    x, target = tokens(3, 9, D), tokens(3, 9, D, seed=1)
    mask = np.random.default_rng(2).random((3, 9)) < 0.7 if masked else None

    out = ours(torch.tensor(x), token_mask=None if mask is None else torch.tensor(mask))
    (
        (out.hidden_states * torch.tensor(target)).sum()
        + 0.7 * out.aux_losses["load_balance"]
        + 0.3 * out.aux_losses["router_z"]
    ).backward()

    def loss():
        y, routing = theirs(x, mask=mask, return_routing=True)
        return ops.sum(ops.multiply(y, target)) + 0.7 * routing["load_balance"] + 0.3 * routing["router_z"]

    found = gradients(theirs, loss)
    expected = {
        name.replace("experts.", "").replace(".", "_"): p.grad.numpy() for name, p in ours.named_parameters()
    }
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        assert np.abs(gradient).max() > 1e-3, name
        np.testing.assert_allclose(found[name], gradient, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_tokens_and_no_real_token(kernel):
    _, layer = pair(kernel=kernel)
    y, routing = layer(np.zeros((0, D), "float32"), return_routing=True)
    assert (tuple(y.shape), number(routing["load_balance"])) == ((0, D), 0.0)
    y, routing = layer(tokens(2, 3, D), mask=np.zeros((2, 3), bool), return_routing=True)
    assert not numpy(y).any()
    assert numpy(routing["tokens_per_expert"]).tolist() == [0] * E
    assert number(routing["router_z"]) == 0.0


@pytest.mark.parametrize("kernel", KERNELS)
def test_padding_reaches_nothing(kernel):
    _, layer = pair(kernel=kernel)
    x = tokens(2, 5, D)
    mask = np.array([[True] * 3 + [False] * 2, [True] * 5])
    x[0, 3], x[0, 4] = np.nan, 1e30
    y, routing = layer(x, mask=mask, return_routing=True)
    alone, without = layer(x[mask], return_routing=True)
    np.testing.assert_allclose(numpy(y)[mask], numpy(alone), rtol=1e-5, atol=1e-6)
    assert not numpy(y)[~mask].any()
    for name in ("load_balance", "router_z"):
        assert number(routing[name]) == pytest.approx(number(without[name]), rel=1e-6)
    assert (numpy(routing["expert_indices"])[~mask] == -1).all()
    assert (numpy(routing["expert_indices"])[mask] == numpy(without["expert_indices"])).all()
    assert not numpy(routing["expert_weights"])[~mask].any()
    assert numpy(routing["tokens_per_expert"]).sum() == 8 * K

    def loss():
        return ops.sum(layer(x, mask=mask))

    assert all(np.isfinite(gradient).all() for gradient in gradients(layer, loss).values())


def test_keras_hands_its_mask_on():
    ids = keras.Input((5,), dtype="int32")
    embedded = keras.layers.Embedding(10, D, mask_zero=True)(ids)
    layer = MixtureOfExperts(E, F, K)
    hidden, routing = layer(embedded, return_routing=True)
    pooled = keras.layers.GlobalAveragePooling1D()(hidden)  # itself reads the mask
    model = keras.Model(ids, [hidden, pooled, routing["tokens_per_expert"]])
    x = np.array([[3, 4, 0, 0, 0], [1, 2, 3, 4, 5]])
    y, mean, load = (numpy(value) for value in model(x))
    assert not y[0, 2:].any()
    assert load.sum() == 7 * K
    np.testing.assert_allclose(mean[0], y[0, :2].mean(axis=0), rtol=1e-5, atol=1e-6)


def test_the_routing_says_what_was_done():
    _, layer = pair()
    x = tokens(2, 4, D)
    y, routing = layer(x, return_routing=True)
    logits, index, weight = (
        numpy(routing[name]) for name in ("router_logits", "expert_indices", "expert_weights")
    )
    np.testing.assert_allclose(logits, x @ numpy(layer.router_weight).T, rtol=1e-5, atol=1e-5)
    assert (np.sort(index, -1) == np.sort(np.argsort(-logits, -1)[..., :K], -1)).all()
    np.testing.assert_allclose(weight.sum(-1), 1.0, rtol=1e-6)
    assert numpy(routing["tokens_per_expert"]).tolist() == np.bincount(index.ravel(), minlength=E).tolist()
    np.testing.assert_allclose(numpy(routing["router_probs"]).sum(-1), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(numpy(layer(x)), numpy(y))


def test_losses_worked_out_by_hand():
    probs = np.array([[0.7, 0.3], [0.5, 0.5], [0.0, 1.0]], "float32")
    mask = np.array([True, True, False])
    # P = (0.6, 0.4), f = (3/4, 1/4): 2 * (0.45 + 0.1)
    counts = np.array([3, 1])
    assert number(load_balance_loss(ops.convert_to_tensor(probs), counts, mask)) == pytest.approx(1.1)
    # ln(2)^2 and 0, the third does not count
    logits = ops.convert_to_tensor(np.array([[0.0, 0.0], [np.log(0.5), np.log(0.5)], [5.0, 5.0]], "float32"))
    assert number(router_z_loss(logits, mask)) == pytest.approx(np.log(2) ** 2 / 2, rel=1e-5)
    assert number(max_violation(np.array([3, 1]))) == pytest.approx(0.5)


def test_add_loss_receives_the_weighted_losses():
    _, layer = pair()
    layer.load_balance, layer.router_z = 0.5, 0.25
    _, routing = layer(tokens(2, 4, D), return_routing=True)
    given = [number(loss) for loss in layer.losses]
    assert given == pytest.approx([0.5 * number(routing["load_balance"]), 0.25 * number(routing["router_z"])])
    layer(tokens(2, 4, D))
    assert len(layer.losses) == 2  # those of the last call alone


def test_no_coefficient_no_loss():
    layer = MixtureOfExperts(E, F, K, load_balance=0.0, router_z=0.0)
    layer(tokens(3, D))
    assert layer.losses == []


def classifier(**fields) -> keras.Model:
    keras.utils.set_random_seed(0)
    x = keras.Input((5, D))
    y = MixtureOfExperts(**{"n_experts": E, "d_expert": F, "top_k": K, **fields})(x)
    return keras.Model(x, keras.layers.Dense(3)(keras.layers.GlobalAveragePooling1D()(y)))


def test_the_loss_of_a_model_has_the_balancing_in_it():
    x, y = tokens(8, 5, D), np.arange(8) % 3
    totals = []
    for coefficient in (0.0, 3.0):
        model = classifier(load_balance=coefficient, router_z=0.0)
        model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        totals.append(model.evaluate(x, y, batch_size=8, verbose=0))
    model(x)
    assert totals[1] - totals[0] == pytest.approx(number(model.losses[0]), rel=1e-4)
    assert totals[1] - totals[0] > 2.5


@pytest.mark.parametrize("kernel", [*KERNELS, "auto"])
def test_fit_learns(kernel):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(96, 5, D)).astype("float32")
    y = x.mean(axis=1)[:, :3].argmax(axis=1)
    model = classifier(kernel=kernel)
    model.compile(
        keras.optimizers.Adam(0.03),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    history = model.fit(x, y, batch_size=32, epochs=12, verbose=0).history  # the last batch is whole
    assert history["accuracy"][-1] > 0.85 > 0.6 > history["accuracy"][0]
    assert len(model.predict(x[:7], batch_size=4, verbose=0)) == 7  # and here it is not


def test_a_graph_without_its_batch_size_computes_the_same():
    """Only TensorFlow has such graphs; elsewhere this is the plain call."""
    _, layer = pair(kernel="blocks")
    x = tokens(9, 5, D)
    inputs = keras.Input((5, D))
    model = keras.Model(inputs, layer(inputs))
    predicted = model.predict(x, batch_size=4, verbose=0)  # batches of 4, 4 and 1
    np.testing.assert_allclose(predicted, numpy(layer(x)), rtol=1e-5, atol=1e-6)


def test_shapes_before_anything_is_computed():
    layer = MixtureOfExperts(E, F, K, d_out=9)
    assert layer.compute_output_shape((None, 7, D)) == (None, 7, 9)
    hidden, routing = layer(keras.Input((7, D)), return_routing=True)
    assert hidden.shape == (None, 7, 9)
    y, real = layer(tokens(2, 7, D), return_routing=True)
    assert tuple(y.shape) == (2, 7, 9)
    assert set(routing) == set(real)
    for name, value in routing.items():
        assert tuple(value.shape)[1:] == tuple(real[name].shape)[1:], name
        assert value.dtype == keras.backend.standardize_dtype(real[name].dtype), name


def test_inside_a_layer_that_declares_no_shape():
    class Residual(keras.layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.inner = MixtureOfExperts(E, F, K)

        def call(self, x):
            return x + self.inner(x)

    x = keras.Input((5, D))
    model = keras.Model(x, Residual()(x))
    assert model.output_shape == (None, 5, D)
    assert numpy(model(tokens(2, 5, D))).shape == (2, 5, D)


FIELDS = {
    "n_experts": 5, "d_expert": 3, "top_k": 2, "router": "softmax", "normalize": "before", "activation": "gelu",
    "bias": True, "d_out": 4, "load_balance": 0.2, "router_z": 0.0, "kernel": "blocks", "seed": 7,
}  # fmt: skip


def test_config_gives_an_equal_layer():
    layer = MixtureOfExperts(**FIELDS, name="experts", dtype="float32")
    again = MixtureOfExperts.from_config(layer.get_config())
    assert again.get_config() == layer.get_config()
    assert {name: layer.get_config()[name] for name in FIELDS} == FIELDS
    assert again.name == "experts"


def test_it_is_registered():
    assert keras.saving.get_registered_name(MixtureOfExperts) == "moekit>MixtureOfExperts"
    assert keras.saving.get_registered_object("moekit>MixtureOfExperts") is MixtureOfExperts


@pytest.mark.parametrize("router", ["softmax", "noisy_topk"])
def test_saved_and_loaded_it_is_equal(tmp_path, router):
    x = keras.Input((5, D))
    y, routing = MixtureOfExperts(E, F, K, bias=True, router=router)(x, return_routing=True)
    model = keras.Model(x, {"y": y, "load": routing["tokens_per_expert"]})
    for variable in model.trainable_variables:  # biases and noise too
        variable.assign(tokens(*variable.shape, seed=3))
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    inputs = tokens(3, 5, D)
    before, after = model(inputs), again(inputs)
    for name in ("y", "load"):
        np.testing.assert_array_equal(numpy(before[name]), numpy(after[name]))
    assert not np.allclose(numpy(before["y"]), 0)


def test_noise_is_drawn_in_training_alone():
    layer = MixtureOfExperts(8, F, K, router="noisy_topk", seed=1)
    x = tokens(20, D)
    _, calm = layer(x, return_routing=True)
    _, calm_again = layer(x, training=False, return_routing=True)
    _, noisy = layer(x, training=True, return_routing=True)
    _, noisy_again = layer(x, training=True, return_routing=True)
    logits = [numpy(routing["router_logits"]) for routing in (calm, calm_again, noisy, noisy_again)]
    np.testing.assert_array_equal(logits[0], logits[1])
    noise = logits[2] - logits[0]
    # softplus(0) + 0.01 = 0.703; 160 draws
    assert 0.55 < noise.std() < 0.85
    assert not np.allclose(logits[2], logits[3])
    clean = np.exp(logits[0])
    np.testing.assert_allclose(numpy(calm["router_probs"]), clean / clean.sum(-1, keepdims=True), rtol=1e-4)


def test_noise_starts_again_from_its_seed_and_learns():
    def build():
        layer = MixtureOfExperts(8, F, K, router="noisy_topk", seed=5)
        layer.build((None, D))
        layer.router_weight.assign(tokens(8, D, seed=1))
        return layer

    x = tokens(20, D)
    layers = build(), build()
    drawn = [numpy(layer(x, training=True, return_routing=True)[1]["router_logits"]) for layer in layers]
    np.testing.assert_array_equal(*drawn)

    layer = layers[0]
    target = tokens(20, D, seed=2)
    found = gradients(layer, lambda: ops.sum(ops.multiply(layer(x, training=True), target)))
    assert np.abs(found["noise_weight"]).max() > 1e-4
    assert np.abs(found["router_weight"]).max() > 1e-4


def test_noise_equals_moekits_rule_when_it_is_calm():
    torch.manual_seed(0)
    ours = moekit.MoE(d_model=D, d_expert=F, n_experts=E, top_k=K, router="noisy_topk", kernel="reference")
    theirs = MixtureOfExperts(E, F, K, router="noisy_topk")
    theirs.build((None, D))
    state = ours.state_dict()
    state["router.weight"].mul_(50)
    for name, value in state.items():
        getattr(
            theirs, name.replace("experts.", "").replace(".", "_", 1).replace("router_noise", "noise")
        ).assign(value.numpy())
    assert_equal_layers(ours.eval(), theirs, tokens(9, D))


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16"])
def test_the_router_is_float32_under_every_policy(policy):
    reference = MixtureOfExperts(E, F, K)
    layer = MixtureOfExperts(E, F, K, dtype=policy)
    for one in (reference, layer):
        one.build((None, D))
    for variable, other in zip(reference.variables, layer.variables, strict=True):
        value = ops.cast(ops.convert_to_tensor(tokens(*variable.shape)), "bfloat16")
        variable.assign(ops.cast(value, "float32"))
        other.assign(ops.cast(value, other.dtype))
    x = ops.cast(ops.convert_to_tensor(tokens(30, D)), "bfloat16")
    y, routing = layer(x, return_routing=True)
    expected, expected_routing = reference(ops.cast(x, "float32"), return_routing=True)
    assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"
    assert keras.backend.standardize_dtype(routing["router_logits"].dtype) == "float32"
    np.testing.assert_allclose(
        numpy(routing["router_logits"]), numpy(expected_routing["router_logits"]), rtol=1e-5, atol=1e-6
    )
    scale = np.abs(numpy(expected)).max()
    assert np.abs(numpy(ops.cast(y, "float32")) - numpy(expected)).max() < 0.03 * scale
    assert all(keras.backend.standardize_dtype(loss.dtype) == "float32" for loss in layer.losses)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 5}, r"top_k must be in 1..n_experts \(4\); got 5"),
        ({"top_k": 0}, "top_k must be in"),
        ({"d_expert": 0}, "d_expert must be at least 1; got 0"),
        ({"router": "softmx"}, "did you mean 'softmax'"),
        ({"activation": "swish"}, "activation must be one of swiglu"),
        ({"normalize": "never"}, "normalize must be one of after"),
        ({"kernel": "fast"}, "kernel must be one of auto, slices, blocks"),
        (
            {"router": "noisy_topk", "normalize": "before"},
            "normalize must be 'after' with router 'noisy_topk'",
        ),
        ({"load_balance": -1.0}, "load_balance must be at least 0"),
    ],
)
def test_errors_name_the_field(fields, message):
    with pytest.raises(ConfigError, match=message):
        MixtureOfExperts(**{"n_experts": E, "d_expert": F, "top_k": K, **fields})


def test_a_mask_of_another_shape_is_refused():
    layer = MixtureOfExperts(E, F, K)
    with pytest.raises(ConfigError, match="mask must have the leading shape of inputs"):
        layer(tokens(2, 3, D), mask=np.ones(6, bool))
    with pytest.raises(ConfigError, match="mask must have the leading shape of inputs"):
        layer(tokens(2, 3, D), mask=np.ones((3, 2), bool))


def test_an_unknown_width_is_refused():
    with pytest.raises(ConfigError, match="inputs must have a known last axis"):
        MixtureOfExperts(E, F, K).build((None, None))


def test_a_router_that_nothing_teaches_is_warned_of():
    with pytest.warns(UntaughtRouterWarning, match="top_k 1"):
        MixtureOfExperts(E, F, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MixtureOfExperts(E, F, 1, normalize="before")
        MixtureOfExperts(1, F, 1)
