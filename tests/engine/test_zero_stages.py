"""The ZeRO stage is a matter of memory: it changes no loss and no weight beyond rounding."""

import numpy as np
import pytest
import tiny

pytestmark = pytest.mark.usefixtures("split_parameters")

TOLERANCE = 1e-4


def curve(folder, name, lora, stage, work):
    goal = tiny.objective(name, tiny.load(folder))
    machine = {"zero_stage": stage}
    return tiny.run(tiny.job(tiny.load(folder, lora), goal, work, steps=20, lora=lora, machine=machine))


@pytest.mark.parametrize("lora", [None, tiny.LORA], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["dpo", "sft"])
def test_same_losses_over_20_steps_in_zero_0_to_3(policy_folder, tmp_path, name, lora):
    results = [curve(policy_folder, name, lora, stage, tmp_path / str(stage)) for stage in range(4)]
    plain = tiny.losses(results[0][0])
    assert len(plain) == 20
    assert plain[-1] < plain[0] - 0.02  # it does train
    for result, state in results[1:]:
        np.testing.assert_allclose(tiny.losses(result), plain, atol=TOLERANCE)
        assert tiny.distance(state, results[0][1]) < TOLERANCE
