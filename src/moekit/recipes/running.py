"""What a recipe's run does: a sparse model and its dense twin for several seeds, the classical baselines, one table.

Twin and sparse model have equal active parameters and see the same examples in the same order. What is finished lies in
the folder of results, one file a row, and is taken from there the next time, as long as nothing it depends on changed.

A recipe's own module may define any of:

    measure(loaded, data) -> {"name": figure}        figures of a trained run that no metric by name can give
    baseline(name, recipe, config, data) -> row      baselines whose names no registry knows
    notes(loaded, data) -> str                       a sentence about what the trained sparse model does
    run(recipe, variant, seeds, out, short, overrides, say) -> rows         in place of all training
    note(recipe, variant, seeds) -> str              below the table of `run`
    train(config, *, quiet) -> RunResult             what `moekit train recipe:NAME` does
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from moekit.config.atomic import write_json
from moekit.config.errors import ConfigError
from moekit.config.task import ClassTarget
from moekit.config.task_run import TaskRunConfig
from moekit.config.task_transcript import TranscriptTarget
from moekit.data.encoding.entities import EntityEncoder
from moekit.data.encoding.fields import category
from moekit.data.encoding.targets import ClassEncoder, TargetEncoder
from moekit.data.encoding.transcripts import label_lists
from moekit.data.examples import Examples, TaskData
from moekit.data.task_data import load_task_data
from moekit.evaluate.baselines.base import Answers, baselines, fit_baseline, target_columns
from moekit.evaluate.task import predict, truth
from moekit.evaluate.task_metrics import score
from moekit.models.accounting import active_parameters, total_parameters
from moekit.models.twins import dense_twin
from moekit.recipes.experts_of_columns import experts_of_columns, in_words
from moekit.recipes.rows import Row, kept_row
from moekit.recipes.tables import recipe_table
from moekit.recipes.tasks import Measure, Recipe, load_recipe
from moekit.train.material import TaskMaterial
from moekit.train.run import LoadedTask, load_task_run, train_run

Say = Callable[[str], None]
Rows = dict[str, list[Row]]
SPARSE, DENSE = "MoE", "dense twin"
# validation examples whose metrics a row keeps: writing texts with beams takes longer than learning to
VALIDATED = 1000
# metrics that order examples by a class's score, in place of the class itself
OF_SCORES = ("roc_auc",)


def run_recipe(
    name: str, *, variant: str | None = None, seeds: int = 1, out: Path | str = "runs/recipes", short: bool = False,
    overrides: Sequence[str] = (), say: Say = lambda message: None,
) -> dict[str, Any]:  # fmt: skip
    """Everything of a recipe; writes `OUT/NAME-VARIANT.json` (`OUT/NAME.json` of the only variant) and returns it.

    Args:
        name: of the recipe.
        variant: of its data; the first where None.
        seeds: of the trained models.
        out: folder for results and runs.
        short: the small version.
        overrides: `key=value` of the run.
        say: called with lines of text.

    Errors: `ConfigError` for unknown names; those of data, extras and training.
    """
    recipe, out = load_recipe(name), Path(out)
    chosen = recipe.variant(variant)
    code = recipe.code()
    about: dict[str, Any]
    if code is not None and hasattr(code, "run"):
        found: Rows = code.run(recipe, chosen, seeds, out, short, overrides, say)
        about = {"note": code.note(recipe, chosen, seeds) if hasattr(code, "note") else recipe.about}
    else:
        experiment = _Experiment.of(recipe, chosen, out, short, overrides, say)
        found = experiment.rows(seeds)
        about = {"note": experiment.note(seeds), "observed": experiment.observed(found)}
    result = {
        "title": recipe.title_of(chosen, ": ", recipe.title),
        "command": _command(name, chosen if len(recipe.variants) > 1 else None, seeds, short, overrides),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **about,
        "table": recipe_table(found, recipe, chosen),
        "recipe": name,
        "variant": chosen,
        "seeds": seeds,
        "rows": found,
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / f"{recipe.title_of(chosen, '-', name)}.json", result)
    return result


@dataclass
class _Experiment:
    recipe: Recipe
    variant: str
    out: Path
    config: TaskRunConfig
    data: TaskData
    material: TaskMaterial
    code: ModuleType | None
    say: Say

    @classmethod
    def of(
        cls, recipe: Recipe, variant: str, out: Path, short: bool, overrides: Sequence[str], say: Say
    ) -> _Experiment:
        config = recipe.config(variant, short=short, overrides=overrides).replace(runs_dir=str(out / "runs"))
        data = load_task_data(config, say)
        sizes = ", ".join(
            f"{len(part)} to {what}"
            for what, part in (("train on", data.train), ("validate", data.validation), ("test", data.test))
        )
        say(f"{recipe.name} {variant}: examples: {sizes}")
        return cls(recipe, variant, out, config, data, TaskMaterial.of(config, data), recipe.code(), say)

    def rows(self, seeds: int) -> Rows:
        found: Rows = {name: [self._baseline(name)] for name in self.recipe.baselines}
        dense = dense_run(self.config, self.recipe, self.material)
        for seed in range(seeds):
            for kind, run in ((DENSE, dense), (SPARSE, self.config)):
                found.setdefault(kind, []).append(self._trained(kind, run, seed))
        return found

    def _kept(self, name: str, depends: Any, make: Callable[[], Row]) -> Row:
        """A row from its file, or made and written there."""
        path = self.out / "rows" / f"{self.recipe.name}-{self.variant}-{name.replace(' ', '-')}.json"

        def said(row: Row) -> None:
            scores = ", ".join(f"{key} {value:.4f}" for key, value in row["scores"].items())
            self.say(f"{self.recipe.name} {self.variant}: {name}: {scores}; {row['seconds']:.0f} s")

        return kept_row(path, [depends, self.material.fingerprint], make, said)

    def _trained(self, kind: str, run: TaskRunConfig, seed: int) -> Row:
        run = run.replace(train=run.train.replace(seed=seed))

        def make() -> Row:
            began = time.perf_counter()
            trained = train_run(run, data=self.data, quiet=True)
            seconds = time.perf_counter() - began
            loaded = load_task_run(trained.folder)
            extra = {} if not hasattr(self.code, "measure") else self.code.measure(loaded, self.data)  # type: ignore[union-attr]
            model = loaded.config.model
            held = self.data.validation.rows(range(min(VALIDATED, len(self.data.validation))))
            return {
                "scores": {**measured(loaded, self.data.test, self.recipe.measures), **extra},
                "validation": measured(loaded, held, self.recipe.measures),
                "seconds": seconds, "active": active_parameters(model), "total": total_parameters(model),
                "folder": str(trained.folder),
                **{key: value for key, value in trained.final.items() if "validation" in key},
            }  # fmt: skip

        return self._kept(f"{kind} {seed}", run.replace(runs_dir="").to_dict(), make)

    def _baseline(self, name: str) -> Row:
        targets = {measure.target: self.config.targets[measure.target] for measure in self.recipe.measures}
        known = baselines()
        options = self.recipe.options.get(name, {})

        def make() -> Row:
            if name not in known and hasattr(self.code, "baseline"):
                return dict(self.code.baseline(name, self.recipe, self.config, self.data))  # type: ignore[union-attr]
            if name not in known:
                raise ConfigError(
                    f"recipe {self.recipe.name} names a baseline {name!r} that nobody registers"
                )
            wanted = {key: target for key, target in targets.items() if target.kind in known[name].answers}
            fitted = fit_baseline(
                name, self.data.train, self.data.validation, self.config.inputs, wanted, options=options
            )
            said = fitted.predict(self.data.test)
            scores = {
                measure.key: _score_of_baseline(
                    measure,
                    said[measure.target],
                    wanted[measure.target],
                    self.data.test,
                    self.material.encoding.targets[measure.target],
                )
                for measure in self.recipe.measures
                if measure.target in said and _answers(measure, said[measure.target])
            }
            return {"scores": scores, "seconds": fitted.fit_seconds, **fitted.report()}

        inputs = {key: value.to_dict() for key, value in self.config.inputs.items()}
        depends = [name, inputs, {key: value.to_dict() for key, value in targets.items()}]
        # a row of a baseline without options stays what it was
        return self._kept(name, [*depends, options] if options else depends, make)

    def note(self, seeds: int) -> str:
        given = (
            "the given test examples" if self.data.given_test else "a share of the examples that was held out"
        )
        sources = ", ".join(f"{source.name} ({source.licence})" for source in self.data.sources)
        over = "one seed" if seeds == 1 else f"mean ± deviation over {seeds} seeds"
        return (
            f"{self.recipe.about} {len(self.data.train):,} examples to train on, {len(self.data.test):,} to test on "
            f"({given}); {over}; the twin has equal active parameters and sees the same examples in the same order. "
            f"Data: {sources}."
        )

    def observed(self, rows: Rows) -> str:
        """What the first sparse model does: whether experts divide the examples, and what the recipe's module says."""
        folder = Path(rows[SPARSE][0]["folder"])
        if not folder.is_dir():
            return ""
        loaded = load_task_run(folder)
        said = list(in_words(experts_of_columns(loaded, self.data.test)))
        if hasattr(self.code, "notes"):
            said.append(str(self.code.notes(loaded, self.data)))  # type: ignore[union-attr]
        return " ".join(said)


def dense_run(config: TaskRunConfig, recipe: Recipe, material: TaskMaterial) -> TaskRunConfig:
    """The dense twin's run: equal active parameters, and its own learning rate where the recipe has one."""
    twin = dense_twin(material.config.model)
    train = config.train
    if "dense" in recipe.lr:
        train = train.replace(optimizer=train.optimizer.replace(lr=recipe.lr["dense"]))
    return config.replace(name=f"{config.name}-dense", model=twin, train=train)


def measured(loaded: LoadedTask, examples: Examples, measures: Sequence[Measure]) -> dict[str, float]:
    """The metrics of a trained task on examples with answers, by `Measure.key`; none where there are no examples."""
    if len(examples) == 0:
        return {}
    found = predict(loaded.model, loaded.encoding, examples)
    wanted = truth(loaded.encoding, examples)
    scores = {}
    for measure in measures:
        encoder: Any = loaded.encoding.targets[measure.target]
        options = dict(measure.options)
        if measure.metric in OF_SCORES:
            said: Any = _of_scores(found.raw[measure.target])
            options["labels"] = encoder.labels
        elif isinstance(encoder, ClassEncoder):
            said = [answer["prediction"] for answer in found.answers[measure.target]]
        else:
            said = found.raw[measure.target]
        said, known = _where_known(said, wanted[measure.target])
        scores[measure.key] = float(score(measure.metric, said, known, **options))
    return scores


def _where_known(said: Any, wanted: Any) -> tuple[Any, Any]:
    """Answers and truths of the examples whose truth is known; all of them where none is None.

    >>> _where_known(["a", "b"], [None, "b"])
    (['b'], ['b'])
    """
    rows = [row for row, value in enumerate(wanted) if value is not None]
    if len(rows) == len(wanted):
        return said, wanted
    return said[rows] if isinstance(said, np.ndarray) else [said[row] for row in rows], [
        wanted[row] for row in rows
    ]


def _of_scores(scores: Any) -> np.ndarray:
    found = np.asarray(scores)
    return found[:, 1] if found.shape[1] == 2 else found


def _answers(measure: Measure, said: Answers) -> bool:
    return measure.metric not in OF_SCORES or said.class_scores is not None


def _score_of_baseline(
    measure: Measure, said: Answers, target: Any, test: Examples, encoder: TargetEncoder
) -> float:
    wanted: Any = test[target_columns(target)[0]]
    options = dict(measure.options)
    if isinstance(encoder, EntityEncoder):
        assert said.class_scores is not None
        order = encoder.ordered(said.labels, said.class_scores, test)
        return float(score(measure.metric, order, encoder.truth(test), **options))
    of_scores = measure.metric in OF_SCORES
    values, wanted = _where_known(_of_scores(said.class_scores) if of_scores else said.values, wanted)
    if of_scores:
        options["labels"], wanted = (
            [category(label) for label in said.labels],
            [category(one) for one in wanted],
        )
    elif isinstance(target, ClassTarget) and not target.multi:
        values, wanted = [category(value) for value in values], [category(value) for value in wanted]
    elif isinstance(target, TranscriptTarget):
        wanted = [" ".join(labels) for labels in label_lists(target, test)]
    return float(score(measure.metric, values, wanted, **options))


def _command(name: str, variant: str | None, seeds: int, short: bool, overrides: Sequence[str]) -> str:
    parts = ["moekit recipes run", name, *([f"--variant {variant}"] if variant else []), f"--seeds {seeds}"]
    return " ".join([*parts, *(["--short"] if short else []), *overrides])


def run_all(
    *, seeds: int = 1, out: Path | str = "runs/recipes", short: bool = False, names: Sequence[str] = (),
    say: Say = lambda message: None,
) -> dict[str, Any]:  # fmt: skip
    """Every recipe with every variant, or those of `names`; then the table of all, `OUT/recipes.json`, and returns it.

    A recipe that fails is named in the table's note with its error, and the others go on.
    """
    from moekit.recipes.tables import table_of_all
    from moekit.recipes.tasks import recipe_names

    failed: Mapping[str, str] = {}
    for name in names or recipe_names():
        recipe = load_recipe(name)
        for variant in recipe.variants:
            try:
                run_recipe(name, variant=variant, seeds=seeds, out=out, short=short, say=say)
            except Exception as error:  # whatever it is, the other recipes shall run
                failed = {**failed, f"{name} {variant}": f"{type(error).__name__}: {error}"}
                say(f"{name} {variant} failed: {error}")
    result = table_of_all(Path(out), failed)
    write_json(Path(out) / "recipes.json", result)
    return result
