"""Fill the tables of README.md and docs/ from the results in docs/results.

    python docs/generate_tables.py            # write
    python docs/generate_tables.py --check    # only compare; exit code 1 where a table is out of date

A result is a JSON file, made by the command that it names:

    {"command": "moekit league ...", "created": "2026-01-31", "title": "...", "note": "...",
     "table": {"columns": ["router", "loss"], "rows": [["softmax", 3.21]]}}

A table is a block between the markers `<!-- table: NAME -->` and `<!-- /table -->`, where NAME is the file's
name without .json. What stands between the markers is replaced.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(
    r"(?P<start><!-- table: (?P<name>[\w.-]+) -->\n)(?P<body>.*?)(?P<end><!-- /table -->)", re.DOTALL
)
OPENING = re.compile(r"<!-- table:")
FIELDS = ("command", "created", "title", "note", "table")


class TableError(Exception):
    """A result or a marker is wrong; the message says which and how."""


def pages(root: Path) -> list[Path]:
    """The Markdown files that may hold tables."""
    return [path for path in [root / "README.md", *sorted((root / "docs").rglob("*.md"))] if path.is_file()]


def filled(text: str, results: Path, where: str) -> str:
    """`text` with every block replaced by the table of its result."""
    blocks = list(BLOCK.finditer(text))
    if len(blocks) != len(OPENING.findall(text)):
        raise TableError(f"{where}: a table marker is not closed by <!-- /table -->")

    def replace(block: re.Match[str]) -> str:
        return f"{block['start']}{render(load(results / (block['name'] + '.json'), where))}{block['end']}"

    return BLOCK.sub(replace, text)


def load(path: Path, where: str) -> dict[str, Any]:
    """A result, checked."""
    if not path.is_file():
        raise TableError(
            f"{where} asks for the table {path.stem}, but there is no {path.name} in {path.parent}"
        )
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    missing = [field for field in FIELDS if field not in result]
    if missing:
        raise TableError(f"{path.name} lacks {', '.join(missing)}")
    width = len(result["table"]["columns"])
    for number, row in enumerate(result["table"]["rows"], 1):
        if len(row) != width:
            raise TableError(f"{path.name}: row {number} has {len(row)} cells; there are {width} columns")
    return result


def render(result: dict[str, Any]) -> str:
    """Markdown of a result: title, table, note and the command that repeats it."""
    columns, rows = result["table"]["columns"], result["table"]["rows"]
    right = [
        bool(rows) and all(_is_number(row[i]) or row[i] is None for row in rows) for i in range(len(columns))
    ]
    lines = [f"**{result['title']}**", ""] if result["title"] else []
    lines.append(_row(columns))
    lines.append(_row(["---:" if numeric else "---" for numeric in right]))
    lines += [_row([cell(value) for value in row]) for row in rows]
    lines += ["", result["note"]] if result["note"] else []
    lines += ["", f"Made by `{result['command']}` on {result['created']}."]
    return "\n".join(lines) + "\n"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(text.replace('|', '&#124;') for text in cells)} |"


def cell(value: Any) -> str:
    """A value as it is printed: four digits that count, thousands apart, a dash for none."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def _is_number(value: Any) -> bool:
    if isinstance(value, str):
        return re.fullmatch(r"–|[-−]?[\d,.]+%?( ± [\d,.]+%?)?", value) is not None
    return isinstance(value, int | float) and not isinstance(value, bool)


def main(arguments: list[str] | None = None) -> int:
    """Write or check the tables; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="change nothing; fail where a table is out of date"
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout")
    options = parser.parse_args(arguments)
    stale = []
    for page in pages(options.root):
        old = page.read_text(encoding="utf-8")
        name = str(page.relative_to(options.root))
        try:
            new = filled(old, options.root / "docs" / "results", name)
        except TableError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        if new != old:
            stale.append(name)
            if not options.check:
                page.write_text(new, encoding="utf-8")
    for name in stale:
        print(f"{name}: {'out of date; run python docs/generate_tables.py' if options.check else 'written'}")
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
