"""The report of `moekit fit`: what a memory holds of a model in each precision, and what to expect of the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moekit.config.errors import ConfigError
from moekit.observe.record import RoutingRecord
from moekit.serve.memory_plan import MemoryPlan, plan_memory, precisions_of, program_bytes
from moekit.serve.model_source import find_source
from moekit.serve.record_forecast import forecast


def fit_report(
    model: str | Path,
    memory: str | int | float,
    *,
    context: int | None = None,
    precision: str = "auto",
    record: RoutingRecord | None = None,
) -> dict[str, Any]:
    """What of a model fits a memory; JSON-ready.

    Args:
        model: a run, a folder of moekit, or a Hugging Face folder or name.
        memory, context, precision: see `plan_memory`.
        record: what routers decided on text like that to come: adds the hit rates to be expected.

    Errors: `ConfigError` where not even one token's experts fit.
    """
    source = find_source(model)
    try:
        plan = plan_memory(source, memory, context=context, precision=precision)
        choices = []
        for one in precisions_of(source):
            wanted = plan_memory(source, None, context=context, precision=one)
            try:
                share = plan_memory(source, memory, context=context, precision=one).share_in_memory
            except ConfigError:  # too little for it, or quantised at opening and not wholly in memory
                share = None
            choices.append({
                "precision": wanted.precision, "option": one, "exact": wanted.exact,
                "expert_bytes": wanted.expert_bytes, "total_bytes": wanted.total_bytes,
                "share_in_memory": share, "chosen": wanted.precision == plan.precision,
            })  # fmt: skip
    finally:
        source.close()
    report = {"model": str(model), **plan.report(), "program_bytes": program_bytes(), "precisions": choices}
    if record is not None:
        report["expected"] = forecast(record, plan)
    return {**report, "advice": _advice(plan, report)}


def _advice(plan: MemoryPlan, report: dict[str, Any]) -> str:
    if plan.fits_wholly and plan.exact:
        return "Everything stays in memory, as it is stored."
    if plan.fits_wholly:
        words = f"Everything stays in memory in {plan.precision}, which is not exact: measure it with moekit evaluate"
        if plan.precision in ("int8", "int4"):
            words += (
                f", and prefer codes chosen on text: moekit compress quantize --bits {plan.precision[3:]}"
            )
        return f"{words}. --precision stored keeps every bit, with experts on disk."
    smaller = [one for one in report["precisions"] if one["share_in_memory"] == 1.0]
    words = (
        f"{plan.share_in_memory:.0%} of the experts' bytes stay in memory, the others are read when needed"
    )
    if smaller:
        return f"{words}. All would stay with --precision {smaller[0]['option']}, which is not exact."
    return f"{words}. Fewer bytes per expert are read faster: moekit compress quantize."
