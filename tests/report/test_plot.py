"""The picture: files that are there, one point per policy, names that do not cover each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pictures import assert_picture

from alignbench.report.plot import trade_off


def record(rows: dict[str, tuple[float, float]], *, seed: int = 0, threshold: float | None = 0.5) -> dict[str, Any]:
    def value(mean: float) -> dict[str, Any]:
        return {"mean": mean, "low": mean - 0.25, "high": mean + 0.5}

    return {
        "seed": seed,
        "config": {"dataset": {"name": "handbook"}},
        "rows": {
            name: {
                "policy": f"{name} {seed}",
                "metrics": {"reward": value(x), "safety": value(y)},
                "constraints": {} if threshold is None else {"safety": {"requested_margin": threshold}},
            }
            for name, (x, y) in rows.items()
        },
    }


def test_png_and_pdf(tmp_path: Path) -> None:
    trade_off([record({"sft": (0, 1), "sacpo": (1, 2)})], tmp_path / "picture", utility="safety")
    assert_picture(tmp_path / "picture.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["picture.pdf", "picture.png"]


def points(figure: Any) -> list[tuple[float, float]]:
    (axes,) = figure.axes
    return [tuple(float(v[0]) for v in container.lines[0].get_data()) for container in axes.containers]


def test_one_point_per_policy_at_its_means(tmp_path: Path, drawn: list[Any]) -> None:
    rows = {"sft": (0.0, 1.0), "step reward": (2.0, 0.5), "sacpo": (1.0, 2.0)}
    trade_off([record(rows)], tmp_path / "p", utility="safety")
    (figure,) = drawn
    assert points(figure) == list(rows.values())
    (axes,) = figure.axes
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(rows)
    assert "reward" in axes.get_xlabel()
    assert axes.get_ylabel().startswith("safety")
    # both arms of both intervals
    segments = [line.get_segments()[0] for container in axes.containers[:1] for line in container.lines[2]]
    assert [[tuple(end) for end in segment] for segment in segments] == [
        [(-0.25, 1.0), (0.5, 1.0)],
        [(0.0, 0.75), (0.0, 1.5)],
    ]
    # the requested level: the reference's mean and the margin
    assert [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--"] == [1.5]


def test_names_of_policies_at_one_place_can_all_be_read(tmp_path: Path, drawn: list[Any]) -> None:
    rows = {f"p_sacpo q={k / 10}": (1.0, 1.0) for k in range(12)}
    trade_off([record(rows)], tmp_path / "p", utility="safety")
    (figure,) = drawn
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.legends[0].get_texts()]
    assert len(boxes) == 12
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert not any(box.overlaps(figure.axes[0].get_window_extent()) for box in boxes)
    width, height = figure.canvas.get_width_height()
    assert all(box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height for box in boxes)
    styles = {(c.lines[0].get_marker(), c.lines[0].get_color()) for c in figure.axes[0].containers}
    assert len(styles) == 12  # no two policies look alike
    assert {c.lines[0].get_markerfacecolor() for c in figure.axes[0].containers} == {"none"}  # none hides another


def test_seeds_share_a_name_and_the_shared_reference_is_drawn_once(tmp_path: Path, drawn: list[Any]) -> None:
    records = [record({"sft": (0, 1), "sacpo": (1 + seed, 2)}, seed=seed) for seed in range(3)]
    records.append(record({"sft": (0, 1), "dpo_helpful": (3, 1)}))  # seed 0's reference again
    trade_off(records, tmp_path / "p", utility="safety")
    (figure,) = drawn
    assert len(points(figure)) == 3 + 3 + 1
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["sft", "sacpo", "dpo_helpful"]


def test_without_interval_or_threshold(tmp_path: Path, drawn: list[Any]) -> None:
    made = record({"sft": (0, 1), "sacpo": (1, 2)}, threshold=None)
    for row in made["rows"].values():
        row["metrics"]["reward"] |= {"low": None, "high": None}
    trade_off([made], tmp_path / "p", utility="safety")
    (figure,) = drawn
    assert not [line for line in figure.axes[0].lines if line.get_linestyle() == "--"]
    assert_picture(tmp_path / "p.png")
