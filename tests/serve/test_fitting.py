"""A model within a memory gives the bits of the model that is wholly in memory, however little is allowed."""

from __future__ import annotations

import os
import shutil
import threading

import pytest
import torch
from fitting_models import KINDS, VOCABULARY, build, quantised, write

from moekit.config.errors import ConfigError, DataError
from moekit.convert.formats.opening import open_model
from moekit.generate.text import generate
from moekit.layers.stored_experts import StoredMLP
from moekit.serve.fitting import fit_to_memory
from moekit.serve.memory_plan import plan_memory
from moekit.serve.model_source import find_source


class Codec:
    end_id = 0

    def encode(self, text):
        return [1 + ord(letter) % (VOCABULARY - 1) for letter in text]

    def decode(self, ids):
        return " ".join(map(str, ids))


def memory_for(path, share, **options):
    source = find_source(path)
    try:
        return plan_memory(source, None, **options).memory_for(share)
    finally:
        source.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(build(), tmp_path_factory.mktemp("models") / "plain")


def logits_of(model, lengths=(1, 3, 40)):
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(0, VOCABULARY, (2, length), generator=generator) for length in lengths]
    with torch.no_grad():
        return [model(part).logits for part in ids]


def assert_equal(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


class TestEqualBits:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
    def test_for_every_kind_of_experts(self, tmp_path, kind, dtype):
        path = write(build(KINDS[kind]), tmp_path / "model", dtype)
        reference = open_model(path, dtype=None).decoder
        expected = logits_of(reference)
        for share, read_ahead in ((0.0, False), (0.5, True), (1.0, None)):
            with fit_to_memory(path, memory_for(path, share), read_ahead=read_ahead) as fitted:
                assert (fitted.store is None) == (share == 1.0)
                assert_equal(logits_of(fitted.model), expected)

    @pytest.mark.parametrize("bits", [8, 4])
    def test_for_quantised_experts(self, tmp_path, bits):
        path = write(quantised(bits), tmp_path / "model")
        expected = logits_of(open_model(path, dtype=None).decoder)
        for share in (0.0, 0.4, 1.0):
            with fit_to_memory(path, memory_for(path, share)) as fitted:
                assert fitted.plan.precision == f"int{bits}"
                assert_equal(logits_of(fitted.model), expected)

    @pytest.mark.parametrize("switch", ["0", "1"], ids=["plain kernels", "fast kernels"])
    def test_with_and_without_the_fast_kernels(self, folder, monkeypatch, switch):
        from moekit.kernels.registry import find

        monkeypatch.setenv("MOEKIT_CPU_KERNELS", switch)
        find.cache_clear()
        try:
            expected = logits_of(open_model(folder).decoder)
            with fit_to_memory(folder, memory_for(folder, 0.3)) as fitted:
                assert_equal(logits_of(fitted.model), expected)
        finally:
            monkeypatch.undo()
            find.cache_clear()

    def test_for_layers_of_different_sizes(self, tmp_path):
        changes = {1: {"n_experts": 5}, 2: {"d_expert": 96, "top_k": 3}}
        path = write(build(layers=4, moe_by_layer=changes), tmp_path / "m")
        expected = logits_of(open_model(path).decoder)
        with fit_to_memory(path, memory_for(path, 0.4)) as fitted:
            assert len(fitted.store.shelves) == 2
            assert_equal(logits_of(fitted.model), expected)

    def test_with_dense_layers_between(self, tmp_path):
        path = write(build(layers=4, n_dense_layers=1, moe_every=2), tmp_path / "m")
        expected = logits_of(open_model(path).decoder)
        with fit_to_memory(path, memory_for(path, 0.3), read_ahead=True) as fitted:
            assert_equal(logits_of(fitted.model), expected)

    def test_rounded_as_it_is_opened(self, folder):
        expected = logits_of(open_model(folder, dtype=torch.bfloat16).decoder)
        memory = memory_for(folder, 0.4, precision="bfloat16")
        with fit_to_memory(folder, memory, precision="bfloat16") as fitted:
            assert_equal(logits_of(fitted.model), expected)

    def test_quantised_as_it_is_opened(self, folder):
        from moekit.kernels.quantized import quantize

        with fit_to_memory(folder, None, precision="int8") as fitted:
            stored = open_model(folder).decoder.state_dict()["backbone.layers.1.feed_forward.experts.w_in"]
            made = fitted.model.state_dict()["backbone.layers.1.feed_forward.experts.w_in.codes"]
            assert torch.equal(made, quantize(stored, 8, 64).codes)
            exact = logits_of(open_model(folder).decoder)[0]
            difference = (logits_of(fitted.model)[0] - exact).norm() / exact.norm()
            assert 0 < difference < 0.1

    def test_generation(self, folder):
        options = {"max_new_tokens": 40, "temperature": 0.8, "seed": 5, "stop_at_end": False}
        prompts = ["experts on disk", "a", "b"]
        expected = generate(open_model(folder).decoder, Codec(), prompts, **options)
        with fit_to_memory(folder, memory_for(folder, 0.2), read_ahead=True) as fitted:
            found = generate(fitted.model, Codec(), prompts, **options)
        assert [one.token_ids for one in found] == [one.token_ids for one in expected]

    def test_two_threads_at_once(self, folder):
        expected = logits_of(open_model(folder).decoder)
        with fit_to_memory(folder, memory_for(folder, 0.4), read_ahead=True) as fitted:
            found = {}

            def work(number):
                for _ in range(5):
                    found[number] = logits_of(fitted.model)

            threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
        assert_equal(found[0], expected)
        assert_equal(found[1], expected)


class TestSources:
    def test_a_hugging_face_folder_in_shards(self, tmp_path):
        from moekit.convert.formats.families import family_named
        from moekit.convert.formats.hf_folder import write_hf_folder

        moe = {"router": {"name": "softmax", "options": {"normalize": "after"}}}
        (tmp_path / "hf").mkdir()
        write_hf_folder(build(moe), family_named("mixtral"), tmp_path / "hf", shard_bytes=200_000)
        assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
        expected = logits_of(open_model(tmp_path / "hf").decoder)
        with fit_to_memory(tmp_path / "hf", memory_for(tmp_path / "hf", 0.3)) as fitted:
            assert_equal(logits_of(fitted.model), expected)

    def test_other_kinds_say_what_to_do(self, tmp_path):
        (tmp_path / "m.gguf").write_bytes(b"GGUF")
        with pytest.raises(ConfigError, match=r"memory cannot be limited for a GGUF file.*moekit import"):
            fit_to_memory(tmp_path / "m.gguf", "1GB")
        with pytest.raises(DataError, match="is no model"):
            fit_to_memory(tmp_path / "none", "1GB")

    def test_a_dense_model_is_opened_as_ever(self, tmp_path):
        dense = write(build(moe=None), tmp_path / "dense")
        with fit_to_memory(dense, "1GB") as fitted:
            assert fitted.store is None
            assert_equal(logits_of(fitted.model), logits_of(open_model(dense).decoder))

    def test_a_read_only_folder(self, folder, tmp_path):
        path = shutil.copytree(folder, tmp_path / "m")
        for file in path.iterdir():
            file.chmod(0o444)
        path.chmod(0o555)
        try:
            with fit_to_memory(path, memory_for(path, 0.2)) as fitted:
                logits_of(fitted.model)
        finally:
            path.chmod(0o755)


def test_opening_reads_the_dense_part_alone(folder):
    with fit_to_memory(folder, memory_for(folder, 0.2)) as fitted:
        assert fitted.source.files.bytes_read == fitted.plan.dense_bytes


class TestPlan:
    def test_parts_add_up_and_are_those_of_the_model(self, folder):
        source = find_source(folder)
        plan = plan_memory(source, None, context=32)
        source.close()
        model = open_model(folder).decoder
        experts = sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name)
        assert plan.expert_bytes == plan.slot_bytes == experts
        assert plan.dense_bytes == sum(p.nbytes for p in model.parameters()) - experts
        assert plan.cache_bytes == 3 * 2 * 32 * 64 * 4
        assert plan.least_bytes == plan.fixed_bytes + 2 * experts // 24

    def test_slots_keep_within_the_memory_and_use_it(self, folder):
        whole = memory_for(folder, 1.0)
        for share in (0.15, 0.3, 0.77):
            memory = memory_for(folder, share)
            with fit_to_memory(folder, memory) as fitted:
                plan = fitted.plan
                assert plan.total_bytes <= memory < plan.total_bytes + plan.forms[0].expert_bytes
                assert plan.forms[0].slots == fitted.store.shelves[0].n_slots == -int(-share * 24 // 1)
        with fit_to_memory(folder, whole - 1) as fitted:
            assert fitted.plan.forms[0].slots == 23

    def test_auto_takes_the_most_exact_that_fits_wholly(self, folder):
        sizes = {
            one: memory_for(folder, 1.0, precision=one) for one in ("stored", "bfloat16", "int8", "int4")
        }
        assert (
            sizes["stored"] > sizes["int8"] > sizes["bfloat16"] > sizes["int4"]
        )  # int8 leaves the rest in float32
        source = find_source(folder)
        for one in ("stored", "bfloat16", "int4"):
            memory = sizes[one]
            assert plan_memory(source, memory, precision="auto").precision == one.replace("stored", "float32")
        below = plan_memory(source, sizes["int4"] - 1, precision="auto")
        assert (below.precision, below.exact, below.fits_wholly) == ("float32", True, False)
        source.close()

    def test_with_everything_in_memory_nothing_is_changed(self, folder):
        with fit_to_memory(folder, "1GB") as fitted:
            plain = open_model(folder).decoder
            assert [type(m) for m in fitted.model.modules()] == [type(m) for m in plain.modules()]
            assert not fitted.model._forward_pre_hooks
            assert not fitted.model.backbone._forward_pre_hooks


class TestErrors:
    def test_less_than_one_token_needs(self, folder):
        least = memory_for(folder, 0.0)
        expected = (
            rf"memory must be at least {least:,} bytes, what every token touches .* got {least - 1:,}\. Allow"
        )
        with pytest.raises(ConfigError, match=expected):
            fit_to_memory(folder, least - 1)
        with fit_to_memory(folder, least) as fitted:
            assert fitted.plan.forms[0].slots == 2

    @pytest.mark.parametrize("memory", ["2 gigs", "", "GB", "-2GB", 0, -5])
    def test_sizes_that_are_none(self, folder, memory):
        with pytest.raises(ConfigError, match=r"memory must be (a number with a unit|more than 0)"):
            fit_to_memory(folder, memory)

    def test_precisions_that_are_not_to_be_had(self, folder, tmp_path):
        with pytest.raises(ConfigError, match=r"precision must be one of stored, auto.*got 'int3'"):
            fit_to_memory(folder, "1GB", precision="int3")
        with pytest.raises(ConfigError, match=r"precision must be stored where not all experts fit in int8"):
            fit_to_memory(folder, memory_for(folder, 0.0, precision="int8"), precision="int8")
        path = write(quantised(8), tmp_path / "q")
        with pytest.raises(ConfigError, match="quantised already"):
            fit_to_memory(path, "1GB", precision="int4")

    def test_a_file_that_is_cut_short(self, folder, tmp_path):
        path = shutil.copytree(folder, tmp_path / "m")
        weights = path / "model.safetensors"
        os.truncate(weights, weights.stat().st_size - 1)
        with pytest.raises(DataError, match=r"model.safetensors is cut short: .* ends at byte"):
            fit_to_memory(path, memory_for(folder, 0.2))
        os.truncate(weights, 20)
        with pytest.raises(DataError, match="header has no end"):
            fit_to_memory(path, memory_for(folder, 0.2))

    def test_a_file_that_is_replaced_is_read_on_as_it_was(self, folder, tmp_path):
        path = shutil.copytree(folder, tmp_path / "m")
        expected = logits_of(open_model(folder).decoder)
        with fit_to_memory(path, memory_for(path, 0.2)) as fitted:
            (tmp_path / "other").write_bytes(b"something else")
            os.replace(tmp_path / "other", path / "model.safetensors")
            assert_equal(logits_of(fitted.model), expected)

    @pytest.mark.parametrize("how", ["written in place", "cut short"])
    def test_a_file_that_changes_while_it_is_open(self, folder, tmp_path, how):
        path = shutil.copytree(folder, tmp_path / "m")
        weights = path / "model.safetensors"
        with fit_to_memory(path, memory_for(path, 0.2)) as fitted:
            if how == "cut short":
                os.truncate(weights, 5000)
            else:
                os.utime(weights, ns=(1, 1))
            said = "was cut short|was changed"
            with pytest.raises(DataError, match=f"model.safetensors ({said}) while the model was open"):
                logits_of(fitted.model)

    def test_gradients(self, folder):
        with (
            fit_to_memory(folder, memory_for(folder, 0.2)) as fitted,
            pytest.raises(ConfigError, match=r"experts on disk cannot be trained.*no_grad"),
        ):
            fitted.model(torch.zeros(1, 3, dtype=torch.long))

    def test_autocast_to_another_type(self, folder):
        with (
            fit_to_memory(folder, memory_for(folder, 0.2)) as fitted,
            torch.no_grad(),
            torch.autocast("cpu", torch.bfloat16),
            pytest.raises(ConfigError, match=r"precision must be torch.bfloat16"),
        ):
            fitted.model(torch.zeros(1, 3, dtype=torch.long))

    def test_after_it_was_closed(self, folder):
        with fit_to_memory(folder, memory_for(folder, 0.2)) as fitted:
            pass
        with pytest.raises(ConfigError, match="closed"):
            logits_of(fitted.model)
        assert "experts" not in {thread.name for thread in threading.enumerate()}


def test_hit_rates_grow_with_the_memory(folder):
    rates = []
    for share in (0.1, 0.5, 0.9):
        with fit_to_memory(folder, memory_for(folder, share), read_ahead=False) as fitted:
            generate(fitted.model, Codec(), ["experts"], max_new_tokens=50, seed=1, stop_at_end=False)
            counts = fitted.store.counts
            assert counts.needed >= 49 * 3 * 2
            assert counts.bytes_read == counts.misses * fitted.plan.forms[0].expert_bytes
            rates.append(counts.hit_rate)
    assert rates[0] < rates[1] < rates[2]
    assert rates[2] > 0.8


def test_the_layers_are_stored_ones(folder):
    with fit_to_memory(folder, memory_for(folder, 0.2)) as fitted:
        experts = [layer.experts for layer in fitted.model.moe_layers]
        assert all(isinstance(one, StoredMLP) for one in experts)
        assert "slots=5" in repr(experts[0])
        assert not any(".experts." in name for name in fitted.model.state_dict())
