"""The memory that a process really takes, measured by the system in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from fitting_models import build, write

from moekit.serve.memory_plan import plan_memory
from moekit.serve.model_source import find_source

SCRIPT = """
import json, pathlib, re, sys, tempfile
import torch
torch.set_num_threads(1)
from moekit.generate.text import generate
from moekit.serve.fitting import fit_to_memory
sys.path.insert(0, sys.argv[3])
from test_fitting import Codec, memory_for
from fitting_models import build, write

def run(path, memory, tokens):
    with fit_to_memory(path, memory, context=64) as fitted:
        (answer,) = generate(fitted.model, Codec(), ["experts " * 6], max_new_tokens=tokens, temperature=0)
        return answer.token_ids, fitted.report()

def most():  # ru_maxrss would begin with that of the process this one was forked from
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) * 1024

with tempfile.TemporaryDirectory() as folder:  # what libraries take once is taken before
    small = write(build(), pathlib.Path(folder) / "m")
    run(small, memory_for(small, 0.2, context=64), 3)
    run(small, None, 3)
before = most()
tokens, report = run(sys.argv[1], int(sys.argv[2]) or None, 12)
print(json.dumps({"bytes": most() - before, "tokens": tokens, **report}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says of a process")
def test_the_process_grows_by_no_more_than_the_memory(tmp_path, repository):
    path = write(build({"n_experts": 64, "d_expert": 1024}, max_seq_len=128), tmp_path / "m", torch.float32)
    source = find_source(path)
    plan = plan_memory(source, None, context=64)
    source.close()
    assert plan.expert_bytes > 140e6

    def measured(memory):
        command = [sys.executable, "-c", SCRIPT, str(path), str(memory), str(repository / "tests" / "serve")]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
        return json.loads(done.stdout)

    allowed = plan.memory_for(0.2)
    within, whole = measured(allowed), measured(0)
    slack = 12e6  # buffers of libraries, and of the allocator
    assert within["bytes"] < allowed + slack
    # so that the line above says something; a little is in memory that was used before
    assert whole["bytes"] > 0.9 * plan.expert_bytes > 2 * (allowed + slack)
    assert within["tokens"] == whole["tokens"]
    assert within["store"]["misses"] > 0
