"""Tables: every arm against the default, ours beside the paper's, as Markdown and CSV. No training code, no torch."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from simmimlib.machine.files import write_csv, write_json, write_text
from simmimlib.report.statistics import MARGIN, by_start
from simmimlib.settings import Settings, require, setting


@dataclass
class TableSettings(Settings):
    """Settings of ``notebooks/04_ablations.ipynb``; the profile is the active one, ``params.yaml``."""

    images: int = setting(8, "pictures in the reconstruction figure")
    out: str = setting("", "folder of runs/, tables, figures; empty means results/ and the profile")

    def check(self) -> None:
        require(self.images > 0, "images", self.images, "1 or more")


def origin_of(runs: pd.DataFrame) -> list[str]:
    """Where all runs come from, a line for each combination of device, precision, versions, commit and data."""
    names = [name for name in ("data", "device", "precision", "versions", "commit", "code") if name in runs]
    lines = []
    for values, group in runs[names].astype(str).groupby(names, sort=False):
        said = dict(zip(names, values, strict=True))
        said |= {name: f"{name} {said[name]}" for name in ("commit", "code") if name in said}
        lines.append(f"- {len(group)} runs: {', '.join(map(str, said.values()))}")
    return lines


def to_markdown(
    table: pd.DataFrame,
    profile: str,
    runs: pd.DataFrame,
    left_out: list[str],
    pictures: dict[str, list[str]],
    probes: pd.DataFrame | None = None,
    notes: dict[str, str] | None = None,
) -> str:
    """One small table per question, each beginning with what the arms are compared with and followed by its pictures.

    Where arms start differently, a last part tells what a separate error for each start would change.

    Args:
        table: from ``statistics.compare``; with ``planned``, the seeds of each arm in the profile, they are told.
        left_out: a line for each run that is there but does not count.
        pictures: of each question, "" for those of all arms, paths relative to the table's own folder.
        probes: the same table of the linear probe, with ``operations`` (of a forward pass in pre-training, millions),
            ``ms`` (of pre-training, an image, the fastest seed) and ``seen`` (images in pre-training, thousands); for
            the questions that ask for it.
        notes: a sentence below the tables of a question.
    """
    labelled = ", ".join(str(int(n)) for n in sorted(set(runs["labelled_images"])))
    lines = [f"# Ablations, profile {profile}", ""]
    lines += [
        f"Top-1 on the validation images in percent, after the last epoch of fine-tuning on {labelled} labelled "
        "images; beside it the best of the validated epochs, and the linear probe and k-NN of the frozen encoder's "
        "output before fine-tuning, from scratch with its random weights. "
        f"Repeat with `make repro PROFILE={profile}`.",
        "",
        "Intervals of means are 95 % Student-t over seeds. Differences are paired by seed, with one error estimated "
        "for all runs of the profile; where a question has several arms, their intervals and verdicts hold jointly "
        "(Bonferroni over its arms, finished or not). The paper's numbers are ImageNet-1K, Swin-B, 100 epochs, unless "
        "said otherwise. "
        f"Verdicts compare differences, not levels: gaps under {MARGIN} points count as none. A difference is over the "
        "seeds that both arms have, and so need not be that of the means.",
        "",
        *_resolution(table, probes),
        *origin_of(runs),
        "",
    ]
    if table.get("mixed", pd.Series([0])).fillna(0).any():
        lines += ["† the runs of some pairs differ in device, precision, versions, code or images.", ""]
    if left_out:
        lines += ["Not in the tables:", "", *(f"- {line}" for line in left_out), ""]
    floor = runs.get("probe_knn_pixels", pd.Series(dtype=float)).dropna()
    if len(floor):
        linear = runs["probe_linear_pixels"].dropna()
        lines += [f"Raw pixels: linear probe {linear.mean():.1f}, k-NN {floor.mean():.1f}.", ""]
    lines += _shown(pictures.get("", []))
    for question in dict.fromkeys(table["question"]):
        if question == "default":
            continue
        arms = table[table["question"] == question]
        lines += [f"## {arms['heading'].iloc[0]}", "", *_compared(table, arms, TOP1), ""]
        if probes is not None and arms["probes"].any():
            lines += ["The linear probe of the encoder's output, and what the arms cost:", ""]
            lines += [*_compared(probes, probes[probes["question"] == question], PROBES), ""]
            lines += [
                "The best block is chosen on the same validation images and read without the final norm; ms are those "
                "of the fastest run, of the loop with its input.",
                "",
            ]
        if note := (notes or {}).get(question):
            lines += [note, ""]
        lines += _shown(pictures.get(question, []))
    if table.get("own_df", pd.Series(0)).gt(0).any() and table["start"].nunique() > 1:
        lines += _own_errors(table, probes, runs)
    return "\n".join(lines)


def _own_errors(table: pd.DataFrame, probes: pd.DataFrame | None, runs: pd.DataFrame) -> list[str]:
    """The error of a run by start, and the comparisons that it would change."""
    starts, labels = (dict(zip(table["arm"], table[name], strict=True)) for name in ("start", "label"))
    metrics = {"top-1": ("top1", table)}
    if probes is not None and probes["probes"].any():
        metrics["linear probe"] = ("probe_linear", probes[probes["probes"]])
    lines = [
        "## Would a separate error for each start change the conclusions?",
        "",
        "The effect of a seed and the error of a run may differ with encoder, positions and initial weights, together "
        "the start of an arm. Residual standard deviation of a run after the effects of seed and arm within a start, "
        "in points (degrees of freedom):",
        "",
        f"| start | arms | runs | {' | '.join(metrics)} |",
        f"|{'---|' * (3 + len(metrics))}",
    ]
    spreads = [by_start(runs, starts, column).to_dict("records") for column, _ in metrics.values()]
    for first, *more in zip(*spreads, strict=True):
        found = [f"{row['sd']:.2f} ({row['df']})" if row["df"] else "–" for row in (first, *more)]
        lines.append(f"| {first['start']} | {first['arms']} | {first['runs']} | {' | '.join(found)} |")
    others = []
    for metric, (_, compared) in metrics.items():
        for row in compared[compared["own_df"] > 0].to_dict("records"):
            (said, *reading), (own_said, *own_reading) = _said(row, ""), _said(row, "own_")
            if reading != own_reading:
                cells = [metric, row["label"], labels[row["reference"]], said, own_said, f"{row['own_df']:.0f}"]
                others.append(f"| {' | '.join(cells)} |")
    how = "With these errors (for arms of different starts, the paired t-test of the two) and the same joint levels,"
    if not others:
        return [*lines, "", f"{how} every verdict is the same, and the same intervals exclude zero.", ""]
    how += " these comparisons change their verdict, or whether their interval excludes zero:"
    columns = "| metric | arm | compared with | one error | separate error | its degrees of freedom |"
    return [*lines, "", how, "", columns, f"|{'---|' * 6}", *others, ""]


def _said(row: dict, prefix: str) -> tuple[str, bool, str]:
    """A difference with its interval and verdict in words, whether the interval excludes zero, and the verdict."""
    low, high, verdict = (row[f"{prefix}{name}"] for name in ("difference_low", "difference_high", "verdict"))
    told = "" if verdict == "not in the paper" else f", {verdict.removesuffix(' at this scale')}"
    return f"{row['difference']:+.1f} ({low:+.1f} to {high:+.1f}){told}", bool(low * high > 0), verdict


def _resolution(table: pd.DataFrame, probes: pd.DataFrame | None) -> list[str]:
    """What differences the runs can tell apart."""
    said = _spread("top-1", table)
    if probes is not None:  # the questions that show them
        said += _spread("linear probe", probes[probes["probes"]])
    if not said:
        return []
    return [
        "Standard deviation of a run once seed and arm are taken out, and half widths of the intervals of differences: "
        f"{'; '.join(said)}. That two arms do not differ can be confirmed only by one narrower than ±{MARGIN}.",
        "",
    ]


def _spread(metric: str, table: pd.DataFrame) -> list[str]:
    found = table[table.get("difference_low", pd.Series(np.nan, table.index)).notna()]
    if not len(found):
        return []
    sd, df = found[["residual_sd", "df"]].iloc[0]
    half = (found["difference_high"] - found["difference_low"]) / 2
    widths = " to ".join(dict.fromkeys(f"±{width:.1f}" for width in (half.min(), half.max())))
    return [f"{metric} {sd:.2f} points ({df:.0f} degrees of freedom), {widths}"]


TOP1 = ("top-1 (95 % interval)", {"best": "top1_best", "linear": "probe_linear", "k-NN": "probe_knn"})
PROBES = (
    "linear probe (95 % interval)",
    {
        "best block": "probe_linear_best",
        "forward, M operations": "operations",
        "pre-training, ms an image": "ms",
        "thousand images seen": "seen",
    },
)


def _compared(table: pd.DataFrame, arms: pd.DataFrame, columns: tuple[str, dict[str, str]]) -> list[str]:
    """A question's arms below the arm that they are compared with."""
    metric, others = columns
    reference = arms["reference"].iloc[0]
    first = "default" if reference == "default" else "the first row"
    names = [f"difference to {first} (joint 95 % interval)", "paper", "paper's difference", "verdict"]
    own = table[table["arm"] == reference].head(1).assign(paper=arms["reference_paper"].iloc[0])
    rows = pd.concat([own, arms[arms["arm"] != reference]])
    lines = [f"| {' | '.join(['arm', 'seeds', metric, *others, *names])} |", f"|{'---|' * (7 + len(others))}"]
    return lines + [_markdown_row(row, others.values(), row["arm"] == reference) for row in rows.to_dict("records")]


def _shown(paths: list[str]) -> list[str]:
    return [line for path in paths for line in (f"![{re.sub('[-_]', ' ', Path(path).stem)}]({path})", "")]


def _markdown_row(row: dict, others: Iterable[str], is_reference: bool) -> str:
    def number(name: str, form: str = ".1f") -> str:
        value = row.get(name, np.nan)
        return "–" if value is None or pd.isna(value) else format(value, form)

    ours = f"{number('mean')} ({number('low')} to {number('high')})" if row["seeds"] > 1 else number("mean")
    cells = [row["label"], seeds_of(row["seeds"], row), ours, *(number(name) for name in others)]
    if is_reference:
        cells += ["–", number("paper"), "–", "–"]
    else:
        between = (
            f" ({number('difference_low', '+.1f')} to {number('difference_high', '+.1f')})" if row["pairs"] > 1 else ""
        )
        mark = " †" if row["mixed"] else ""
        cells += [number("difference", "+.1f") + between + mark, number("paper"), number("paper_difference", "+.1f")]
        cells += [row["verdict"]]
    return "| " + " | ".join(map(str, cells)) + " |"


def seeds_of(count: float, row: dict) -> str:
    """``3``, or ``3 of 5`` while the profile's runs of an arm are not finished."""
    planned = row.get("planned", count)
    return f"{count:.0f}" if pd.isna(planned) or planned <= count else f"{count:.0f} of {planned:.0f}"


def write_tables(
    folder: str | Path,
    runs: pd.DataFrame,
    curves: pd.DataFrame,
    table: pd.DataFrame,
    probes: pd.DataFrame,
    markdown: str,
) -> None:
    """Writes the four tables, ``ablations.md`` and, for ``dvc metrics``, ``summary.json``.

    Args:
        curves: from ``records.load_curves``.
        table, probes, markdown: as of ``to_markdown``.
    """
    folder = Path(folder)
    write_csv(folder / "runs.csv", runs)
    write_csv(folder / "curves.csv", curves)
    write_csv(folder / "ablations.csv", table)
    write_csv(folder / "probes.csv", probes[probes["probes"]].round(4))
    write_text(folder / "ablations.md", markdown)
    keys = [key for key in ("mean", "low", "high", "difference", "verdict") if key in table]
    own = table[~table["repeated"]].set_index("arm")[keys]
    write_json(folder / "summary.json", json.loads(own.round(2).to_json(orient="index")))
