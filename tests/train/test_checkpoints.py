"""Checkpoints: bit-exact round trips, damage that is noticed, and writes that leave the old ones alone."""

import errno
import json
import os
import re
import resource
import shutil
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file

from moekit.config.errors import CheckpointError, ConfigError
from moekit.train.checkpoints import (
    DamagedCheckpointWarning,
    check_checkpoint,
    checkpoint_name,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from moekit.train.memory import PeakMemory

posix = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and file locks")


def content(step):
    """Tensors and state that tell the steps apart."""
    return {"weight": torch.arange(100.0) + step, "count": torch.tensor(step)}, {"step": step}


def save(folder, step, keep=2, micro=0):
    return save_checkpoint(folder, step, *content(step + micro / 10), keep, micro)


def assert_is(path, step):
    tensors, state = load_checkpoint(path)
    expected, expected_state = content(step)
    assert state == expected_state
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def names(folder):
    return sorted(entry.name for entry in folder.iterdir() if entry.name != ".lock")


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


TENSORS = {
    "float32": torch.tensor([1.5, -0.0, float("inf"), float("-inf"), float("nan"), 1e-45]),
    "quiet nan with payload": torch.tensor([0x7FC12345, -0x3EDCBB], dtype=torch.int32).view(torch.float32),
    "float64": torch.tensor([[1 / 3, 2.0**-1074]], dtype=torch.float64),
    "bfloat16": torch.randn(3, 5, 7).bfloat16(),
    "float16": torch.randn(9).half(),
    "float8": torch.randn(9).to(torch.float8_e4m3fn),
    "int64": torch.tensor([2**63 - 1, -(2**63)]),
    "int32": torch.tensor([-5], dtype=torch.int32),
    "int16": torch.tensor([-5], dtype=torch.int16),
    "int8": torch.tensor([[-128, 127]], dtype=torch.int8),
    "bool": torch.tensor([True, False, True]),
    "uint8": torch.arange(256, dtype=torch.uint8),
    "uint64": torch.tensor([2**64 - 1], dtype=torch.uint64),
    "no axis": torch.tensor(2.5),
    "no axis, bool": torch.tensor(True),
    "no element": torch.empty(0, 4),
    "no element either": torch.empty(0, 4),
    "transposed": torch.randn(4, 6).t(),
    "every third": torch.arange(30.0)[::3],
    "expanded": torch.tensor([7.0]).expand(4),
    "parameter": torch.nn.Parameter(torch.randn(2, 2)),
    "random state": torch.get_rng_state(),
    "Chinese 中文 / and.dots": torch.ones(1),
}


def test_every_type_comes_back_bit_for_bit(tmp_path):
    path = save_checkpoint(tmp_path, 3, TENSORS, {}, keep=1)
    tensors, _ = load_checkpoint(path)
    assert tensors.keys() == TENSORS.keys()
    for name, expected in TENSORS.items():
        assert tensors[name].dtype == expected.dtype, name
        assert tensors[name].shape == expected.shape, name
        assert bits(tensors[name]) == bits(expected.detach()), name
    torch.set_rng_state(tensors["random state"])  # torch accepts it as it is


def test_the_file_is_one_of_the_safetensors_library(tmp_path):
    path = save_checkpoint(tmp_path, 3, TENSORS, {}, keep=1)
    for name, tensor in load_file(path / "tensors.safetensors").items():
        assert bits(tensor) == bits(TENSORS[name].detach()), name
        assert tensor.data_ptr() % tensor.element_size() == 0, name


def test_tied_tensors_are_stored_once_and_tied_again(tmp_path):
    weight = torch.randn(1000)
    path = save_checkpoint(
        tmp_path, 1, {"embedding": weight, "head": weight, "view": weight.view(1000), "start": weight[:500],
                      "other shape": weight.view(10, 100), "equal": weight.clone()}, {}, keep=1,
    )  # fmt: skip
    n_bytes = (path / "tensors.safetensors").stat().st_size
    assert n_bytes < 4 * (1000 + 500 + 1000 + 1000) + 1000
    tensors, _ = load_checkpoint(path)
    assert tensors["head"] is tensors["embedding"]
    assert tensors["view"] is tensors["embedding"]
    assert tensors["equal"] is not tensors["embedding"]
    assert torch.equal(tensors["start"], weight[:500])
    assert torch.equal(tensors["other shape"], weight.view(10, 100))


@pytest.mark.parametrize(
    "tensor", [torch.eye(2).to_sparse(), torch.ones(2, dtype=torch.complex64), torch.empty(2, device="meta")]
)
def test_a_tensor_that_cannot_be_saved_is_named(tmp_path, tensor):
    with pytest.raises(CheckpointError, match=r"tensor 'odd one' cannot be saved"):
        save_checkpoint(tmp_path, 1, {"fine": torch.ones(1), "odd one": tensor}, {}, keep=1)
    assert list_checkpoints(tmp_path) == []


def test_loaded_tensors_can_change_without_changing_the_file(tmp_path):
    path = save(tmp_path, 5)
    tensors, _ = load_checkpoint(path)
    tensors["weight"].zero_()
    assert_is(path, 5)


def test_state_comes_back(tmp_path):
    state = {
        "epoch": 2,
        "loss": 0.1 + 0.2,
        "best": float("inf"),
        "text": '中文 \u2028 \x00 "',
        "nested": {"list": [1, None, True, {"a": []}]},
        "large": 2**100,
    }
    _, got = load_checkpoint(save_checkpoint(tmp_path, 1, {}, state, keep=1))
    assert got == state
    _, got = load_checkpoint(save_checkpoint(tmp_path, 2, {}, {"x": float("nan")}, keep=1))
    assert got["x"] != got["x"]


def test_state_that_is_not_json_is_refused_before_anything_is_written(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"state of step 2 cannot be written as JSON.*Tensor"):
        save_checkpoint(tmp_path, 2, {}, {"a": [torch.ones(1)]}, keep=1)
    assert names(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize(
    ("field", "arguments"), [("step", (-1, 1, 0)), ("keep", (1, 0, 0)), ("micro", (1, 1, -1))]
)
def test_impossible_arguments(tmp_path, field, arguments):
    step, keep, micro = arguments
    with pytest.raises(ConfigError, match=f"{field} must be"):
        save_checkpoint(tmp_path, step, {}, {}, keep, micro)


# --- which one is the newest, and which ones stay


def test_order_and_pruning(tmp_path):
    for step, micro in ((8, 0), (9, 0), (9, 1), (9, 2), (10, 0), (100_000_000, 0)):
        path = save(tmp_path, step, keep=3, micro=micro)
        assert path.name == checkpoint_name(step, micro)
        assert latest_checkpoint(tmp_path) == path
        assert_is(path, step + micro / 10)
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "step-100000000", "step-00000010", "step-00000009-m2"
    ]  # fmt: skip
    save(tmp_path, 100_000_001, keep=1)
    assert names(tmp_path) == ["step-100000001"]


def test_no_folder_no_checkpoint(tmp_path):
    assert latest_checkpoint(tmp_path / "none") is None
    assert latest_checkpoint(tmp_path) is None
    (tmp_path / "step-00000001").write_text("a file")
    (tmp_path / "step-1").mkdir()
    (tmp_path / "notes").mkdir()
    assert latest_checkpoint(tmp_path) is None
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*step-00000007"):
        load_checkpoint(tmp_path / "step-00000007")


def test_folders_above_are_made(tmp_path, monkeypatch):
    assert_is(save(tmp_path / "a" / "b" / "c", 1), 1)
    monkeypatch.chdir(tmp_path)
    assert_is(save_checkpoint("relative/checkpoints", 2, *content(2), 1), 2)


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 1, keep=1)
    path = save_checkpoint(tmp_path, 1, {"new": torch.ones(1)}, {"version": 2}, keep=1)
    assert load_checkpoint(path)[1] == {"version": 2}
    assert names(tmp_path) == ["step-00000001"]


def test_damaged_ones_do_not_count_as_kept(tmp_path):
    save(tmp_path, 1)
    (save(tmp_path, 2) / "manifest.json").unlink()
    save(tmp_path, 3)
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


def test_a_good_later_step_is_set_aside_and_a_damaged_one_removed(tmp_path):
    save(tmp_path, 10, keep=9)
    save(tmp_path, 20, keep=9)
    (save(tmp_path, 30, keep=9) / "state.json").unlink()
    with pytest.warns(
        UserWarning, match=r"step-00000020 is of a later step than step-00000015.*now abandoned-step"
    ):
        save(tmp_path, 15, keep=9)
    aside, *rest = names(tmp_path)
    assert re.fullmatch(r"abandoned-step-00000020-[0-9a-f]{4}", aside)
    assert rest == ["step-00000010", "step-00000015"]
    assert latest_checkpoint(tmp_path).name == "step-00000015"
    assert_is(tmp_path / aside, 20)


# --- damage


def truncate(file):
    os.truncate(file, file.stat().st_size - 1)


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGE = {
    "tensors truncated": (
        lambda p: truncate(p / "tensors.safetensors"),
        r"tensors\.safetensors has \d+ bytes",
    ),
    "tensors empty": (lambda p: os.truncate(p / "tensors.safetensors", 0), "has 0 bytes instead of"),
    "tensors longer": (
        lambda p: (p / "tensors.safetensors").open("ab").write(b"x"),
        r"has \d+ bytes instead of",
    ),
    "tensors changed": (lambda p: flip(p / "tensors.safetensors"), "does not match its SHA-256"),
    "tensors missing": (lambda p: (p / "tensors.safetensors").unlink(), "cannot be read"),
    "state changed": (lambda p: flip(p / "state.json"), r"state\.json does not match its SHA-256"),
    "state missing": (lambda p: (p / "state.json").unlink(), r"state\.json cannot be read"),
    "state a folder": (lambda p: ((p / "state.json").unlink(), (p / "state.json").mkdir()), r"state\.json"),
    "manifest missing": (lambda p: (p / "manifest.json").unlink(), r"manifest\.json is missing"),
    "manifest truncated": (lambda p: truncate(p / "manifest.json"), "not valid JSON"),
    "manifest not text": (lambda p: (p / "manifest.json").write_bytes(b"\xff\xfe\x00"), "not valid JSON"),
    "manifest a list": (lambda p: (p / "manifest.json").write_text("[]"), "does not describe a checkpoint"),
    "manifest of something else": (lambda p: (p / "manifest.json").write_text("{}"), "does not describe"),
    "manifest without files": (
        lambda p: (p / "manifest.json").write_text(
            '{"format": "moekit-checkpoint", "version": 1, "step": 20, "micro": 0, "files": []}'
        ),
        "does not list",
    ),
    "of another step": (
        lambda p: (shutil.rmtree(p), shutil.copytree(p.parent / "step-00000010", p)),
        "says step 10",
    ),
    "empty folder": (lambda p: (shutil.rmtree(p), p.mkdir()), r"manifest\.json is missing"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_passed_over(tmp_path, kind):
    save(tmp_path, 10)
    path = save(tmp_path, 20)
    damage, reason = DAMAGE[kind]
    damage(path)
    with pytest.raises(
        CheckpointError, match=rf"step-00000020 is damaged: .*{reason}.*Delete this folder and resume"
    ):
        load_checkpoint(path)
    with pytest.warns(DamagedCheckpointWarning, match=rf"passed over.*step-00000020.*{reason}"):
        assert latest_checkpoint(tmp_path).name == "step-00000010"
    assert_is(tmp_path / "step-00000010", 10)
    save(tmp_path, 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_is(latest_checkpoint(tmp_path), 20)


def test_all_damaged_is_none(tmp_path):
    for path in [save(tmp_path, step) for step in (1, 2)]:
        truncate(path / "state.json")
    with pytest.warns(DamagedCheckpointWarning) as record:
        assert latest_checkpoint(tmp_path) is None
    assert len(record) == 2


def test_no_flipped_bit_anywhere_is_believed(tmp_path):
    """A bit flipped in the manifest, or in every seventh byte elsewhere: noticed, or nothing changed."""
    path = save_checkpoint(
        tmp_path, 1, {"a": torch.arange(3.0), "b": torch.ones(1).bool()}, {"step": 1}, keep=1
    )
    expected, state = load_checkpoint(path)
    n_noticed = n_harmless = 0
    for file in path.iterdir():
        original = file.read_bytes()
        for position in range(0, len(original), 1 if file.name == "manifest.json" else 7):
            data = bytearray(original)
            data[position] ^= 1 << (position % 8)
            file.write_bytes(data)
            try:
                tensors, got = load_checkpoint(path)
            except CheckpointError:
                n_noticed += 1
                continue
            n_harmless += 1
            assert file.name == "manifest.json"
            assert got == state
            assert all(torch.equal(tensors[name], expected[name]) for name in expected)
        file.write_bytes(original)
    check_checkpoint(path)
    assert n_noticed > 300
    assert n_harmless < 40  # blanks and the version of moekit in the manifest


def test_without_verification_sizes_still_count(tmp_path):
    path = save(tmp_path, 1)
    flip(path / "tensors.safetensors")
    tensors, _ = load_checkpoint(path, verify=False)
    assert not torch.equal(tensors["weight"], content(1)[0]["weight"])
    truncate(path / "tensors.safetensors")
    with pytest.raises(CheckpointError, match="bytes instead of"):
        load_checkpoint(path, verify=False)


def test_a_newer_format_says_who_wrote_it(tmp_path):
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "version": 9, "moekit": "7.0"}))
    with pytest.raises(CheckpointError, match=r"format version 9, this moekit reads 1\. Install .*\(7\.0\)"):
        load_checkpoint(path)


# --- writes that fail


def assert_old_one_is_intact(folder):
    assert names(folder) == ["step-00000001"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_is(latest_checkpoint(folder), 1)


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_disk_full_in_any_file(tmp_path, monkeypatch, after):
    save(tmp_path, 1, keep=1)
    real, n_calls = os.write, 0

    def write(file, data):
        nonlocal n_calls
        n_calls += 1
        if n_calls > after:
            real(file, bytes(data)[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        with pytest.raises(
            CheckpointError, match=r"step 2 cannot be written .*No space left.*needs .* MB.*are free"
        ):
            save(tmp_path, 2, keep=1)
    assert_old_one_is_intact(tmp_path)
    assert_is(save(tmp_path, 2, keep=1), 2)


@posix
def test_a_real_limit_of_the_system_on_file_size(tmp_path):
    """The kernel itself stops the write in the middle of a file."""
    save(tmp_path, 1, keep=1)
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        message = "nothing was raised"
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
            save_checkpoint(tmp_path, 2, {"weight": torch.ones(10_000)}, {}, keep=1)
        except CheckpointError as error:
            message = str(error)
        finally:
            os.write(send, message.encode())
            os._exit(0)
    os.close(send)
    with os.fdopen(receive, "rb") as pipe:
        message = pipe.read().decode()
    os.waitpid(child, 0)
    assert re.search(
        r"step 2 cannot be written .*File too large .*Earlier checkpoints are intact", message
    ), message
    assert_old_one_is_intact(tmp_path)


@pytest.mark.parametrize("call", ["mkdir", "fsync", "rename", "open"])
@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EIO])
def test_a_call_that_fails_leaves_the_old_one(tmp_path, monkeypatch, call, number):
    save(tmp_path, 1, keep=1)

    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(
            CheckpointError, match=rf"{os.strerror(number)}.*Check that runs_dir .*are intact"
        ):
            save(tmp_path, 2, keep=1)
    assert_old_one_is_intact(tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(tmp_path):
    save(tmp_path, 1, keep=1)
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(CheckpointError, match=r"Permission denied.*Check that runs_dir"):
            save(tmp_path, 2, keep=1)
        assert_old_one_is_intact(tmp_path)
    finally:
        tmp_path.chmod(0o755)


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match=r"Not a directory|File exists"):
        save(tmp_path / "checkpoints", 1)
    with pytest.raises(CheckpointError, match=r"Not a directory|File exists"):
        save(tmp_path / "checkpoints" / "deeper", 1)


def test_an_interrupt_in_the_middle_leaves_no_rubbish(tmp_path, monkeypatch):
    save(tmp_path, 1, keep=1)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2, keep=1)
    assert_old_one_is_intact(tmp_path)


def test_old_ones_that_cannot_be_removed_are_no_reason_to_fail(tmp_path, monkeypatch):
    save(tmp_path, 1, keep=1)
    real = os.rename

    def rename(source, target):
        if ".removed-" in str(target):
            raise OSError(errno.EACCES, "Permission denied")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        with pytest.warns(UserWarning, match="old checkpoints .* were not removed"):
            path = save(tmp_path, 2, keep=1)
    assert_is(path, 2)
    save(tmp_path, 3, keep=1)
    assert names(tmp_path) == ["step-00000003"]


@posix
def test_two_processes_cannot_save_in_one_folder(tmp_path):
    import fcntl

    save(tmp_path, 1, keep=1)
    with open(tmp_path / ".lock", "r+") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(
            CheckpointError, match=r"another process is saving .*Give each run its own folder"
        ):
            save(tmp_path, 2, keep=1)
    assert_old_one_is_intact(tmp_path)
    save(tmp_path, 2, keep=1)


def test_what_dead_processes_left_is_cleared(tmp_path):
    save(tmp_path, 1, keep=5)
    for name in (
        ".step-00000002.writing-00aa",
        ".step-00000001.replaced-00bb",
        ".step-00000000.removed-00cc",
    ):
        shutil.copytree(tmp_path / "step-00000001", tmp_path / name)
    os.rename(tmp_path / "step-00000001", tmp_path / ".step-00000001.replaced-00dd")
    (tmp_path / ".step-mine").mkdir()  # not one of ours
    assert_is(latest_checkpoint(tmp_path), 1)  # its successor never came
    save(tmp_path, 3, keep=5)
    assert names(tmp_path) == [".step-mine", "step-00000001", "step-00000003"]
    assert_is(tmp_path / "step-00000001", 1)


# --- order and cost of the writes


@posix
def test_everything_is_flushed_before_it_gets_its_name_and_only_then_is_anything_removed(
    tmp_path, monkeypatch
):
    save(tmp_path, 1, keep=1)
    events, paths = [], {}

    def short(path):
        text = str(path)
        kind = re.search(r"\.(writing|removed|replaced)-", text)
        name = os.path.basename(text)
        return f"{kind[1]}/{name}" if kind and not name.startswith(".") else kind[1] if kind else name

    def record(name, describe):
        real = getattr(os, name)

        def call(*args, **kwargs):
            result = real(*args, **kwargs)
            event = describe(args, result)
            if event and (not events or events[-1] != event):
                events.append(event)
            return result

        monkeypatch.setattr(os, name, call)

    def opened(args, file):
        paths[file] = short(args[0])

    record("open", opened)
    record("write", lambda args, _: f"write {paths[args[0]]}")
    record("fsync", lambda args, _: f"fsync {paths[args[0]]}")
    record("rename", lambda args, _: f"rename {short(args[0])} to {short(args[1])}")
    record("unlink", lambda args, _: f"unlink {short(args[0])}")
    save(tmp_path, 2, keep=1)
    here = tmp_path.name
    assert [event for event in events if not event.startswith("unlink")] == [
        "write writing/tensors.safetensors",
        "fsync writing/tensors.safetensors",
        "write writing/state.json",
        "fsync writing/state.json",
        "write writing/manifest.json",
        "fsync writing/manifest.json",
        "fsync writing",
        "rename writing to step-00000002",
        f"fsync {here}",
        "rename step-00000001 to removed",
    ]
    assert [event.split()[0] for event in events[-3:]] == ["unlink"] * 3


@pytest.mark.skipif(sys.platform != "linux", reason="measures resident memory")
def test_large_tensors_are_not_copied(tmp_path):
    large = {
        name: torch.ones(9_000_000) for name in "ab"
    }  # 36 MB each: memory of this size goes back when freed
    save(tmp_path, 1)
    with PeakMemory() as memory:
        save_checkpoint(tmp_path, 2, large, {}, keep=1)
    assert memory.increase < 10_000_000
    turned = {name: tensor.view(3000, 3000).t() for name, tensor in large.items()}  # not contiguous: copied
    with PeakMemory() as memory:
        save_checkpoint(tmp_path, 3, turned, {}, keep=1)
    assert 30_000_000 < memory.increase < 46_000_000  # one of the two at a time


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tensors_of_the_gpu(tmp_path):
    tensors = {name: tensor.cuda() for name, tensor in TENSORS.items() if tensor.dtype != torch.uint64}
    loaded, _ = load_checkpoint(save_checkpoint(tmp_path, 1, tensors, {}, keep=1))
    assert all(bits(loaded[name]) == bits(tensor.detach().cpu()) for name, tensor in tensors.items())
