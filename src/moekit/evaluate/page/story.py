"""The sections that let a reader judge and repeat the run: samples, sources, settings, machine, notes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moekit.evaluate.charts.numbers import format_bytes, format_count, format_number, is_number
from moekit.evaluate.charts.theme import escape
from moekit.evaluate.page.blocks import facts, section, table
from moekit.evaluate.page.headline import present
from moekit.evaluate.page.schema import MODEL_COLOURS, MODEL_NAMES

Report = Mapping[str, Any]
_SETTINGS = {"lr": "learning rate", "seq_len": "sequence length", "batch_size": "sequences per batch"}


def samples_section(report: Report) -> str:
    """Text that each model wrote."""
    cards = ""
    for name in present(report):
        sample = report["models"][name]["sample"]
        if sample.strip():
            cards += (
                f'<div><h3><span class="swatch {MODEL_COLOURS[name]}"></span>{MODEL_NAMES[name]}</h3>'
                f'<pre dir="auto">{escape(sample)}</pre></div>'
            )
    if not cards:
        return ""
    intro = (
        "Written by the models after training, as it came. After minutes of training, expect the look of the "
        "language and little sense."
    )
    return section("samples", "Sample text", intro, f'<div class="samples">{cards}</div>')


def made_section(report: Report) -> str:
    """Models, corpus with licences, settings, machine, and the command that repeats the run."""
    corpus, machine = report["corpus"], report["machine"]
    models = table(
        ["model", "description"],
        [
            (MODEL_NAMES[name], escape(report["models"][name]["description"]))
            for name in present(report)
            if report["models"][name]["description"]
        ],
    )
    sources = table(
        ["source", "origin", "licence", "note"],
        [
            tuple(escape(source.get(key) or "") for key in ("name", "origin", "licence", "note"))
            for source in corpus["sources"]
        ],
    )
    text = [
        ("corpus", corpus["name"]),
        ("training tokens in the corpus", format_count(corpus["train_tokens"])),
        ("validation tokens", format_count(corpus["validation_tokens"])),
        ("vocabulary", f"{corpus['vocab_size']:,} tokens"),
        ("held-out domain", corpus["held_out_domain"] or "none"),
        *((f"text: {domain}", format_bytes(size)) for domain, size in corpus["bytes"].items()),
    ]
    cores = format_count(machine["cores"])
    computer = [
        ("processor", machine["cpu"]),
        ("cores", cores),
        ("memory", format_bytes(machine["memory_bytes"])),
        ("device", machine["device"]),
        ("precision", machine["precision"]),
        ("PyTorch", machine["torch"]),
        ("moekit", report["moekit_version"]),
        ("run on", report["created"]),
    ]
    settings = [
        (_SETTINGS.get(key, key.replace("_", " ")), _setting(value))
        for key, value in report["settings"].items()
    ]
    note = f"<p>{escape(corpus['note'])}</p>" if corpus.get("note") else ""
    return section(
        "made",
        "How this was made",
        "",
        f"<p>Repeat the run with</p><pre class='command'>{escape(report['command'])}</pre>",
        f"<h3>Models</h3>{models}",
        f"<h3>Corpus</h3>{note}{sources}{facts(text)}",
        f"<h3>Settings</h3>{facts(settings)}",
        f"<h3>Machine</h3>{facts(computer)}",
    )


def notes_section(report: Report) -> str:
    """What the run wants said about itself."""
    items = "".join(f"<li>{escape(note)}</li>" for note in report["notes"])
    return section("notes", "Notes", "", f"<ul>{items}</ul>") if items else ""


def _setting(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(
            f"{MODEL_NAMES.get(str(key), str(key))} {_setting(item)}" for key, item in value.items()
        )
    if isinstance(value, (list, tuple)):
        return ", ".join(_setting(item) for item in value)
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if is_number(value):
        return (
            f"{value:.4g}" if value and abs(value) < 0.01 else format_number(value, 4).rstrip("0").rstrip(".")
        )
    return str(value)
