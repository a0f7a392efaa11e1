"""What only the recipe of spoken and written digits has: which experts hear and which see."""

from __future__ import annotations

from moekit.data.examples import TaskData
from moekit.evaluate.inputs_and_experts import experts_of_inputs, in_words
from moekit.train.run import LoadedTask


def notes(loaded: LoadedTask, data: TaskData) -> str:
    """The experts of each input in each layer, on the test examples; nothing where there is one input."""
    if len(loaded.encoding.inputs) < 2:
        return ""
    shares = experts_of_inputs(loaded.model, loaded.encoding, data.test)
    return f"Experts by input on the test examples: {in_words(shares)}."
