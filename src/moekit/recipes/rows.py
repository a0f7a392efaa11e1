"""Rows of results, one file each: what is finished is made once, however often a recipe is run."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moekit.config.atomic import write_json

Row = dict[str, Any]


def kept_row(path: Path, depends: Any, make: Callable[[], Row], said: Callable[[Row], None]) -> Row:
    """A row from its file, where nothing that it depends on has changed; or made and written there.

    Its `processor_seconds` are what all threads of this process took to make it, training and testing together: other
    work on the machine changes them little.

    Args:
        path: of the file.
        depends: all that the row depends on, as far as JSON can say it.
        make: gives it.
        said: called with a row that was made.
    """
    digest = hashlib.sha256(json.dumps(depends, sort_keys=True, default=str).encode()).hexdigest()
    if path.is_file():
        row: Row = json.loads(path.read_text("utf-8"))
        if row.get("of") == digest:
            return row
    began = time.process_time()
    row = {**make(), "of": digest}
    row["processor_seconds"] = time.process_time() - began
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, row)
    said(row)
    return row
