"""N steps = k steps, an interruption, a resumption and N - k steps, to the bit; half a checkpoint is none."""

import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import train_worker

from alignbench.engine.runtime import DTYPES
from alignbench.errors import StoreError
from alignbench.jsonio import read_json

pytestmark = pytest.mark.usefixtures("split_parameters")

STEPS, EVERY, STOP = 8, 3, 5
DROPOUT = replace(tiny.LORA, dropout=0.3)
REPOSITORY = Path(__file__).parents[2]


class InterruptionError(Exception):
    pass


def stop_at(step):
    def on_metrics(now, metrics):
        if now == step:
            raise InterruptionError

    return on_metrics


def make(folder, work, *, name="dpo", lora=None, stage=0, **machine):
    goal = tiny.objective(name, tiny.load(folder))
    machine = {"checkpoint_every": EVERY, "zero_stage": stage} | machine
    # decay, warm-up and a cosine: a scheduler or an optimizer that restarts would show
    train_settings = {"schedule": "cosine", "warmup_ratio": 0.4, "weight_decay": 0.1, "max_grad_norm": 1.0}
    model = tiny.load(folder, lora, DTYPES[machine.get("dtype", "fp32")])
    return tiny.job(model, goal, work, steps=STEPS, lora=lora, machine=machine, train_settings=train_settings)


def interrupted(*args, step=STOP, **kwargs):
    with pytest.raises(InterruptionError):
        tiny.run(make(*args, **kwargs), stop_at(step))


CASES = [
    pytest.param({"stage": stage, "lora": lora}, id=f"{'lora-dropout' if lora else 'full'}-zero{stage}")
    for lora in (None, DROPOUT)
    for stage in range(4)
]


@pytest.mark.parametrize(
    "case",
    [*CASES, pytest.param({"name": "kto"}, id="kto"), pytest.param({"name": "sft", "dtype": "bf16"}, id="sft-bf16")],
)
def test_interrupted_and_resumed_equals_uninterrupted_to_the_bit(policy_folder, tmp_path, case):
    whole, expected = tiny.run(make(policy_folder, tmp_path / "whole", **case))
    interrupted(policy_folder, tmp_path / "parts", **case)
    seen = []
    resumed, state = tiny.run(make(policy_folder, tmp_path / "parts", **case), lambda step, _: seen.append(step))
    assert (whole.resumed_at, resumed.resumed_at) == (0, EVERY)
    assert seen == list(range(EVERY + 1, STEPS + 1))  # nothing is trained twice
    assert resumed.log == whole.log
    assert tiny.same_bits(state, expected)


def test_dropout_is_on_and_its_generator_is_part_of_the_checkpoint(policy_folder, tmp_path):
    first, _ = tiny.run(make(policy_folder, tmp_path / "a", lora=DROPOUT))
    second, _ = tiny.run(make(policy_folder, tmp_path / "b", lora=tiny.LORA))
    assert first.log[1:] != second.log[1:]


def test_trained_tokens_count_the_whole_run_after_a_resumption(policy_folder, tmp_path):
    from alignbench.engine.train import train

    cost, whole = {}, {}
    train(make(policy_folder, tmp_path / "whole"), whole, lambda step, metrics: None)
    interrupted(policy_folder, tmp_path / "parts")
    train(make(policy_folder, tmp_path / "parts"), cost, lambda step, metrics: None)
    assert cost["trained_tokens"] == whole["trained_tokens"] > 0


def test_only_one_checkpoint_is_kept(policy_folder, tmp_path):
    interrupted(policy_folder, tmp_path, step=7)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["COMPLETE.json", "step-6"]


@pytest.mark.parametrize("other", [{"stage": 2}, {"micro_batch": 8}], ids=["zero-stage", "micro-batch"])
def test_checkpoint_of_another_layout_is_refused_and_training_starts_anew(policy_folder, tmp_path, other, caplog):
    whole, expected = tiny.run(make(policy_folder, tmp_path / "whole", **other))
    interrupted(policy_folder, tmp_path / "parts")
    with caplog.at_level(logging.WARNING):
        result, state = tiny.run(make(policy_folder, tmp_path / "parts", **other))
    assert "starting anew" in caplog.text
    assert result.resumed_at == 0
    assert result.log == whole.log
    assert tiny.same_bits(state, expected)


def test_checkpoint_without_its_marker_is_not_used(policy_folder, tmp_path):
    whole, expected = tiny.run(make(policy_folder, tmp_path / "whole"))
    interrupted(policy_folder, tmp_path / "parts")
    (tmp_path / "parts/checkpoints/COMPLETE.json").unlink()
    for file in (tmp_path / "parts/checkpoints/step-3").iterdir():
        os.truncate(file, file.stat().st_size // 2)
    result, state = tiny.run(make(policy_folder, tmp_path / "parts"))
    assert result.resumed_at == 0
    assert tiny.same_bits(state, expected)
    assert result.log == whole.log


@pytest.mark.parametrize("fault", ["cut", "absent"])
def test_a_marked_checkpoint_with_a_damaged_file_starts_anew(policy_folder, tmp_path, fault, caplog):
    whole, expected = tiny.run(make(policy_folder, tmp_path / "whole", stage=2))
    interrupted(policy_folder, tmp_path / "parts", stage=2)
    file = max((tmp_path / "parts/checkpoints/step-3").iterdir(), key=lambda path: path.stat().st_size)
    file.unlink() if fault == "absent" else os.truncate(file, file.stat().st_size // 2)
    result, state = tiny.run(make(policy_folder, tmp_path / "parts", stage=2))
    assert "starting anew" in caplog.text
    assert result.resumed_at == 0
    assert result.log == whole.log
    assert tiny.same_bits(state, expected)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_checkpoint_of_the_right_size_that_cannot_be_read_is_named(policy_folder, tmp_path, stage):
    interrupted(policy_folder, tmp_path, stage=stage)
    for file in (tmp_path / "checkpoints/step-3").iterdir():
        file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(StoreError, match="checkpoint at step 3 cannot be read") as caught:
        tiny.run(make(policy_folder, tmp_path, stage=stage))
    assert str(tmp_path / "checkpoints") in str(caught.value)


@pytest.mark.parametrize("other", [{"stage": 2}, {"micro_batch": 8}], ids=["zero-stage", "micro-batch"])
def test_a_refused_checkpoint_that_is_half_overwritten_is_not_used_later(policy_folder, tmp_path, other, monkeypatch):
    """A run stops, another layout's is killed while it writes the same step, the first one comes back."""
    from alignbench.engine import checkpoint

    def killed(path, value):
        raise InterruptionError

    whole, expected = tiny.run(make(policy_folder, tmp_path / "whole"))
    interrupted(policy_folder, tmp_path / "parts")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "atomic_write_json", killed)
        with pytest.raises(InterruptionError):
            tiny.run(make(policy_folder, tmp_path / "parts", **other))
    result, state = tiny.run(make(policy_folder, tmp_path / "parts"))
    assert result.resumed_at == 0
    assert result.log == whole.log
    assert tiny.same_bits(state, expected)


def environment(**changes):
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])} | changes


def test_kill_9_in_the_middle_of_a_checkpoint_resumes_from_the_one_before(policy_folder, tmp_path):
    worker = Path(train_worker.__file__)
    command = [sys.executable, str(worker), str(policy_folder), str(tmp_path / "parts"), "die"]
    killed = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (tmp_path / "parts/checkpoints/step-6").exists()
    assert read_json(tmp_path / "parts/checkpoints/COMPLETE.json")["step"] == 3

    whole, expected = tiny.run(train_worker.job(policy_folder, tmp_path / "whole"))
    resumed, state = tiny.run(train_worker.job(policy_folder, tmp_path / "parts"))
    assert resumed.resumed_at == 3
    assert resumed.log == whole.log
    assert tiny.same_bits(state, expected)


def resumes_from_3(folder, work):
    whole, expected = tiny.run(make(folder, work.parent / "whole"))
    resumed, state = tiny.run(make(folder, work))
    assert resumed.resumed_at == 3
    assert resumed.log == whole.log
    assert tiny.same_bits(state, expected)


def test_a_file_that_cannot_grow_leaves_the_previous_checkpoint_usable(policy_folder, tmp_path):
    """RLIMIT_FSIZE needs no rights: the second checkpoint's files stop in the middle."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def shrink(step, metrics):
        if step == STOP:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))

    try:
        with pytest.raises(OSError, match="checkpoint"):
            tiny.run(make(policy_folder, tmp_path / "parts"), shrink)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    resumes_from_3(policy_folder, tmp_path / "parts")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small tmpfs needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("stage", [0, 2])
def test_a_full_disk_leaves_the_previous_checkpoint_usable(policy_folder, tmp_path, small_disk, stage):
    ballast = small_disk / "ballast"

    def fill(step, metrics):
        if step == STOP:
            free = shutil.disk_usage(small_disk).free
            ballast.write_bytes(b"x" * (free - 65536))

    with pytest.raises(OSError, match="checkpoint"):
        tiny.run(make(policy_folder, small_disk / "parts", stage=stage), fill)
    assert read_json(small_disk / "parts/checkpoints/COMPLETE.json")["step"] == 3
    assert not (small_disk / "parts/checkpoints/step-6").exists()  # half a checkpoint does not keep the disk full
    ballast.unlink()
    whole, expected = tiny.run(make(policy_folder, tmp_path / "whole", stage=stage))
    resumed, state = tiny.run(make(policy_folder, small_disk / "parts", stage=stage))
    assert resumed.resumed_at == 3
    assert resumed.log == whole.log
    assert tiny.same_bits(state, expected)
