"""`moekit explain`: the record of a run, its report and its page."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from moekit.config.atomic import write_text
from moekit.config.errors import ConfigError
from moekit.data.loader import Batch, evaluation_batches
from moekit.data.packing import TokenizedSplit
from moekit.data.prepare import prepare
from moekit.data.tokenizer import load_tokenizer
from moekit.explain.page import render_explain_page
from moekit.explain.reading import TOKENS, record_split
from moekit.explain.specialists import DRAWS, CausalCheck, Verdict, ways_of
from moekit.explain.summary import summarise
from moekit.observe.record import JSON_FILE, RoutingRecord
from moekit.observe.recorder import layers_of
from moekit.train.device import resolve_device, resolve_dtype
from moekit.train.run import LoadedRun, load_run, require_same_data

PAGE = "explain.html"
# batches that are recorded token by token for the sample texts, and that an expert's absence is measured on
SAMPLE_BATCHES, CAUSE_BATCHES = 4, 8


def explain(
    source: Path, out: Path | None = None, *, tokens: int = TOKENS, causes: bool = False,
    progress: Callable[[str], None] = lambda message: None,
) -> tuple[Path, dict[str, Any]]:  # fmt: skip
    """The page of a run or of a routing record, and its report, which is written as JSON beside it.

    Args:
        source: folder of a language model's run, or of a routing record.
        out: the page; `explain.html` in the folder by default.
        tokens: about so many tokens of a run get a row of their own.
        causes: switch experts of a run off, and measure what the groups miss.
        progress: called with a line of text.

    Errors: `ConfigError` for a model without experts, or causes of a record; `CheckpointError` for a folder that is no
    run; `DataError` for a record that is damaged.
    """
    page = source / PAGE if out is None else out
    if (source / JSON_FILE).is_file():
        if causes:
            raise ConfigError(
                f"{source} is a record: causes need the model that it was made with. Give its run's folder"
            )
        report = _of_record(source)
    else:
        report = _of_run(source, tokens, causes, progress)
    return write_page(page, report), report


def write_page(page: Path, report: Mapping[str, Any]) -> Path:
    """The page of a report, and the report itself beside it as JSON."""
    write_text(page, render_explain_page(report))
    write_text(page.with_suffix(".json"), json.dumps(report, ensure_ascii=False, allow_nan=False) + "\n")
    return page


def _of_record(folder: Path) -> dict[str, Any]:
    record = RoutingRecord.load(folder)
    if not record.layers:
        raise ConfigError(f"{folder} has no sparse layer: there are no experts to explain")
    own = next((path for path in (folder, folder.parent) if (path / "tokenizer.json").is_file()), None)
    tokenizer = None if own is None else load_tokenizer(own / "tokenizer.json", exact=False)
    return summarise(record, tokenizer=tokenizer, title=str(record.info.get("run", folder.name)))


def _of_run(folder: Path, tokens: int, causes: bool, progress: Callable[[str], None]) -> dict[str, Any]:
    run = load_run(folder)
    if not layers_of(run.model):
        raise ConfigError(f"{folder} is a dense model: it has no experts to explain")
    data = prepare(run.config.data)
    require_same_data(run.folder, data)
    split = data.validation
    progress(f"reading {split.n_tokens:,} tokens of the validation split")
    record = record_split(run, split, tokens=tokens)
    # rows of single tokens are a sample; texts that are read want every token
    samples = record_split(run, split, tokens=split.n_tokens, max_batches=SAMPLE_BATCHES)
    verdicts = verdicts_of(run, split, record, progress) if causes else None
    return summarise(
        record, tokenizer=run.tokenizer, samples=samples, verdicts=verdicts, title=run.folder.name
    )


def verdicts_of(
    run: LoadedRun, split: TokenizedSplit, record: RoutingRecord, progress: Callable[[str], None],
    *, max_batches: int = CAUSE_BATCHES, draws: int = DRAWS,
) -> list[Verdict]:  # fmt: skip
    """Each group's specialists of each layer switched off: whether the group misses them more than the others do.

    Args:
        run: of a language model.
        split: the text. record: of it.
        progress: called with a line of text.
        max_batches: of the text that each edit is measured on.
        draws: sets of random experts that each set is compared with.

    Errors: `ConfigError` for text of one group, which nothing is compared with.
    """
    n_groups = len(record.groups)
    if n_groups < 2:
        raise ConfigError(
            f"--causes compares groups of text; this run has one: {record.groups[0]}. Run without it"
        )
    device = resolve_device(run.config.train.device)
    dtype = resolve_dtype(run.config.train.precision, device)
    run.model.to(device)

    def batches() -> Iterable[Batch]:
        return evaluation_batches(
            split, run.config.train.batch_size, run.config.data.seq_len, max_batches=max_batches
        )

    check = CausalCheck(run.model, batches, n_groups, device, dtype, draws=draws)
    found: list[Verdict] = []
    for layer in range(len(record.layers)):
        counts, requested = record.of(layer, "counts"), record.of(layer, "requested")
        found += check.layer(
            layer, counts, requested, ways_of(record, layer), groups=record.groups, progress=progress
        )
    return found


def in_words(report: Mapping[str, Any]) -> list[str]:
    """What the command line says of a report."""
    alarms = [f"{alarm['kind']}: {alarm['words']} {alarm['remedy']}" for alarm in report["alarms"]]
    claims = [
        f"layer {number}: specialisation by group {layer['claim']['value']:.1%}, {layer['claim']['words']}"
        for number, layer in enumerate(report["layers"])
        if layer["claim"]
    ]
    return [report["verdict"], *alarms, *claims]
