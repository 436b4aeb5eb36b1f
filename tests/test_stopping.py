"""Requests to stop: saved first in training, at once elsewhere, and what the signal meant before is done in the end."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import PATIENCE_S, command, environment

from alignbench.stopping import Signals, Stopped


def test_outside_of_training_it_acts_at_once_and_afterwards_nothing_is_changed() -> None:
    before = signal.getsignal(signal.SIGTERM)
    signals = Signals()
    with signals.handled(), pytest.raises(Stopped) as caught:
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before


def test_in_training_it_waits_and_then_calls_what_was_there_before() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: heard.append(number))  # as submitit's
    try:
        signals = Signals()
        with signals.handled():
            with signals.heard():
                signal.raise_signal(signal.SIGUSR2)
                assert signals.pending()
                assert not heard
                signals.done()
                assert heard == [signal.SIGUSR2]
                assert not signals.pending()
            with signals.heard():
                signal.raise_signal(signal.SIGUSR2)
            assert heard == [signal.SIGUSR2] * 2  # nobody asked in time: at the end of the loop
            signal.raise_signal(signal.SIGUSR2)
            assert heard == [signal.SIGUSR2] * 3
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_a_signal_that_nobody_gave_a_meaning_keeps_its_own() -> None:
    with Signals().handled():
        assert signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL


@pytest.mark.slow
def test_sigterm_ends_a_sweep_with_a_checkpoint_and_the_same_command_goes_on(tmp_path: Path) -> None:
    store = tmp_path / "store"
    settings = ("method=sft,dpo_helpful", "model.sft.epochs=2000", "model.sft.schedule=constant")
    arguments = command(store, tmp_path / "out", "-m", "hardware.checkpoint_every=20", *settings)
    output = tmp_path / "output"
    with output.open("wb") as stream:
        run = subprocess.Popen(arguments, env=environment(), stdout=stream, stderr=subprocess.STDOUT)
    until = time.monotonic() + PATIENCE_S
    while not list(store.glob("building/*/work/checkpoints/COMPLETE.json")):
        assert run.poll() is None, output.read_text()
        assert time.monotonic() < until
        time.sleep(0.1)
    run.terminate()
    assert run.wait(PATIENCE_S) == 128 + signal.SIGTERM
    told = output.read_text()
    (step,) = re.findall(r"saved at step (\d+) of \d+, as asked", told)
    assert "stopped by SIGTERM; the same command goes on from here" in told
    assert "dpo_helpful" not in "".join(path.name for path in tmp_path.glob("out/*"))  # the sweep did not go on
    again = subprocess.Popen(arguments, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert again.stdout is not None
        assert any(f"continuing at step {step} of" in line for line in iter(again.stdout.readline, ""))
    finally:
        again.kill()
        again.wait()


def test_the_module_imports_nothing_heavy() -> None:
    script = "import sys, alignbench.stopping; assert not {'torch', 'transformers', 'hydra'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, env=environment())
