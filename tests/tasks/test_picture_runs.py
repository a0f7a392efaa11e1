"""Boxes, masks, clips and transcripts from examples to a trained run, its answers and its metrics."""

from __future__ import annotations

import json

import numpy as np
import pytest

from moekit.cli.main import main
from moekit.config.task_run import TaskRunConfig
from moekit.data.examples import Examples, TaskData
from moekit.evaluate.answers import answers_to
from moekit.evaluate.task import predict, truth
from moekit.evaluate.task_metrics import score
from moekit.train.run import LoadedTask, load_task_run, train_run

WORDS = {"a": (1.0, -1.0), "b": (-1.0, -1.0), "c": (0.0, 2.0)}


def scenes(n: int, seed: int) -> Examples:
    """A bright square or a dim bar in a picture, its pixels, a clip in which it goes left or right, and words."""
    rng = np.random.default_rng(seed)
    columns: dict[str, list] = {
        name: [] for name in ("image", "boxes", "labels", "mask", "clip", "way", "frames", "said")
    }
    for _ in range(n):
        kind, way = str(rng.choice(["bar", "square"])), str(rng.choice(["left", "right"]))
        height, width = (6, 6) if kind == "square" else (3, 9)
        y, x = int(rng.integers(16 - height)), int(rng.integers(16 - width))
        image = np.zeros((16, 16), np.uint8)
        image[y : y + height, x : x + width] = 250 if kind == "square" else 120
        step = 1 if way == "right" else -1
        words = [str(rng.choice(list(WORDS))) for _ in range(rng.integers(1, 4))]
        frames = [rng.normal(WORDS[word], 0.2, (rng.integers(3, 6), 2)) for word in words]
        # a pause between, so that a word twice is two
        frames = [part for each in frames for part in (each, rng.normal(0, 0.2, (2, 2)))]
        columns["image"].append(image[..., None])
        columns["boxes"].append([[y, x, height, width]])
        columns["labels"].append([kind])
        columns["mask"].append((image > 0) * (1 + (kind == "square")))
        columns["clip"].append(np.stack([np.roll(image, step * time, axis=1) for time in range(4)]))
        columns["way"].append(way)
        columns["frames"].append(np.concatenate(frames).astype(np.float32))
        columns["said"].append(words)
    stacked = {name: np.stack(columns[name]) for name in ("image", "mask", "clip")}
    return Examples({**columns, **stacked})


DATA = TaskData(scenes(320, 0), scenes(32, 1), scenes(48, 2), given_test=True)
IMAGE = {"image": {"kind": "image", "patch": 4, "convolutions": 1}}


def trained(tmp_path, inputs: dict, targets: dict, steps: int = 120) -> LoadedTask:
    config = TaskRunConfig.from_dict({
        "name": "t", "runs_dir": str(tmp_path), "inputs": inputs, "targets": targets,
        "model": {"d_model": 24, "n_layers": 2, "n_heads": 2, "d_ff": 32,
                  "moe": {"n_experts": 4, "top_k": 2, "d_expert": 16}},
        "train": {"steps": steps, "batch_size": 32, "checkpoint_every": 0, "validate_every": 0,
                  "optimizer": {"lr": 1e-2}, "schedule": {"warmup_steps": 10}, "device": "cpu"},
    })  # fmt: skip
    return load_task_run(train_run(config, data=DATA, quiet=True).folder)


def figure(loaded: LoadedTask, metric: str) -> float:
    (name,) = loaded.encoding.targets
    found = predict(loaded.model, loaded.encoding, DATA.test, with_experts=True)
    assert all(shares.shape == (2, 4) for shares in found.experts)
    return score(metric, found.raw[name], truth(loaded.encoding, DATA.test)[name])


def test_boxes_are_found(tmp_path, capsys):
    loaded = trained(tmp_path, IMAGE, {"things": {"kind": "boxes", "threshold": 0.2}})
    assert figure(loaded, "mean_average_precision") > 0.8
    # a user's own file needs the picture alone
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"image": DATA.test["image"][0].tolist()}))
    (answer,) = answers_to(loaded.folder, str(path), draw=tmp_path / "drawn")
    said = answer["answers"]["things"]
    assert {box["label"] for box in said["prediction"]} >= set(DATA.test["labels"][0])
    json.dumps(answer)
    drawn = np.asarray(pytest.importorskip("PIL.Image").open(tmp_path / "drawn" / "things-1.png"))
    assert said["drawn"].endswith("things-1.png")
    assert drawn.shape == (64, 64, 3)
    assert main(["predict", str(loaded.folder), str(path), "--draw", str(tmp_path / "cli")]) == 0
    assert f"things: {said['text']} in {tmp_path / 'cli' / 'things-1.png'}" in capsys.readouterr().out


@pytest.mark.parametrize("refine", [0, 4])
def test_pixels_are_named(tmp_path, refine):
    pytest.importorskip("sklearn")
    loaded = trained(tmp_path, IMAGE, {"mask": {"kind": "mask", "refine": refine}}, steps=60)
    assert figure(loaded, "mean_iou") > 0.9
    if refine:
        np.save(tmp_path / "mine.npy", DATA.test["image"][0])
        (answer,) = answers_to(loaded.folder, str(tmp_path / "mine.npy"), draw=tmp_path)
        assert answer["answers"]["mask"]["drawn"] == str(tmp_path / "mask-1.png")
        assert answer["answers"]["mask"]["text"].startswith("class 0 ")


def test_ways_of_clips_are_told(tmp_path):
    pytest.importorskip("sklearn")
    loaded = trained(
        tmp_path,
        {"clip": {"kind": "video", "patch": 8, "frames": 2}},
        {"way": {"kind": "class", "column": "way"}},
    )
    found = predict(loaded.model, loaded.encoding, DATA.test)
    right = [
        answer["prediction"] == way
        for answer, way in zip(found.answers["way"], DATA.test["way"], strict=True)
    ]
    assert np.mean(right) > 0.9


@pytest.mark.parametrize("beam", [1, 4])
def test_words_are_heard_in_their_order(tmp_path, beam):
    pytest.importorskip("jiwer")
    loaded = trained(
        tmp_path, {"sound": {"kind": "audio", "column": "frames"}},
        {"words": {"kind": "transcript", "column": "said", "beam": beam}},
    )  # fmt: skip
    assert figure(loaded, "wer") < 0.1
