"""The HTML of a dashboard: one file with its program, style and plotting library inside, and no address to fetch.

Whatever stands in a record or a response may be hostile. Text in HTML is escaped; the data is JSON in a block that
browsers do not run, without any "<"; the program writes text nodes only; and the page's own security policy allows the
two scripts whose hashes it states, no other, no request, and no frame or form.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from alignbench.errors import ConfigError
from alignbench.report.dashboard.content import Content, Part, RunLine, run_headings
from alignbench.report.dashboard.generations import LONGEST
from alignbench.report.sections import Cell, Section, Value

_HERE = Path(__file__).parent
# tables that grow with the square of the methods start closed
_OPEN = ("methods", "requested_achieved")
_DIFFERENCE = " - "
_NAMED = 5  # runs that one note names


def page_of(content: Content, title: str) -> str:
    """The whole page.

    Raises:
        ConfigError: The plotting library is not installed.
    """
    program, library = (_HERE / "page.js").read_text(encoding="utf-8"), _library()
    hashes = " ".join(f"'sha256-{_sha256(script)}'" for script in (library, program))
    policy = f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'"
    data = {"groups": [part.data for part in content.parts], "texts": content.texts.strings}
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{escape(title)}: alignbench</title>
<link rel="icon" href="data:,">
<style>
{(_HERE / "page.css").read_text(encoding="utf-8")}</style>
</head>
<body>
<a class="skip" href="#results">Skip to the results</a>
{_header(content, title)}
<div class="columns">
{_FILTERS}
<main id="results" tabindex="-1">
<noscript><p class="notice">Plots, filters and responses need JavaScript; the tables below do not.</p></noscript>
{_PLOTS}
<section aria-labelledby="tables-heading">
<h2 id="tables-heading">Tables</h2>
<p>Press a column's heading to sort by it. Brackets are intervals. The filters of methods and thresholds choose the
rows; numbers over seeds stay those over all seeds.</p>
{"".join(_tables(index, part) for index, part in enumerate(content.parts))}
</section>
{_generations(content)}
<section aria-labelledby="runs-heading">
<h2 id="runs-heading">Runs and artifacts</h2>
{"".join(_runs(index, part) for index, part in enumerate(content.parts))}
</section>
</main>
</div>
<script type="application/json" id="data">{as_json(data)}</script>
<script>{library}</script>
<script>{program}</script>
</body>
</html>
"""


def as_json(data: Any) -> str:
    """JSON that no HTML reader takes for markup: it holds no "<", ">" or "&"."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)  # ASCII: U+2028 and its like are escaped
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


@cache
def _library() -> str:
    """Vega, Vega-Lite and vega-embed as one script."""
    try:
        import vl_convert
    except ImportError:
        raise ConfigError(
            "no plotting library",
            where="dashboard",
            mend="pip install -r requirements.txt (it holds vl-convert-python)",
        ) from None
    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")).replace("\r", "")


# ---------------------------------------------------------------- parts of the page

_FILTERS = """<form id="filters" class="filters" aria-label="Filters">
<details open id="filters-box">
<summary>Filters</summary>
<p id="shown" role="status" aria-live="polite"></p>
<div class="row" id="group-row" hidden><label for="group">Group</label><select id="group"></select></div>
<div class="row"><label for="threshold">Threshold</label><select id="threshold"></select></div>
<div class="row"><label for="seed">Seed</label><select id="seed"></select></div>
<div class="row" id="utility-row" hidden><label for="utility">Utility in the plots</label>
<select id="utility"></select></div>
<fieldset><legend>Methods</legend>
<p class="buttons"><button type="button" id="all">All</button> <button type="button" id="none">None</button></p>
<div id="methods"></div></fieldset>
</details>
</form>"""


def _figure(name: str, heading: str, before: str = "", views: Sequence[str] = ("",)) -> str:
    plots = "".join(f'<div class="plot" id="{name}{view}"></div>' for view in views)
    return f"""<section aria-labelledby="{name}-heading">
<h2 id="{name}-heading">{heading}</h2>
{before}<figure>{plots}<figcaption id="{name}-caption"></figcaption></figure>
<details class="numbers" id="{name}-numbers"><summary>The numbers of this plot</summary>
<div class="scroll" role="region" tabindex="0" aria-label="Numbers: {heading}"></div></details>
</section>
"""


_PLOTS = (
    '<section aria-labelledby="best-heading"><h2 id="best-heading">At a glance</h2><div id="best"></div></section>\n'
    + _figure("front", "Reward against safety")
    + _figure("calibration", "Requested against achieved")
    + _figure(
        "dual",
        "Multipliers and constraint gap",
        '<p class="row"><label for="course">Method and threshold</label> <select id="course"></select></p>\n',
        ("-multiplier", "-gap"),
    )
)


def _header(content: Content, title: str) -> str:
    groups = f"{len(content.parts)} groups" if len(content.parts) > 1 else "one group"
    commits = ", ".join(content.commits) or "unknown"
    facts = f"{content.records} runs in {groups}; newest {content.newest or 'of unknown time'}; commit {commits}"
    found = [*content.notes, *_without_responses(content)]
    if content.courses_left_out:
        found.append(
            f"the courses of {content.courses_left_out} runs are not in this page, which would get too large: "
            "trajectory.png in each run's folder shows them"
        )
    box = ""
    if found:
        lines = "".join(f"<li>{escape(note)}</li>\n" for note in found)
        count = f"{len(found)} note{'s' if len(found) > 1 else ''}"
        box = (
            f'<details class="notes" id="notes"{" open" if len(found) <= 5 else ""}>'
            f"<summary>{count}: what is missing, doubtful or left out</summary>\n<ul>{lines}</ul></details>\n"
        )
    return f"<header>\n<h1>{escape(title)}</h1>\n<p>{escape(facts)}</p>\n{box}</header>"


def _without_responses(content: Content) -> list[str]:
    """One note per fault: without a single file there are as many runs as in the sweep."""
    notes = []
    for fault, runs in content.texts.faults.items():
        who = ", ".join(runs) if len(runs) <= _NAMED else f"{len(runs)} of {content.records} runs"
        notes.append(f"no responses of {who}: {fault}")
    return notes


def _tables(index: int, part: Part) -> str:
    names = [series["name"] for series in part.data["series"]]
    thresholds = part.data["thresholds"]
    tables = "".join(_section(f"g{index}", section, names, thresholds) for section in part.sections)
    return f'<div class="group" data-group="{index}">{tables or "<p>No tables: no run has scores.</p>"}</div>\n'


def _section(prefix: str, section: Section, names: Sequence[str], thresholds: Sequence[str]) -> str:
    by_threshold = "asked" in section.headings[:2]
    rows = []
    for line in section.lines:
        places = _places(str(line[0]), names)
        asked = str(line[1]) if by_threshold else ""
        where = f' data-s="{" ".join(map(str, places))}"' if places else ""
        where += f' data-t="{thresholds.index(asked)}"' if asked in thresholds else ""
        cells = "".join(_cell(value, i, section.texts) for i, value in enumerate(line))
        rows.append(f"<tr{where}>{cells}</tr>\n")
    return (
        f'<details class="table"{" open" if section.key in _OPEN else ""}>'
        f"<summary><h3>{escape(section.title)}</h3></summary>\n"
        + _table(f"{prefix}-{section.key}", section.title, section.headings, rows, section.texts)
        + f'<p class="caption">{escape(section.caption)}</p></details>\n'
    )


def _places(text: str, names: Sequence[str]) -> list[int]:
    """Which series a row is about: one, or the two of a difference."""
    if text in names:
        return [names.index(text)]
    for cut in range(len(text)):
        if text.startswith(_DIFFERENCE, cut):
            pair = text[:cut], text[cut + len(_DIFFERENCE) :]
            if pair[0] in names and pair[1] in names:
                return [names.index(name) for name in pair]
    return []


def _table(name: str, title: str, headings: Sequence[str], rows: Sequence[str], texts: int) -> str:
    heads = "".join(
        f'<th scope="col"{"" if i < texts else " class=n"}><button type="button">{escape(heading)}</button></th>'
        for i, heading in enumerate(headings)
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(title)}">'
        f'<table class="sortable" id="{name}"><thead><tr>{heads}</tr></thead>\n'
        f"<tbody>{''.join(rows)}</tbody></table></div>\n"
    )


def _cell(value: Cell, column: int, texts: int) -> str:
    text = escape(str(value))
    if column == 0:
        return f'<th scope="row">{text}</th>'
    order = f' data-v="{value.estimate.mean:.6g}"' if isinstance(value, Value) else ""
    return f"<td{' class=n' if column >= texts else ''}{order}>{text}</td>"


def _generations(content: Content) -> str:
    texts = content.texts
    facts = f"{texts.shown} of the {texts.found} answers in the runs' generations.jsonl are in this page"
    if texts.shown < texts.found:
        facts += ", which holds as many prompts as fit and the same ones for every run"
    if texts.cut:
        facts += f"; {texts.cut} texts are cut after {LONGEST:,} characters"
    facts += ". A run's other responses are in the store."
    return f"""<section aria-labelledby="generations-heading">
<h2 id="generations-heading">Responses side by side</h2>
<p>{escape(facts)}</p>
<p class="notice">Responses may be harmful: they are hidden until you ask for them.</p>
<div class="tools" role="search">
<div class="row"><label for="search">Search prompts and responses</label>
<input type="search" id="search" autocomplete="off" spellcheck="false"></div>
<div class="row"><label><input type="checkbox" id="reveal"> Show every response</label></div>
</div>
<p id="matches" role="status" aria-live="polite"></p>
<div id="responses"></div>
<p><button type="button" id="more" hidden>More prompts</button></p>
</section>"""


def _runs(index: int, part: Part) -> str:
    utilities = part.data["objectives"][1:]
    headings = [*run_headings(utilities), "files", "policy"]
    rows = "".join(_run(line) for line in part.runs)
    title = "Runs" if len(part.runs) != 1 else "Run"
    return (
        f'<div class="group" data-group="{index}"><p>{escape(part.title)}. Each run by itself, with the interval of '
        "its own prompts; links are relative to this file.</p>\n"
        + _table(f"g{index}-runs", title, headings, [rows], 2)
        + "</div>\n"
    )


def _run(line: RunLine) -> str:
    cells = "".join(_cell(value, i, 2) for i, value in enumerate(line.cells))
    links = " ".join(f'<a href="{escape(where)}">{escape(text)}</a>' for text, where in line.links)
    artifacts = "" if line.artifact is None else _artifact(*line.artifact)
    place = f'data-s="{line.series}" data-t="{line.threshold}" data-seed="{line.seed}"'
    return f'<tr {place}>{cells}<td class="links">{links}</td><td class="links">{artifacts}</td></tr>\n'


def _artifact(name: str, key: str, where: str) -> str:
    text = f"{escape(name)} <code>{escape(key[:8])}</code>"
    return f'<a href="{escape(where)}/">{text}</a>' if where else f'<span title="{escape(key)}">{text}</span>'
