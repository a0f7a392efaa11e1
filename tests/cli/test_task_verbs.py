"""train, predict, validate and recipes on a user's own files."""

from __future__ import annotations

import json
import random
import wave

import numpy as np
import pytest

SMALL = [
    "model.d_model=16", "model.n_heads=2", "model.n_layers=1", "model.d_ff=32", "model.moe.n_experts=4",
    "model.moe.d_expert=16", "train.validate_every=0", "train.optimizer.lr=0.02", "train.schedule.warmup_steps=2",
    "train.batch_size=16", "train.device=cpu",
]  # fmt: skip
TEXTS = [
    "model.dropout=0",
    "model.embedding_dropout=0",
    "model.head_dropout=0",
    "epochs=8",
    "inputs.text.vocab_size=300",
]
NAMES = ["data.columns.text=review", "data.columns.label=stars"]
WORDS = {"+": ["good", "fine", "棒极了"], "-": ["bad", "poor", "太差了"]}


def reviews(n: int = 120) -> str:
    rng = random.Random(0)
    rows = [
        (label, " ".join(rng.choices([*WORDS[label], "it", "was"], k=5))) for label in rng.choices("+-", k=n)
    ]
    return "review,stars\n" + "".join(f"{text},{label}\n" for label, text in rows)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of the recipe on a user's own file."""
    pytest.importorskip("sklearn")
    from moekit.cli.main import main

    folder = tmp_path_factory.mktemp("own")
    path = folder / "mine.csv"
    path.write_text(reviews(), encoding="utf-8")
    words = ["train", "recipe:review-sentiment", f"data.path={path}", *NAMES, *SMALL, *TEXTS,
             f"runs_dir={folder / 'runs'}"]  # fmt: skip
    assert main(words) == 0
    return next((folder / "runs").iterdir())


def test_predict_answers_a_text_with_its_probability_and_experts(moekit_command, trained):
    result = moekit_command("predict", str(trained), "太差了 bad poor", "--json")
    assert result.code == 0, result.err
    (answer,) = json.loads(result.out)
    (said,) = answer["answers"].values()
    assert said["prediction"] == "-"
    assert 0.5 < said["probability"] <= 1
    assert sum(said["probabilities"].values()) == pytest.approx(1)
    assert len(answer["experts"]) == 2
    assert all(0 <= entry["expert"] < 4 and 0 < entry["share"] <= 1 for entry in answer["experts"])
    plain = moekit_command("predict", str(trained), "太差了 bad poor").out
    assert f": - ({said['probability']:.1%})" in plain
    assert f"expert {answer['experts'][0]['expert']}" in plain
    assert "expert" not in moekit_command("predict", str(trained), "太差了", "--experts", "0").out


def test_predict_answers_a_file_line_by_line(moekit_command, trained, tmp_path):
    path = tmp_path / "more.jsonl"
    path.write_text('{"body": "good fine good"}\n{"body": "bad poor bad"}\n', encoding="utf-8")
    result = moekit_command("predict", str(trained), str(path), "--columns", "text=body", "--json")
    assert result.code == 0, result.err
    assert [next(iter(entry["answers"].values()))["prediction"] for entry in json.loads(result.out)] == [
        "+",
        "-",
    ]
    plain = moekit_command("predict", str(trained), str(path), "--columns", "text=body").out.splitlines()
    assert len(plain) == 2
    assert plain[0].startswith("1: label: ")
    assert plain[0].count("layer 0 expert") == 1, "the first expert of each layer"
    missing = moekit_command("predict", str(trained), str(path))
    assert missing.code != 0
    assert "more.jsonl:1: column 'text'" in missing.err


def test_validate_says_what_there_is_and_trains_nothing(moekit_command, tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.csv").write_text(reviews(), encoding="utf-8")
    result = moekit_command("validate", "recipe:review-sentiment", "data.path=mine.csv", *NAMES, "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert sum(found["examples"].values()) == 120
    assert sorted(item.name for item in tmp_path.iterdir()) == ["mine.csv"]


TASK = """
inputs:
  text: {kind: text, tokenizer: words, column: words}
  numbers: {kind: fields, numbers: [age]}
targets:
  tags: {kind: tags, column: tags, input: text}
  stars: {kind: number, columns: [stars]}
data: {path: mine.jsonl, test_share: 0.2, validation_share: 0.2}
"""
GOOD = {"words": ["a", "b"], "age": 3, "tags": ["X", "O"], "stars": 1.5}


def lines(*changes: dict) -> str:
    rows = [{**GOOD, "stars": i / 2} for i in range(20)]
    for place, change in enumerate(changes):
        rows[place + 11] |= change
    return "".join(json.dumps(row) + "\n" for row in rows)


# what is wrong: (content of mine.jsonl, what the error says)
BROKEN = {
    "no number": (lines({"age": "old"}), r"mine.jsonl:12, column 'age': .*number.*; got 'old'"),
    "no number to learn": (lines({}, {"stars": "five"}), r"mine.jsonl:13, column 'stars': .*number.*; got 'five'"),
    "tags too many": (lines({"tags": ["X"] * 3}), r"mine.jsonl:12, column 'tags': must hold as many tags as words"),
    "no text": (lines({"words": None}), r"mine.jsonl:12, column 'words': must hold"),
    "a column gone": (lines()[:-1].replace('"stars": 9.5', '"stras": 9.5'), "mine.jsonl:20: column 'stars'.*'stras'"),
    "cut off": (lines()[:-10], "mine.jsonl:20: not JSON"),
    "not an object": (lines() + "3\n", "mine.jsonl:21: each line must be a JSON object"),
    "nothing": ("", "mine.jsonl is empty"),
    "blank lines alone": ("\n\n", "mine.jsonl is empty"),
    "one line": (lines().split("\n")[0], "1 examples are too few"),
    "one number for all": ("".join(json.dumps(GOOD) + "\n" for _ in range(20)), "must hold different numbers to learn"),
    "binary": (b"\xff\xfe\x00\x01", "not UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_validate_names_file_line_and_column(moekit_command, tmp_path, monkeypatch, what):
    import re

    monkeypatch.chdir(tmp_path)
    content, words = BROKEN[what]
    (tmp_path / "task.yaml").write_text(TASK)
    (tmp_path / "mine.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    result = moekit_command("validate", "task.yaml")
    assert result.code not in (0, 1), "an error in one paragraph"
    assert re.search(words, result.err), result.err
    assert len(result.err.strip().splitlines()) == 1


def test_the_sound_file_is_whole(moekit_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "task.yaml").write_text(TASK)
    (tmp_path / "mine.jsonl").write_text(lines())
    result = moekit_command("validate", "task.yaml")
    assert result.code == 0, result.err


def test_own_names_of_columns_are_named_in_errors(moekit_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "task.yaml").write_text(TASK)
    (tmp_path / "mine.jsonl").write_text(lines({"age": "old"}).replace('"age"', '"years"'))
    result = moekit_command("validate", "task.yaml", "data.columns.age=years")
    assert "mine.jsonl:12, column 'years'" in result.err


def tone(path, hertz: float, seconds: float, rate: int = 8000, channels: int = 1) -> None:
    t = np.arange(round(seconds * rate)) / rate
    samples = (0.5 * np.sin(2 * np.pi * hertz * t) * 32767).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.repeat(samples, channels).tobytes())


def test_a_folder_of_sounds_is_learnt_and_one_sound_answered(moekit_command, tmp_path):
    rng = random.Random(0)
    for label, low in (("deep", 200), ("high", 2000)):
        (tmp_path / "sounds" / label).mkdir(parents=True)
        for number in range(24):
            tone(
                tmp_path / "sounds" / label / f"{number}.wav",
                low * rng.uniform(0.8, 1.2),
                rng.uniform(0.2, 0.4),
            )
    (tmp_path / "task.yaml").write_text(
        "inputs: {audio: {kind: audio, column: audio, stride: 2}}\ntargets: {label: {kind: class, column: label}}\n"
        "data: {test_share: 0.2, validation_share: 0.2}\nmodel: {moe: {n_experts: 4, d_expert: 16}}\nepochs: 10\n"
    )
    runs = f"runs_dir={tmp_path / 'runs'}"
    done = moekit_command(
        "train", str(tmp_path / "task.yaml"), f"data.path={tmp_path / 'sounds'}", runs, *SMALL
    )
    assert done.code == 0, done.err
    run = str(next((tmp_path / "runs").iterdir()))
    pytest.importorskip("scipy")
    for name, hertz, rate, channels in (("deep", 210, 8000, 1), ("high", 1900, 44100, 2)):
        tone(tmp_path / "one.wav", hertz, 0.3, rate, channels)
        result = moekit_command("predict", run, str(tmp_path / "one.wav"), "--json")
        assert result.code == 0, result.err
        assert json.loads(result.out)[0]["answers"]["label"]["prediction"] == name
    (tmp_path / "one.wav").write_bytes(b"RIFF....")
    assert "is no WAV file" in moekit_command("predict", run, str(tmp_path / "one.wav")).err


def test_a_picture_is_answered_whether_grey_or_in_colour(moekit_command, tmp_path):
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for label, level in (("dark", 40), ("light", 210)):
        (tmp_path / "pictures" / label).mkdir(parents=True)
        for number in range(24):
            pixels = np.clip(rng.normal(level, 20, (8, 8, 1)), 0, 255).astype(np.uint8)
            np.save(tmp_path / "pictures" / label / f"{number}.npy", pixels)
    (tmp_path / "task.yaml").write_text(
        "inputs: {image: {kind: image, column: image, patch: 4}}\ntargets: {label: {kind: class, column: label}}\n"
        "data: {test_share: 0.2, validation_share: 0.2}\nmodel: {moe: {n_experts: 4, d_expert: 16}}\nepochs: 10\n"
    )
    runs = f"runs_dir={tmp_path / 'runs'}"
    done = moekit_command(
        "train", str(tmp_path / "task.yaml"), f"data.path={tmp_path / 'pictures'}", runs, *SMALL
    )
    assert done.code == 0, done.err
    run = str(next((tmp_path / "runs").iterdir()))
    image.fromarray(np.full((8, 8, 3), 220, np.uint8)).save(tmp_path / "one.png")
    result = moekit_command("predict", run, str(tmp_path / "one.png"), "--json")
    assert json.loads(result.out)[0]["answers"]["label"]["prediction"] == "light"
    image.fromarray(np.full((9, 8, 3), 220, np.uint8)).save(tmp_path / "one.png")
    assert (
        "must hold images of shape (8, 8, 1)" in moekit_command("predict", run, str(tmp_path / "one.png")).err
    )


def test_evaluate_measures_a_task_and_compares_its_experts(moekit_command, trained, tmp_path):
    page = tmp_path / "page.html"
    result = moekit_command("evaluate", str(trained), "--page", str(page), "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert report["metrics"]["label.accuracy"] > 0.9
    assert report == json.loads(page.with_suffix(".json").read_text("utf-8"))
    (by,) = report["experts_by"]
    assert by["column"] == "label"
    assert sorted(by["values"]) == ["+", "-"]
    assert sum(by["examples"]) == report["examples"]
    assert np.array(by["layers"][0]["shares"]).sum(axis=1) == pytest.approx([1, 1])
    assert "label accuracy" in page.read_text("utf-8")
    file = tmp_path / "more.csv"
    file.write_text("text,label,city\ngood fine,+,Bonn\nbad poor,+,北京\n", encoding="utf-8")
    result = moekit_command("evaluate", str(trained), "--file", str(file), "--by", "city")
    assert result.code == 0, result.err
    assert "0.5" in result.out
    assert "Experts by city differ by more than chance in" in result.out
    result = moekit_command("evaluate", str(trained), "--file", str(file), "--by", "town")
    assert result.code != 0
    assert "town" in result.err
    assert (
        "--max-batches is for language models"
        in moekit_command("evaluate", str(trained), "--max-batches", "1").err
    )
