"""The verbs one after the other on a small text, as a user types them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from moekit.cli.main import main

CONFIG = """
name: tiny
model:
  vocab_size: 300
  d_model: 32
  n_layers: 2
  n_heads: 2
  moe: {n_experts: 4, d_expert: 32, top_k: 2}
data: {corpus: null, vocab_size: 300, seq_len: 32, validation_share: 0.2}
train: {steps: 6, batch_size: 4, log_every: 1, validate_every: 3, checkpoint_every: 3, validation_batches: 2}
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with text, a configuration and one finished run."""
    folder = tmp_path_factory.mktemp("whole-run")
    words = [line.strip() for line in (Path(__file__).read_text().split())]
    draw = random.Random(0)
    (folder / "text").mkdir()
    for number in range(30):
        text = " ".join(draw.choices(words, k=200))
        (folder / "text" / f"{number}.txt").write_text(text, encoding="utf-8")
    (folder / "run.yaml").write_text(CONFIG)
    patch = pytest.MonkeyPatch()
    patch.setenv("MOEKIT_CACHE", str(folder / "cache"))
    patch.chdir(folder)
    assert main(["train", "run.yaml", "data.path=text", "--quiet"]) == 0
    yield folder
    patch.undo()


@pytest.fixture(scope="module")
def run(workplace) -> str:
    (folder,) = (workplace / "runs").iterdir()
    return str(folder.relative_to(workplace))


def test_plan(moekit_command, workplace):
    plan = json.loads(moekit_command("plan", "run.yaml", "data.path=text", "--json").out)
    assert plan["steps"] == 6
    assert plan["time"]["seconds"] > 0


def test_train_leaves_a_folder_that_says_everything(workplace, run):
    folder = workplace / run
    assert {"config.yaml", "metrics.jsonl", "final.json", "checkpoints"} <= {
        path.name for path in folder.iterdir()
    }


def test_resume_with_more_steps(moekit_command, workplace, tmp_path):
    first = json.loads(
        moekit_command("train", "run.yaml", "data.path=text", f"runs_dir={tmp_path}", "--json").out
    )
    again = json.loads(moekit_command("resume", first["folder"], "train.steps=8", "--json").out)
    assert (first["final"]["step"], again["final"]["step"]) == (6, 8)
    assert again["folder"] == first["folder"]


def test_resume_without_anything_to_resume(moekit_command, workplace, tmp_path):
    result = moekit_command("resume", "--runs-dir", str(tmp_path))
    assert (result.code, result.out) == (4, "")


def test_evaluate(moekit_command, run):
    answer = json.loads(moekit_command("evaluate", run, "--json", "--max-batches", "2").out)
    assert answer["step"] == 6
    assert 0 < answer["bits_per_byte"]["mean"] < 20
    assert "bits per byte" in moekit_command("evaluate", run, "--max-batches", "2").out


def test_generate_is_repeatable(moekit_command, run):
    arguments = ["generate", run, "from pathlib", "--max-tokens", "12", "--seed", "5"]
    first, second = moekit_command(*arguments), moekit_command(*arguments)
    assert first.code == 0
    assert first.out.startswith("from pathlib")
    assert first.out == second.out
    answer = json.loads(moekit_command(*arguments, "--json").out)
    assert answer["prompt"] + answer["text"] == first.out[:-1]
    assert len(answer["token_ids"]) <= 12


def test_generate_from_standard_input(moekit_command, run, monkeypatch):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("import"))
    assert moekit_command("generate", run, "-", "--max-tokens", "2").out.startswith("import")


def test_export_a_run(moekit_command, workplace, run):
    """A trained model leaves for transformers, with its data and figures on the card, and comes back."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    result = moekit_command("export", run, "exported", "--json")
    assert result.code == 0
    assert json.loads(result.out)["architecture"] == "MixtralForCausalLM"
    card = (workplace / "exported/README.md").read_text()
    final = json.loads((workplace / run / "final.json").read_text())
    fingerprint = json.loads((workplace / run / "run.json").read_text())["data_fingerprint"]
    assert f"`{fingerprint}`" in card
    assert f"| validation loss | {final['validation_loss']:,.4g} |" in card
    assert f"| validation max violation | {final['validation_max_violation']:,.4g} |" in card
    assert moekit_command("verify", run, "exported").code == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(workplace / "exported")
    tokenizer = transformers.AutoTokenizer.from_pretrained(workplace / "exported")
    ids = tokenizer("from pathlib", return_tensors="pt")
    text = tokenizer.decode(
        model.generate(**ids, max_new_tokens=8, do_sample=False)[0], skip_special_tokens=True
    )
    assert text.startswith("from pathlib")


def test_a_wrong_value_is_refused(moekit_command, run):
    result = moekit_command("generate", run, "x", "--temperature", "-1")
    assert result.code == 2
    assert "temperature" in result.err


def test_a_folder_that_is_no_run(moekit_command, workplace):
    result = moekit_command("evaluate", "text")
    assert (result.code, result.out) == (4, "")
    assert "no run" in result.err


def test_a_damaged_checkpoint(moekit_command, workplace, tmp_path):
    answer = json.loads(
        moekit_command("train", "run.yaml", "data.path=text", f"runs_dir={tmp_path}", "--json").out
    )
    for path in Path(answer["folder"]).rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-40])
    with pytest.warns(UserWarning, match="checkpoint"):
        result = moekit_command("evaluate", answer["folder"])
    assert result.code == 4


def test_evaluate_by_number_of_experts(moekit_command, run, workplace, tmp_path):
    answer = json.loads(moekit_command("evaluate", run, "--json", "--k", "1,2,4").out)
    rows = answer["by_setting"]
    assert [row["top_k"] for row in rows] == [1, 2, 4]
    (configured,) = (row for row in rows if row["top_k"] == 2)
    assert configured["bits_per_byte"] == answer["bits_per_byte"]["mean"]
    assert configured["active_parameters"] == answer["active_parameters"]
    assert configured["flops_per_token"] == answer["flops_per_token"]
    # an expert more in each of the two layers: three matrices of 32 x 32
    assert rows[1]["active_parameters"] - rows[0]["active_parameters"] == 2 * 3 * 32 * 32
    assert rows[2]["flops_per_token"] - rows[1]["flops_per_token"] == 2 * (2 * 2 * 3 * 32 * 32)
    assert all(row["tokens_per_second"] > 0 for row in rows)
    assert min(row["change"] for row in rows) == 0
    (tmp_path / "table.json").write_text(json.dumps(answer))
    words = ("generate", run, "def", "--max-tokens", "12", "--json", "--latency-ms", "0.0001")
    pace = json.loads(moekit_command(*words, "--table", str(tmp_path / "table.json")).out)["pace"]
    assert pace["overloaded"]
    assert pace["quality_cost"] is not None
    table = moekit_command("evaluate", run, "--k", "1,2", "--max-batches", "1")
    assert "k=1" in table.out
    assert "bits per byte" in table.out


@pytest.mark.parametrize(
    "content", ["[]", '{"by_setting": [1]}', '{"by_setting": [{"top_k": 1}]}', '{"by_setting": 3}', "x"]
)
def test_tables_that_are_none(moekit_command, run, tmp_path, content):
    (tmp_path / "table.json").write_text(content)
    options = ("--latency-ms", "1", "--table", str(tmp_path / "table.json"))
    result = moekit_command("generate", run, "def", "--max-tokens", "2", *options)
    assert result.code == 2
    assert "table.json" in result.err


def test_a_table_of_another_model_is_refused_before_anything_is_written(moekit_command, run, tmp_path):
    rows = [{"top_k": k, "tokens_per_second": 10 / k, "bits_per_byte": 1 / k} for k in (1, 9)]
    (tmp_path / "table.json").write_text(json.dumps({"by_setting": rows}))
    options = ("--latency-ms", "1", "--table", str(tmp_path / "table.json"))
    result = moekit_command("generate", run, "def", "--max-tokens", "2", *options)
    assert (result.code, result.out) == (2, "")
    assert "elastic.top_k must be at most the experts to choose from (4); got 9" in result.err


def test_generate_at_a_setting(moekit_command, run):
    def tokens(*options):
        return json.loads(
            moekit_command("generate", run, "def", "--max-tokens", "20", "--json", *options).out
        )

    plain = tokens()
    assert tokens("--top-k-experts", "2")["token_ids"] == plain["token_ids"]
    one = tokens("--top-k-experts", "1")
    assert one["routing"] == "k=1"
    at_most = sorted(
        row["flops_per_token"]
        for row in json.loads(
            moekit_command("evaluate", run, "--k", "1,2", "--max-batches", "1", "--json").out
        )["by_setting"]
    )
    budget = tokens("--flops", str(at_most[1] - 1))  # of k = 1 and 2 it holds the first alone
    assert (budget["routing"], budget["token_ids"]) == ("k=1", one["token_ids"])
    assert tokens("--top-p-experts", "0.1")["token_ids"] == one["token_ids"]
    assert tokens("--first-experts", "2")["routing"] == "n=2"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--top-k-experts", "5"], "elastic.top_k must be at most the experts to choose from (4); got 5"),
        (["--flops", "10"], "no setting stays within 10 FLOPs"),
        (["--flops", "1e9", "--top-k-experts", "1"], "exclude each other"),
        (["--table", "run.yaml"], "Add --latency-ms"),
    ],
)
def test_settings_that_cannot_be(moekit_command, run, options, message):
    result = moekit_command("generate", run, "def", "--max-tokens", "2", *options)
    assert result.code == 2
    assert message in result.err
