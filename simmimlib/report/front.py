"""The README's table of findings: every arm that was run, at every scale, with its verdict.

python -m simmimlib.report.front    # writes it between the two marks in README.md, from results/*/ablations.csv
"""

import math
from pathlib import Path

import pandas as pd

from simmimlib.machine.files import project_root, write_text
from simmimlib.report.tables import seeds_of

PROFILES = ("quick", "cifar10-cpu", "cifar10", "imagenette")  # columns, those of them that have results
BEGIN = "<!-- findings: written by python -m simmimlib.report.front -->"
END = "<!-- end of findings -->"


def findings(root: Path) -> str:
    """The table as Markdown: the default's level, then a row an arm, question by question; a column a profile.

    What is compared with another arm than the default comes in a second table, folded up, which names that arm.
    """
    tables = {
        name: {(row["question"], row["arm"]): row for row in pd.read_csv(path).to_dict("records")}
        for name in PROFILES
        if (path := root / f"results/{name}/ablations.csv").is_file()
    }
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
    write_text(path, f"{before}{BEGIN}\n{findings(root)}\n{END}{after}")


if __name__ == "__main__":
    write_findings(project_root())
