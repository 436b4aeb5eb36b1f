"""The README's examples are real: the method, the data set and the scorer that it shows are added and planned here."""

import re
from pathlib import Path

import hydra
import numpy as np
import pytest

from alignbench.cli import CONF, register
from alignbench.config import problem_of, resolve, validate
from alignbench.methods import METHODS, find_method
from alignbench.models import scorers
from alignbench.plan import PlanLab
from alignbench.store import Store

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")


def block(language, containing):
    found = [text for text in re.findall(rf"```{language}\n(.*?)```", README, re.S) if containing in text]
    assert len(found) == 1, f"{len(found)} {language} blocks with {containing!r}"
    return found[0]


def compose(folder, *overrides):
    register()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        search = f"hydra.searchpath=[file://{folder}]"
        return hydra.compose("config", overrides=[search, "debug=tiny", f"store_dir={folder}/store", *overrides])


@pytest.fixture
def _restored():
    methods, known = dict(METHODS), dict(scorers._SCORERS)
    yield
    METHODS.clear()
    METHODS.update(methods)
    scorers._SCORERS.clear()
    scorers._SCORERS.update(known)


@pytest.mark.usefixtures("_restored")
def test_the_method_shown_is_composed_and_planned(tmp_path):
    exec(block("python", '@method("soup"'), {"__name__": "soup"})
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "soup.yaml").write_text(block("yaml", "name: soup"))

    config, settings = resolve(compose(tmp_path, "method=soup", "method.weight=0.25"))
    validate(config, settings)
    lab = PlanLab(config, Store(tmp_path / "store"), None)
    outcome = find_method("soup").recipe(lab, problem_of(config.constraint), settings)

    assert outcome.policies["soup"].identity.spec.weights == (0.75, 0.25)
    assert [n.label for n in outcome.policies["soup"].inputs.values()] == ["prefer reward", "prefer safety"]


def test_the_data_set_shown_composes(tmp_path):
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "mine.yaml").write_text(block("yaml", "name: mine"))
    register()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        overrides = [f"hydra.searchpath=[file://{tmp_path}]", "dataset=mine", "evaluate=unscored", "model=folder"]
        composed = hydra.compose("config", overrides=[*overrides, "model.path=model"])

    assert resolve(composed)[0].dataset.files.pairs.path == "/data/mine/pairs.parquet"


@pytest.mark.usefixtures("_restored")
def test_the_scorer_shown_is_registered_and_scores():
    exec(block("python", '@register_scorer("short")'), {"np": np, "register_scorer": scorers.register_scorer})

    scores = scorers.find_scorer("short")(["q", "q"], ["a b", "a b c"])

    assert scores["reward"].tolist() == [2, 3]
    assert scores["safety"][0] > scores["safety"][1]


def test_every_group_option_stands_in_the_readme():
    table = README[README.index("| group | options |") :]
    for group in (p for p in CONF.iterdir() if p.is_dir()):
        row = next(line for line in table.splitlines() if line.startswith(f"| `{group.name}`"))
        for option in group.rglob("*.yaml"):
            if option.parent.name == "parts":
                continue  # pieces of options, and none themselves
            name = str(option.relative_to(group).with_suffix(""))
            shown = name in row or re.sub(r"zero[123]$", "zero1..3", name) in row
            assert shown, f"{group.name}={name} is not in the README's table"
