"""Which columns a run's experts are compared by."""

from moekit.config.task_run import TaskRunConfig
from moekit.data.examples import Examples
from moekit.recipes.experts_of_columns import columns_to_compare


def test_classes_and_few_unread_texts_once_each():
    config = TaskRunConfig.from_dict({
        "data": {"path": "mine.csv"},
        "inputs": {"text": {"kind": "text", "column": "text"}},
        "targets": {"label": {"kind": "class", "column": "label"}},
    })  # fmt: skip
    n = 20
    places = ["north", "south"] * (n // 2)
    examples = Examples({
        "text": [f"text {number}" for number in range(n)], "label": ["a", "b"] * (n // 2), "place": places,
        "region": list(places), "number": [str(number) for number in range(n)],
        "mood": ["good", "good", "bad", None] * (n // 4),
    })  # fmt: skip
    # not the text, which is read; not the number, which is each one's own; not the region, which is the place again
    assert columns_to_compare(config, examples) == ["label", "place", "mood"]
