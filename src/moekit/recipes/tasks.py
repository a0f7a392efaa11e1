"""Recipes: a task's data, model, training, metrics and baselines as one YAML file; and configurations of tasks by name.

What a recipe's run does is in `moekit.recipes.running`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module, resources
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from moekit.config.errors import ConfigError, nearest
from moekit.config.loading import apply_overrides, load_any_config
from moekit.config.task_run import TaskRunConfig
from moekit.config.yamlio import dump_yaml
from moekit.data.encoding.targets import ClassEncoder
from moekit.train.material import TaskMaterial
from moekit.train.run import RunResult, train_run

FOLDER = "moekit.recipes.catalogue"


@dataclass(frozen=True)
class Measure:
    """A metric of one target: its name in `moekit.evaluate.task_metrics`, and options.

    >>> Measure("film", "hits_at_k", {"k": 3}).key
    'film.hits_at_k(k=3)'
    """

    target: str
    metric: str
    options: Mapping[str, Any]

    @property
    def label(self) -> str:
        """The metric with its options."""
        said = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.metric}({said})" if said else self.metric

    @property
    def key(self) -> str:
        """What a row of results calls it."""
        return f"{self.target}.{self.label}"


@dataclass(frozen=True)
class Recipe:
    """One file of the catalogue.

    Attributes: name; title; about: one sentence; minutes: with one seed on two cores; measures: by target, the first is
        the main one; baselines: classical ones, by name; options: of
        baselines that have some, by name; variants: changes of `run` for other data, by name;
        published: figures by variant, with their source; run: the configuration; short: its changes for continuous
        integration; lr: learning rates of single models, such as `dense`; module: of code that is only this
        recipe's, see `moekit.recipes.running`; data, licence: where no source says them.
    """

    name: str
    title: str
    about: str
    minutes: float
    measures: tuple[Measure, ...]
    baselines: tuple[str, ...]
    variants: Mapping[str, Mapping[str, Any]]
    published: Mapping[str, Sequence[Mapping[str, Any]]]
    run: Mapping[str, Any]
    short: Mapping[str, Any]
    lr: Mapping[str, float]
    module: str | None = None
    data: str = ""
    licence: str = ""
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def variant(self, name: str | None) -> str:
        """The name of a variant, of the first one where None. Errors: `ConfigError` with the nearest name."""
        chosen = name if name is not None else next(iter(self.variants))
        if chosen not in self.variants:
            raise ConfigError(
                f"recipe {self.name} has no variant {chosen!r}: {nearest(chosen, self.variants)}"
            )
        return chosen

    def title_of(self, variant: str, between: str, name: str) -> str:
        """`name`, and the variant behind it where there are several."""
        return name if len(self.variants) == 1 else f"{name}{between}{variant}"

    def code(self) -> ModuleType | None:
        """The module with code that is only this recipe's."""
        return None if self.module is None else import_module(self.module)

    def config(
        self, variant: str | None = None, *, short: bool = False, overrides: Sequence[str] = ()
    ) -> TaskRunConfig:
        """The configuration of the sparse model's run.

        Errors: `ConfigError` for an unknown variant, with the nearest name, and for overrides that do not fit.
        """
        chosen = self.variant(variant)
        data = laid_over(dict(self.run), self.variants[chosen])
        if short:
            data = laid_over(data, self.short)
        apply_overrides(data, list(overrides))
        if data.get("data", {}).get("path") is not None:
            data["data"] = {**data["data"], "source": None}
        return TaskRunConfig.from_dict({"name": self.name, "recipe": f"{self.name}:{chosen}", **data})


def laid_over(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` upon `base`, group by group; a group with another `kind` replaces the whole group, null takes it away.

    >>> laid_over({"ear": {"stride": 1}, "eye": {"patch": 4}}, {"ear": {"stride": 2}, "eye": None})
    {'ear': {'stride': 2}}
    """
    found = dict(base)
    for key, value in over.items():
        below = found.get(key)
        if value is None and isinstance(below, Mapping):
            del found[key]
            continue
        other = isinstance(value, Mapping) and isinstance(below, Mapping) and (
            "kind" in value and value["kind"] != below.get("kind")
        )  # fmt: skip
        both = isinstance(value, Mapping) and isinstance(below, Mapping) and not other
        found[key] = laid_over(below, value) if both else value  # type: ignore[arg-type]
    return found


def recipe_names() -> list[str]:
    """All recipes, sorted."""
    files = resources.files(FOLDER).iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def load_recipe(name: str) -> Recipe:
    """A recipe of the catalogue. Errors: `ConfigError` with the nearest name."""
    if name not in recipe_names():
        raise ConfigError(f"recipe {name!r} is unknown: {nearest(name, recipe_names())}")
    data = yaml.safe_load((resources.files(FOLDER) / f"{name}.yaml").read_text("utf-8"))
    baselines = dict(_named(data.get("baselines", ())))
    return Recipe(
        name=name, title=data["title"], about=data["about"], minutes=data["minutes"],
        measures=_measures(data.get("metrics", {})), baselines=tuple(baselines),
        variants=data.get("variants") or {name: {}}, published=data.get("published", {}), run=data["run"],
        short=data.get("short", {}), lr=data.get("lr", {}), module=data.get("module"),
        data=data.get("data", ""), licence=data.get("licence", ""),
        options={baseline: options for baseline, options in baselines.items() if options},
    )  # fmt: skip


def recipe_yaml(name: str, variant: str | None = None) -> str:
    """The whole configuration of a recipe's run, as YAML to start from."""
    return dump_yaml(load_recipe(name).config(variant).to_dict())


def _measures(metrics: Mapping[str, Sequence[Any]]) -> tuple[Measure, ...]:
    return tuple(
        Measure(target, metric, options)
        for target, names in metrics.items()
        for metric, options in _named(names)
    )


def _named(names: Sequence[Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Names with their options: a list of names, and of mappings from one name to its options.

    >>> list(_named(["majority", {"crf": {"min_count": 2}}]))
    [('majority', {}), ('crf', {'min_count': 2})]
    """
    for name in names:
        ((said, options),) = name.items() if isinstance(name, Mapping) else [(name, {})]
        yield said, options


def task_config(config: str, overrides: Sequence[str] = ()) -> TaskRunConfig:
    """The configuration of a task: `recipe:NAME`, `recipe:NAME:VARIANT`, or a YAML file with inputs and targets.

    Errors: `ConfigError` for an unknown recipe and for the file of a language model.
    """
    if config.startswith("recipe:"):
        _, name, *variant = config.split(":")
        return load_recipe(name).config(variant[0] if variant else None, overrides=overrides)
    found = load_any_config(config, overrides)
    if not isinstance(found, TaskRunConfig):
        raise ConfigError(f"{config} has no inputs and targets, so it describes no task")
    return found


def train_task(config: str, overrides: Sequence[str] = (), *, quiet: bool = False) -> RunResult:
    """Train what `task_config` names, as its recipe's own module does where that has a `train`.

    Errors: those of `task_config` and of the training.
    """
    run = task_config(config, overrides)
    name = (run.recipe or "").split(":")[0]
    code = load_recipe(name).code() if name in recipe_names() else None
    if hasattr(code, "train"):
        result: RunResult = code.train(run, quiet=quiet)  # type: ignore[union-attr]
        return result
    return train_run(run, quiet=quiet)


def is_task(config: str) -> bool:
    """Whether this names a recipe, or a file with inputs or targets; broken files are nobody's, and fail where read."""
    if config.startswith("recipe:"):
        return True
    try:
        found = yaml.safe_load(Path(config).read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(found, Mapping) and ("inputs" in found or "targets" in found)


def validate_task(config: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read and encode all examples of a task: how many there are, and the sizes that follow from them.

    Errors: those of files, sources and encoders, with file, line and column.
    """
    run = task_config(config, overrides)
    material = TaskMaterial.of(run)
    test = material.encoding.encode(material.data.test)
    parts = (material.data.validation, material.data.test)
    unseen = {
        name: sorted({label for part in parts for label in encoder.unseen(part)})
        for name, encoder in material.encoding.targets.items()
        if isinstance(encoder, ClassEncoder)
    }
    return {
        "examples": {"train": len(material.train), "validation": len(material.held), "test": len(test)},
        "stems": {name: stem.to_dict() for name, stem in material.config.model.stems.items()},
        "heads": {name: type(head).__name__.removesuffix("HeadConfig").lower() for name, head in
                  material.config.model.heads.items()},
        "classes_unseen_in_training": unseen,
        "entities_unseen_in_training": material.encoding.unseen_entities(parts),
        "longest": int(material.train.lengths.max(initial=0)),
        "steps": material.config.train.steps,
    }  # fmt: skip
