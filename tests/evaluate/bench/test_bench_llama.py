"""GGUF files and llama.cpp, against transformers on the same weights."""

from __future__ import annotations

import pytest
import torch

import moekit
from moekit.config.errors import MoekitError
from moekit.evaluate.bench import gguf_file, model
from moekit.evaluate.bench.compare import TimingOptions
from moekit.evaluate.bench.llama import LlamaModel
from moekit.evaluate.bench.olmoe import ModelShape, random_olmoe
from moekit.evaluate.bench.result import bench_result, check_result, fail_on_refused

pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("gguf")

SHAPE = ModelShape(
    vocab_size=96, d_model=64, d_expert=32, experts=4, top_k=2, layers=2, heads=2, prompt=12, new_tokens=3
)


@pytest.fixture
def olmoe():
    return random_olmoe(SHAPE, seed=0)


@pytest.mark.parametrize(("kind", "error"), [("bf16", 0.0), ("Q8_0", 0.01), ("Q4_0", 0.12)])
def test_a_file_holds_every_weight(olmoe, tmp_path, kind, error):
    path = tmp_path / "model.gguf"
    gguf_file.write_gguf(olmoe, SHAPE, path, kind)
    assert [each.name for each in tmp_path.iterdir()] == ["model.gguf"]  # nothing half-written stays
    read = gguf_file.read_weights(path)
    for name, value in olmoe.named_parameters():
        found = read(name, value.data)
        exact = value.data.float()
        assert found.shape == exact.shape
        assert float((found - exact).norm() / exact.norm()) <= error, name


def test_llama_cpp_agrees_with_transformers(tmp_path):
    pytest.importorskip("llama_cpp")
    cases = model.run_model(
        SHAPE,
        against=("transformers", "llama-cpp"),
        folder=tmp_path,
        threads=1,
        timing=TimingOptions(2, 0),
        use_moekit=moekit.use_in_transformers,
    )
    result = bench_result("model", cases, {}, ("llama-cpp",), "moekit bench model")
    check_result(result)
    fail_on_refused(result)
    assert set(result["peers"]) == {"llama-cpp-python", "gguf"}
    rows = [row["name"] for row in cases[1]["contestants"]]
    assert rows[-3:] == ["llama-cpp bf16", "llama-cpp Q8_0", "llama-cpp Q4_0"]
    assert cases[1]["contestants"][-1]["work"]["bytes"] < cases[1]["contestants"][0]["work"]["bytes"] / 3
    assert len(list(tmp_path.glob("*.gguf"))) == 3


def test_another_models_file_is_refused(olmoe, tmp_path):
    """A file whose experts are exchanged stands for another model."""
    pytest.importorskip("llama_cpp")
    right = gguf_file.write_gguf

    def wrong(olmoe, shape, path, kind):
        for block in olmoe.model.layers:
            block.mlp.experts.down_proj.data = block.mlp.experts.down_proj.data.flip(0)
        right(olmoe, shape, path, kind)
        for block in olmoe.model.layers:
            block.mlp.experts.down_proj.data = block.mlp.experts.down_proj.data.flip(0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "write_gguf", wrong)
        cases = model.run_model(
            SHAPE,
            against=("llama-cpp",),
            formats=["bf16"],
            threads=1,
            timing=TimingOptions(1, 0),
            use_moekit=moekit.use_in_transformers,
        )
    assert [list(case["refused"]) for case in cases] == [["llama-cpp bf16"]] * 2


def test_a_broken_file_is_reported(tmp_path):
    pytest.importorskip("llama_cpp")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with pytest.raises(MoekitError, match=r"llama\.cpp on broken\.gguf: the file cannot be loaded"):
        LlamaModel(tmp_path / "broken.gguf", 8, 8, 8, 1)


def test_a_process_that_dies_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(MoekitError, match=r"llama\.cpp ended with exit code 1 on none\.gguf: no message"):
        LlamaModel(tmp_path / "none.gguf", 8, 8, 8, 1)


def test_rewinding_gives_the_same_logits_again(olmoe, tmp_path):
    pytest.importorskip("llama_cpp")
    gguf_file.write_gguf(olmoe, SHAPE, tmp_path / "model.gguf", "bf16")
    llama = LlamaModel(tmp_path / "model.gguf", SHAPE.vocab_size, SHAPE.context, SHAPE.prompt, 1)
    try:
        whole = torch.from_numpy(llama.prefill_logits([1, 2, 3]))
        llama.rewind(2)
        llama.decode([3])
        assert torch.allclose(torch.from_numpy(llama.logits()), whole[-1:], atol=2e-3)
    finally:
        llama.close()
