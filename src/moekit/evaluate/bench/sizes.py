"""What every subject's sizes must hold."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from moekit.config.errors import require


def check_sizes(shape: Any) -> None:
    """Each field of the dataclass at least 1, and no more choices (`top_k`) than `experts`.

    Errors: `ConfigError`, naming the option of the command line that the field comes from.
    """
    for name, value in asdict(shape).items():
        require(value >= 1, f"--{name.replace('_', '-')}", value, "must be at least 1")
    require(
        shape.top_k <= shape.experts, "--top-k", shape.top_k, f"must be at most --experts ({shape.experts})"
    )
