"""Peak memory: known allocations must show up, and only they."""

import sys
import threading
import time

import pytest
import torch

from moekit.train import memory
from moekit.train.memory import PeakMemory, resident_bytes

MB = 1_000_000
linux = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's mark exists on Linux only")


def allocate(n_bytes):
    return torch.full((n_bytes // 4,), 1.0)


@linux
def test_peak_is_seen_after_the_memory_was_freed():
    with PeakMemory() as measured:
        allocate(100 * MB)
    assert measured.method == "high-water mark"
    assert 95 * MB < measured.increase < 125 * MB
    assert measured.bytes - measured.increase == pytest.approx(resident_bytes(), abs=30 * MB)


@linux
def test_an_earlier_peak_does_not_count():
    allocate(200 * MB)
    with PeakMemory() as measured:
        allocate(50 * MB)
    assert 45 * MB < measured.increase < 75 * MB


@linux
def test_blocks_inside_each_other():
    with PeakMemory() as outer:
        allocate(120 * MB)
        with PeakMemory() as inner:  # resets the mark, which must not take the 120 MB from the outer block
            allocate(40 * MB)
        with PeakMemory() as second:
            pass
    assert 35 * MB < inner.increase < 65 * MB
    assert second.increase < 15 * MB
    assert 115 * MB < outer.increase < 150 * MB


@linux
def test_reading_inside_the_block():
    with PeakMemory() as measured:
        first = measured.increase
        allocate(60 * MB)
        assert measured.increase > first + 50 * MB


def test_sampling_where_the_mark_cannot_be_reset(monkeypatch):
    if resident_bytes() is None:
        pytest.skip("this system does not tell the resident size")
    monkeypatch.setattr(memory, "_reset_mark", lambda: False)
    with PeakMemory() as measured:
        tensor = allocate(80 * MB)
        time.sleep(20 * memory._INTERVAL)
        del tensor
    assert measured.method == "sampled"
    assert 70 * MB < measured.increase < 110 * MB
    assert not any(thread.name == "moekit-memory" for thread in threading.enumerate())


def test_a_system_that_tells_nothing_gives_zero_and_a_warning(monkeypatch):
    monkeypatch.setattr(memory, "_reset_mark", lambda: False)
    monkeypatch.setattr(memory, "resident_bytes", lambda: None)
    with pytest.warns(UserWarning, match="does not tell the memory"), PeakMemory() as measured:
        pass
    assert (measured.method, measured.bytes, measured.increase) == ("unavailable", 0, 0)


def test_an_error_inside_ends_the_block():
    with pytest.raises(KeyError), PeakMemory() as measured:
        raise KeyError
    assert measured.bytes >= 0
    assert PeakMemory._active == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_the_gpu_tensors_count():
    with PeakMemory("cuda") as measured:
        tensor = torch.ones(25_000_000, device="cuda")
        del tensor
    assert measured.method == "cuda"
    assert measured.increase == pytest.approx(100 * MB, rel=0.05)
