"""`MixtureOfExperts`: the sparse feed-forward block as a Keras 3 layer, in `keras.ops` alone.

Shape legend: T tokens (all positions before the last axis), D input width, E experts, K top_k, F d_expert, O output
width.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import keras
from keras import ops

from moekit.config.errors import UntaughtRouterWarning, nearest, require
from moekit.keras.balancing import load_balance_loss, router_z_loss
from moekit.keras.experts import GATED, PLAIN, Experts, SortedRows, by_blocks, by_slices

ROUTERS = ("softmax", "noisy_topk")
NORMALIZE = ("after", "before", "ones")
KERNELS = {"slices": by_slices, "blocks": by_blocks}
ACTIVATIONS = (*GATED, *PLAIN)


@keras.saving.register_keras_serializable(package="moekit")
class MixtureOfExperts(keras.layers.Layer):
    """A sparse feed-forward block on `[..., D]`: each token visits the `top_k` experts that a learned router chooses.

    The words and the mathematics are `moekit.MoE`'s, and so are the layouts of the weights: `router_weight [E, D]`,
    `w_in [E, G*F, D]` (G = 2 with a gate: gates first, then linear parts), `w_out [E, O, F]`. No token is ever dropped.
    The router computes in float32, whatever the dtype policy.

    Args:
        n_experts, d_expert, top_k: E, F and K.
        router: "softmax", or "noisy_topk", which adds learned Gaussian noise to the logits in training (Shazeer et
            al. 2017, arXiv 1701.06538).
        normalize: the combine weights: "after", softmax over the chosen experts; "before", over all; "ones", 1 for each
            (the router learns by the gradient of log(probability)).
        activation: swiglu, geglu, geglu_tanh, clamped_swiglu, gelu, gelu_tanh, relu, relu_squared, silu or sigmoid.
        bias: whether the experts' linear maps have biases.
        d_out: O; D where None.
        load_balance: coefficient of E * sum(f * P) (1 at perfect balance), which `add_loss` receives; 0 for none.
        router_z: coefficient of the mean squared log-sum-exp of the logits; 0 for none.
        kernel: how the experts are computed (`moekit.keras.experts`): "slices", "blocks", or "auto", which takes slices
            on the torch backend and blocks, whose shapes a compiled graph knows, on the others.
        seed: of the noise.

    Call arguments:
        inputs: `[..., D]`.
        mask: `[...]`, False at padding, which visits no expert, counts in no loss and gets zeros. Keras passes on the
            mask that a layer before it made.
        training: whether the noise is drawn.
        return_routing: also return what the router did, as a dict: `router_logits` and `router_probs` `[..., E]`
            (float32; they say nothing at padding), `expert_indices` `[..., K]` (-1 at padding), `expert_weights`
            `[..., K]` (0 at padding), `tokens_per_expert` `[E]`, and the unweighted `load_balance` and `router_z`.
            Nothing is kept on the layer.

    Errors: `ConfigError` for a value that breaks a rule, naming field, value and remedy. Warns
    (`UntaughtRouterWarning`) where the task cannot teach the router.

    >>> layer = MixtureOfExperts(n_experts=8, d_expert=32, top_k=2)
    >>> y, routing = layer(ops.ones((2, 5, 16)), return_routing=True)
    >>> tuple(y.shape), int(ops.sum(routing["tokens_per_expert"])), len(layer.losses)
    ((2, 5, 16), 20, 2)
    """

    def __init__(
        self,
        n_experts: int = 8,
        d_expert: int = 512,
        top_k: int = 2,
        *,
        router: str = "softmax",
        normalize: str = "after",
        activation: str = "swiglu",
        bias: bool = False,
        d_out: int | None = None,
        load_balance: float = 0.01,
        router_z: float = 0.001,
        kernel: str = "auto",
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, value in (("n_experts", n_experts), ("d_expert", d_expert), ("d_out", d_out)):
            require(value is None or value >= 1, name, value, "must be at least 1")
        require(1 <= top_k <= n_experts, "top_k", top_k, f"must be in 1..n_experts ({n_experts})")
        for name, word, known in (
            ("router", router, ROUTERS),
            ("normalize", normalize, NORMALIZE),
            ("activation", activation, ACTIVATIONS),
            ("kernel", kernel, ("auto", *KERNELS)),
        ):
            require(word in known, name, word, f"must be one of {', '.join(known)}", nearest(word, known))
        require(
            router == "softmax" or normalize == "after", "normalize", normalize,
            f"must be 'after' with router {router!r}, whose weights are a softmax over the chosen",
            "Or use router='softmax'",
        )  # fmt: skip
        for name, coefficient in (("load_balance", load_balance), ("router_z", router_z)):
            require(coefficient >= 0, name, coefficient, "must be at least 0")
        if top_k == 1 < n_experts and normalize == "after":
            warnings.warn(
                "top_k 1 with normalize 'after' scales the one weight to 1, so that only the balancing losses teach "
                "the router and the task does not. Use top_k 2 or more, or router='softmax' with normalize='before'",
                UntaughtRouterWarning,
                stacklevel=2,
            )
        self.n_experts, self.d_expert, self.top_k = n_experts, d_expert, top_k
        self.router, self.normalize, self.activation = router, normalize, activation
        self.bias, self.d_out = bias, d_out
        self.load_balance, self.router_z = load_balance, router_z
        self.kernel, self.seed = kernel, seed
        self.supports_masking = True
        self.noise = keras.random.SeedGenerator(seed) if router == "noisy_topk" else None

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Make the weights: normal ones of standard deviation D^-1/2 and F^-1/2, 0.02 in the router, zero biases."""
        width = input_shape[-1]
        require(width is not None, "inputs", tuple(input_shape), "must have a known last axis")
        assert width is not None
        inner = self.d_expert * (2 if self.activation in GATED else 1)
        out = width if self.d_out is None else self.d_out
        n = self.n_experts
        self.router_weight = self._matrix("router_weight", (n, width), 0.02, autocast=False)
        self.noise_weight = self.b_in = self.b_out = None
        if self.noise is not None:
            # zeros, as in the paper: all experts start with equal noise softplus(0)
            self.noise_weight = self._zeros("noise_weight", (n, width), autocast=False)
        self.w_in = self._matrix("w_in", (n, inner, width), width**-0.5)
        self.w_out = self._matrix("w_out", (n, out, self.d_expert), self.d_expert**-0.5)
        if self.bias:
            self.b_in = self._zeros("b_in", (n, inner))
            self.b_out = self._zeros("b_out", (n, out))
        self.built = True

    def call(
        self, inputs: Any, mask: Any = None, training: bool | None = None, return_routing: bool = False
    ) -> Any:
        leading = ops.shape(inputs)[:-1]
        tokens = ops.reshape(inputs, (-1, inputs.shape[-1]))  # [T, D]
        if mask is not None:
            fits = len(mask.shape) == len(leading) and all(
                None in sizes or sizes[0] == sizes[1] for sizes in zip(mask.shape, inputs.shape, strict=False)
            )
            require(fits, "mask", tuple(mask.shape),
                    f"must have the leading shape of inputs {tuple(inputs.shape[:-1])}")  # fmt: skip
            mask = ops.reshape(ops.cast(mask, "bool"), (-1,))
            # whatever stands at padding, NaN too, reaches nothing
            tokens = ops.where(mask[:, None], tokens, ops.zeros((), tokens.dtype))

        logits = self._logits(tokens, training)  # [T, E]
        probs = _softmax(logits)
        weights, indices = self._choose(logits, probs)  # [T, K]
        choices = indices if mask is None else ops.where(mask[:, None], indices, self.n_experts)
        rows = SortedRows.of(choices, self.n_experts)
        answers = self._kernel(tokens, choices, rows, self._experts())  # [T, K, O]
        if mask is not None:
            weights = ops.where(mask[:, None], weights, 0.0)
            answers = ops.where(mask[:, None, None], answers, ops.zeros((), answers.dtype))
        mixed = ops.sum(answers * ops.cast(weights, answers.dtype)[..., None], axis=1)  # [T, O]
        hidden = ops.reshape(mixed, (*leading, mixed.shape[-1]))

        losses = {
            "load_balance": load_balance_loss(probs, rows.counts, mask),
            "router_z": router_z_loss(logits, mask),
        }
        for name, coefficient in (("load_balance", self.load_balance), ("router_z", self.router_z)):
            if coefficient > 0:
                self.add_loss(coefficient * losses[name])
        if not return_routing:
            return hidden
        chosen = indices if mask is None else ops.where(mask[:, None], indices, -1)
        return hidden, {
            "router_logits": ops.reshape(logits, (*leading, self.n_experts)),
            "router_probs": ops.reshape(probs, (*leading, self.n_experts)),
            "expert_indices": ops.reshape(chosen, (*leading, self.top_k)),
            "expert_weights": ops.reshape(weights, (*leading, self.top_k)),
            "tokens_per_expert": rows.counts,
            **losses,
        }

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Of the answer alone; `compute_output_spec` knows of the routing too."""
        return (*input_shape[:-1], input_shape[-1] if self.d_out is None else self.d_out)

    def compute_output_spec(
        self, inputs: Any, mask: Any = None, training: bool | None = None, return_routing: bool = False
    ) -> Any:
        """The shapes and types of what `call` returns; nothing is computed for it."""
        leading = tuple(inputs.shape[:-1])
        hidden = keras.KerasTensor(self.compute_output_shape(inputs.shape), self.compute_dtype)
        if not return_routing:
            return hidden
        return hidden, {
            "router_logits": keras.KerasTensor((*leading, self.n_experts), "float32"),
            "router_probs": keras.KerasTensor((*leading, self.n_experts), "float32"),
            "expert_indices": keras.KerasTensor((*leading, self.top_k), "int32"),
            "expert_weights": keras.KerasTensor((*leading, self.top_k), "float32"),
            "tokens_per_expert": keras.KerasTensor((self.n_experts,), "int32"),
            "load_balance": keras.KerasTensor((), "float32"),
            "router_z": keras.KerasTensor((), "float32"),
        }

    def get_config(self) -> dict[str, Any]:
        """What `from_config` needs to make an equal layer."""
        names = (
            "n_experts", "d_expert", "top_k", "router", "normalize", "activation", "bias", "d_out", "load_balance",
            "router_z", "kernel", "seed",
        )  # fmt: skip
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}

    def _logits(self, tokens: Any, training: bool | None) -> Any:
        """`[T, E]` float32, with noise in the training of a noisy router."""
        tokens = ops.cast(tokens, "float32")
        logits = ops.matmul(tokens, ops.transpose(ops.cast(self.router_weight, "float32")))
        if self.noise is None or not training:
            return logits
        spread = ops.matmul(tokens, ops.transpose(ops.cast(self.noise_weight, "float32")))
        draw = keras.random.normal(ops.shape(logits), dtype="float32", seed=self.noise)
        return logits + draw * (ops.softplus(spread) + 1e-2)

    def _choose(self, logits: Any, probs: Any) -> tuple[Any, Any]:
        """Combine weights (float32) and experts (int32) of the K choices of each token."""
        if self.router == "noisy_topk":
            best, indices = ops.top_k(logits, self.top_k)
            return _softmax(best), ops.cast(indices, "int32")
        weights, indices = ops.top_k(probs, self.top_k)
        if self.normalize == "after":
            weights = weights / ops.maximum(ops.sum(weights, axis=-1, keepdims=True), 1e-20)
        elif self.normalize == "ones":
            fixed = ops.stop_gradient(weights)
            # exactly 1, with the gradient of log(probability), also where a probability has underflowed to 0
            weights = 1.0 + (weights - fixed) / ops.maximum(fixed, TINY)
        return weights, ops.cast(indices, "int32")

    def _kernel(self, *parts: Any) -> Any:
        name = self.kernel
        if name == "auto":
            name = "slices" if keras.config.backend() == "torch" else "blocks"
        return KERNELS[name](*parts)

    def _experts(self) -> Experts:
        parts = (self.w_in, self.w_out, self.b_in, self.b_out)
        w_in, w_out, b_in, b_out = (None if p is None else ops.convert_to_tensor(p) for p in parts)
        return Experts(w_in, w_out, b_in, b_out, self.activation)

    def _matrix(self, name: str, shape: tuple[int, ...], std: float, autocast: bool = True) -> Any:
        normal = keras.initializers.RandomNormal(stddev=std)
        return self.add_weight(name=name, shape=shape, initializer=normal, autocast=autocast)

    def _zeros(self, name: str, shape: tuple[int, ...], autocast: bool = True) -> Any:
        return self.add_weight(name=name, shape=shape, initializer="zeros", autocast=autocast)


def _softmax(logits: Any) -> Any:
    """Over the last axis; `ops.softmax` warns of an axis of one, which one expert is entitled to."""
    return ops.exp(logits - ops.logsumexp(logits, axis=-1, keepdims=True))


# the smallest normal float32
TINY = math.ldexp(1.0, -126)
