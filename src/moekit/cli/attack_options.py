"""Options of `moekit evaluate --attack`, and its tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def attack_options(function: F) -> F:
    """Adds the options that `attacked` reads."""
    for option in reversed((
        click.option("--attack", type=click.Choice(["pgd"]), help="measure under this attack: answers and routes"),
        click.option("--epsilon", type=float, help="size of the attack: 0.1 is a tenth from black to white  [0.1]"),
        click.option("--attack-steps", type=click.IntRange(min=1), help="steps of the attack  [40]"),
        click.option("--restarts", type=click.IntRange(min=1), help="attacks on each example  [1]"),
        click.option("--attack-set", multiple=True, metavar="KEY=VALUE",
                     help="another key of the attack, such as norm=l2; may be given again"),
        click.option("--attack-examples", type=click.IntRange(min=1), help="attack an even sample of so many"),
        click.option("--attack-checks", is_flag=True, help="look for gradients that mislead the attack"),
        click.option("--transfer-from", type=click.Path(path_type=Path), metavar="RUN",
                     help="make the attack on the model of this run"),
    )):  # fmt: skip
        function = option(function)
    return function


def attacked(run: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """The report of a run under the attack that the options describe.

    Errors: `ConfigError` for a key or value that an attack does not have.
    """
    from moekit.config.adversarial import AttackConfig
    from moekit.config.loading import apply_overrides
    from moekit.evaluate.attacked import evaluate_attack

    fields: dict[str, Any] = {"steps": given["attack_steps"] or 40}
    apply_overrides(fields, given["attack_set"])
    if given["epsilon"] is not None:
        fields["epsilon"] = given["epsilon"]
    return evaluate_attack(
        run, AttackConfig.from_dict(fields, where="attack"), examples=given["attack_examples"],
        restarts=given["restarts"] or 1, checks=given["attack_checks"], transfer_from=given["transfer_from"],
    )  # fmt: skip


def print_attack(report: Mapping[str, Any]) -> None:
    """The tables for people: answers, routes of each layer, checks."""
    from moekit.cli.output import print_result

    attack = report["attack"]
    made = f"PGD-{attack['steps']}, epsilon {attack['epsilon']:g} ({attack['norm']})"
    ways = ["clean", "attack", "noise"]
    rows = [
        [f"accuracy: {name}", *(f"{found[way]:.1%}" for way in ways)]
        for name, found in report["accuracy"].items()
    ]
    rows.append(["loss", *(f"{report['loss'][way]:.4f}" for way in ways)])
    if report["layers"]:
        for kind in ("set", "heaviest"):
            name = "set of experts" if kind == "set" else "heaviest expert"
            for layer in report["layers"]:
                cells = [f"{layer[way][kind]:.1%}" for way in ways[1:]]
                rows.append([f"other {name}: {layer['layer']}", "–", *cells])
            rows.append(
                [
                    f"other {name}: all layers",
                    "–",
                    *(f"{report['routes'][way][kind]:.1%}" for way in ways[1:]),
                ]
            )
    title = f"{report['run']}: {report['examples']} examples under {made}"
    print_result({"title": title, "table": {"columns": ["", *ways], "rows": rows}})
    if "checks" in report:
        lines = [
            [row["check"], f"{row['accuracy']:.1%}", row["rule"], "yes" if row["passed"] else "NO"]
            for row in report["checks"]
        ]
        columns = ["gradients", "accuracy", "must be", "holds"]
        print_result({"title": "Does the attack mislead?", "table": {"columns": columns, "rows": lines}})
