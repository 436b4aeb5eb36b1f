"""NumPy's own threads: none, unless the user asks for them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from tiny_runs import TOP

# NumPy starts its threads when it is imported; what else has threads (torch) is not imported here
COUNT = "import alignbench, os, numpy; print(len(os.listdir('/proc/self/task')))"


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core has no threads to spare")
@pytest.mark.parametrize(("asked", "threads"), [({}, 1), ({"OPENBLAS_NUM_THREADS": "2"}, 2)])
def test_numpy_has_one_thread_unless_told_otherwise(asked: dict[str, str], threads: int) -> None:
    plain = {key: value for key, value in os.environ.items() if not key.endswith("_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", COUNT], env=plain | asked, cwd=TOP, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == threads
