"""A run in its folder: the files it leaves, validation, failure, resume with changes, loading, signals."""

import json
import math
import os
import re
import signal
import threading

import numpy as np
import pytest
import torch
from training_samples import (
    CLOCK,
    LENGTH,
    ROWS,
    assert_same_run,
    assert_same_tensors,
    at_micro_step,
    copies,
    decoder,
    dense,
    newest,
    random_split,
    run_config,
    transformer_xl,
    write_corpus,
)

from moekit.cli.main import main
from moekit.config.errors import CheckpointError, ConfigError, DataError, Interrupted, NonFiniteError
from moekit.config.loading import load_run_config, save_run_config
from moekit.config.model import model_config_from_dict
from moekit.data.loader import evaluation_batches
from moekit.data.prepare import prepare
from moekit.models import build_model
from moekit.train import material as material_module
from moekit.train import run as run_module
from moekit.train.run import load_run, resume_run, train_run
from moekit.train.trackers import read_metrics
from moekit.train.validation import loss_over


def die_at(monkeypatch, step, error=SystemExit):
    def die(trainer):
        raise error

    at_micro_step(monkeypatch, step, 0, die)


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# --- what a run leaves behind


def test_the_folder_of_a_run(tmp_path):
    result = train_run(run_config(tmp_path), quiet=True)
    assert result.folder == tmp_path / "runs" / "tiny-1"
    assert files(result.folder) == [
        "checkpoints/.lock",
        *(f"checkpoints/step-000000{step}/{name}" for step in ("09", "10")
          for name in ("manifest.json", "state.json", "tensors.safetensors")),
        "config.yaml", "final.json", "metrics.jsonl", "run.json", "tokenizer.json",
    ]  # fmt: skip
    about = json.loads((result.folder / "run.json").read_text())
    assert about["data_fingerprint"] == prepare(run_config(tmp_path).data).fingerprint
    model = build_model(load_run_config(result.folder / "config.yaml").model)
    assert about["total_parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert about["active_parameters"] < about["total_parameters"]
    assert about["sources"][0]["licence"] == "yours"
    data = prepare(run_config(tmp_path).data)
    most = run_config(tmp_path).train.validation_batches
    batches = evaluation_batches(data.validation, ROWS, LENGTH, max_batches=most)
    targets = np.concatenate([batch.targets[batch.targets >= 0].numpy() for batch in batches])
    assert about["bytes_per_token"] == pytest.approx(data.tokenizer.byte_lengths()[targets].mean())


def test_metrics_lines(tmp_path):
    result = train_run(run_config(tmp_path, log_every=3), quiet=True)
    lines = read_metrics(result.folder / "metrics.jsonl")
    train = [line for line in lines if line["kind"] == "train"]
    validation = [line for line in lines if line["kind"] == "validation"]
    assert [line["step"] for line in train] == [3, 6, 9, 10], "every third step and the last"
    assert [line["step"] for line in validation] == [4, 8, 10], "every fourth step and the last"
    for line in train:
        assert line.keys() == {
            "step", "time", "kind", "tokens", "loss", "gradient_norm", "lr", "tokens_per_second", "seconds",
            "aux/load_balance", "aux/router_z",
            "load", "max_violation", "dropped_share", "mean_active_experts", "by_layer",
        }  # fmt: skip
        assert max(line["by_layer"]["max_violation"]) == pytest.approx(line["max_violation"], abs=1e-5)
        assert all(0 < entropy <= 1 for entropy in line["by_layer"]["load_entropy"])
        assert line["tokens"] == line["step"] * ROWS * LENGTH
        assert len(line["load"]) == 4
    for line in validation:
        assert line.keys() == {
            "step", "time", "kind", "tokens", "seconds", "validation_loss", "validation_max_violation",
            "validation_dropped_share", "validation_mean_active_experts",
        }  # fmt: skip
    assert sorted(lines, key=lambda line: line["step"]) == lines
    # a dense model has no routing to log
    result = train_run(run_config(tmp_path, dense()), quiet=True)
    keys = {key for line in read_metrics(result.folder / "metrics.jsonl") for key in line}
    assert keys == {"step", "time", "kind", "tokens", "loss", "gradient_norm", "lr", "validation_loss",
                    "tokens_per_second", "seconds"}  # fmt: skip


def test_the_final_result(tmp_path):
    result = train_run(run_config(tmp_path), quiet=True)
    assert json.loads((result.folder / "final.json").read_text()) == result.final
    last = read_metrics(result.folder / "metrics.jsonl", "validation")[-1]
    assert result.final == {
        "step": 10,
        "tokens": 10 * ROWS * LENGTH,
        "train_seconds": last["seconds"],
        **{key: value for key, value in last.items() if key.startswith("validation_")},
    }
    # the last validation, by hand, on the last checkpoint
    run = load_run(result.folder)
    data = prepare(run.config.data)
    nats = n = 0
    for batch in evaluation_batches(data.validation, ROWS, LENGTH, max_batches=2):
        with torch.no_grad():
            out = run.model(
                batch.token_ids,
                segment_ids=batch.segment_ids,
                targets=batch.targets,
                token_mask=batch.token_mask,
            )
        nats, n = nats + float(out.loss) * out.n_targets, n + out.n_targets
    assert result.final["validation_loss"] == pytest.approx(nats / n, rel=1e-6)


def test_no_validation_or_checkpoint_on_the_way(tmp_path):
    """0 means at the end only."""
    result = train_run(run_config(tmp_path, validate_every=0, checkpoint_every=0), quiet=True)
    assert [line["step"] for line in read_metrics(result.folder / "metrics.jsonl", "validation")] == [10]
    assert [path.name for path in (result.folder / "checkpoints").glob("step-*")] == ["step-00000010"]


def test_folders_are_numbered_and_never_shared(tmp_path):
    config = run_config(tmp_path, steps=1)
    runs = tmp_path / "runs"
    (runs / "tiny-2").mkdir(parents=True)
    (runs / "tiny-2" / "mine.txt").write_text("kept")
    names = [train_run(config, quiet=True).folder.name for _ in range(2)]
    names.append(train_run(config.replace(name="other"), quiet=True).folder.name)
    assert names == ["tiny-1", "tiny-3", "other-1"]
    assert files(runs / "tiny-2") == ["mine.txt"]
    for name in ("", "a/b", "../a", "."):
        with pytest.raises(ConfigError, match="name must be a plain folder name"):
            train_run(config.replace(name=name), quiet=True)
    (tmp_path / "a file").write_text("")
    with pytest.raises(ConfigError, match=r"runs_dir .* cannot be written"):
        train_run(config.replace(runs_dir=str(tmp_path / "a file" / "runs")), quiet=True)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"model": decoder(router="no such router")}, ConfigError),
        ({"model": decoder(router="expert_choice")}, ConfigError),
        ({"model": {**decoder(), "d_model": 18, "n_heads": 4}}, ConfigError),
        ({"device": "cuda:77"}, ConfigError),
        ({"batch_size": 6000}, DataError),
    ],
)
def test_a_mistake_in_the_configuration_leaves_no_folder(tmp_path, change, error):
    """Otherwise it would be the newest unfinished run that `moekit resume` takes up."""
    with pytest.raises(error):
        train_run(run_config(tmp_path, **change), quiet=True)
    assert list((tmp_path / "runs").glob("*")) == []


def test_a_folder_that_is_only_half_made_is_no_run(tmp_path, monkeypatch):
    """The configuration is written last: whoever is killed before that leaves no run behind."""
    with monkeypatch.context() as patch:

        def die(config, path):
            raise SystemExit

        patch.setattr(run_module, "save_run_config", die)
        with pytest.raises(SystemExit):
            train_run(run_config(tmp_path), quiet=True)
    assert (tmp_path / "runs" / "tiny-1" / "run.json").exists()
    with pytest.raises(CheckpointError, match="no unfinished run"):
        resume_run(runs_dir=tmp_path / "runs", quiet=True)
    with pytest.raises(CheckpointError, match=r"tiny-1 is no run: it has no config\.yaml"):
        resume_run(tmp_path / "runs" / "tiny-1", quiet=True)


def test_two_runs_of_one_configuration_are_equal_and_another_seed_is_not(tmp_path):
    config = run_config(tmp_path, decoder(router="noisy_topk"))
    torch.manual_seed(5)
    first = train_run(config, quiet=True)
    torch.manual_seed(6)
    second = train_run(config, quiet=True)
    assert_same_run(first.folder, second.folder)
    other = train_run(config.replace(train=config.train.replace(seed=1)), quiet=True)
    assert other.final["validation_loss"] != first.final["validation_loss"]


def test_data_that_is_prepared_already_is_not_prepared_again(tmp_path, monkeypatch):
    config = run_config(tmp_path, steps=2)
    data = prepare(config.data)
    whole = train_run(config, quiet=True)
    monkeypatch.setattr(material_module, "prepare", None)
    assert_same_run(train_run(config, data=data, quiet=True).folder, whole.folder)


def test_the_model_is_made_to_fit_the_data(tmp_path):
    config = run_config(tmp_path, {**decoder(), "vocab_size": 10, "max_seq_len": 4}, steps=1)
    saved = load_run_config(train_run(config, quiet=True).folder / "config.yaml")
    assert saved.model.vocab_size == prepare(config.data).tokenizer.vocab_size
    assert saved.model.max_seq_len == LENGTH
    # a larger vocabulary is left as it is
    config = run_config(tmp_path, {**decoder(), "vocab_size": 1000}, steps=1)
    assert load_run_config(train_run(config, quiet=True).folder / "config.yaml").model.vocab_size == 1000


# --- validation beside training


@pytest.mark.parametrize(
    "model",
    [decoder(router="random"), transformer_xl(dropout=0.5), decoder(balance={"bias_update_rate": 0.1})],
)
def test_validation_leaves_training_as_it_was(tmp_path, model):
    """Runs that validate after every step, and only at the end, are equal in all but the validations."""
    often = train_run(run_config(tmp_path, model, validate_every=1), quiet=True)
    never = train_run(run_config(tmp_path, model, validate_every=0), quiet=True)
    assert_same_tensors(newest(often.folder)[0], newest(never.folder)[0])
    lines = [
        [
            {k: v for k, v in line.items() if k not in CLOCK}
            for line in read_metrics(run.folder / "metrics.jsonl", "train")
        ]
        for run in (often, never)
    ]
    assert lines[0] == lines[1]


def test_loss_over_restores_mode_gradients_and_generator(tmp_path):
    data = prepare(run_config(tmp_path).data)
    model = build_model(run_config(tmp_path, {**decoder(router="random"), "vocab_size": 300}).model)
    batch = next(evaluation_batches(data.train, ROWS, LENGTH))
    model(batch.token_ids, targets=batch.targets).loss.backward()
    before, generator = copies(model.state_dict()), torch.get_rng_state()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    assert gradients
    for mode in (True, False):
        model.train(mode)
        modes = []
        hook = model.backbone.layers[0].register_forward_hook(
            lambda m, i, o, modes=modes: modes.append(m.training)
        )
        loss_over(
            model, evaluation_batches(data.validation, ROWS, LENGTH), torch.device("cpu"), torch.float32
        )
        hook.remove()
        assert set(modes) == {False}
        assert model.training is mode
        assert model.backbone.layers[0].training is mode
    assert_same_tensors(model.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), generator)
    for name, parameter in model.named_parameters():
        assert name not in gradients or torch.equal(parameter.grad, gradients[name])

    def broken():
        yield batch
        raise DataError("no more")

    model.train()
    with pytest.raises(DataError):
        loss_over(model, broken(), torch.device("cpu"), torch.float32)
    assert model.training
    assert torch.equal(torch.get_rng_state(), generator)


def test_loss_over_depends_on_model_and_batches_alone(tmp_path):
    """A router that draws in evaluation too draws the same, whatever was drawn before."""
    data = prepare(run_config(tmp_path).data)
    model = build_model(run_config(tmp_path, {**decoder(router="random"), "vocab_size": 300}).model)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        batches = evaluation_batches(data.validation, ROWS, LENGTH)
        results.append(loss_over(model, batches, torch.device("cpu"), torch.float32))
    assert results[0].mean == results[1].mean
    assert torch.equal(results[0].stats[0].requested_per_expert, results[1].stats[0].requested_per_expert)


@pytest.mark.parametrize("model", [decoder(), transformer_xl()], ids=["decoder", "transformer_xl"])
def test_loss_over_weighs_every_token_alike_whatever_the_batches(tmp_path, model):
    """One row without padding against many rows with padding: the same tokens, the same documents."""
    data = prepare(run_config(tmp_path).data)
    built = build_model(run_config(tmp_path, {**model, "vocab_size": 300}).model).eval()
    totals = []
    for batches in (
        evaluation_batches(data.validation, 1, data.validation.n_tokens),
        evaluation_batches(data.validation, 5, data.validation.n_tokens // 5 + 1),
    ):
        totals.append(loss_over(built, batches, torch.device("cpu"), torch.float32))
    # five rows cut four documents, whose rests lack their context: the count is exact, the loss nearly equal
    assert totals[0].n_targets == totals[1].n_targets == data.validation.n_tokens
    assert totals[0].mean == pytest.approx(totals[1].mean, rel=0.01)
    if totals[0].stats:
        assert all(
            int(layer.n_tokens) == data.validation.n_tokens for total in totals for layer in total.stats
        )
    assert math.isnan(loss_over(built, [], torch.device("cpu"), torch.float32).mean)


def test_loss_over_carries_memory():
    """With memory, cutting a long text into segments changes nothing that the memory can reach."""
    split = random_split(200)
    model = build_model(model_config_from_dict(transformer_xl(init_std=0.3, eval_memory_length=256)))
    whole, cut = (
        loss_over(model, evaluation_batches(split, 1, length), torch.device("cpu"), torch.float32).mean
        for length in (200, 10)
    )
    assert cut == pytest.approx(whole, rel=1e-5)
    model = build_model(model_config_from_dict(transformer_xl(init_std=0.3, eval_memory_length=0)))
    whole, cut = (
        loss_over(model, evaluation_batches(split, 1, length), torch.device("cpu"), torch.float32).mean
        for length in (200, 10)
    )
    assert abs(cut - whole) > 1e-4


# --- failure


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_run_that_is_not_finite_keeps_its_last_good_checkpoint(tmp_path, monkeypatch, capsys, what):
    """Through the command line: exit code 5; without the poison the run goes on as if nothing was."""
    config = run_config(tmp_path)
    whole = train_run(config, quiet=True)
    save_run_config(config, tmp_path / "config.yaml")

    def poison(trainer):
        if what == "loss":
            with torch.no_grad():
                trainer.model.stem.weight[0, 0] = math.nan
        else:
            trainer.model.stem.weight.register_hook(lambda gradient: gradient * math.inf)

    with monkeypatch.context() as patch:
        at_micro_step(patch, 7, 0, poison)
        assert main(["train", str(tmp_path / "config.yaml"), "--quiet"]) == NonFiniteError.exit_code == 5
    message = capsys.readouterr().err
    assert re.search(r"error: (loss of micro-batch 1|gradient norm) became (nan|inf) in step 8", message)
    assert "then resume" in message
    folder = tmp_path / "runs" / "tiny-2"
    tensors, state = newest(folder)
    assert state["step"] == 6
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values() if tensor.is_floating_point())
    assert load_run(folder).step == 6
    assert not (folder / "final.json").exists()
    resume_run(folder, quiet=True)
    assert_same_run(folder, whole.folder)


def test_a_tracker_gets_what_the_file_gets_and_the_place_it_goes_on_from(tmp_path, monkeypatch):
    made, logged = [], []

    class Tracker:
        def log(self, step, metrics):
            logged.append((step, dict(metrics)))

        def close(self):
            logged.append("closed")

    def make(names, folder, run_name, config, resume_step=None):
        made.append((names, folder.name, run_name, resume_step))
        return [Tracker()]

    monkeypatch.setattr(run_module, "make_trackers", make)
    with monkeypatch.context() as patch:
        die_at(patch, 7)
        with pytest.raises(SystemExit):
            train_run(run_config(tmp_path, trackers=["tensorboard"]), quiet=True)
    assert logged[-1] == "closed"
    lines = read_metrics(tmp_path / "runs" / "tiny-1" / "metrics.jsonl")
    expected = [
        (line["step"], {f"validation/{k}" if k.startswith("validation_") else k: v for k, v in line.items()
                        if k not in ("step", "time", "kind")})
        for line in lines
    ]  # fmt: skip
    for (step, metrics), (expected_step, expected_metrics) in zip(logged[:-1], expected, strict=True):
        assert step == expected_step
        assert metrics.items() <= expected_metrics.items()
        assert "step" not in metrics
    resume_run(tmp_path / "runs" / "tiny-1", quiet=True)
    assert made == [(("tensorboard",), "tiny-1", "tiny-1", 0), (("tensorboard",), "tiny-1", "tiny-1", 6)]


# --- resume


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    done = train_run(run_config(tmp_path), quiet=True)
    before = {name: (done.folder / name).read_bytes() for name in files(done.folder)}
    times = {name: os.stat(done.folder / name).st_mtime_ns for name in before}
    again = resume_run(done.folder, quiet=True)
    assert again.final == done.final
    assert {name: (done.folder / name).read_bytes() for name in files(done.folder)} == before
    assert {name: os.stat(done.folder / name).st_mtime_ns for name in before} == times


def test_a_run_killed_between_its_last_checkpoint_and_its_result(tmp_path):
    done = train_run(run_config(tmp_path), quiet=True)
    metrics = (done.folder / "metrics.jsonl").read_bytes()
    (done.folder / "final.json").unlink()
    assert resume_run(runs_dir=tmp_path / "runs", quiet=True).final == done.final
    assert json.loads((done.folder / "final.json").read_text()) == done.final
    assert (done.folder / "metrics.jsonl").read_bytes() == metrics


def test_more_steps_for_a_finished_run(tmp_path, monkeypatch):
    """The longer run is unfinished again until it is done, and its configuration says how long it is."""
    config = run_config(tmp_path, schedule={"kind": "constant", "warmup_steps": 2})
    whole = train_run(config.replace(train=config.train.replace(steps=16)), quiet=True)
    short = train_run(config, quiet=True)
    assert short.final["step"] == 10
    with monkeypatch.context() as patch:
        die_at(patch, 13)
        with pytest.raises(SystemExit):
            resume_run(short.folder, overrides=["train.steps=16"], quiet=True)
    assert not (short.folder / "final.json").exists()
    assert load_run_config(short.folder / "config.yaml").train.steps == 16
    # found as the newest unfinished one, and finished without naming the steps again
    result = resume_run(runs_dir=tmp_path / "runs", quiet=True)
    assert (result.folder, result.final["step"]) == (short.folder, 16)
    assert_same_tensors(newest(short.folder)[0], newest(whole.folder)[0])
    # the shorter run had one more validation, after its own last step
    assert [line["step"] for line in read_metrics(short.folder / "metrics.jsonl", "validation")] == [
        4,
        8,
        10,
        12,
        16,
    ]


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("model.d_model=32", CheckpointError, "do not fit the model"),
        ("model.moe.n_experts=8", CheckpointError, "do not fit the model"),
        (
            "train.batch_size=3",
            CheckpointError,
            r"train\.batch_size must be 6 .* resume with train\.batch_size=6",
        ),
        ("data.seq_len=8", CheckpointError, r"data\.seq_len must be 16"),
        ("data.vocab_size=300", CheckpointError, "the data of .* has changed"),
        ("train.stepz=3", ConfigError, "did you mean 'steps'"),
    ],
)
def test_an_override_that_does_not_fit_is_refused_and_forgotten(
    tmp_path, monkeypatch, override, error, message
):
    config = run_config(tmp_path)
    with monkeypatch.context() as patch:
        die_at(patch, 5)
        with pytest.raises(SystemExit):
            train_run(config, quiet=True)
    folder = tmp_path / "runs" / "tiny-1"
    before = (folder / "config.yaml").read_bytes()
    with pytest.raises(error, match=message):
        resume_run(folder, overrides=[override], quiet=True)
    assert (folder / "config.yaml").read_bytes() == before
    assert resume_run(folder, quiet=True).final["step"] == 10


def test_changed_data_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        die_at(patch, 5)
        with pytest.raises(SystemExit):
            train_run(run_config(tmp_path), quiet=True)
    folder = tmp_path / "runs" / "tiny-1"
    corpus = tmp_path / "corpus.jsonl"
    write_corpus(corpus, seed=1)
    with pytest.raises(
        CheckpointError, match=r"the data of .*tiny-1 has changed .* Restore the data"
    ) as caught:
        resume_run(folder, quiet=True)
    assert caught.value.exit_code == 4
    write_corpus(corpus)
    assert resume_run(folder, quiet=True).final["step"] == 10


def test_the_newest_unfinished_run_is_found(tmp_path, monkeypatch):
    config, runs = run_config(tmp_path), tmp_path / "runs"
    with pytest.raises(CheckpointError, match=r"no unfinished run in .*runs'. Name one: moekit resume RUN"):
        resume_run(runs_dir=runs, quiet=True)
    for step in (4, 7):
        with monkeypatch.context() as patch:
            die_at(patch, step)
            with pytest.raises(SystemExit):
                train_run(config, quiet=True)
    train_run(config, quiet=True)  # finished, and the newest of all
    (runs / "notes").mkdir()
    os.utime(runs / "tiny-2" / "metrics.jsonl", (1, 1))  # the other one was worked on later
    assert resume_run(runs_dir=runs, quiet=True).folder.name == "tiny-1"
    assert resume_run(runs_dir=runs, quiet=True).folder.name == "tiny-2"
    with pytest.raises(CheckpointError, match="no unfinished run"):
        resume_run(runs_dir=runs, quiet=True)
    with pytest.raises(CheckpointError, match="is no run"):
        resume_run(runs / "notes", quiet=True)


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    config = run_config(tmp_path)
    whole = train_run(config, quiet=True)
    hurt = train_run(config, quiet=True).folder
    (hurt / "final.json").unlink()
    path = hurt / "checkpoints" / "step-00000010" / "tensors.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))
    with pytest.warns(UserWarning, match="passed over a checkpoint"):
        resume_run(hurt, quiet=True)
    assert_same_run(hurt, whole.folder)


# --- loading


def test_load_run(tmp_path, monkeypatch):
    result = train_run(run_config(tmp_path, decoder(balance={"bias_update_rate": 0.1})), quiet=True)
    run = load_run(result.folder)
    assert (run.step, run.folder, run.model.training) == (10, result.folder, False)
    assert run.tokenizer.decode(run.tokenizer.encode("cat 中 dog")) == "cat 中 dog"
    saved = {
        k.removeprefix("model."): v for k, v in newest(result.folder)[0].items() if k.startswith("model.")
    }
    loaded = run.model.state_dict()
    for name, tensor in saved.items():
        assert torch.equal(loaded[name], tensor), name
    assert loaded["backbone.layers.0.feed_forward.router.expert_bias"].abs().max() > 0
    with pytest.raises(CheckpointError, match="is no run"):
        load_run(tmp_path / "runs")
    with monkeypatch.context() as patch:
        die_at(patch, 1)
        with pytest.raises(SystemExit):
            train_run(run_config(tmp_path), quiet=True)
    with pytest.raises(
        CheckpointError, match=r"holds no complete checkpoint yet\. Train it on with: moekit resume"
    ):
        load_run(tmp_path / "runs" / "tiny-2")


# --- signals inside the process


def test_handlers_are_put_back(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    train_run(run_config(tmp_path, steps=1), quiet=True)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_second_sigint_stops_at_once(tmp_path, monkeypatch):
    def twice(trainer):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    at_micro_step(monkeypatch, 5, 0, twice)
    with pytest.raises(KeyboardInterrupt):
        train_run(run_config(tmp_path), quiet=True)
    assert newest(tmp_path / "runs" / "tiny-1")[1]["step"] == 3, (
        "the checkpoint on the way, none for the signal"
    )


def test_a_signal_in_the_last_step_lets_the_run_finish(tmp_path, monkeypatch):
    saved = run_module.save_checkpoint

    def save(folder, step, *rest):
        if step == 10:
            signal.raise_signal(signal.SIGTERM)
        return saved(folder, step, *rest)

    monkeypatch.setattr(run_module, "save_checkpoint", save)
    result = train_run(run_config(tmp_path), quiet=True)
    assert result.final["step"] == 10
    assert (result.folder / "final.json").exists()


def test_training_in_a_thread_listens_to_no_signal(tmp_path):
    """Python lets only the main thread handle signals; training elsewhere must work all the same."""
    results = []
    thread = threading.Thread(
        target=lambda: results.append(train_run(run_config(tmp_path, steps=2), quiet=True))
    )
    thread.start()
    thread.join()
    assert results[0].final["step"] == 2


def test_the_live_view_is_fed(tmp_path, capsys, monkeypatch):
    shown = []

    class View:
        def __init__(self, total_steps, title):
            shown.append((total_steps, title))

        def __enter__(self):
            return self

        def __exit__(self, *error):
            shown.append("closed")

        def update(self, step, **values):
            shown.append((step, values))

    monkeypatch.setattr(run_module, "TrainingView", View)
    train_run(run_config(tmp_path))
    assert shown[0] == (10, "tiny-1")
    assert shown[-1] == "closed"
    assert [entry[0] for entry in shown[1:-1]] == list(range(1, 11))
    first, last = shown[1][1], shown[-2][1]
    assert {
        "loss",
        "tokens_per_second",
        "load",
        "max_violation",
        "dropped_share",
        "eta_seconds",
    } <= first.keys()
    assert first["note"] is None
    assert re.fullmatch(r"validation loss \d\.\d{3}", last["note"])
    assert first["eta_seconds"] > 0
    assert last["eta_seconds"] == 0
    at_micro_step(monkeypatch, 2, 0, lambda trainer: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted):  # closed as well when the run is stopped
        train_run(run_config(tmp_path))
    assert shown[-1] == "closed"


# --- one domain


def test_training_on_one_domain(tmp_path):
    """The same validation, tokenizer and data fingerprint; another loss of the domain that was left out."""
    whole = train_run(run_config(tmp_path, steps=12), quiet=True)
    one = train_run(run_config(tmp_path, data={"domains": ["animals"]}, steps=12), quiet=True)
    prints = [
        json.loads((result.folder / "run.json").read_text())["data_fingerprint"] for result in (whole, one)
    ]
    assert prints[0] == prints[1]
    assert one.final["validation_loss"] != whole.final["validation_loss"]
    with pytest.raises(ConfigError, match=r"data.domains must name domains of the text; got 'animal'"):
        train_run(run_config(tmp_path, data={"domains": ["animal"]}), quiet=True)


@pytest.mark.parametrize(("first", "then"), [(["animals"], "null"), (None, "[numbers]")])
def test_other_domains_are_no_way_to_go_on(tmp_path, first, then):
    """The place in the data means nothing in another text; a checkpoint of before says nothing of domains."""
    folder = train_run(run_config(tmp_path, data={"domains": first}, steps=4), quiet=True).folder
    if first is None:
        state = newest(folder)[1]
        assert state["layout"].pop("data.domains") is None
    told = "null" if first is None else r"\[animals\]"
    with pytest.raises(
        CheckpointError, match=rf"data.domains must be {told} as when .* resume with data.domains={told}"
    ):
        resume_run(folder, overrides=["train.steps=6", f"data.domains={then}"], quiet=True)
    assert resume_run(folder, overrides=["train.steps=6"], quiet=True).final["step"] == 6
