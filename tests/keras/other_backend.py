"""What the second backend does in a process of its own: `python other_backend.py FOLDER`.

Loads `FOLDER/model.keras`, answers `FOLDER/inputs.npy`, and leaves in `FOLDER/answers.npz` what it computed, with the
gradients of its experts layer; then saves a changed model as `FOLDER/back.keras` with the answers of that.
"""

from __future__ import annotations

import sys
from pathlib import Path

import keras
import numpy as np
from keras_gradients import gradients

import moekit.keras  # noqa: F401  (registers the layer)


def main(folder: Path) -> None:
    x = np.load(folder / "inputs.npy")
    model = keras.saving.load_model(folder / "model.keras")
    experts = model.get_layer("experts")
    # compiled as a whole, as in use: a call outside compiles each operation by itself
    found = {f"before_{name}": value for name, value in model.predict(x, verbose=0).items()}

    def loss():
        y, routing = experts(x, return_routing=True)
        return keras.ops.mean(keras.ops.square(y)) + routing["load_balance"]

    found.update({f"gradient_{name}": value for name, value in gradients(experts, loss).items()})
    for variable in experts.trainable_variables:
        variable.assign(-0.5 * variable.numpy())
    model.save(folder / "back.keras")
    found.update({f"after_{name}": value for name, value in model.predict(x, verbose=0).items()})
    np.savez(folder / "answers.npz", backend=keras.config.backend(), **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
