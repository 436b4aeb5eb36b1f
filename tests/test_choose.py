"""`hardware=auto`: what is chosen as memory shrinks, that it changes no key, and that the record shows it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from alignbench import choose as chosen
from alignbench.choose import MARGIN, choose, largest_processes
from alignbench.config import TrainConfig, run_id
from alignbench.errors import ConfigError
from alignbench.hardware import HardwareConfig
from alignbench.plan import PlanLab, check_fits
from alignbench.record import read_records
from alignbench.run import execute
from tests.test_plan import PINNED, compose, plan

SEVEN = ["method=sacpo", "model=alpaca_7b", "experiment=sacpo/table3_dpo_dpo", *PINNED, "hardware=auto"]
QUIET = Console(quiet=True)


def choice(lab: PlanLab, gib: float, **hardware: object) -> HardwareConfig:
    lab.config.hardware = replace(lab.config.hardware, memory_gib=gib, **hardware)  # type: ignore[arg-type]
    return choose(lab, QUIET)


@pytest.fixture(scope="module")
def seven(tmp_path_factory: pytest.TempPathFactory) -> PlanLab:
    return plan(tmp_path_factory.mktemp("plan"), *SEVEN)


def test_less_memory_takes_higher_zero_stages_then_offload_then_refuses(seven: PlanLab) -> None:
    machine = {"device": "cuda", "dtype": "fp32", "processes": 2}
    found = [choice(seven, gib, **machine) for gib in (400, 200, 130, 115, 104, 100, 96, 92, 88, 84, 60, 50)]
    ways = [(h.zero_stage, h.offload != "none") for h in found]
    assert ways == sorted(ways)
    assert {(0, False), (2, False), (3, False), (3, True)} <= set(ways)
    with pytest.raises(ConfigError, match="at the least stage"):
        choice(seven, 20, **machine)


def test_in_bf16_the_stage_that_deepspeed_takes_is_named(seven: PlanLab) -> None:
    assert choice(seven, 140, device="cuda", dtype="bf16", processes=8).zero_stage == 2
    alone = choice(seven, 140, device="cuda", dtype="bf16", processes=1)
    assert (alone.zero_stage, alone.offload) == (0, "none")
    offloaded = choice(seven, 80, device="cuda", dtype="bf16", processes=1)
    assert (offloaded.zero_stage, offloaded.offload) == (3, "cpu")


@pytest.mark.parametrize("gib", [400, 140, 80, 50])
def test_every_stage_of_what_is_chosen_fits_with_the_margin(seven: PlanLab, gib: float) -> None:
    hardware = choice(seven, gib, device="cuda", dtype="fp32", processes=8)
    assert not hardware.auto
    needed = [e.memory_bytes for e in seven.estimated(hardware).values() if not e.on_host]
    assert 0 < max(needed) <= MARGIN * gib * 2**30


def test_the_default_shrinks_its_passes_then_recomputes_then_is_refused(tmp_path: Path) -> None:
    lab = plan(tmp_path, "hardware=auto")
    large, small = choice(lab, 16), choice(lab, 0.6)
    assert (large.micro_batch, large.eval_batch, large.generation_batch) == (32, 128, 512)
    assert small.generation_batch < 512
    with pytest.raises(ConfigError) as caught:
        choice(lab, 0.4)
    assert caught.value.where == "hardware=auto"
    assert "GiB" in caught.value.what


def test_settings_that_are_given_are_where_the_search_starts(seven: PlanLab) -> None:
    found = choice(seven, 400, device="cuda", dtype="fp32", processes=8, zero_stage=2, micro_batch=4)
    assert found.zero_stage == 2
    assert found.micro_batch == 4
    seven.config.hardware = replace(seven.config.hardware, zero_stage=0, micro_batch=32)


def test_processes_are_those_that_every_optimiser_step_divides_among(tmp_path: Path) -> None:
    hardware = replace(plan(tmp_path, "debug=tiny").config.hardware, processes=8)
    sizes = [TrainConfig(1e-3, 1, size) for size in (48, 36)]
    assert largest_processes(hardware, *sizes).processes == 6
    assert largest_processes(hardware, sizes[0]).processes == 8


def test_it_says_what_it_tried(seven: PlanLab) -> None:
    console = Console(record=True, width=200)
    seven.config.hardware = replace(
        seven.config.hardware, memory_gib=80, device="cuda", dtype="fp32", processes=8, zero_stage=0
    )
    choose(seven, console)
    text = console.export_text()
    assert text.count("chosen") == 1
    assert "too large" in text


def test_it_is_the_same_run_as_on_the_hardware_that_it_chooses(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    automatic, stated = (compose(tmp_path, "debug=tiny", f"hardware={name}") for name in ("auto", "cpu"))
    if OmegaConf.to_container(automatic, resolve=True)["hardware"]["device"] == "cpu":
        assert run_id(automatic) == run_id(stated)
    before = run_id(automatic)
    automatic.plan = True
    assert execute(automatic) == 0.0
    assert "hardware=auto: 1 process" in capsys.readouterr().out
    assert run_id(automatic) == before
    assert not automatic.hardware.auto


def test_what_is_chosen_is_checked_like_any_hardware(tmp_path: Path) -> None:
    lab = plan(tmp_path, "debug=tiny", "hardware=auto")
    lab.config.hardware = choice(lab, 2)
    check_fits(lab)
    assert chosen.MARGIN < 1


@pytest.mark.slow
def test_a_real_run_chooses_and_records_what_it_chose(tmp_path: Path) -> None:
    execute(compose(tmp_path, "debug=tiny", "method=dpo_helpful", "hardware=auto"))
    (record,) = read_records(tmp_path / "outputs")
    hardware = record["config"]["hardware"]
    assert hardware["auto"] is False
    assert (hardware["device"], hardware["dtype"]) in (("cpu", "fp32"), ("cuda", "bf16"))
    assert isinstance(hardware["micro_batch"], int)
