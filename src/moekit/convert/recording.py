"""The routing of a Hugging Face model on text: computed by transformers, read through the seam, explained on a page.

Shape legend: B texts of a batch, S tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moekit.config.data import DataConfig
from moekit.config.errors import ConfigError, require
from moekit.convert.foreign import transformers_model
from moekit.data.documents import Document
from moekit.data.sources import local_documents
from moekit.data.tokenizer import Tokenizer, load_tokenizer
from moekit.explain.run import PAGE, write_page
from moekit.explain.summary import summarise
from moekit.observe.foreign import record_model
from moekit.observe.record import RoutingRecord

LENGTH, BATCH = 256, 16


def explain_folder(
    folder: Path, paths: Sequence[Path], out: Path | None = None, *, tokens: int = 50_000,
    progress: Callable[[str], None] = lambda message: None,
) -> tuple[Path, dict[str, Any]]:  # fmt: skip
    """The page of a Hugging Face folder's model on the text in `paths`, and its report; see `record_folder`.

    Args: out: the page; `explain.html` in the folder by default.
    """
    record = record_folder(folder, paths, tokens=tokens, progress=progress)
    tokenizer = load_tokenizer(folder / "tokenizer.json", exact=False)
    report = summarise(record, tokenizer=tokenizer, title=folder.absolute().name)
    return write_page(folder / PAGE if out is None else out, report), report


def record_folder(
    folder: Path, paths: Sequence[Path], *, tokens: int = 50_000, length: int = LENGTH, batch_size: int = BATCH,
    progress: Callable[[str], None] = lambda message: None,
) -> RoutingRecord:  # fmt: skip
    """The routing record of a Hugging Face folder's model, computed by transformers.

    Args:
        folder: with config.json, weights and tokenizer.json.
        paths: files or folders of text. Groups are the folders directly below a folder, or the files that are named.
        tokens: at most so many are read, of each group about as many; each has a row in the record.
        length: a document is read in pieces of so many tokens.
        batch_size: pieces at a time.
        progress: called with a line of text.

    Errors: `ConfigError` for a model without experts or tokenizer, `DataError` for text or weights that cannot be read,
    `MissingExtraError` without transformers.
    """
    require(bool(paths), "--data", "missing", "must name text for the model to read",
            "Give files or folders: --data prose.txt --data code/")  # fmt: skip
    if not (folder / "tokenizer.json").is_file():
        raise ConfigError(f"{folder} has no tokenizer.json, so that no text can be given to it")
    tokenizer = load_tokenizer(folder / "tokenizer.json", exact=False)
    documents = [document for path in paths for document in _documents(path, progress)]
    groups = sorted({document.domain for document in documents})
    model = transformers_model(folder)
    most = getattr(model.config, "max_position_embeddings", None) or length
    pieces = cut(tokenizer, documents, groups, tokens, min(length, most))
    n_tokens = sum(len(ids) for ids, *_ in pieces)
    progress(f"reading {n_tokens:,} tokens of {len(groups)} group{'s' if len(groups) > 1 else ''}")
    return record_model(
        model, batches(pieces, batch_size), groups=groups, most=n_tokens, run=folder.absolute().name,
    )  # fmt: skip


def _documents(path: Path, progress: Callable[[str], None]) -> list[Document]:
    """Texts of a file or folder, with the names that their groups have where the path does not say more."""
    found, _ = local_documents(DataConfig(corpus=None, path=str(path)), progress)
    own = path.absolute().stem if path.is_file() else path.absolute().name
    return [
        replace(document, domain=own) if path.is_file() or document.domain == "text" else document
        for document in found
    ]


Piece = tuple[list[int], int, int, int]  # token ids, group, document, place of the first token


def cut(
    tokenizer: Tokenizer, documents: Sequence[Document], groups: Sequence[str], tokens: int, length: int
) -> list[Piece]:
    """Documents in pieces of `length` tokens; of each group at most its share of `tokens`, from all its documents."""
    share = max(tokens // max(len(groups), 1), 1)
    found: list[Piece] = []
    for number, group in enumerate(groups):
        mine = [(place, document) for place, document in enumerate(documents) if document.domain == group]
        mine = [one for one in mine if one[1].text.strip()]
        # of many documents some, from the first to the last, so that each is long enough to be read
        n_read = min(len(mine), max(1, 2 * share // length))
        mine = [mine[rank * len(mine) // n_read] for rank in range(n_read)]
        left = share
        for rank, (place, document) in enumerate(mine):
            # what shorter ones leave, longer ones may have; of a long one no more is encoded than can be used
            room = -(-left // (len(mine) - rank))
            ids = tokenizer.encode(document.text[: 16 * room])[:room]
            left -= len(ids)
            found += [
                (ids[start : start + length], number, place, start) for start in range(0, len(ids), length)
            ]
    return [piece for piece in found if len(piece[0]) > 1]


def batches(pieces: Sequence[Piece], size: int) -> Iterator[dict[str, torch.Tensor]]:
    """What `record_model` reads: `[B, S]` ids and mask, `[B]` groups and texts, `[B, S]` positions in the document."""
    order = np.argsort(
        [-len(ids) for ids, *_ in pieces], kind="stable"
    )  # pieces of a batch are about equally long
    for start in range(0, len(order), size):
        chosen = [pieces[place] for place in order[start : start + size]]
        width = max(len(ids) for ids, *_ in chosen)
        token_ids = torch.zeros(len(chosen), width, dtype=torch.long)
        mask = torch.zeros(len(chosen), width, dtype=torch.long)
        for row, (ids, *_) in enumerate(chosen):
            token_ids[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids)] = 1
        first = torch.tensor([place for *_, place in chosen])
        yield {
            "input_ids": token_ids, "attention_mask": mask, "groups": torch.tensor([group for _, group, *_ in chosen]),
            "texts": torch.tensor([text for _, _, text, _ in chosen]),
            "positions": first[:, None] + torch.arange(width),
        }  # fmt: skip
