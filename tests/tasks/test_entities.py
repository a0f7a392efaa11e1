"""Entities as answers: filters, orders, both directions, histories, profiles; and small tasks that are learnt."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from moekit.config.errors import ConfigError, DataError
from moekit.config.task import (
    EntityTarget,
    FieldsInput,
    IdsInput,
    IdStemConfig,
    ProfileInput,
    ProfileStemConfig,
    RankHeadConfig,
    SequenceInput,
    TaskModelConfig,
    TokenStemConfig,
)
from moekit.config.task_reshape import HistoriesReshape, ReciprocalReshape
from moekit.config.task_run import TaskRunConfig
from moekit.data.encoding.entities import EntityEncoder, IdSequenceEncoder
from moekit.data.encoding.fields import FieldsEncoder, IdsEncoder
from moekit.data.encoding.profiles import ProfileEncoder
from moekit.data.encoding.whole import Encoding
from moekit.data.examples import Examples, TaskData
from moekit.data.reshape import both_directions, histories
from moekit.data.task_data import load_task_data
from moekit.evaluate.answers import answers_to
from moekit.evaluate.ranking_metrics import filtered_ranks
from moekit.evaluate.task import predict, truth
from moekit.models.rank_head import RankHead
from moekit.models.task_heads import Hidden
from moekit.models.task_model import TaskModel
from moekit.models.task_stems import IdStem, ProfileStem, TextStem, complex_product
from moekit.recipes.tasks import validate_task
from moekit.train.run import load_task_run, train_run

MODEL = {
    "d_model": 16, "n_layers": 1, "n_heads": 2, "d_ff": 32, "moe": {"n_experts": 4, "top_k": 2, "d_expert": 16},
}  # fmt: skip
LINKS = {"ids": {"kind": "ids", "columns": ["head", "relation"], "products": [["head", "relation"]]}}
TAIL = {"tail": {"kind": "entity", "column": "tail", "input": "ids", "like": "head"}}
HISTORY = {"history": {"kind": "sequence", "max_len": 4}}
NEXT = {"item": {"kind": "entity", "input": "history"}}


def run_config(tmp_path, inputs, targets, **fields) -> TaskRunConfig:
    train = {"steps": 60, "batch_size": 16, "checkpoint_every": 0, "validate_every": 0, "device": "cpu",
             "optimizer": {"lr": 2e-2}, "schedule": {"warmup_steps": 5}}  # fmt: skip
    return TaskRunConfig.from_dict({
        "name": "t", "runs_dir": str(tmp_path), "inputs": inputs, "targets": targets, "model": MODEL, "train": train,
        **fields,
    })  # fmt: skip


# ------------------------------------------------------------------------------------------------------- the head


def hidden_of(x: torch.Tensor, stem: torch.nn.Module, mask: torch.Tensor | None = None) -> Hidden:
    return Hidden(x, mask, x[:, 0], {"it": slice(0, x.shape[1])}, {}, {"it": stem})


def test_a_score_is_the_product_with_the_entity_s_own_vector_and_a_bias():
    stem = IdStem(IdStemConfig(sizes=(3, 2)), 2)
    stem.weight.data = torch.tensor([[9.0, 9.0], [1.0, 2.0], [0.0, -1.0], [5.0, 5.0], [5.0, 5.0]])
    head = RankHead(RankHeadConfig(n_entities=2, stem="it"), 2)
    head.bias.data = torch.tensor([0.5, 0.0])
    answer = head.answer(hidden_of(torch.tensor([[[1.0, 1.0]], [[2.0, 0.0]]]), stem))
    # row 0 of the table is what was never seen; [1, 1] · [1, 2] + 0.5 = 3.5 and so on
    assert answer.tolist() == [[3.5, -1.0], [2.5, 0.0]]
    loss, n = head.loss(answer, torch.tensor([0, -100]))
    assert n == 1
    assert float(loss.detach()) == pytest.approx(np.log(1 + np.exp(-4.5)), rel=1e-5)


def test_a_sequence_is_answered_behind_its_last_token_and_learnt_behind_every_one():
    stem = TextStem(TokenStemConfig(vocab_size=5), 1)
    stem.weight.data = torch.tensor([[0.0], [0.0], [1.0], [2.0], [3.0]])
    head = RankHead(RankHeadConfig(n_entities=3, stem="it", start=2, sequence=True), 1)
    x = torch.tensor([[[1.0], [2.0], [9.0]], [[1.0], [1.0], [-1.0]]])
    hidden = hidden_of(x, stem, torch.tensor([[True, True, False], [True, True, True]]))
    assert head.answer(hidden).tolist() == [[2.0, 4.0, 6.0], [-1.0, -2.0, -3.0]]
    targets = torch.tensor([[0, 2, -100], [-100, -100, 1]])
    answer = head.run(hidden, targets).answer
    assert answer.tolist() == [[1.0, 2.0, 3.0], [2.0, 4.0, 6.0], [-1.0, -2.0, -3.0]]
    loss, n = head.loss(answer, targets)
    assert n == 3
    expected = [torch.logsumexp(row, 0) - row[place] for row, place in zip(answer, [0, 2, 1], strict=True)]
    torch.testing.assert_close(loss, torch.stack(expected).mean())
    with pytest.raises(ConfigError, match="behind each of the stem's tokens"):
        head.run(hidden, targets[:, :2])


def test_products_of_vectors_are_tokens_of_their_own():
    for complex_, product in ((False, [3.0, 8.0]), (True, [-5.0, 10.0])):
        stem = IdStem(IdStemConfig(sizes=(1, 1), products=((0, 1),), complex=complex_), 2)
        stem.weight.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        out = stem(torch.tensor([[0, 0]]))
        torch.testing.assert_close(
            out.x[0], torch.tensor([product, [1.0, 2.0], [3.0, 4.0]]) * torch.tensor([[2**0.5], [1], [1]])
        )
        assert out.ids.shape == (1, 3)
    # ComplEx: Re(<h, r, conj(t)>) is the plain product of (h r) with t
    h, r, t = (torch.randn(8) for _ in range(3))
    as_numbers = [torch.complex(*part.chunk(2)) for part in (h, r, t)]
    expected = (as_numbers[0] * as_numbers[1] * as_numbers[2].conj()).sum().real
    torch.testing.assert_close(complex_product(h, r) @ t, expected)


# --------------------------------------------------------------------------------------------------- the encoders


def test_what_is_known_is_left_out_of_an_order():
    facts = Examples({"head": ["a", "a", "b"], "relation": ["r", "r", "r"], "tail": ["b", "c", "d"]})
    config = {"ids": IdsInput(columns=("head", "relation"))}
    target = EntityTarget(column="tail", input="ids", like="head")
    encoding = Encoding.fit(config, {"tail": target}, facts)
    encoder = encoding.targets["tail"]
    assert encoder.names == encoding.inputs["ids"].names["head"] == ["a", "b", "c", "d"]
    assert encoding.inputs["ids"].part().sizes == (5, 2)
    asked = Examples(
        {"head": ["a", "a", "b", "b"], "relation": ["r", "s", "r", "r"], "tail": ["d", "d", "d", "x"]}
    )
    assert encoder.truth(asked).tolist() == [4, 4, 4, 0]
    # a-r has b (2) and c (3), a-s nothing, b-r has d, which is the answer that is asked for here, then is not
    assert encoder.known(asked) == [{2, 3}, set(), set(), {4}]
    encoder.learn(Examples({"head": ["a"], "relation": ["s"], "tail": ["c"]}))
    assert encoder.known(asked)[1] == {3}
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]] * 4)
    said = [encoder.completed(encoder.answers(logits, row), row, {}, asked) for row in range(4)]
    raw = np.stack([encoder.raw(logits, row, one) for row, one in enumerate(said)])
    assert raw[0].tolist() == [-np.inf, 0.0, -np.inf, -np.inf, 1.0]
    # by hand: only a is left beside d; of a, b, d two; of all four three; an unseen answer comes last of all
    ranks = filtered_ranks(raw, encoder.truth(asked))
    assert ranks.tolist() == [1.0, 2.0, 3.0, 4.5]
    assert [one["prediction"] for one in said] == ["d", "b", "b", "b"]
    assert said[0]["probability"] == pytest.approx(1 / (1 + np.exp(-1)))
    assert [one["entity"] for one in said[0]["best"]] == ["d", "a"]
    json.dumps(said)
    # a baseline's scores by name come into the same order
    table = encoder.ordered(["d", "b", "zz"], np.array([[1.0, 5.0, 9.0]] * 4), asked)
    assert table[0].tolist() == [-np.inf, -np.inf, -np.inf, -np.inf, 1.0]
    assert table[1].tolist() == [-np.inf, -np.inf, 5.0, -np.inf, 1.0]
    assert encoder.unseen(asked) == {"tail": ["x"]}
    again = EntityEncoder.from_state(target, json.loads(json.dumps(encoder.state())))
    assert again.known(asked) == encoder.known(asked)
    assert again.part() == encoder.part()


def test_without_a_filter_everything_stays():
    facts = Examples({"head": ["a", "a"], "relation": ["r", "r"], "tail": ["b", "c"]})
    target = EntityTarget(column="tail", input="ids", like="head", new=False)
    encoder = Encoding.fit({"ids": IdsInput(columns=("head", "relation"))}, {"t": target}, facts).targets["t"]
    assert encoder.known(facts) == [set(), set()]


def test_sequences_and_what_comes_behind_each_token():
    train = Examples({"history": [["x", "y", "z"], []], "item": ["w", "x"]})
    encoding = Encoding.fit(
        {"history": SequenceInput(max_len=2)}, {"item": EntityTarget(input="history")}, train
    )
    encoder, answers = encoding.inputs["history"], encoding.targets["item"]
    assert encoder.names == answers.names == ["w", "x", "y", "z"]
    asked = Examples({"history": ["x y q z", None], "item": ["y", "q"]})
    encoded = encoding.encode(asked)
    rows = np.arange(2)
    # 1 begins; x, y, z are 3, 4, 5; the unseen q is left out, and of the rest the last two are read
    assert encoder.encode(asked).batch(rows)["ids"].tolist() == [[1, 4, 5], [1, 0, 0]]
    rng = np.random.default_rng(0)
    assert encoded.arrays(rows, rng)[1]["item"].tolist() == [[2, 3, 2], [-100, -100, -100]]
    assert encoded.arrays(rows)[1]["item"].tolist() == [[-100, -100, 2], [-100, -100, -100]]
    assert answers.known(asked) == [{2, 4}, set()]
    assert answers.known(Examples({"history": [["x", "y"]]})) == [{2, 3}]
    assert encoder.unseen(asked) == {"history": ["q"]}
    with pytest.raises(DataError, match="example 1, column 'history': must hold a list"):
        encoder.encode(Examples({"history": [7]}))
    with pytest.raises(DataError, match="all are empty"):
        IdSequenceEncoder.fit(SequenceInput(), Examples({"history": [[], None]}))


def test_a_profile_leaves_the_example_itself_out():
    train = Examples({
        "user": ["u", "u", "u", "v", "v", "v"], "item": ["a", "b", "c", "a", "b", "c"],
        "rating": [1.0, 3.0, 5.0, 3.0, 5.0, 1.0],
    })  # fmt: skip
    encoder = ProfileEncoder.fit(ProfileInput(value="rating", shrink=0.0), train)
    encoded = encoder.encode(Examples({"user": ["u", "w"], "item": ["b", "a"]}))
    arrays = encoded.batch(np.arange(2))
    spread = (16 / 6) ** 0.5  # both users have the mean 3; a has 2, b has 4, c has 3
    # u's other ratings: a 1, which is 1 below its mean, and c 5, 2 above; they are 0.5 above on average
    found = dict(zip(arrays["ids"][0].tolist(), arrays["weights"][0].tolist(), strict=True))
    assert found == {1: pytest.approx(-1.5 / spread), 3: pytest.approx(1.5 / spread)}
    np.testing.assert_allclose(arrays["numbers"][0], [0.5 / spread, np.log(3) / 5], rtol=1e-6)
    assert arrays["sizes"].tolist() == [2, 0]
    assert arrays["ids"][1].tolist() == [0, 0], "nobody knows w"
    sampled = ProfileEncoder(encoder.config.replace(keep=0.5), encoder.names, encoder.state()["entries"])
    one, rows = sampled.encode(train.rows([1])), np.zeros(1, np.int64)
    drawn = [one.batch(rows, np.random.default_rng(seed))["ids"][0].tolist() for seed in range(40)]
    assert {frozenset(ids) - {0} for ids in drawn} == {
        frozenset(),
        frozenset([1]),
        frozenset([3]),
        frozenset([1, 3]),
    }
    assert frozenset(one.batch(rows)["ids"][0].tolist()) == {1, 3}, "all of it where nothing is trained"
    again = ProfileEncoder.from_state(encoder.config, json.loads(json.dumps(encoder.state())))
    for name, array in again.encode(train).batch(np.arange(6)).items():
        assert torch.equal(array, encoder.encode(train).batch(np.arange(6))[name])


def test_means_of_users_and_films_are_fitted_to_each_other():
    # u gives all films 1 less than v; only the better half of the films was seen by v
    train = Examples({
        "user": ["u"] * 4 + ["v"] * 2, "item": ["a", "b", "c", "d", "c", "d"], "rating": [1.0, 1, 3, 3, 4, 4],
    })  # fmt: skip
    encoder = ProfileEncoder.fit(ProfileInput(value="rating", shrink=0.0), train)
    of_u = encoder.entries(1, 0)[1]
    of_v = encoder.entries(2, 0)[1]
    spread = float(np.std([1, 1, 3, 3, 4, 4]))
    # simple means of the films would say 0.25 for u and 0.5 for v: 0.75 apart
    assert float(of_v.mean() - of_u.mean()) * spread == pytest.approx(1.0, abs=0.02)


def test_lists_of_categories_weigh_the_same_however_long():
    train = Examples({"genres": [["war", "love"], ["war", "love"], "love rare", []]})
    encoder = FieldsEncoder.fit(FieldsInput(lists=("genres",)), train)
    lists = encoder.encode(train).batch(np.arange(4))["lists"]
    assert encoder.part().list_sizes == (2,)
    torch.testing.assert_close(lists, torch.tensor([[0.5**0.5] * 2, [0.5**0.5] * 2, [1.0, 0.0], [0.0, 0.0]]))


# ------------------------------------------------------------------------------------------------------- reshaping


def told(histories: Examples) -> list[tuple]:
    return sorted(zip(histories["user"], histories["history"], histories["item"], strict=True))


def test_histories_end_with_the_last_events():
    events = Examples({
        "user": ["u", "v", "u", "u", "v", "u", "w"], "item": ["a", "b", "c", "d", "e", "f", "g"],
        "time": [4, 1, 1, 2, 9, 3, 5],
    })  # fmt: skip
    none = events.rows([])
    found = histories(TaskData(events, none, none), HistoriesReshape())
    # u: c d f a by time; v and w have too few events to hold some back
    assert told(found.test) == [("u", ["c", "d", "f"], "a")]
    assert told(found.validation) == [("u", ["c", "d"], "f")]
    assert told(found.train) == [("u", ["c"], "d"), ("v", ["b"], "e")]
    given = TaskData(events.rows([2, 3, 1, 4]), events.rows([5]), events.rows([0]))
    again = histories(given, HistoriesReshape())
    for part in ("train", "validation", "test"):
        assert told(getattr(again, part)) == told(getattr(found, part))
    with pytest.raises(DataError, match="column 'time'"):
        histories(TaskData(Examples({**events.columns, "time": [None] * 7}), none, none), HistoriesReshape())
    with pytest.raises(DataError, match="two events"):
        histories(TaskData(events.rows([0, 1]), none, none), HistoriesReshape())


def test_an_inverse_says_the_same_backwards():
    two = both_directions(
        Examples({"head": ["a"], "relation": ["r"], "tail": ["b"], "n": [1]}), ReciprocalReshape()
    )
    assert two.columns == {
        "head": ["a", "b"],
        "relation": ["r", "inverse r"],
        "tail": ["b", "a"],
        "n": [1, 1],
    }


# ---------------------------------------------------------------------------------------------------- whole tasks


def ring(n: int = 12) -> TaskData:
    """Entities in a ring: next and the one after it; a twelfth of the triples is held back."""
    rows = [(f"e{i}", f"plus{step}", f"e{(i + step) % n}") for step in (1, 2, 3) for i in range(n)]
    columns = {name: [row[place] for row in rows] for place, name in enumerate(("head", "relation", "tail"))}
    examples = Examples(columns)
    held = [5, 17, 31]
    rest = [row for row in range(len(rows)) if row not in held]
    return TaskData(examples.rows(rest), examples.rows(held[:1]), examples.rows(held), given_test=True)


def test_relations_are_learnt_in_both_directions(tmp_path, monkeypatch):
    monkeypatch.setattr("moekit.data.task_data.load_source", lambda *_: ring())
    made = run_config(tmp_path, LINKS, TAIL, data={"source": "x", "reshape": {"kind": "reciprocal"}})
    data = load_task_data(made)
    assert len(data.train) == 66
    loaded = load_task_run(train_run(made, data=data, quiet=True).folder)
    found = predict(loaded.model, loaded.encoding, data.train, with_experts=True)
    ranks = filtered_ranks(found.raw["tail"], truth(loaded.encoding, data.train)["tail"])
    assert (ranks == 1).mean() > 0.9
    assert found.experts[0].shape == (1, 4)
    # validation and test are known to the filter as well
    encoder = loaded.encoding.targets["tail"]
    assert encoder.known(Examples({"head": ["e5", "e6"], "relation": ["plus1", "inverse plus1"]})) == [
        {encoder.names.index("e6") + 1}, {encoder.names.index("e5") + 1},
    ]  # fmt: skip
    (tmp_path / "asked.csv").write_text("who,relation\ne1,plus1\nnobody,plus2\n")
    first, second = answers_to(loaded.folder, str(tmp_path / "asked.csv"), {"head": "who"})
    assert len(first["answers"]["tail"]["best"]) == 10
    assert "e2" not in [one["entity"] for one in first["answers"]["tail"]["best"]], "it is known already"
    assert first["experts"]
    assert 0 < second["answers"]["tail"]["probability"] <= 1


def test_an_order_is_learnt_and_what_was_had_is_not_proposed(tmp_path):
    events = [(f"u{u}", f"i{(u + t) % 9}", t) for u in range(40) for t in range(6)]
    examples = Examples(
        {name: [event[place] for event in events] for place, name in enumerate(("user", "item", "time"))}
    )
    made = run_config(tmp_path, HISTORY, NEXT, model={**MODEL, "causal": True})
    data = histories(TaskData(examples, examples.rows([]), examples.rows([])), HistoriesReshape())
    assert [len(part) for part in (data.train, data.validation, data.test)] == [40, 40, 40]
    result = train_run(made, data=data, quiet=True)
    assert result.final["validation_loss"] < 1.0  # of 9 items: 2.2 before anything is learnt
    loaded = load_task_run(result.folder)
    found = predict(loaded.model, loaded.encoding, data.test)
    said = [answer["prediction"] for answer in found.answers["item"]]
    assert np.mean([one == other for one, other in zip(said, data.test["item"], strict=True)]) > 0.9
    for answer, before in zip(found.answers["item"], data.test["history"], strict=True):
        assert not {one["entity"] for one in answer["best"]} & set(before)
    (tmp_path / "mine.jsonl").write_text('{"history": ["i1", "i2"]}\n{"history": []}\n')
    two, start = answers_to(result.folder, str(tmp_path / "mine.jsonl"))
    assert two["answers"]["item"]["prediction"] == "i3"
    assert start["answers"]["item"]["prediction"]


def test_causality_is_asked_for_where_every_token_is_learnt(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.causal"):
        run_config(tmp_path, HISTORY, NEXT)
    with pytest.raises(ConfigError, match=r"targets.tail.like"):
        run_config(tmp_path, LINKS, {"tail": {**TAIL["tail"], "like": "tial"}})
    with pytest.raises(ConfigError, match="must be an input of kind ids or sequence"):
        run_config(tmp_path, {"text": {"kind": "text"}}, {"tail": {**TAIL["tail"], "input": "text"}})
    with pytest.raises(ConfigError, match="products"):
        run_config(tmp_path, {"ids": {**LINKS["ids"], "products": [["head", "tail"]]}}, TAIL)


def test_ratings_are_learnt_from_profiles(tmp_path):
    rng = np.random.default_rng(0)
    taste = {f"u{u}": u % 2 for u in range(30)}
    rows = [(user, f"i{i}") for user in taste for i in rng.choice(12, 8, replace=False)]
    stars = [5.0 if taste[user] == int(item[1:]) % 2 else 1.0 for user, item in rows]
    examples = Examples({"user": [r[0] for r in rows], "item": [r[1] for r in rows], "stars": stars})
    data = TaskData(examples.rows(range(200)), examples.rows(range(200, 220)), examples.rows(range(220, 240)))
    inputs = {"user": {"kind": "profile", "value": "stars"}, "ids": {"kind": "ids", "columns": ["item"]}}
    made = run_config(tmp_path, inputs, {"stars": {"kind": "number", "columns": ["stars"]}})
    made = made.replace(train=made.train.replace(steps=150))
    loaded = load_task_run(train_run(made, data=data, quiet=True).folder)
    found = predict(loaded.model, loaded.encoding, data.train)
    error = found.raw["stars"][:, 0] - np.asarray(data.train["stars"])
    assert (error**2).mean() ** 0.5 < 1.0  # 2 without tastes


def test_unknown_entities_are_said_before_training(tmp_path):
    for name, tail in (("train", "abcdabcd"), ("test", "abzy")):
        lines = [f"{'abcdabcd'[i]},r,{letter}" for i, letter in enumerate(tail)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["head,relation,tail", *lines]) + "\n")
    config = tmp_path / "links.yaml"
    config.write_text(json.dumps({
        "inputs": LINKS, "targets": TAIL,
        "data": {"path": str(tmp_path / "train.csv"), "test_path": str(tmp_path / "test.csv"), "validation_share": 0},
        "train": {"batch_size": 2},
    }))  # fmt: skip
    assert validate_task(str(config))["entities_unseen_in_training"] == {"tail": "2: y, z"}
    found = validate_task(str(config), ["data.reshape.kind=reciprocal"])
    assert found["entities_unseen_in_training"]["head"] == "2: y, z"


def test_ids_of_several_columns_need_one_of_them():
    encoder = IdsEncoder.fit(IdsInput(columns=("a", "b")), Examples({"a": ["x"], "b": ["y"]}))
    target = EntityEncoder.fit(EntityTarget(column="a", like="c"), Examples({"a": ["x", "z"]}))
    with pytest.raises(ConfigError, match=r"must be a column of inputs\.ids"):
        target.share(encoder, Examples({"a": [], "b": []}))


def test_a_sample_of_a_profile_stands_for_the_whole():
    stem = ProfileStem(ProfileStemConfig(size=4), 1)
    stem.presence.data = torch.tensor([[7.0], [1.0], [2.0], [3.0]])
    stem.weight.data = torch.tensor([[7.0], [10.0], [20.0], [30.0]])
    stem.map.weight.data, stem.map.bias.data = torch.tensor([[1.0, 0.0]]), torch.zeros(1)
    numbers = torch.tensor([[0.25, 9.0]])
    out = stem(torch.tensor([[1, 2, 0]]), torch.tensor([[0.1, -0.1, 5.0]]), numbers, torch.tensor([4.0]))
    # (1 + 2 + 10 * 0.1 - 20 * 0.1) / 2 entries that are read, times the root of the 4 that there are
    assert out.x[0, :, 0].tolist() == pytest.approx([2.0, 0.25])


def test_first_tokens_of_two_inputs_are_multiplied_and_all_are_fused():
    stems = {name: {"kind": "ids", "sizes": [2]} for name in ("a", "b")}
    heads = {"it": {"kind": "regress"}}
    config = {**MODEL, "stems": stems, "heads": heads, "products": [["a", "b"]]}
    model = TaskModel(TaskModelConfig.from_dict(config))
    ids = {name: {"ids": torch.tensor([[1]])} for name in stems}
    assert model(ids).places == {"a": slice(0, 1), "b": slice(1, 2), "a x b": slice(2, 3)}
    x = torch.cat([stem(**ids[name]).x for name, stem in model.stems.items()], dim=1)
    fused = TaskModel(TaskModelConfig.from_dict({**config, "fuse": True}))
    assert fused.fusion.map.shape == (3, 16, 16)
    assert fused(ids).hidden_states.shape == (1, 1, 16)
    # each token has length sqrt(D) and mean 0 when it meets its own matrix
    normed = torch.nn.functional.layer_norm(x, (16,))
    expected = normed[0, 0] @ fused.fusion.map[0] + normed[0, 1] @ fused.fusion.map[1]
    said = fused.fusion(torch.cat([x, torch.zeros(1, 1, 16)], dim=1))
    torch.testing.assert_close(said[0, 0], expected)
    with pytest.raises(ConfigError, match="products must name inputs"):
        TaskModelConfig.from_dict({**config, "products": [["a", "c"]]})
    text = {"t": {"kind": "tokens", "vocab_size": 9}}
    with pytest.raises(ConfigError, match="equally many tokens in every example; t has not"):
        TaskModelConfig.from_dict({**config, "stems": {**stems, **text}, "fuse": True})
    with pytest.raises(ConfigError, match="leaves no tokens for the target it"):
        TaskModelConfig.from_dict({**config, "heads": {"it": {"kind": "tag", "stem": "a"}}, "fuse": True})


def test_a_number_starts_at_the_means_of_profiles(tmp_path):
    inputs = {"user": {"kind": "profile", "value": "stars"}}
    stars = {"stars": {"kind": "number", "columns": ["stars"], "wide": ["user"]}}
    made = run_config(tmp_path, inputs, stars)
    examples = Examples({"user": ["u", "u", "v"], "item": ["a", "b", "a"], "stars": [1.0, 2.0, 4.0]})
    encoding = Encoding.fit(made.inputs, made.targets, examples)
    model = TaskModel(encoding.fill(made.model)).eval()
    encoded = encoding.encode(examples)
    arrays = encoded.arrays(np.arange(3))[0]
    assert torch.equal(model(arrays).answers["stars"], arrays["user"]["numbers"][:, :1])
    with pytest.raises(ConfigError, match=r"targets.stars.wide must name inputs of kind profile"):
        run_config(tmp_path, LINKS, stars)
