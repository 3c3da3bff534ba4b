"""The README's table of findings: every arm that was run, at every scale, with its verdict; a figure; numbers in prose.

Two profiles of one recipe and other seeds are also judged together (``pooled``).

python -m simmimlib.report.front    # from results/: what is between the two marks in README.md, findings.png, and in
                                    # README.md and docs/ the differences that are marked (``numbers.py``)
"""

import math
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from simmimlib.machine.files import project_root, write_text
from simmimlib.report.figures import differences_beside_paper, save
from simmimlib.report.numbers import renumbered
from simmimlib.report.statistics import judge, residual
from simmimlib.report.tables import seeds_of

PROFILES = ("quick", "cifar10-cpu", "cifar10-replica", "cifar10", "imagenette")  # columns, those that have results
POOLED = ("cifar10-cpu", "cifar10-replica")
ABOUT = ("arm", "question", "heading", "label", "reference", "paper", "paper_difference")  # the same in every profile
BEGIN = "<!-- findings: written by python -m simmimlib.report.front -->"
END = "<!-- end of findings -->"


def judged(root: Path) -> dict[str, list[dict]]:
    """Rows of each profile's table, and of ``POOLED`` together where both profiles have finished the default."""
    rows = {}
    for name in PROFILES:
        if (path := _table(root, name)).is_file():
            rows[name] = pd.read_csv(path).to_dict("records")
        if name == POOLED[-1] and set(POOLED) <= set(rows):
            both = pooled(root)
            if any(row["arm"] == "default" for row in both):
                rows["both"] = both
    return rows


def findings(judged: dict[str, list[dict]]) -> str:
    """The table as Markdown: the default's level, then a row an arm, question by question; a column a profile.

    What is compared with another arm than the default comes in a second table, folded up, which names that arm.
    """
    tables = {name: {(row["question"], row["arm"]): row for row in rows} for name, rows in judged.items()}
    levels = [table["default", "default"] for table in tables.values()]
    labels = {arm: row["label"] for table in tables.values() for (_, arm), row in table.items()}
    compared = [{key: row for key, row in t.items() if not math.isnan(row["difference"])} for t in tables.values()]
    largest = max(compared, key=len)  # its order is that of the grid
    first = ["", "**Default: top-1**", f"{levels[0]['paper']:.1f}", *map(_level, levels)]
    grid, others = [first], []
    before = ""
    for key in dict.fromkeys([*largest, *(key for table in compared for key in table)]):
        row = next(table[key] for table in compared if key in table)
        heading = row["heading"] if row["question"] != before else ""
        before = row["question"]
        paper = "" if math.isnan(row["paper_difference"]) else f"{row['paper_difference']:+.1f}"
        cells = [row["label"], paper, *(_cell(table[key]) if key in table else "" for table in compared)]
        if row["reference"] == "default":
            grid.append([heading, *cells])
        else:
            others.append([heading, labels[row["reference"]] if heading else "", *cells])
    columns = ["arm", "paper", *(f"`{name}`" for name in tables)]
    text = _markdown(["question", *columns], grid)
    if others:
        summary = f"<details><summary>{len(others)} comparisons with other arms than the default</summary>"
        text += f"\n\n{summary}\n\n{_markdown(['question', 'differences from', *columns], others)}\n\n</details>"
    return text


def pooled(root: Path) -> list[dict]:
    """Rows of arms that both profiles of ``POOLED`` have finished, over the seeds of both.

    Differences are paired by seed, so within one profile; the common error is that of these arms alone. Intervals and
    verdicts hold jointly over the arms that the first profile gives a question.

    Raises:
        ValueError: the profiles share a seed.
    """
    tables = [pd.read_csv(_table(root, name)) for name in POOLED]
    whole = [set(table.loc[table["seeds"] >= table["planned"], "arm"]) for table in tables]
    runs = [pd.read_csv(_table(root, name).with_name("runs.csv")) for name in POOLED]
    if shared := set(runs[0]["seed"]) & set(runs[1]["seed"]):
        raise ValueError(f"{' and '.join(POOLED)} share seed {min(shared)}: runs of one seed cannot be pooled")
    both = pd.concat(runs)
    both = both[both["arm"].isin(whole[0] & whole[1])]
    of_arm = {arm: group.set_index("seed") for arm, group in both.groupby("arm")}
    error = residual(both.pivot(index="seed", columns="arm", values="top1"))
    rows = []
    for of_first in tables[0].to_dict("records"):
        if not {of_first["arm"], of_first["reference"]} <= set(of_arm):
            continue
        beside = None if of_first["arm"] == of_first["reference"] else of_arm[of_first["reference"]]
        row = judge(of_arm[of_first["arm"]], beside, "top1", of_first["level"], error, of_first["paper_difference"])
        rows.append({name: of_first[name] for name in ABOUT} | {"difference": math.nan} | row)
    return rows


def _table(root: Path, profile: str) -> Path:
    return root / f"results/{profile}/ablations.csv"


def _markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A profile without a number in any row has no column here."""
    kept = [i for i, name in enumerate(columns) if not name.startswith("`") or any(row[i] for row in rows)]
    columns, rows = [columns[i] for i in kept], [[row[i] for i in kept] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [columns, ["---"] * len(columns), *rows])


def _level(row: dict) -> str:
    return f"{row['mean']:.1f} ({row['low']:.1f} to {row['high']:.1f}), n = {seeds_of(row['seeds'], row)}"


def _cell(row: dict) -> str:
    found = f"{row['difference']:+.1f}"
    if row["pairs"] > 1:
        found += f" ({row['difference_low']:+.1f} to {row['difference_high']:+.1f})"
    found += " †" * (row["mixed"] > 0)
    verdict = row["verdict"].removesuffix(" at this scale")
    said = "" if verdict == "not in the paper" else f"**{verdict}**, "
    return f"{said}{found}, n = {seeds_of(row['pairs'], row)}"


def write_findings(root: Path) -> None:
    path = root / "README.md"
    before, _, rest = path.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    rows = judged(root)
    texts = {path: f"{before}{BEGIN}\n{findings(rows)}\n{END}{after}"}
    texts |= {document: document.read_text() for document in root.glob("docs/*.md")}
    for document, text in {path: renumbered(text, root, rows) for path, text in texts.items()}.items():
        write_text(document, text)
    figure = differences_beside_paper(rows)
    save(figure, root / "results/findings.png")
    plt.close(figure)


if __name__ == "__main__":
    write_findings(project_root())
