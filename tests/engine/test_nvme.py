"""ZeRO-3 with its optimizer state in files: the same training, where DeepSpeed's async_io can be built."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny

from alignbench.engine.runtime import import_deepspeed


@pytest.mark.slow
def test_offload_to_files_trains_the_same(tmp_path: Path) -> None:
    import_deepspeed()
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("DeepSpeed's async_io needs libaio (Debian: libaio-dev) and a C++ compiler")
    goal = tiny.sft()
    # what is smaller than DeepSpeed's limits stays in memory: an MLP's matrix must be larger
    size = {"hidden_size": 256, "intermediate_size": 2048}
    machine = {"zero_stage": 3}
    plain, weights = tiny.run(tiny.job(tiny.llama(**size), goal, tmp_path / "plain", machine=machine))
    files = tmp_path / "files"
    machine = {"zero_stage": 3, "offload": "nvme", "nvme_path": str(files)}
    seen: set[str] = set()

    def look(step: int, metrics: object) -> None:
        seen.update(path.name for path in files.rglob("*") if path.is_file())

    offloaded, found = tiny.run(tiny.job(tiny.llama(**size), goal, tmp_path / "nvme", machine=machine), look)
    np.testing.assert_allclose(tiny.losses(offloaded), tiny.losses(plain), atol=1e-5)
    assert tiny.distance(found, weights) < 1e-4
    assert seen
