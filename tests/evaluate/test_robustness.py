"""Accuracy and routes under attack: against closed forms, on runs, and by another library's attack."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moekit.cli.main import main
from moekit.config.adversarial import AttackConfig
from moekit.config.errors import ConfigError
from moekit.config.moe import MoEConfig
from moekit.config.task_run import TaskRunConfig
from moekit.data.examples import Examples, TaskData
from moekit.data.loader import Batch
from moekit.evaluate import attacked as attacked_module
from moekit.evaluate.attacked import evaluate_attack
from moekit.evaluate.robustness import changed_routes, gradient_checks, measure_attack
from moekit.layers.plan import RoutingContext, RoutingPlan
from moekit.layers.routing import build_router
from moekit.train.attack import continuous_inputs
from moekit.train.run import load_task_run, train_run

X = torch.tensor([-2.0, -0.5, -0.05, 0.05, 0.3, 0.6, 1.5, 2.0])


def plan_of(
    experts: list[list[int]], weights: list[list[float]], mask: list[bool] | None = None
) -> RoutingPlan:
    context = RoutingContext((1, len(experts)), token_mask=None if mask is None else torch.tensor(mask))
    return RoutingPlan.from_choices(torch.tensor(experts), torch.tensor(weights), 4, context)


def test_a_route_changes_with_the_set_of_experts_or_with_the_heaviest():
    before = plan_of([[0, 1], [2, 3], [0, 2], [1, 2]], [[0.6, 0.4]] * 4)
    after = plan_of([[1, 0], [3, 2], [0, 3], [1, 2]], [[0.4, 0.6], [0.6, 0.4], [0.6, 0.4], [0.6, 0.4]])
    sets, heaviest = changed_routes(before, after)
    assert sets.tolist() == [False, False, True, False]
    assert heaviest.tolist() == [False, True, False, False]


def test_padding_has_no_route_and_another_number_of_experts_is_another_set():
    mask = [True, False, True]
    one = plan_of([[0], [1], [2]], [[1.0]] * 3, mask)
    two = plan_of([[0, 3], [2, 3], [3, 2]], [[0.9, 0.1]] * 3, mask)
    sets, heaviest = changed_routes(one, two)
    assert sets.tolist() == [True, True]
    assert heaviest.tolist() == [False, True]


@dataclass
class Said:
    logits: Tensor
    loss: Tensor
    n_targets: int
    routing: tuple[RoutingPlan, ...]


class Line(nn.Module):
    """Token i is the number X[i]; class 0 is right, said where the number is above 0; two experts part there too."""

    def __init__(self, masked: bool = False) -> None:
        super().__init__()
        self.masked = masked
        layer = nn.Module()
        layer.config = MoEConfig(n_experts=2, top_k=1, d_expert=4)
        layer.router = build_router(1, layer.config)
        with torch.no_grad():
            layer.router.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        self.layer = layer

    @property
    def moe_layers(self) -> list[Any]:
        return [self.layer]

    def stem(self, ids: Tensor) -> Tensor:
        return X[ids][..., None]

    def forward(self, token_ids: Tensor, targets: Tensor, segment_ids: Tensor, shift: Any = 0.0) -> Said:
        x = self.stem(token_ids) + shift
        plan = self.layer.router(x.flatten(0, 1), RoutingContext(tuple(token_ids.shape)))
        if self.masked:  # as good as the other, and without a gradient
            x = (x * 8).ceil() / 8
        logits = torch.cat([x, -x], dim=-1)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return Said(logits, loss, targets.numel(), (plan,))


def line_batch() -> Batch:
    ids = torch.arange(8).view(2, 4)
    zeros = torch.zeros_like(ids)
    return Batch(ids, zeros, zeros, zeros)


UNIT = float(X.square().mean().sqrt())


def test_accuracy_and_routes_of_a_hand_made_router_are_those_of_the_closed_form():
    epsilon = 0.5 / UNIT  # half a step of the line
    found = measure_attack(Line(), [line_batch()], AttackConfig(epsilon=epsilon, steps=5))
    assert found["accuracy"]["next token"]["clean"] == 5 / 8
    # right answers that are further from 0 than an attack reaches: 0.6, 1.5 and 2
    assert found["accuracy"]["next token"]["attack"] == 3 / 8
    # those that were right and within reach, and none of the others, which move away from 0
    assert found["routes"]["attack"] == {"set": 2 / 8, "heaviest": 2 / 8}
    assert found["layers"][0]["attack"] == {"set": 2 / 8, "heaviest": 2 / 8}
    assert found["examples"] == 2
    moved = (X - 0.5).double()
    expected = torch.nn.functional.softplus(-2 * moved).mean()
    assert found["loss"]["attack"] == pytest.approx(float(expected), rel=1e-5)
    # noise goes up or down by as much: numbers beyond its reach keep their answer and their route
    assert found["routes"]["noise"]["set"] <= 4 / 8
    assert found["accuracy"]["next token"]["noise"] >= 3 / 8


def test_an_attack_on_the_routing_changes_all_routes_within_reach():
    config = AttackConfig(epsilon=0.51 / UNIT, steps=20, objective="routing")
    found = measure_attack(Line(), [line_batch()], config, restarts=8)
    assert found["routes"]["attack"]["set"] == 4 / 8  # -0.5, -0.05, 0.05 and 0.3


def test_gradients_that_lead_nowhere_are_found_out():
    config = AttackConfig(epsilon=0.5 / UNIT, steps=10)
    honest = gradient_checks(Line(), [line_batch()], config, source=Line())
    assert [row["check"] for row in honest if not row["passed"]] == []
    assert {row["check"]: row["accuracy"] for row in honest}["everything within reach"] == 0
    masked = gradient_checks(Line(masked=True), [line_batch()], config, source=Line())
    failed = [row["check"] for row in masked if not row["passed"]]
    assert "everything within reach" in failed
    assert "attack made on the other model" in failed


# --- runs


def bars(n: int, seed: int) -> Examples:
    """A bar in the upper or in the lower half of a picture, some grey."""
    rng = np.random.default_rng(seed)
    images, labels = rng.integers(0, 40, (n, 8, 8, 1)).astype(np.uint8), []
    for image in images:
        labels.append(str(rng.choice(["high", "low"])))
        row = int(rng.integers(0, 3)) + 4 * (labels[-1] == "low")
        image[row : row + 2] = 200
    words = [f"{'top' if label == 'high' else 'floor'} {rng.choice(['a', 'b'])}" for label in labels]
    return Examples({"image": images, "text": words, "label": labels})


DATA = TaskData(bars(160, 0), bars(16, 1), bars(40, 2), given_test=True)
INPUTS = {
    "image": {"kind": "image", "patch": 4, "convolutions": [4]},
    "text": {"kind": "text", "tokenizer": "words", "max_len": 4},
}


def run_of(folder, inputs=("image",), moe: Any = {"n_experts": 4, "d_expert": 16}, **train) -> TaskRunConfig:  # noqa: B006
    return TaskRunConfig.from_dict({
        "name": "bars", "runs_dir": str(folder), "inputs": {name: INPUTS[name] for name in inputs},
        "targets": {"label": {"kind": "class", "column": "label"}},
        "model": {"d_model": 16, "n_layers": 2, "n_heads": 2, "d_ff": 32, "moe": moe},
        "train": {"steps": 60, "batch_size": 32, "checkpoint_every": 0, "validate_every": 0, "device": "cpu",
                  "precision": "float32", "optimizer": {"lr": 1e-2}, "schedule": {"warmup_steps": 5}, **train},
    })  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of a plain run, one trained against attacks, and a dense one."""
    folder = tmp_path_factory.mktemp("attacked")
    made = {
        "plain": run_of(folder), "trained": run_of(folder, adversarial={"epsilon": 0.3, "steps": 3}),
        "dense": run_of(folder, moe=None),
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attacked_module, "load_task_data", lambda config: DATA)
        yield {name: train_run(config, data=DATA, quiet=True).folder for name, config in made.items()}


@pytest.fixture
def data(monkeypatch):
    monkeypatch.setattr(attacked_module, "load_task_data", lambda config: DATA)


ATTACK = AttackConfig(epsilon=0.3, steps=10)


@pytest.mark.usefixtures("data")
def test_pictures_are_attacked_and_training_against_it_helps(runs):
    found = {name: evaluate_attack(run, ATTACK) for name, run in runs.items()}
    for report in found.values():
        accuracy = report["accuracy"]["label"]
        assert accuracy["clean"] > 0.9
        assert accuracy["attack"] <= accuracy["clean"]
        assert report["examples"] == 40
        json.dumps(report)
    assert found["plain"]["accuracy"]["label"]["attack"] < found["trained"]["accuracy"]["label"]["attack"]
    assert len(found["plain"]["layers"]) == 2
    assert 0 < found["plain"]["routes"]["attack"]["set"] <= 1
    assert found["dense"]["layers"] == []
    small = evaluate_attack(runs["plain"], ATTACK.replace(epsilon=1e-6))
    assert small["accuracy"]["label"]["attack"] == small["accuracy"]["label"]["clean"]
    assert small["routes"]["attack"]["set"] == 0


@pytest.mark.usefixtures("data")
def test_an_attack_of_another_model_does_less(runs):
    own = evaluate_attack(runs["plain"], ATTACK, examples=20)
    other = evaluate_attack(runs["plain"], ATTACK, examples=20, transfer_from=runs["dense"])
    assert own["examples"] == other["examples"] == 20
    assert own["loss"]["attack"] > other["loss"]["attack"] > other["loss"]["clean"]


def test_the_same_attack_by_foolbox(runs):
    foolbox = pytest.importorskip("foolbox")
    loaded = load_task_run(runs["plain"])
    encoded = loaded.encoding.encode(DATA.test)
    (pixels,) = continuous_inputs(loaded.encoding.encode(DATA.train).inputs, ATTACK).values()
    arrays, targets = encoded.arrays(np.arange(40))
    wanted = targets["label"]

    class Pixels(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return loaded.model({"image": {"pixels": pixels.low + x * pixels.unit}}).answers["label"]

    wrapped = foolbox.PyTorchModel(Pixels().eval(), bounds=(0, 1))
    x = ((arrays["image"]["pixels"] - pixels.low) / pixels.unit).clamp(0, 1)
    for epsilon in (0.05, 0.1, 0.3):
        made = foolbox.attacks.LinfPGD(abs_stepsize=epsilon / 4, steps=10, random_start=False)
        _, _, fooled = made(wrapped, x, wanted, epsilons=epsilon)
        config = AttackConfig(epsilon=epsilon, steps=10, step_size=epsilon / 4, random_start=False)
        own = evaluate_attack(runs["plain"], config)["accuracy"]["label"]["attack"]
        assert own == pytest.approx(float((~fooled).float().mean()), abs=1 / 40 + 1e-9)


@pytest.mark.usefixtures("data")
def test_words_are_attacked_at_their_vectors_beside_a_picture(tmp_path):
    run = train_run(run_of(tmp_path, ("image", "text"), steps=5), data=DATA, quiet=True).folder
    both = evaluate_attack(run, ATTACK, examples=16)
    words = evaluate_attack(run, ATTACK.replace(inputs=["text"]), examples=16)
    assert both["loss"]["attack"] > words["loss"]["attack"] > words["loss"]["clean"]
    with pytest.raises(ConfigError, match="space must be auto or embedding for input 'text'"):
        evaluate_attack(run, ATTACK.replace(space="input"))


@pytest.mark.usefixtures("data")
def test_the_verb_prints_tables_and_json(runs, capsys):
    words = ["evaluate", str(runs["plain"]), "--attack", "pgd", "--epsilon", "0.2", "--attack-steps", "3",
             "--attack-set", "norm=l2", "--attack-examples", "10"]  # fmt: skip
    assert main([*words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["attack"]["norm"] == "l2"
    assert report["attack"]["steps"] == 3
    assert report["examples"] == 10
    assert main([*words, "--attack-checks", "--transfer-from", str(runs["dense"])]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for said in ("PGD-3, epsilon 0.2 (l2)", "accuracy: label", "other set of experts", "attack made on the"):
        assert said in text


@pytest.mark.usefixtures("data")
def test_options_that_do_not_fit_are_refused(runs, capsys):
    run = str(runs["plain"])
    for words, message in (
        (["--epsilon", "0.1"], "--epsilon is for --attack pgd"),
        (["--attack", "pgd", "--by", "label"], "--by is for measuring without --attack"),
        (["--attack", "pgd", "--attack-set", "nrm=l2"], "attack.nrm is not a known key"),
        (["--attack", "pgd", "--epsilon", "-1"], "attack.epsilon"),
    ):
        assert main(["evaluate", run, *words]) == 2
        assert message in capsys.readouterr().err
