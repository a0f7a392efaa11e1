"""A run: one folder with its configuration, tokenizer, metrics and checkpoints; started, resumed, or loaded.

runs/<name>-<number>/
    config.yaml       the whole configuration
    tokenizer.json    the tokenizer that the tokens came from
    run.json          versions, data fingerprint, parameters
    metrics.jsonl     the truth about the run, one line per event
    checkpoints/      step-00000200/ ...
    routing/          what routers decided, where train.record asks for it
    final.json        written at the end
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moekit import __version__
from moekit.config.atomic import write_json
from moekit.config.errors import CheckpointError, ConfigError, require
from moekit.config.loading import load_any_config, load_run_config, save_run_config
from moekit.config.task_run import TaskRunConfig
from moekit.config.train import RunConfig
from moekit.data.encoding.whole import Encoding
from moekit.data.examples import TaskData
from moekit.data.prepare import PreparedData
from moekit.data.tokenizer import Tokenizer, load_tokenizer
from moekit.models import build_model
from moekit.models.accounting import active_parameters, total_parameters
from moekit.models.language_model import LanguageModel
from moekit.models.reshape_experts import shaped_like
from moekit.models.task_model import TaskModel
from moekit.observe.recorder import layers_of
from moekit.train.alarms import RoutingWatch
from moekit.train.checkpoints import latest_checkpoint, load_checkpoint, save_checkpoint
from moekit.train.distill import TeacherOpener, open_distillation
from moekit.train.experts import experts_of
from moekit.train.loop import Metrics, Trainer, balance_metrics, load_model_tensors
from moekit.train.lora import add_lora, merge_lora
from moekit.train.material import AnyRunConfig, Material, TextMaterial, material_of
from moekit.train.observing import FOLDER, TrainingRecord
from moekit.train.optimizer import freeze_all_but
from moekit.train.stop import Stop
from moekit.train.terminal import TrainingView
from moekit.train.trackers import MetricsLog, make_trackers, read_metrics
from moekit.train.validation import loss_over


@dataclass(frozen=True)
class RunResult:
    """Where a run lies and what it ended with."""

    folder: Path
    final: dict[str, Any]


@dataclass(frozen=True)
class LoadedRun:
    """A trained model with what it needs to be used."""

    config: RunConfig
    model: nn.Module
    tokenizer: Tokenizer
    step: int
    folder: Path


@dataclass(frozen=True)
class Start:
    """Weights that a run begins with.

    Attributes:
        tensors: under moekit's names.
        origin: where they come from, for run.json.
        files: what else belongs to the tokenizer, such as a chat template; copied into the run by their names.
    """

    tensors: Mapping[str, Tensor]
    origin: Mapping[str, Any]
    files: Mapping[str, Path] = field(default_factory=dict)


def train_run(
    config: AnyRunConfig, *, data: PreparedData | TaskData | None = None, start: Start | None = None,
    open_teacher: TeacherOpener | None = None, quiet: bool = False,
) -> RunResult:  # fmt: skip
    """Train a model in a new folder.

    Args:
        config: everything about the run: of a language model, or of a task.
        data: prepared text or the examples where the caller has them already; made from `config.data` otherwise.
        start: weights to begin with; drawn at random where None.
        open_teacher: opens the teacher of `train.distill`.
        quiet: show nothing while training.

    Errors: `NonFiniteError` for a loss or gradient that is not finite, `Interrupted` after SIGTERM or SIGINT (a
    checkpoint is written before), and what data and configuration raise.
    """
    require(config.train.lora is None or start is not None, "train.lora", "set",
            "needs a trained model to adapt", "Name one: moekit train CONFIG --from MODEL")  # fmt: skip
    material = material_of(config, data, _reporter(quiet))
    # before there is a folder: what is wrong in the configuration leaves none behind
    run = _Run(material, quiet, start, open_teacher)
    config = material.config
    folder = new_run_folder(config)
    material.save(folder)
    for name, path in (start.files if start is not None else {}).items():
        shutil.copyfile(path, folder / name)
    write_json(
        folder / "run.json",
        {
            "moekit": __version__,
            "torch": torch.__version__,
            "data_fingerprint": material.fingerprint,
            "sources": [vars(source) for source in material.sources],
            "total_parameters": total_parameters(config.model),
            "active_parameters": active_parameters(config.model),
            "trained_parameters": sum(p.numel() for p in run.trainer.model.parameters() if p.requires_grad),
            "bytes_per_token": _bytes_per_token(material),
            "started_from": None if start is None else dict(start.origin),
        },
    )
    if start is not None:
        run.save(folder)  # what it began with cannot be made again: a run stopped early goes on from here
    save_run_config(config, folder / "config.yaml")  # last, because it makes the folder a run
    return run.go(folder)


def resume_run(
    folder: Path | None = None, *, runs_dir: str | Path = "runs", overrides: tuple[str, ...] | list[str] = (),
    open_teacher: TeacherOpener | None = None, quiet: bool = False,
) -> RunResult:  # fmt: skip
    """Go on with a run from its newest good checkpoint, or from the start where it has none; a finished one stays.

    Args:
        folder: the run; where None, the newest unfinished one in `runs_dir`.
        runs_dir: where runs lie.
        overrides: `key=value` changes of the configuration, for example `train.steps=500`; kept for later resumes.
        open_teacher: opens the teacher of `train.distill`.
        quiet: show nothing while training.

    Errors: `CheckpointError` where there is nothing to resume, an override does not fit the checkpoint, or the data is
    no longer what the run was trained on; and those of `train_run`.
    """
    folder = _unfinished(Path(runs_dir)) if folder is None else Path(folder)
    config = load_any_config(_config_file(folder), list(overrides))
    encoding = None
    if isinstance(config, TaskRunConfig):
        encoding = Encoding.load(folder, config.inputs, config.targets)
    else:
        config = with_own_tokenizer(config, folder)
    material = material_of(config, None, _reporter(quiet), encoding)
    config = material.config
    require_same_data(folder, material)
    run = _Run(material, quiet, None, open_teacher)
    if not run.load_newest(folder):
        _require_random_start(folder)
    if overrides:  # only now that they are known to fit: the run could not be resumed without them otherwise
        save_run_config(config, folder / "config.yaml")
    return run.go(folder)


def _bytes_per_token(material: Material) -> float | None:
    """Of what a validation predicts: turns its nats of a token into bits of a byte; None where no text is predicted."""
    if not isinstance(material, TextMaterial):
        return None
    lengths, n_bytes, n_tokens = torch.from_numpy(material.data.tokenizer.byte_lengths()), 0, 0
    for batch in material.validation():
        targets = batch.targets[batch.targets >= 0]
        n_bytes, n_tokens = n_bytes + int(lengths[targets].sum()), n_tokens + len(targets)
    return n_bytes / n_tokens if n_tokens else None


def _reporter(quiet: bool) -> Callable[[str], None] | None:
    return None if quiet else lambda message: print(message, flush=True)


def require_same_data(folder: Path, data: PreparedData | Material) -> None:
    """Raise `CheckpointError` unless `data` is what the run in `folder` was trained on."""
    expected = json.loads((folder / "run.json").read_text())["data_fingerprint"]
    if data.fingerprint != expected:
        raise CheckpointError(
            f"the data of {folder} has changed since the run began (fingerprint {data.fingerprint[:12]}, was "
            f"{expected[:12]}): tokens may mean other text, and documents held for validation may be among those "
            "trained on. Restore the data, or start a new run"
        )


def _require_random_start(folder: Path) -> None:
    """Raise `CheckpointError` where a run without a checkpoint began with given weights: they are gone."""
    origin = json.loads((folder / "run.json").read_text()).get("started_from")
    if origin is not None:
        raise CheckpointError(
            f"{folder} began with the weights of {origin.get('model')} and has no good checkpoint left. "
            f"Start again: moekit train {folder / 'config.yaml'} --from {origin.get('model')}"
        )


def load_run(folder: Path | str, device: str = "cpu") -> LoadedRun:
    """The model of a run with the weights of its newest good checkpoint, in evaluation mode.

    Errors: `CheckpointError` where the folder is no run or holds no good checkpoint.
    """
    folder = Path(folder)
    config = with_own_tokenizer(load_run_config(_config_file(folder), []), folder)
    tensors, state = _newest_weights(folder)
    model = build_model(config.model)
    if "experts" in state and isinstance(model, LanguageModel):
        shaped_like(model, experts_of(state["experts"]))
        config = config.replace(model=model.config)  # what the run began with is not what it has now
    if config.train.lora is not None:
        add_lora(model, config.train.lora)
    load_model_tensors(model, tensors)
    if config.train.lora is not None:
        merge_lora(model)
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    return LoadedRun(config, model.to(device).eval(), tokenizer, int(state["step"]), folder)


@dataclass(frozen=True)
class LoadedTask:
    """A trained task's model with what it needs to be used."""

    config: TaskRunConfig
    model: TaskModel
    encoding: Encoding
    step: int
    folder: Path


def load_task_run(folder: Path | str, device: str = "cpu") -> LoadedTask:
    """The model of a run on a task with the weights of its newest good checkpoint, in evaluation mode.

    Errors: `CheckpointError` for a folder that is no run or has no good checkpoint, `ConfigError` for a language model.
    """
    folder = Path(folder)
    config = load_any_config(_config_file(folder))
    if not isinstance(config, TaskRunConfig):
        raise ConfigError(
            f"{folder} is the run of a language model, not of a task. Use moekit generate {folder}"
        )
    encoding = Encoding.load(folder, config.inputs, config.targets)
    tensors, state = _newest_weights(folder)
    model = TaskModel(config.model)
    load_model_tensors(model, tensors)
    return LoadedTask(config, model.to(device).eval(), encoding, int(state["step"]), folder)


def _config_file(folder: Path) -> Path:
    if not (folder / "config.yaml").is_file():
        raise CheckpointError(
            f"{folder} is no run: it has no config.yaml. Give the folder that `moekit train` printed"
        )
    return folder / "config.yaml"


def _newest_weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The model's tensors of the newest good checkpoint, and the checkpoint's state."""
    checkpoint = latest_checkpoint(folder / "checkpoints")
    if checkpoint is None:
        raise CheckpointError(
            f"{folder} holds no complete checkpoint yet. Train it on with: moekit resume {folder}"
        )
    tensors, state = load_checkpoint(checkpoint, verify=False)
    return {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}, state


class _Run:
    """One stretch of training: log, show, validate, save, stop."""

    def __init__(
        self,
        material: Material,
        quiet: bool,
        start: Start | None = None,
        open_teacher: TeacherOpener | None = None,
    ) -> None:
        config: AnyRunConfig = material.config
        self.config, self.material, self.quiet = config, material, quiet
        loader, distillation = material.loader(), None
        if material.tokenizer is not None:
            distillation = open_distillation(config.train.distill, material.tokenizer, open_teacher)
        torch.manual_seed(config.train.seed)
        self.stop = Stop()
        model = build_model(config.model)
        material.begin(model)
        if start is not None:
            load_model_tensors(model, start.tensors)
        if config.train.lora is not None:
            add_lora(model, config.train.lora)
        elif config.train.trainable is not None:
            freeze_all_but(model, config.train.trainable)
        self.trainer = Trainer(model, config.train, loader, self.stop, distillation)
        self.record: TrainingRecord | None = None
        self._observe()
        self.validation: dict[str, Any] = {}  # the last one, empty where it was cut short
        self._saved: tuple[int, int] | None = None

    def load_newest(self, folder: Path) -> bool:
        """Take over the newest good checkpoint; False where there is none."""
        newest = latest_checkpoint(folder / "checkpoints")
        if newest is None:
            return False
        tensors, state = load_checkpoint(newest, verify=False)
        self.trainer.load(tensors, state)
        self._observe()  # there may be other experts than the configuration says
        self.watch.load(state.get("alarms"))
        if self.record is not None:
            self.record.load(state.get("record"), folder / FOLDER, self.trainer.step)
        self._saved = (self.trainer.step, self.trainer.micro)
        return True

    def _observe(self) -> None:
        """Watch the experts that the model has now, and record them, from nothing on where they are not the same."""
        config, model, before = self.config.train, self.trainer.model, getattr(self, "watch", None)
        self.watch = RoutingWatch(model, config)
        if before is not None:
            self.watch.take_over(before)
        known = None if self.record is None else self.record.layers
        if config.record is not None and self.trainer.moe_layers and known != layers_of(model):
            groups = self.material.groups()
            self.record = TrainingRecord(config.record, model, groups, self.material.validation)

    def go(self, folder: Path) -> RunResult:
        train, trainer, result = self.config.train, self.trainer, folder / "final.json"
        if trainer.step >= train.steps and result.exists():
            return RunResult(folder, json.loads(result.read_text()))
        result.unlink(missing_ok=True)  # a finished run that was given more steps is unfinished again
        with ExitStack() as stack:
            stack.enter_context(self.stop.listening())
            log = stack.enter_context(MetricsLog(folder / "metrics.jsonl", resume_step=trainer.step))
            trackers = make_trackers(train.trackers, folder, folder.name, self.config.to_dict(), trainer.step)
            for tracker in trackers:
                stack.callback(tracker.close)
            if trainer.step:
                self._make_up_validation(log, trackers)
            view = None if self.quiet else stack.enter_context(TrainingView(train.steps, folder.name))
            began = time.monotonic()
            first_step = trainer.step
            for metrics in trainer.steps():
                step, last = trainer.step, trainer.step == train.steps
                if self.record is not None:
                    self.record.add(step, trainer.last_stats)
                self._warn(log, view)
                if trainer.reshaped:
                    self._observe()
                if self._validates_at(step):
                    self._validate(log, trackers)
                if last or step % train.log_every == 0 or "experts" in metrics:
                    values = {name: value for name, value in metrics.items() if name != "step"}
                    log.log(step, values)
                    for tracker in trackers:
                        tracker.log(step, values)
                if last or (train.checkpoint_every and step % train.checkpoint_every == 0):
                    self.save(folder)
                if view is not None:
                    per_step = (time.monotonic() - began) / (step - first_step)
                    self._show(view, metrics, (train.steps - step) * per_step)
            if self.stop() and (trainer.step < train.steps or not self.validation):
                self.save(folder)
                raise self.stop.interrupted(
                    f"stopped by {self.stop.name}; a checkpoint was written. Go on with: moekit resume {folder}"
                )
        final = {
            "step": trainer.step,
            "tokens": trainer.tokens,
            "train_seconds": trainer.seconds,
            **self.validation,
        }
        write_json(result, final)
        return RunResult(folder, final)

    def _warn(self, log: MetricsLog, view: TrainingView | None) -> None:
        for alarm in self.watch.step(self.trainer.last_stats):
            log.log(self.trainer.step, alarm.values(), "alarm")
            if view is not None:
                view.alarm(alarm.message)

    def _validates_at(self, step: int) -> bool:
        train = self.config.train
        return step >= train.steps or (train.validate_every > 0 and step % train.validate_every == 0)

    def _validate(self, log: MetricsLog, trackers: list[Any]) -> None:
        """Validate and log; where SIGTERM comes meanwhile, leave it: it is made up for when the run goes on."""
        trainer = self.trainer
        batches = takewhile(lambda _: not self.stop(), self.material.validation())
        recorder = None if self.record is None else self.record.recorder()

        def observe(batch: Any, out: Any) -> None:
            if recorder is not None:
                self.material.observe(recorder, batch, out, trainer.step)

        result = loss_over(trainer.model, batches, trainer.device, trainer.dtype, observe)
        if self.stop():
            self.validation = {}
            return
        if self.record is not None and recorder is not None:
            self.record.keep(recorder, trainer.step)
            # for those who look while it trains; a resumed run takes from it what its checkpoint knows of
            self.record.save(log.path.parent / FOLDER, run=log.path.parent.name)
        self.validation = {"validation_loss": result.mean}
        if result.stats:
            self.validation |= {
                f"validation_{k}": v
                for k, v in balance_metrics(result.stats).items()
                if k not in ("load", "by_layer")
            }
        log.log(
            trainer.step,
            {"tokens": trainer.tokens, "seconds": trainer.seconds, **self.validation},
            "validation",
        )
        for tracker in trackers:
            tracker.log(
                trainer.step, {f"validation/{name}": value for name, value in self.validation.items()}
            )

    def _make_up_validation(self, log: MetricsLog, trackers: list[Any]) -> None:
        """The validation of the step resumed from: read back, or done now where the run was stopped before it."""
        done = read_metrics(log.path, "validation")
        if done and done[-1]["step"] == self.trainer.step:
            self.validation = {
                name: value for name, value in done[-1].items() if name.startswith("validation_")
            }
        elif self._validates_at(self.trainer.step):
            self._validate(log, trackers)

    def save(self, folder: Path) -> None:
        """Write a checkpoint, unless one of this step was written just now."""
        trainer = self.trainer
        if self._saved == (trainer.step, trainer.micro):
            return
        keep = self.config.train.keep_checkpoints
        state = {**trainer.state(), "alarms": self.watch.state()}
        if self.record is not None:
            # before the checkpoint, which takes up what is there: later moments than its own are cut off
            self.record.save(folder / FOLDER, run=folder.name)
            state["record"] = self.record.state()
        save_checkpoint(folder / "checkpoints", trainer.step, trainer.tensors(), state, keep, trainer.micro)
        self._saved = (trainer.step, trainer.micro)

    def _show(self, view: TrainingView, metrics: Metrics, eta_seconds: float) -> None:
        shown = ("loss", "tokens_per_second", "load", "max_violation", "dropped_share")
        note = f"validation loss {self.validation['validation_loss']:.3f}" if self.validation else None
        view.update(
            self.trainer.step,
            eta_seconds=eta_seconds,
            note=note,
            **{k: metrics[k] for k in shown if k in metrics},
        )


def with_own_tokenizer(config: RunConfig, folder: Path) -> RunConfig:
    """A run keeps a copy of its tokenizer: the file that it was given may be gone."""
    own = folder / "tokenizer.json"
    if config.data.tokenizer is None or not own.is_file():
        return config
    return config.replace(data=config.data.replace(tokenizer=str(own.absolute())))


def new_run_folder(config: AnyRunConfig) -> Path:
    """runs/<name>-<n> with the lowest n that is free; made at once, so two processes never share one."""
    base = Path(config.runs_dir)
    if not config.name or Path(config.name).name != config.name:
        raise ConfigError(f"name must be a plain folder name; got {config.name!r}")
    try:
        base.mkdir(parents=True, exist_ok=True)
        for number in range(1, 100_000):
            folder = base / f"{config.name}-{number}"
            try:
                folder.mkdir()
                return folder
            except FileExistsError:
                continue
    except OSError as error:
        raise ConfigError(
            f"runs_dir {str(base)!r} cannot be written: {error.strerror}. Set runs_dir=FOLDER"
        ) from error
    raise ConfigError(f"runs_dir {str(base)!r} holds 100,000 runs named {config.name!r}; choose another name")


def _unfinished(runs_dir: Path) -> Path:
    candidates = [
        path.parent for path in runs_dir.glob("*/config.yaml") if not (path.parent / "final.json").exists()
    ]
    if not candidates:
        raise CheckpointError(f"no unfinished run in {str(runs_dir)!r}. Name one: moekit resume RUN")

    def changed(folder: Path) -> float:
        log = folder / "metrics.jsonl"
        return (log if log.exists() else folder / "config.yaml").stat().st_mtime

    return max(candidates, key=changed)
