"""Check that a quickstart left a complete report: python .ci/check_report.py FOLDER."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

MODELS = ("dense", "transformer_xl", "moe")
FIELDS = (
    "active_parameters",
    "total_parameters",
    "tokens",
    "train_tokens_per_second",
    "inference_tokens_per_second",
    "peak_memory_bytes",
)


def check(folder: Path) -> list[str]:
    """What is missing or wrong in `report.json` and `report.html`, one line each."""
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    numbers: dict[str, object] = {}
    for model in MODELS:
        part = report.get("models", {}).get(model, {})
        for field in FIELDS:
            numbers[f"models.{model}.{field}"] = part.get(field)
        bits = part.get("bits_per_byte", {})
        numbers[f"models.{model}.bits_per_byte.mean"] = bits.get("mean")
        for domain in [name for name in bits if name != "mean"] or ["<domain>"]:
            numbers[f"models.{model}.bits_per_byte.{domain}"] = bits.get(domain)
    # null where the sparse model did not reach the dense twin's loss, as in a run of a few steps
    gain = report.get("to_dense_loss", {})
    wrong = [
        f"{name} must be a number; got {value!r}" for name, value in numbers.items() if not _finite(value)
    ]
    wrong += [
        f"to_dense_loss.{name} is missing" for name in ("steps_share", "seconds_share") if name not in gain
    ]
    page = folder / "report.html"
    if not page.is_file() or "<svg" not in page.read_text(encoding="utf-8"):
        wrong.append("report.html is missing or has no charts")
    return wrong


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


if __name__ == "__main__":
    problems = check(Path(sys.argv[1]))
    print("\n".join(problems) or f"{sys.argv[1]}: report.json and report.html are complete")
    sys.exit(1 if problems else 0)
