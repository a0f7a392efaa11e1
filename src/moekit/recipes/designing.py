"""What `moekit design` and `moekit tune` search for: a recipe, a task's file or a language model's file by its name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moekit.config.errors import ConfigError, nearest
from moekit.config.loading import load_any_config
from moekit.config.task_run import TaskRunConfig
from moekit.config.train import RunConfig
from moekit.data.examples import Examples
from moekit.design.subject import Subject
from moekit.evaluate.task_metrics import METRICS
from moekit.recipes.quickstart import base_config, quickstart_recipe
from moekit.recipes.running import measured
from moekit.recipes.task_report import measures_of
from moekit.recipes.tasks import Measure, is_task, load_recipe, recipe_names, task_config
from moekit.train.run import LoadedTask

QUICKSTART = "quickstart"


@dataclass(frozen=True)
class RecipeMeasures:
    """The metrics of a task's recipe."""

    measures: tuple[Measure, ...]

    def __call__(self, loaded: LoadedTask, examples: Examples) -> dict[str, float]:
        return measured(loaded, examples, self.measures)


def subject_of(
    task: str, overrides: Sequence[str] = (), *, by: str | None = None, short: bool = False
) -> Subject:
    """The subject that a name stands for.

    Args:
        task: a recipe (`digits`, `digits:small`, `recipe:digits:small`), `quickstart`, or a YAML file.
        overrides: `key=value` of its run.
        by: the figure to improve: a metric such as `label.accuracy`, or `loss`; the recipe's first metric by default,
            the loss of a language model.
        short: the small version of a recipe.

    Errors: `ConfigError` for an unknown name, a recipe that trains by code of its own, or a figure that is not
    measured.
    """
    config, title = _config_of(task, overrides, short)
    if isinstance(config, RunConfig):
        if by not in (None, "loss"):
            raise ConfigError(f"--by must be loss for a language model; got {by!r}. Leave it out")
        return Subject(title, config)
    measures = tuple(measures_of(config))
    named = {measure.key: METRICS[measure.metric].higher_is_better for measure in measures}
    key = by or next(iter(named), "loss")
    if key not in (*named, "loss"):
        raise ConfigError(
            f"--by must be a figure of this task; got {key!r}: {nearest(key, [*named, 'loss'])}"
        )
    return Subject(title, config, key, named.get(key, False), RecipeMeasures(measures))


def _config_of(task: str, overrides: Sequence[str], short: bool) -> tuple[TaskRunConfig | RunConfig, str]:
    name = task.removeprefix("recipe:")
    if name == QUICKSTART:
        config = base_config(quickstart_recipe(short), Path("."), seed=0).replace(name=QUICKSTART)
        return _overridden(config, overrides), QUICKSTART
    if Path(task).suffix in (".yaml", ".yml") or Path(task).is_file():
        if short:
            raise ConfigError(f"--short is for recipes; {task} is a file. Lower its own train.steps")
        found = (
            task_config(task, overrides) if is_task(task) else load_any_config(Path(task), list(overrides))
        )
        return found, Path(task).stem
    base, _, variant = name.partition(":")
    if base not in recipe_names():
        raise ConfigError(f"no recipe or file {task!r}: {nearest(base, [*recipe_names(), QUICKSTART])}")
    recipe = load_recipe(base)
    code = recipe.code()
    if hasattr(code, "run") or hasattr(code, "train"):
        raise ConfigError(
            f"recipe {base} trains by code of its own, which a trial cannot repeat. Name a recipe without a module, "
            "or a configuration file"
        )
    chosen = recipe.variant(variant or None)
    return recipe.config(chosen, short=short, overrides=overrides), recipe.title_of(chosen, ":", base)


def _overridden(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    found = load_any_config(None, list(overrides), preset=config.to_dict())
    assert isinstance(found, RunConfig)
    return found
