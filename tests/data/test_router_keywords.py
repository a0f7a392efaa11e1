"""Keywords of a router in words become rules in token ids when a task's text is encoded."""

from __future__ import annotations

import pytest

from moekit.config.errors import ConfigError
from moekit.config.task import FieldsInput, TaskModelConfig, TextInput
from moekit.data.encoding.fields import FieldsEncoder
from moekit.data.encoding.keywords import with_keywords
from moekit.data.encoding.text import TextEncoder
from moekit.data.examples import Examples

TEXTS = ["The court is closed", "my income tax", "the tax court", "hello there income"] * 2
KEYWORDS = {"law": ["court", "judge"], "tax": ["income tax", "tax"]}


def encoders(tokenizer: str = "words"):
    config = TextInput(tokenizer=tokenizer, vocab_size=400)
    return {"text": TextEncoder.fit(config, Examples({"text": TEXTS}))}


def model(**fields) -> TaskModelConfig:
    router = {"name": "rule", "mode": "decide", "keywords": KEYWORDS, **fields.pop("router", {})}
    return TaskModelConfig.from_dict({
        "d_model": 8, "n_layers": 2, "n_heads": 2, "moe": {"n_experts": 3, "d_expert": 4, "router": router}, **fields,
    })  # fmt: skip


def test_words_become_ids_and_names() -> None:
    inputs = encoders()
    options = with_keywords(model(), inputs).moe.router.options
    known = inputs["text"].tokenizer.token_to_id
    assert options["names"] == ["law", "tax", "other 0"]
    # "judge" is in no text, and its id would be that of every unknown word
    assert options["rules"] == [
        {"expert": 0, "token_ids": [[known("court")]]},
        {"expert": 1, "token_ids": [[known("income"), known("tax")], [known("tax")]]},
    ]
    assert options["mode"] == "decide"
    again = with_keywords(with_keywords(model(), inputs), inputs)
    assert again.moe.router.options == options


def test_bpe_keeps_the_spellings_apart() -> None:
    inputs = encoders("bpe")
    rules = with_keywords(model(), inputs).moe.router.options["rules"]
    spellings = {tuple(inputs["text"].tokenizer.encode(text).ids) for text in ("court", "Court")}
    assert spellings <= {tuple(ids) for ids in rules[0]["token_ids"]}


def test_other_routers_stay_as_they_are_and_single_layers_may_have_rules() -> None:
    plain = TaskModelConfig.from_dict({"d_model": 8, "n_heads": 2, "moe": {"n_experts": 3}})
    assert with_keywords(plain, encoders()) == plain
    assert with_keywords(plain.replace(moe=None), {}).moe is None
    one = model().replace(
        moe={"n_experts": 3, "d_expert": 4},
        moe_by_layer={1: {"router": {"name": "rule", "keywords": KEYWORDS}}, 0: {"d_expert": 5}},
    )
    found = with_keywords(one, encoders())
    assert found.moe.router.name == "softmax"
    assert found.moe_of(1).router.options["names"] == ["law", "tax", "other 0"]
    assert found.moe_of(0).d_expert == 5


def test_errors_name_what_is_missing() -> None:
    fields = FieldsEncoder.fit(FieldsInput(numbers=("x",)), Examples({"x": [1.0, 2.0]}))
    with pytest.raises(ConfigError, match=r"need exactly one input of kind text; there are 0"):
        with_keywords(model(), {"x": fields})
    with pytest.raises(ConfigError, match=r"must name at most n_experts \(3\) experts"):
        with_keywords(model(router={"keywords": {name: ["tax"] for name in "abcd"}}), encoders())
    with pytest.raises(ConfigError, match=r"keywords.law must hold a word that the training texts have"):
        with_keywords(model(router={"keywords": {"law": ["judge"]}}), encoders())
