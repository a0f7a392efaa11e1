"""moekit for Keras 3: the Mixture-of-Experts layer on the backend that Keras runs on (torch, JAX or TensorFlow).

`import moekit` never imports this package; it needs the extra `keras`. Keras takes its backend from the environment
variable `KERAS_BACKEND`, which has to be set before Keras is first imported.

Errors: `MissingExtraError` where Keras, or the backend that it was told to use, is not installed.
"""

from __future__ import annotations

from moekit.config.errors import MissingExtraError

try:
    # a name of its own: a bare `import keras` also succeeds on any folder that happens to be called keras
    import keras.ops  # noqa: F401
except ImportError as error:
    missing = (getattr(error, "name", None) or "keras").split(".")[0]
    if missing in ("tensorflow", "jax", "torch"):
        raise MissingExtraError(
            f"Keras was told to use {missing}, which is not installed. Set KERAS_BACKEND=torch, which moekit brings, "
            f"before Keras is first imported, or: pip install {missing}"
        ) from error
    raise MissingExtraError(
        "moekit.keras needs Keras 3, which is not installed: pip install 'moekit[keras]'"
    ) from error

from moekit.keras.balancing import load_balance_loss, max_violation, router_z_loss
from moekit.keras.layer import MixtureOfExperts
from moekit.keras.routing import routing_model

__all__ = ["MixtureOfExperts", "load_balance_loss", "max_violation", "router_z_loss", "routing_model"]
