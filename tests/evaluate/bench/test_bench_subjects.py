"""Each subject at a tiny size, with everybody who takes part; wrong answers are seen in each."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moekit.config.errors import ConfigError, MoekitError
from moekit.evaluate.bench import decode, layer, model, peaks, step
from moekit.evaluate.bench.compare import TimingOptions, compare
from moekit.evaluate.bench.decode import DecodeShape, run_decode
from moekit.evaluate.bench.layer import LayerShape, layer_contestants, layer_shapes, run_layer
from moekit.evaluate.bench.olmoe import ModelShape, float32_logits, random_olmoe
from moekit.evaluate.bench.result import bench_result, check_result, fail_on_refused
from moekit.kernels.registry import available

LAYER = LayerShape(tokens=24, d_model=32, d_expert=16, experts=4, top_k=2)
DECODE = DecodeShape(d_model=64, d_expert=32, experts=4, top_k=2, layers=2)
MODEL = ModelShape(
    vocab_size=96, d_model=64, d_expert=32, experts=4, top_k=2, layers=2, heads=2, prompt=12, new_tokens=3
)
QUICK = TimingOptions(repeats=2, warmup=0)


def needs_transformers():
    return pytest.importorskip("transformers", minversion="5.0")


def accepted(subject, cases, against=()):
    """The result of these cases, valid and without a refusal."""
    result = bench_result(subject, cases, {}, against, "moekit bench")
    check_result(result)
    fail_on_refused(result)
    return result


def names(case):
    return [row["name"] for row in case["contestants"]]


@pytest.mark.parametrize("dtype", ["bf16", "float32"])
def test_layer_alone(dtype):
    cases = run_layer({"own": LAYER}, dtype=dtype, against=("dense",), timing=QUICK)
    accepted("layer", cases)
    assert [case["shape"]["backward"] for case in cases] == [False, True]
    for case in cases:
        assert names(case)[0] == "moekit"
        assert names(case)[-1] == "dense"
    flops = [case["contestants"][0]["work"]["flops"] for case in cases]
    assert flops == [6 * 24 * 2 * 32 * 16, 18 * 24 * 2 * 32 * 16]


def test_layer_against_transformers():
    needs_transformers()
    (case,) = run_layer({"own": LAYER}, backward=True, against=("transformers",), timing=QUICK)
    accepted("layer", [case], ("transformers",))
    assert {"transformers grouped_mm", "transformers batched_mm", "transformers eager"} <= set(names(case))
    assert set(case["contestants"][0]["deviations"]) == {
        "output", "gradient of tokens", "gradient of expert_weights", "gradient of w_in", "gradient of w_out",
    }  # fmt: skip


def test_batched_mm_is_left_out_where_its_copies_are_too_large(monkeypatch):
    needs_transformers()
    monkeypatch.setattr("moekit.evaluate.bench.experts_of_transformers._LARGEST_COPY", 1000)
    (case,) = run_layer({"own": LAYER}, backward=False, against=("transformers",), timing=QUICK)
    assert "copies the matrices of every choice" in case["skipped"]["transformers batched_mm"]
    assert "transformers batched_mm" not in names(case)


def test_a_wrong_output_of_a_layer_is_refused(monkeypatch):
    monkeypatch.setattr(layer, "combine", lambda answers, plan: answers[: plan.n_tokens])
    contestants, _ = layer_contestants(LAYER, torch.float32, backward=False, against=())
    refused = compare(contestants, repeats=1).refused
    assert "output is off by" in refused[contestants[-1].name]


@pytest.mark.parametrize("tensor", ["tokens", "expert_weights", "w_in", "w_out"])
def test_a_wrong_gradient_of_a_layer_is_refused(tensor):
    contestants, _ = layer_contestants(LAYER, torch.bfloat16, backward=True, against=("dense",))
    ours = contestants[0]
    right = ours.run

    def wrong():
        outputs = dict(right())
        outputs[f"gradient of {tensor}"] = outputs[f"gradient of {tensor}"] * 1.05
        return outputs

    ours.run = wrong
    found = compare(contestants, repeats=1)
    assert list(found.refused) == ["moekit"]
    assert found.refused["moekit"].startswith(f"gradient of {tensor} is off by 0.0")


def test_layer_shapes():
    assert list(layer_shapes(["e32-k4"])) == ["e32-k4"]
    assert layer_shapes(tokens=8, top_k=1)["own"] == LayerShape(8, 512, 512, 16, 1)
    with pytest.raises(ConfigError, match="did you mean 'e16-k2'"):
        layer_shapes(["e16-k3"])
    with pytest.raises(ConfigError, match="--preset cannot be changed"):
        layer_shapes(["e16-k2"], tokens=8)
    with pytest.raises(ConfigError, match=r"--top-k must be at most --experts \(4\); got 5"):
        LayerShape(1, 8, 8, 4, 5)


def test_peak_memory_counts_what_a_contestant_holds():
    """The dense layer's hidden values: T * 2F and T * F numbers, of 4 bytes, and the output."""
    shape = {"tokens": 2048, "d_model": 64, "d_expert": 512, "experts": 2, "top_k": 1}
    settings = {**shape, "dtype": "float32", "backward": False, "against": ["dense"], "seed": 0}
    peak = peaks.peak_of("dense", settings)
    assert peak is None or 0.9 * 4 * 2048 * (1024 + 512) < peak < 2.5 * 4 * 2048 * (1024 + 512)


def test_a_process_that_measures_memory_and_fails_is_reported():
    with pytest.raises(MoekitError, match="measuring the memory of nobody ended with exit code 1"):
        peaks.peak_of("nobody", {"dtype": "bf16"})


_, CAN_DECODE, WHY = available("expert_decode")[0]
needs_decode = pytest.mark.skipif(not CAN_DECODE, reason=WHY)


@needs_decode
def test_decode_against_transformers(monkeypatch):
    needs_transformers()
    seen = []
    kernel = decode.expert_decode
    monkeypatch.setattr(decode, "expert_decode", lambda *args: (seen.append(args[3]), kernel(*args))[1])
    cases = run_decode(DECODE, tokens=(1, 3), group_size=32, timing=QUICK)
    accepted("decode", cases, ("transformers",))
    assert [case["name"] for case in cases] == ["1 token", "3 tokens"]
    assert names(cases[0])[:3] == ["moekit", "moekit int8", "moekit int4"]
    assert len(names(cases[0])) == 6
    ours, packed = cases[0]["contestants"][:2]
    # layers, experts of the token, matrices, bfloat16
    assert ours["work"]["bytes"] == 2 * 2 * 3 * 64 * 32 * 2
    assert packed["work"]["bytes"] == ours["work"]["bytes"] * (8 + 16 / 32) / 16  # a scale for 32 weights
    some, all_of_them = 1 / 4, 1  # three tokens choose six times among the four experts of each layer
    most = 2 * 4 * 3 * 64 * 32 * 2
    assert some < cases[1]["contestants"][0]["work"]["bytes"] / most <= all_of_them
    assert len({id(weights.w_in) for weights in seen}) == 6  # each layer, each number of bits


@needs_decode
def test_a_wrong_answer_of_decode_is_refused(monkeypatch):
    right = decode.expert_decode
    wrong = lambda tokens, index, weight, weights: right(tokens, index.roll(1, 1), weight, weights)  # noqa: E731
    monkeypatch.setattr(decode, "expert_decode", wrong)
    (case,) = run_decode(DECODE, tokens=(2,), bits=(16,), against=(), timing=QUICK)
    assert "output is off by" in case["refused"]["moekit"]


def test_decode_without_the_kernel_says_why(monkeypatch):
    needs_transformers()
    monkeypatch.setenv("MOEKIT_CPU_KERNELS", "0")
    (case,) = run_decode(DECODE, tokens=(1,), bits=(16,), timing=QUICK)
    assert case["skipped"]["moekit"] == "switched off by MOEKIT_CPU_KERNELS=0"


def test_decode_refuses_what_does_not_fit():
    with pytest.raises(ConfigError, match="--bits must be among 16, 8, 4; got 3"):
        run_decode(DECODE, bits=(3,))
    with pytest.raises(ConfigError, match="--layers needs"):
        run_decode(replace(DECODE, layers=1_000_000_000))


def small_run(**model_fields):
    from moekit.config.loading import load_run_config
    from moekit.recipes.quickstart import quickstart_recipe

    small = ["model.d_model=32", "model.n_layers=3", "model.vocab_size=64", "data.seq_len=16", "train.batch_size=2",
             "model.moe.n_experts=4", "model.moe.d_expert=16"]  # fmt: skip
    return load_run_config(None, small, preset=quickstart_recipe()["run"])


@pytest.mark.parametrize("dtype", ["bf16", "float32"])
def test_step_against_transformers(dtype):
    needs_transformers()
    cases = step.run_step(small_run(), dtype=dtype, timing=QUICK)
    accepted("step", cases, ("transformers", "dense"))
    assert names(cases[0]) == ["moekit", "transformers grouped_mm", "transformers eager", "dense"]
    assert cases[0]["shape"]["tokens"] == 32
    assert all(row["tokens_per_second"] > 0 for row in cases[0]["contestants"])


def test_a_step_changes_the_weights():
    config = small_run()
    ids = torch.randint(64, (2, 17))
    ours = step._ours("moekit", config.model, config.train, ids, "float32", "moekit")
    first, *_, last = [float(ours.run()["loss"]) for _ in range(5)]
    assert last < first


def test_a_wrong_gradient_of_a_step_is_refused(monkeypatch):
    from moekit.layers.moe import MoE

    right = MoE.forward

    def wrong(self, hidden_states, **kwargs):
        out = right(self, hidden_states, **kwargs)
        if torch.is_autocast_enabled("cpu"):  # not where the reference is computed
            same = out.hidden_states
            out.hidden_states = same + (same - same.detach())  # the same values, twice the gradient
        return out

    monkeypatch.setattr(MoE, "forward", wrong)
    (case,) = step.run_step(small_run(), against=(), timing=QUICK)
    assert case["refused"]["moekit"].startswith("gradient of backbone")


def test_step_needs_a_sparse_model():
    config = small_run()
    dense = config.replace(model=config.model.replace(moe=None, moe_by_layer={}))
    with pytest.raises(ConfigError, match=r"model\.moe must be given"):
        step.run_step(dense, against=(), timing=QUICK)


def eager_as_moekit(model=None):
    """Registers "moekit" as transformers' own arithmetic, in place of the plug-in."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register("moekit", ALL_EXPERTS_FUNCTIONS["batched_mm"])
    if model is not None:
        model.set_experts_implementation("moekit")


def test_model_inside_transformers():
    needs_transformers()
    cases = model.run_model(MODEL, use_moekit=eager_as_moekit, threads=1, timing=QUICK)
    accepted("model", cases, ("transformers",))
    prefill, decoding = cases
    assert names(prefill) == [
        "moekit",
        "moekit experts only",
        "transformers grouped_mm",
        "transformers eager",
    ]
    assert names(decoding) == [
        "moekit",
        "moekit experts only",
        "transformers grouped_mm",
        "transformers batched_mm",
        "transformers eager",
    ]
    assert "decode only" in prefill["skipped"]["transformers batched_mm"]
    assert prefill["contestants"][0]["work"]["tokens"] == 12
    assert decoding["contestants"][0]["work"]["tokens"] == 3


def test_model_without_the_plug_in_says_so():
    needs_transformers()
    cases = model.run_model(MODEL, threads=1, timing=QUICK)
    assert "does not plug into transformers" in cases[0]["skipped"]["moekit"]
    assert cases[0]["moekit_speedup"] is None


def test_model_on_all_of_moekits_kernels():
    """In the whole a `moekit.use_in_transformers(model)` that every other contestant undoes."""
    needs_transformers()
    from moekit.convert.transformers import undo, use_in_transformers

    log = []

    def use(olmoe=None):
        log.append("plug" if olmoe is None else "use")
        use_in_transformers(olmoe)

    def take_back(olmoe):
        log.append("undo")
        undo(olmoe)

    cases = model.run_model(MODEL, against=(), use_moekit=use, undo_moekit=take_back, threads=1, timing=QUICK)
    accepted("model", cases)
    assert names(cases[0]) == ["moekit", "moekit experts only"]
    assert log[0] == "plug"
    assert log.count("use") >= 4
    assert log.count("undo") >= 2 * log.count("use") - 2


def test_wrong_experts_of_a_model_are_refused():
    """Every token visits the experts next to those that it chose."""
    needs_transformers()
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    right = ALL_EXPERTS_FUNCTIONS["batched_mm"]

    def wrong(self, hidden_states, indices, weights):
        return right(self, hidden_states, (indices + 1) % self.num_experts, weights)

    def register(model=None):
        ALL_EXPERTS_FUNCTIONS.register("moekit", wrong)
        if model is not None:
            model.set_experts_implementation("moekit")

    cases = model.run_model(MODEL, against=(), use_moekit=register, threads=1, timing=QUICK)
    assert [list(case["refused"]) for case in cases] == [["moekit", "moekit experts only"]] * 2


def test_float32_logits_leave_the_model_as_it_was():
    needs_transformers()
    olmoe = random_olmoe(MODEL, seed=0)
    ids = torch.arange(5)
    before = {name: value.clone() for name, value in olmoe.state_dict().items()}
    logits = float32_logits(olmoe, ids)
    whole = random_olmoe(MODEL, seed=0).float()
    assert torch.allclose(logits, whole(input_ids=ids[None]).logits[0], atol=1e-6)
    assert all(value.dtype == torch.bfloat16 for value in olmoe.parameters())
    assert all(torch.equal(value, before[name]) for name, value in olmoe.state_dict().items())
    half = float32_logits(olmoe, ids, lambda name, value: value.float() / 2)
    assert not torch.allclose(half, logits)


def test_prefill_counts_what_the_last_logits_need():
    """Counted on the module itself: every matrix, with the tokens that it must multiply."""
    needs_transformers()
    olmoe = random_olmoe(MODEL, seed=0)
    sizes = {name: value.numel() for name, value in olmoe.named_parameters() if value.dim() > 1}
    total = sizes["lm_head.weight"]
    for name, size in sizes.items():
        if name.startswith("model.layers"):
            active = size * MODEL.top_k // MODEL.experts if ".experts." in name else size
            needed = 12 if ".0." in name or "k_proj" in name or "v_proj" in name else 1
            total += active * needed
    attention = (
        2 * 64 * sum(range(1, 13)) + 2 * 64 * 12
    )  # first layer: position p sees p tokens; last: one row
    assert MODEL.prefill_flops == 2 * (total + attention)


def test_model_shapes():
    with pytest.raises(ConfigError, match="--d-model must be a multiple of twice --heads"):
        ModelShape(d_model=60, heads=8)
    with pytest.raises(ConfigError, match="did you mean 'Q4_0'"):
        model.run_model(MODEL, formats=["Q4_1"], threads=1)
