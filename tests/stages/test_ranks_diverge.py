"""Two ranks whose training leaves the finite numbers: both stop with one error, which is that of one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pair_chain import Chain
from test_launch import Made, training

from alignbench.errors import InvariantError
from alignbench.jsonio import read_json


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return Chain(tmp_path_factory.mktemp("diverge") / "store")


def diverging(chain: Chain, folder: Path, **machine: Any) -> InvariantError:
    stage, spec, inputs = training(chain)
    settings = replace(spec.train, learning_rate=1e30, warmup_ratio=0.0, max_grad_norm=0.0)
    with pytest.raises(InvariantError) as caught:
        Made(folder, stage, replace(spec, train=settings), inputs, micro_batch=1, checkpoint_every=1, **machine)
    return caught.value


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 2, 3])
def test_both_ranks_stop_with_the_error_of_one_process(chain: Chain, tmp_path: Path, zero: int) -> None:
    alone = diverging(chain, tmp_path / "one", zero_stage=zero)
    error = diverging(chain, tmp_path / "two", processes=2, zero_stage=zero)
    assert "of optimiser step 2 is" in error.what
    # every rank knows all examples whose loss is not finite, whoever computed it
    assert error.where.startswith(f"{alone.where}; rank ")
    assert error.what == alone.what
    assert error.mend == alone.mend
    assert "the checkpoint of step 1 is kept" in error.mend
    assert read_json(tmp_path / "two/work/checkpoints/COMPLETE.json")["step"] == 1
