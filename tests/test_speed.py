"""Times of a plan: pieces are measured once, add up to stages, and are what a plan says they are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny

from alignbench import speed
from alignbench.config import ArchitectureConfig, SamplingConfig
from alignbench.engine.generate import Request, generate
from alignbench.errors import ConfigError
from alignbench.plan import UNTIMED_RATE, seconds_of
from alignbench.speed import Piece, Speed
from alignbench.stages.stage import Estimate, Facts, piece_of

HARDWARE = tiny.hardware(flops_per_second=None)
STEP = Piece("step", tiny.SHAPE, 6, 8, 2, 4)
PIECES = [
    STEP,
    replace(STEP, sequences=1),
    replace(STEP, lora=tiny.LORA),
    Piece("forward", tiny.SHAPE, 6, 8, 2, 8),
    Piece("sample", tiny.SHAPE, 6, 8, 4, 8),
]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ALIGNBENCH_CACHE", str(tmp_path))
    return tmp_path / "speed.json"


def test_pieces_are_timed_once_and_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Speed(HARDWARE)
    here.learn(PIECES)
    assert all(here.seconds(piece) > 0 for piece in PIECES)
    assert here.start > 0
    assert len(json.loads(cache.read_text())) == len(PIECES) + 1
    monkeypatch.setattr(speed.subprocess, "run", None)  # nothing more is measured
    again = Speed(HARDWARE)
    again.learn(PIECES)
    assert [again.seconds(piece) for piece in PIECES] == [here.seconds(piece) for piece in PIECES]
    assert again.start == here.start


@pytest.mark.parametrize("text", ["", "[1]", '{"a": "b"}', "{"])
def test_a_cache_that_is_not_ours_is_measured_anew(cache: Path, text: str) -> None:
    cache.write_text(text)
    assert Speed(HARDWARE).known == {}


def test_a_cache_that_cannot_be_written_costs_a_warning_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ALIGNBENCH_CACHE", str(tmp_path / "file"))
    speed._write({"a": 1.0})
    assert "cannot be kept" in caplog.text


def test_a_key_knows_what_time_depends_on_and_nothing_else() -> None:
    key = STEP.key(HARDWARE)
    assert key != replace(STEP, rows=5).key(HARDWARE)
    assert key != STEP.key(tiny.hardware(threads=2))
    assert key != STEP.key(tiny.hardware(zero_stage=2))
    assert key == STEP.key(tiny.hardware(checkpoint_every=7, memory_gib=3.0))


def test_a_large_piece_is_measured_in_part_and_a_large_model_by_its_first_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[int, int]] = []

    def steps(piece: Piece, hardware: object) -> float:
        seen.append((piece.shape.layers, piece.rows))
        return piece.rows * (1.0 + piece.shape.layers)

    monkeypatch.setattr(speed, "_steps", steps)
    large = replace(STEP, rows=int(10 * 3e10 / STEP.flops * STEP.rows))
    assert speed.seconds_of(large, HARDWARE) == pytest.approx(3.0 * large.rows)
    assert seen[0][1] < large.rows / 9
    seen.clear()
    deep = ArchitectureConfig(32000, 1024, 2816, 24, 16, 16, 1024, False)
    assert speed.seconds_of(replace(STEP, shape=deep, rows=1), HARDWARE) == pytest.approx(25.0)
    assert [layers for layers, _ in seen] == [1, 2]


def test_a_gpu_that_is_not_here_cannot_be_timed() -> None:
    with pytest.raises(ConfigError, match="torch sees none"):
        Speed(tiny.hardware(device="cuda", flops_per_second=None))


def test_a_stage_is_its_pieces_and_what_they_are_not(cache: Path) -> None:
    here = Speed(HARDWARE)
    here.known |= {STEP.key(HARDWARE): 0.5, PIECES[3].key(HARDWARE): 0.25}
    here.start = 3.0
    estimate = Estimate(flops=1e12, overhead_seconds=2.0, pieces=((STEP, 10.0), (PIECES[3], 4.0)))
    assert seconds_of(estimate, HARDWARE, speed=here) == 8.0
    assert seconds_of(estimate, replace(HARDWARE, processes=2), speed=here) == 3.0 + 2.0 + 3.0
    unknown = Estimate(flops=UNTIMED_RATE, overhead_seconds=1.0)
    assert seconds_of(unknown, HARDWARE, speed=here) == 2.0
    assert piece_of("step", Facts(parameters=1e6), prompt=4, response=4, sequences=1, rows=4) is None


@pytest.mark.parametrize(("mean", "most"), [(8, 24), (20, 24), (1, 24)])
def test_a_sampled_piece_s_responses_end_by_chance_at_their_mean(mean: int, most: int) -> None:
    piece = Piece("sample", tiny.SHAPE, 6, mean, 64, 64, most=most)
    policy = speed._model(piece, HARDWARE)
    speed._end_at(policy, mean, most)
    requests = [Request(str(i), (1, 2, 3), i) for i in range(600)]
    found = generate(
        policy, requests, sampling=SamplingConfig(most), eos_id=0, pad_id=0, seed=0, batch=600, device=tiny.CPU
    )
    lengths = np.array([len(response) for response in found])
    assert lengths.max() <= most
    assert abs(lengths.mean() - mean) <= 4 * lengths.std() / 600**0.5


def test_a_longer_limit_is_another_piece() -> None:
    short = PIECES[4]
    assert replace(short, most=32).key(HARDWARE) != short.key(HARDWARE)


def test_a_large_batch_of_answers_is_measured_in_two_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_sample", lambda piece, hardware: 2.0 + 0.01 * piece.rows)
    large = Piece("sample", tiny.SHAPE, 6, 8, 4, 4)
    large = replace(large, rows=int(50 * 3e10 / large.flops) * 4)
    assert speed.seconds_of(large, HARDWARE) == pytest.approx(2.0 + 0.01 * large.rows)
