"""Resume is exact: a run that was stopped and taken up again equals one that never stopped, bit for bit.

Compared are the weights, the optimizer, the random generators, the place in the data, the recurrent memory
and every metric of every step. A trainer that resumes is built with other initial weights and another state
of the random generator, so that nothing can be right by chance.
"""

import functools
import json
import signal

import pytest
import torch
from training_samples import (
    BATCHES_PER_EPOCH,
    assert_same_run,
    assert_same_tensors,
    at_micro_step,
    copies,
    decoder,
    dense,
    exact,
    make_trainer,
    newest,
    run_config,
    transformer_xl,
)

from moekit.config.errors import CheckpointError, Interrupted
from moekit.train import validation
from moekit.train.checkpoints import load_checkpoint, save_checkpoint
from moekit.train.run import resume_run, train_run

STEPS = BATCHES_PER_EPOCH + 3
MODELS = {
    "dense": (dense(), {}),
    "softmax": (decoder(), {}),
    "auxiliary-loss-free bias": (
        decoder(router="sigmoid", balance={"load_balance": 0, "bias_update_rate": 0.01}), {},
    ),
    "noisy_topk": (decoder(router="noisy_topk", balance={"importance": 0.1, "load": 0.1}), {}),
    "gshard": (decoder(router="gshard"), {}),
    "switch": (decoder(router={"name": "switch", "jitter": 0.3}, top_k=1), {}),
    "random": (decoder(router="random"), {}),
    "threshold": (decoder(router="threshold"), {}),
    "capacity and shared": (decoder(capacity_factor=1.0, n_shared_experts=1), {}),
    "recompute": (decoder(router="noisy_topk"), {"recompute": True}),
    "bf16": (decoder(), {"precision": "bf16"}),
    "transformer_xl": (transformer_xl(dropout=0.2), {}),
    "transformer_xl, recompute": (transformer_xl(dropout=0.2), {"recompute": True}),
    "transformer_xl, shuffled": (transformer_xl(), {"order": "shuffled"}),
}  # fmt: skip
# (optimizer steps done, micro-batches of the next one done)
STOPS = {
    "mid-epoch": (2, 0),
    "after micro-batch 1": (2, 1),
    "after micro-batch 2": (2, 2),
    "in the first step": (0, 1),
    "in the last batch of an epoch": (BATCHES_PER_EPOCH - 1, 2),
    "at the end of an epoch": (BATCHES_PER_EPOCH, 0),
    "in the first batch of the next epoch": (BATCHES_PER_EPOCH, 1),
}
# everywhere for the two models with the most state, at the two hardest places for all others
PLACES = [
    (name, stop)
    for name in MODELS
    for stop in (
        STOPS
        if name in ("noisy_topk", "transformer_xl")
        else ("after micro-batch 2", "in the first batch of the next epoch")
    )
]


def new_trainer(name, weights_seed=0):
    model, train = MODELS[name]
    return make_trainer(model, weights_seed=weights_seed, steps=STEPS, accumulation=3, **train)


@functools.cache
def uninterrupted(name):
    trainer = new_trainer(name)
    metrics = [exact(line) for line in trainer.steps()]
    return metrics, copies(trainer.tensors()), exact(trainer.state())


def run_until(trainer, stop):
    """The metrics of the steps up to `stop`, where the trainer was told to stop."""
    trainer.should_stop = lambda: (trainer.step, trainer.micro) >= stop
    metrics = [exact(line) for line in trainer.steps()]
    assert (trainer.step, trainer.micro) == stop
    return metrics


@pytest.mark.parametrize(("name", "stop"), PLACES)
def test_a_stopped_trainer_goes_on_exactly(tmp_path, name, stop):
    expected_metrics, expected_tensors, expected_state = uninterrupted(name)
    first = new_trainer(name)
    metrics = run_until(first, STOPS[stop])
    path = save_checkpoint(tmp_path, first.step, first.tensors(), first.state(), 1, first.micro)

    second = new_trainer(name, weights_seed=99)
    torch.manual_seed(99)
    second.load(*load_checkpoint(path))
    metrics += [exact(line) for line in second.steps()]

    assert metrics == expected_metrics
    assert_same_tensors(second.tensors(), expected_tensors)
    assert exact(second.state()) == expected_state


def test_the_models_of_these_tests_have_state_worth_restoring():
    """Otherwise the tests above could not fail."""
    moved = uninterrupted("auxiliary-loss-free bias")[1][
        "model.backbone.layers.0.feed_forward.router.expert_bias"
    ]
    assert moved.abs().max() > 0
    assert uninterrupted("threshold")[1]["model.backbone.layers.0.feed_forward.router.coefficient"] != 1e-8
    assert any(line["dropped_share"] > 0 for line in uninterrupted("capacity and shared")[0])
    memory = uninterrupted("transformer_xl")[1]
    assert {f"memory.{i}.layer_1" for i in range(3)} <= memory.keys()
    for name in ("noisy_topk", "gshard", "switch", "random"):
        fresh = new_trainer(name).tensors()["rng.cpu"]
        assert not torch.equal(uninterrupted(name)[1]["rng.cpu"], fresh), f"{name} draws nothing"


def test_stopping_at_every_micro_batch_changes_nothing(tmp_path):
    """A run that is interrupted after each micro-batch, every time in a new process's state."""
    name = "transformer_xl"
    expected_metrics, expected_tensors, expected_state = uninterrupted(name)
    trainer, metrics = new_trainer(name), []
    while trainer.step < STEPS:
        # an interruption between micro-batches, or after the whole step
        done = trainer.step * 3 + trainer.micro + 1
        metrics += run_until(trainer, divmod(done, 3))
        path = save_checkpoint(tmp_path, trainer.step, trainer.tensors(), trainer.state(), 1, trainer.micro)
        trainer = new_trainer(name, weights_seed=done)
        trainer.load(*load_checkpoint(path))
    assert metrics == expected_metrics
    assert_same_tensors(trainer.tensors(), expected_tensors)
    assert exact(trainer.state()) == expected_state


def test_the_same_trainer_goes_on_after_a_stop():
    """Without a checkpoint in between: what a notebook does."""
    expected_metrics, expected_tensors, _ = uninterrupted("softmax")
    trainer = new_trainer("softmax")
    metrics = run_until(trainer, (2, 2))
    trainer.should_stop = lambda: False
    metrics += [exact(line) for line in trainer.steps()]
    assert metrics == expected_metrics
    assert_same_tensors(trainer.tensors(), expected_tensors)


def test_a_trainer_that_has_gone_on_can_be_put_back(tmp_path):
    """Into a used trainer, in the middle of another step: its gradients, counts and memory must not linger."""
    for name in ("softmax", "transformer_xl"):
        expected_metrics, expected_tensors, _ = uninterrupted(name)
        trainer = new_trainer(name)
        metrics = run_until(trainer, (2, 0))
        path = save_checkpoint(tmp_path / name, 2, trainer.tensors(), trainer.state(), 1)
        run_until(trainer, (4, 2))
        trainer.load(*load_checkpoint(path))
        trainer.should_stop = lambda: False
        metrics += [exact(line) for line in trainer.steps()]
        assert metrics == expected_metrics
        assert_same_tensors(trainer.tensors(), expected_tensors)


def test_a_checkpoint_of_another_model_is_refused():
    tensors, state = new_trainer("dense").tensors(), new_trainer("dense").state()
    with pytest.raises(CheckpointError, match="do not fit the model: missing"):
        new_trainer("softmax").load(tensors, state)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"order": "shuffled"}, "data.order"),
        ({"seed": 5}, "train.seed"),
        ({"batch_size": 3}, "train.batch_size"),
        ({"accumulation": 2}, "train.accumulation"),
    ],
)
def test_a_place_in_other_data_order_is_refused(changes, key):
    """It would silently train on some text twice and on some never."""
    first = new_trainer("softmax")
    run_until(first, (2, 1))
    fields = {"steps": STEPS, "accumulation": 3, **changes}
    with pytest.raises(CheckpointError, match=key):
        make_trainer(decoder(), **fields).load(first.tensors(), first.state())


def test_accumulation_may_change_between_steps():
    """A smaller machine takes more micro-batches; nothing half done depends on their number."""
    first = new_trainer("softmax")
    run_until(first, (2, 0))
    other = make_trainer(decoder(), steps=STEPS, accumulation=6)
    other.load(first.tensors(), first.state())
    assert [line["step"] for line in other.steps()] == list(range(3, STEPS + 1))


# --- whole runs in their folders

RUNS = {
    "noisy MoE": (decoder(router="noisy_topk", balance={"bias_update_rate": 0.01}), {}),
    "threshold, recompute": (decoder(router="threshold"), {"recompute": True}),
    "random": (decoder(router="random"), {}),
    "transformer_xl": (transformer_xl(dropout=0.2), {}),
}


def stop_at(monkeypatch, step, micro, number=signal.SIGTERM):
    at_micro_step(monkeypatch, step, micro, lambda trainer: signal.raise_signal(number))


# SIGTERM arrives during this micro-batch; validation falls on steps 4 and 8, checkpoints on steps 3, 6 and 9
PLACES_IN_RUNS = [
    ("noisy MoE", 4, 0), ("noisy MoE", 3, 2), ("noisy MoE", 0, 0), ("threshold, recompute", 7, 1),
    ("random", 7, 2), ("transformer_xl", 4, 1), ("transformer_xl", 3, 2),
]  # fmt: skip


@pytest.mark.parametrize(("name", "step", "micro"), PLACES_IN_RUNS)
def test_a_stopped_run_ends_like_one_that_was_not(tmp_path, monkeypatch, name, step, micro):
    model, train = RUNS[name]
    config = run_config(tmp_path, model, accumulation=3, **train)
    whole = train_run(config, quiet=True)
    with monkeypatch.context() as patch:
        stop_at(patch, step, micro)
        with pytest.raises(Interrupted, match="SIGTERM"):
            train_run(config, quiet=True)
    folder = tmp_path / "runs" / "tiny-2"
    _, state = newest(folder)
    # the micro-batch in which the signal came is finished, no further one is begun
    assert (state["step"], state["micro"]) == ((step, micro + 1) if micro < 2 else (step + 1, 0))
    torch.manual_seed(1234)
    result = resume_run(folder, quiet=True)
    assert result.folder == folder
    assert_same_run(folder, whole.folder)


def test_a_run_stopped_twice_in_one_step(tmp_path, monkeypatch):
    config = run_config(tmp_path, decoder(router="gshard"), accumulation=3)
    whole = train_run(config, quiet=True)
    with monkeypatch.context() as patch:
        stop_at(patch, 5, 0)
        with pytest.raises(Interrupted):
            train_run(config, quiet=True)
    folder = tmp_path / "runs" / "tiny-2"
    with monkeypatch.context() as patch:
        stop_at(patch, 5, 1, signal.SIGINT)
        with pytest.raises(Interrupted, match="SIGINT"):
            resume_run(folder, quiet=True)
    assert [newest(folder)[1][key] for key in ("step", "micro")] == [5, 2]
    resume_run(folder, quiet=True)
    assert_same_run(folder, whole.folder)


def test_a_run_that_died_without_a_word_goes_on_from_its_last_checkpoint(tmp_path, monkeypatch):
    """As after kill -9: the metrics of steps after the checkpoint are there and are written again."""
    config = run_config(tmp_path, decoder(router="noisy_topk"))
    whole = train_run(config, quiet=True)

    class Died(BaseException):
        pass

    def die(trainer):
        raise Died

    with monkeypatch.context() as patch:
        at_micro_step(patch, 8, 0, die)
        with pytest.raises(Died):
            train_run(config, quiet=True)
    folder = tmp_path / "runs" / "tiny-2"
    assert newest(folder)[1]["step"] == 6
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 8 + 2
    resume_run(folder, quiet=True)
    assert_same_run(folder, whole.folder)


def test_a_run_that_died_before_its_first_checkpoint_starts_over_exactly(tmp_path, monkeypatch):
    config = run_config(tmp_path, decoder(router="noisy_topk"))
    whole = train_run(config, quiet=True)

    def die(trainer):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        at_micro_step(patch, 2, 0, die)
        with pytest.raises(KeyboardInterrupt):
            train_run(config, quiet=True)
    folder = tmp_path / "runs" / "tiny-2"
    assert list((folder).glob("checkpoints/step-*")) == []
    torch.manual_seed(1234)
    resume_run(folder, quiet=True)
    assert_same_run(folder, whole.folder)


@pytest.mark.parametrize("at", ["in a validation", "in the last validation"])
def test_a_stop_does_not_wait_for_a_validation(tmp_path, monkeypatch, at):
    """Validation can take longer than the 25 s after SIGTERM; it is made up for when the run goes on."""
    # a validation takes 4 batches and falls on steps 4, 8 and 10: SIGTERM in the first batch of one of them
    step, batches = (4, 1) if at == "in a validation" else (10, 9)
    config = run_config(tmp_path, decoder(router="random"), validation_batches=4)
    whole = train_run(config, quiet=True)
    seen = []
    original = validation.routing_stats

    def routing_stats(plans):
        seen.append(len(plans))
        if len(seen) == batches:
            signal.raise_signal(signal.SIGTERM)
        return original(plans)

    with monkeypatch.context() as patch:
        patch.setattr(validation, "routing_stats", routing_stats)
        with pytest.raises(Interrupted):
            train_run(config, quiet=True)
    assert len(seen) == batches, "further batches were evaluated after SIGTERM"
    folder = tmp_path / "runs" / "tiny-2"
    assert newest(folder)[1]["step"] == step
    assert not (folder / "final.json").exists()
    resume_run(folder, quiet=True)
    assert_same_run(folder, whole.folder)
    assert json.loads((folder / "final.json").read_text())["step"] == 10
