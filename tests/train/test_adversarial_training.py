"""Training against attacks: what reaches which parameters, resume, and what is refused."""

from __future__ import annotations

import shutil

import pytest
import torch
from training_samples import (
    assert_same_run,
    copies,
    decoder,
    dense,
    make_trainer,
    run_config,
    transformer_xl,
)

from moekit.config.adversarial import AdversarialConfig
from moekit.config.errors import ConfigError
from moekit.train.adversarial import routers_of
from moekit.train.run import resume_run, train_run

SMALL = {"epsilon": 0.3, "steps": 2}


def gradients(trainer):
    """Of the first micro-batch, by name: of routers, and of all else."""
    batch = trainer.loader.next_batch()
    trainer._micro_step(batch, batch.n_targets)
    routers = {id(one) for one in routers_of(trainer.model)}
    found = ({}, {})
    for name, parameter in trainer.model.named_parameters():
        found[id(parameter) not in routers][name] = parameter.grad
    return found


def test_moved_inputs_teach_routers_alone():
    routers, rest = gradients(make_trainer(decoder(), adversarial={**SMALL, "weight": 1, "target": "router"}))
    assert all(not grad.any() for grad in rest.values())
    assert all(grad.abs().sum() > 0 for grad in routers.values())
    # with half of the weight the rest learns what it learns without attack, by half
    _, rest = gradients(make_trainer(decoder(), adversarial={**SMALL, "weight": 0.5, "target": "router"}))
    _, plain = gradients(make_trainer(decoder()))
    for name, grad in plain.items():
        assert torch.allclose(rest[name], grad / 2, atol=1e-7), name
    # and everything learns from both where the target is all
    _, both = gradients(make_trainer(decoder(), adversarial={**SMALL, "weight": 0.5}))
    assert any(not torch.allclose(both[name], grad / 2, atol=1e-4) for name, grad in plain.items())


def test_turns_change_routers_and_everything_else_in_turn():
    trainer = make_trainer(decoder(), adversarial={**SMALL, "target": "alternate", "stability": 0.5})
    routers = {id(one) for one in routers_of(trainer.model)}
    steps = trainer.steps()
    for step in range(4):
        before = copies(dict(trainer.model.named_parameters()))
        next(steps)
        for name, parameter in trainer.model.named_parameters():
            turn = (id(parameter) in routers) == (step % 2 == 0)
            assert torch.equal(parameter, before[name]) != turn, (step, name)


def test_no_attack_changes_another_draw():
    """With nothing of the moved loss, all is as without attack but for what attacks cost."""
    options = {"router": {"name": "noisy_topk"}}  # which draws
    plain = make_trainer(decoder(**options))
    attacked = make_trainer(decoder(**options), adversarial={**SMALL, "weight": 1e-30, "loss": "trades"})
    original = attacked.model.forward

    def draws_once(*arguments, **more):
        """Moved inputs of training draw as well: their own draws."""
        if "shift" in more and attacked.model.training:
            with torch.random.fork_rng():
                return original(*arguments, **more)
        return original(*arguments, **more)

    attacked.model.forward = draws_once
    generators = []
    for trainer in (plain, attacked):
        torch.manual_seed(1)
        for _, _ in zip(range(2), trainer.steps(), strict=False):
            pass
        generators.append(torch.get_rng_state())
    assert torch.equal(*generators)
    for name, tensor in plain.model.state_dict().items():
        assert torch.allclose(attacked.model.state_dict()[name], tensor, atol=1e-5), name


@pytest.mark.parametrize("target", ["all", "alternate"])
def test_a_resumed_run_makes_the_same_attacks(tmp_path, target):
    settings = {
        "adversarial": {**SMALL, "target": target, "stability": 0.1, "ramp_steps": 6},
        "accumulation": 3,
        "steps": 6,
    }
    folders = []
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
        folders.append(train_run(run_config(tmp_path / name, **settings), quiet=True).folder)
    whole, parts = folders
    for later in sorted((parts / "checkpoints").glob("step-*"))[1:]:
        shutil.rmtree(later)
    (parts / "final.json").unlink()
    resume_run(parts, quiet=True)
    assert_same_run(parts, whole)


@pytest.mark.parametrize(
    ("model", "adversarial"),
    [
        (decoder(), {"loss": "trades", "weight": 2, "stability": 1}),
        (decoder(), {"norm": "l2", "objective": "routing"}),
        (dense(), {}),
        (transformer_xl(), {"loss": "trades", "weight": 2}),
        (transformer_xl(), {}),
    ],
)
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_models_and_losses(model, adversarial, precision):
    trainer = make_trainer(
        model, adversarial={**SMALL, **adversarial}, precision=precision, steps=2, accumulation=2
    )
    metrics = list(trainer.steps())
    assert all(metric["aux/adversarial_loss"] > 0 for metric in metrics)
    assert ("aux/routing_divergence" in metrics[0]) == ("stability" in adversarial)


def test_training_against_attacks_makes_them_do_less():
    """On the words of a table by heart, an attack on the plain model does more than on one that knew it."""
    found = {}
    for name, adversarial in (("plain", None), ("attacked", {"epsilon": 0.5, "steps": 3, "weight": 1})):
        trainer = make_trainer(decoder(), adversarial=adversarial, steps=30, optimizer={"lr": 1e-2})
        list(trainer.steps())
        probe = make_trainer(decoder(), adversarial={"epsilon": 0.5, "steps": 3})
        probe.model.load_state_dict(trainer.model.state_dict())
        batch = probe.loader.next_batch()
        given = probe.model(**batch.arguments()).loss
        changed = probe.adversarial.moved(probe.model, batch.arguments(), 0, 0)
        found[name] = float((probe.model(**changed).loss - given).detach())
    assert 0 < found["attacked"] < found["plain"]


@pytest.mark.parametrize(
    ("model", "adversarial", "message"),
    [
        (dense(), {"target": "router"}, "train.adversarial.target must be all without routers that learn"),
        (decoder(router="hash"), {"target": "alternate"}, "train.adversarial.target must be all"),
        (dense(), {"stability": 1}, "train.adversarial.stability must be 0 for a model without sparse"),
        (dense(), {"objective": "routing"}, "train.adversarial.objective must be loss for a model without"),
        (decoder(), {"space": "input"}, "train.adversarial.space must be auto or embedding for a language"),
        (decoder(), {"inputs": ["text"]}, "train.adversarial.inputs must be null for a language model"),
    ],
)
def test_what_cannot_be_attacked_is_refused_before_training(model, adversarial, message):
    with pytest.raises(ConfigError, match=message):
        make_trainer(model, adversarial={**SMALL, **adversarial})


def test_routers_without_probabilities_have_nothing_to_hold_still():
    trainer = make_trainer(decoder(router="hash"), adversarial={**SMALL, "stability": 1})
    with pytest.raises(ConfigError, match="no sparse layer here has routing probabilities"):
        next(trainer.steps())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight": 2}, "weight must be at most 1 with loss: mix"),
        ({"weight": 0}, "weight must be above 0, or stability"),
        ({"loss": "trades", "random_start": False}, "random_start must be true with loss: trades"),
    ],
)
def test_configurations_that_cannot_be(fields, message):
    with pytest.raises(ConfigError, match=message):
        AdversarialConfig.from_dict(fields)
