"""What judges said, from records: a table, a picture, and ratings across runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from alignbench.errors import DataError
from alignbench.report.entries import asked
from alignbench.report.plot import arms, pyplot, save, style
from alignbench.report.table import cell

Contest = Mapping[str, Any]
_ONLY_IN_FILES = ("orders agree", "longer preferred", "gold win rate", "length bias")
_SHADES = {"win": "#0072B2", "tie": "#BBBBBB", "loss": "#D55E00"}


def headings(contests: Sequence[Contest]) -> list[str]:
    """Columns; those of the truth only where there is one."""
    found = ["policy", "against", "criterion", "win rate", "win / tie / loss", "missing", "first place", "orders agree"]
    found.append("longer preferred")
    if any("gold" in contest for contest in contests):
        found += ["agrees with gold", "gold win rate", "length bias"]
    return [*found, "rating"]


def cells(judging: Mapping[str, Any]) -> list[list[str]]:
    """One line per contest and criterion."""
    contests, lines = judging["contests"], []
    golden = any("gold" in contest for contest in contests)
    for contest in contests:
        counts, order = contest["counts"], contest["order_bias"] or {}
        shares = " / ".join(_share(contest[name]) for name in ("win", "tie", "loss"))
        spread = contest["repeat_std"]
        line = [contest.get("label", contest["row"]), contest["opponent"], contest["criterion"]]
        line.append(cell(contest["win_rate"]) + ("" if spread is None else f" (repeats ±{spread:.3f})"))
        line += [shares, f"{sum(counts['judgements_missing'].values())} of {counts['judgements']}"]
        line += [_signed(order.get("first_place")), cell(order.get("agreement")), cell(contest["longer_preferred"])]
        if golden:
            gold = contest.get("gold", {})
            line += [cell(gold.get("agreement")), cell(gold.get("win_rate")), _signed(gold.get("length_bias"))]
        lines.append([*line, _rating(judging["ratings"].get(contest["criterion"], {}), contest["row"])])
    return lines


def _share(value: Mapping[str, Any]) -> str:
    return "-" if value["mean"] is None else f"{value['mean']:.2f}"


def _signed(value: Mapping[str, Any] | None) -> str:
    text = cell(value)
    return text if value is None or value["mean"] is None or value["mean"] < 0 else f"+{text}"


def _rating(ratings: Mapping[str, Any], row: str) -> str:
    value = ratings.get("bradley_terry", {}).get(row)
    text = cell(value, 0)
    elo = ratings.get("sequential_elo", {}).get(row)
    return text if elo is None else f"{text}; Elo {elo['mean']:.0f} ±{elo['std']:.0f}"


def caption(judging: Mapping[str, Any]) -> str:
    """What the numbers are."""
    protocol, contests = judging["protocol"], judging["contests"]
    rate = contests[0]["win_rate"]
    return (
        f"judge {judging['judge']}, protocol {protocol['name']} ({protocol['source']}); "
        f"{contests[0]['counts']['comparisons']} comparisons; [{rate['level']:.0%} prompt-clustered]; "
        f"a tie counts {protocol['tie']:g}; missing: answers that could not be read, never counted as ties; "
        "first place: how much more than half the answer shown first is preferred; "
        "length bias: how much more often than gold the judge prefers the longer answer; "
        "rating: Bradley-Terry on Elo's scale, the reference at 1000"
    )


def markdown(judging: Mapping[str, Any]) -> str:
    """The table as Markdown, with its caption below."""
    columns = headings(judging["contests"])
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(line) + " |" for line in cells(judging)]
    return "\n".join(lines) + f"\n\n{caption(judging)}\n"


def terminal(judging: Mapping[str, Any]) -> Table:
    """The table for a terminal, without the columns that only fit into a file."""
    table = Table(title="pairwise judging", caption=caption(judging))
    columns = headings(judging["contests"])
    shown = [i for i, heading in enumerate(columns) if heading not in _ONLY_IN_FILES]
    for i in shown:
        table.add_column(columns[i], justify="left" if i < 3 else "right", overflow="fold")
    for line in cells(judging):
        table.add_row(*(line[i] for i in shown))
    return table


def picture(judging: Mapping[str, Any], path: Path) -> None:
    """Wins, ties and losses of every contest with the win rate's interval, and the ratings; a column per criterion.

    Args:
        judging: A record's judging, with at least one contest.
        path: Base name; a .png and a .pdf are written.
    """
    plt = pyplot()
    criteria = list(dict.fromkeys(contest["criterion"] for contest in judging["contests"]))
    longest = max(sum(c["criterion"] == name for c in judging["contests"]) for name in criteria)
    height = 2.4 + 0.9 * longest
    figure, axes = plt.subplots(
        2, len(criteria), figsize=(4.6 * len(criteria) + 1, height), layout="constrained", squeeze=False
    )
    for k, criterion in enumerate(criteria):
        _bars(axes[0][k], [c for c in judging["contests"] if c["criterion"] == criterion], criterion)
        _ratings(axes[1][k], judging["ratings"].get(criterion, {}))
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(f"judge {judging['judge']}, protocol {judging['protocol']['name']}", fontsize=11)
    save(figure, path)


def _bars(axes: Any, contests: Sequence[Contest], criterion: str) -> None:
    judged = [contest for contest in contests if contest["win_rate"]["mean"] is not None]
    names = [f"{c.get('label', c['row'])}\nagainst {c['opponent']}" for c in judged]
    left = [0.0] * len(judged)
    for name, colour in _SHADES.items():
        shares = [contest[name]["mean"] for contest in judged]
        axes.barh(names, shares, left=left, color=colour, height=0.55, label=name)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    for i, contest in enumerate(judged):
        rate = contest["win_rate"]
        axes.errorbar(
            rate["mean"], i, xerr=arms(rate), fmt="D", color="black", markerfacecolor="white", capsize=3,
            label="win rate and its interval" if i == 0 else None,
        )  # fmt: skip
    axes.axvline(0.5, color="0.3", linestyle="--", linewidth=1)
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of comparisons")
    axes.set_title(criterion, fontsize=11)
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _ratings(axes: Any, ratings: Mapping[str, Any]) -> None:
    found = ratings.get("bradley_terry")
    if not found:
        axes.text(0.5, 0.5, ratings.get("none", "no ratings"), ha="center", va="center", fontsize=8, wrap=True)
        axes.set_axis_off()
        return
    names = sorted(found, key=lambda name: -found[name]["mean"])
    for i, name in enumerate(names):
        marker, colour = style(list(found).index(name))
        axes.errorbar(
            found[name]["mean"], i, xerr=arms(found[name]), fmt=marker, color=colour, markerfacecolor="none", capsize=3
        )
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.axvline(1000, color="0.6", linestyle="--", linewidth=1, zorder=0)
    axes.set_xlabel("Bradley-Terry rating (400 points: odds of ten to one)", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def kind_of(record: Mapping[str, Any]) -> tuple[str, str, str]:
    """Judge, protocol and data set of a judged record: verdicts of one kind can be rated together."""
    judging = record["judging"]
    return str(judging["judge"]), str(judging["protocol"]["name"]), str(record["config"]["dataset"]["name"])


def _players(records: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int, str], str]:
    """What to call each judged policy, by (row, seed, policy); equal names over seeds share a rating.

    Its row's name; where a seed has several policies of that name, with what the run asked for, else with its method
    too, else with its key.
    """
    found: dict[tuple[str, int], dict[str, set[tuple[str, str]]]] = {}
    for record in records:
        asked_for = asked(record["config"]["constraint"]["thresholds"])
        for contest in record["judging"]["contests"]:
            for name in (contest["row"], contest["opponent"]):
                own = found.setdefault((name, record["seed"]), {})
                own.setdefault(record["rows"][name]["policy"], set()).add((str(record["method"]), asked_for))
    spellings = (
        lambda name, policy, runs: name,
        lambda name, policy, runs: f"{name} @ {' or '.join(sorted({a for _, a in runs}))}",
        lambda name, policy, runs: " or ".join(sorted(f"{name} of {m} @ {a}" for m, a in runs)),
        lambda name, policy, runs: f"{name} {policy[:6]}",
    )
    # one spelling for a row in all seeds: what tells its policies apart in each of them
    chosen: dict[str, int] = {}
    for (name, _), own in found.items():
        apart = (
            k for k, spell in enumerate(spellings) if len({spell(name, *item) for item in own.items()}) == len(own)
        )
        chosen[name] = max(chosen.get(name, 0), next(apart, len(spellings) - 1))
    return {
        (name, seed, policy): spellings[chosen[name]](name, policy, runs)
        for (name, seed), own in found.items()
        for policy, runs in own.items()
    }


def together(records: Sequence[Mapping[str, Any]], *, resamples: int = 2000) -> dict[str, Any]:
    """The judging of several records as one: each contest once, and ratings of all policies together.

    Records of one judge, protocol and data set, with the same prompts. Policies of one name and several seeds have one
    rating: a prompt is drawn with its verdicts of all seeds.

    Args:
        records: Records with judging.
        resamples: Bootstrap draws of the ratings.

    Returns:
        Like a record's judging, with `reported`: the names of policies that a method reports.

    Raises:
        DataError: no record was judged, or their judges or protocols differ.
    """
    from alignbench.lab_judge import rated

    judged = [record for record in records if (record.get("judging") or {}).get("contests")]
    if not judged:
        raise DataError(
            "no record holds judged answers", where="report judging", mend="run with judge=gold, for instance"
        )
    kinds = {kind_of(record) for record in judged}
    if len(kinds) > 1:
        shown = "; ".join(", ".join(kind) for kind in sorted(kinds))
        raise DataError(
            f"these records are of different judges, protocols or data sets: {shown}",
            where="report judging",
            mend="report folders of one kind each",
        )
    names = _players(judged)
    reported_names: dict[str, None] = {}
    reported = {record["rows"][record["outcome"]["reported"]]["policy"] for record in judged}
    contests: dict[tuple[str, str], dict[str, Any]] = {}
    for record in judged:
        for contest in record["judging"]["contests"]:
            row, opponent = (
                names[name, record["seed"], record["rows"][name]["policy"]]
                for name in (contest["row"], contest["opponent"])
            )
            seen = {"row": row, "opponent": opponent, "label": f"{row}, seed {record['seed']}"}
            if record["rows"][contest["row"]]["policy"] in reported:
                reported_names[row] = None
            contests.setdefault((contest["artifact"], contest["criterion"]), {**contest, **seen})
    rows = list(contests.values())
    first, level = judged[0]["judging"], judged[0]["config"]["evaluate"]["level"]
    return {
        **first,
        "contests": rows,
        "reported": list(reported_names),
        "ratings": {
            criterion: rated(rows, criterion, level=level, resamples=resamples, seed=0, elo=False)
            for criterion in dict.fromkeys(row["criterion"] for row in rows)
        },
    }
