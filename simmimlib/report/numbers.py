"""Differences in prose that follow from the tables. A comment, which a page does not show, says what each one is:

    MAE is above SimMIM by 5.8 (4.3 to 7.3)<!--n: mae - simmim_xavier-->.

The two arms may be followed by a profile other than ``cifar10-cpu``, by ``probe_linear``, by ``each`` for an interval
at 95 % by itself in place of the joint one of the arms' question, and by ``own`` for the error of the arms' own start
(``statistics.own_error``); or by ``both`` (``front.pooled``) alone. How a number is written stays as it was: with a
sign or without, "a (b to c)", "a, b to c" or "a" alone. No torch.
"""

import re
from collections import Counter
from pathlib import Path

import pandas as pd

from simmimlib.report.statistics import LEVEL, own_error, paired

NUMBER = r"[+-]?\d+\.\d"
INTERVAL = rf"((?:\s+points)?(?:\s+\(|,\s+))({NUMBER})(\s+to\s+){NUMBER}"
MARKED = re.compile(rf"(?<!to\s)({NUMBER})(?:{INTERVAL})?(\)?)<!--n: (.+?)-->")


def renumbered(text: str, root: Path, tables: dict[str, list[dict]]) -> str:
    """The text with each marked number as the tables have it now.

    Args:
        tables: rows of each profile's (``front.judged``).

    Raises:
        ValueError: a comment does not follow a number directly, the tables do not have what it names, or a difference
            that is written without a sign is no longer beyond zero, so that its sentence must change.
    """
    found = [marked[6] for marked in MARKED.finditer(text)]
    if astray := Counter(re.findall(r"<!--\s*n:\s*(.*?)\s*-->", text, re.DOTALL)) - Counter(found):
        raise ValueError(f"{', '.join(astray)}: there is no number, or number (number to number), before the comment")
    return MARKED.sub(lambda marked: _written(marked, _difference(marked[6], root, tables)), text)


def _written(found: re.Match, difference: tuple[float, float, float]) -> str:
    value, between, low, to, after, what = found.groups(default="")
    sign = "+" if value[0] in "+-" else ""
    numbers = [f"{number:{sign}.1f}" for number in difference]
    if not sign and any(number.startswith("-") for number in (numbers if low else numbers[:1])):
        raise ValueError(f"{what} is now {' '.join(numbers)}: the text has it without a sign, as beyond zero")
    if "nan" in "".join(numbers if low else numbers[:1]):
        raise ValueError(f"{what} is now {' '.join(numbers)}: too few runs")
    interval = f"{between}{numbers[1]}{to}{numbers[2]}" if low else ""
    return f"{numbers[0]}{interval}{after}<!--n: {what}-->"


def _difference(what: str, root: Path, tables: dict[str, list[dict]]) -> tuple[float, float, float]:
    """What a comment names: a difference and the bounds of its interval."""
    arms, *options = what.split("; ")
    arm, _, other = arms.partition(" - ")
    profile, *unknown = [name for name in options if name not in ("probe_linear", "each", "own")] or ["cifar10-cpu"]
    if unknown or profile not in tables or (profile == "both" and len(options) > 1):
        raise ValueError(f"{what}: what follows the arms is unknown or does not go together")
    rows, metric = tables[profile], "top1"
    starts = {row["arm"]: row["start"] for row in rows if "start" in row}
    if "own" in options and not {arm, other} <= set(starts):
        raise ValueError(f"{what}: the tables of {profile} do not tell where these start")
    if "probe_linear" in options:
        metric = "probe_linear"
        rows = pd.read_csv(root / f"results/{profile}/probes.csv").to_dict("records")
    if "each" in options:
        runs = pd.read_csv(root / f"results/{profile}/runs.csv")
        own, beside = (runs[runs["arm"] == name].set_index("seed") for name in (arm, other))
        residual = next((row["residual_sd"], int(row["df"])) for row in rows if row["df"] > 0)
        if "own" in options:
            residual = own_error(runs.pivot(index="seed", columns="arm", values=metric), starts, arm, other)
        return _interval(paired(own, beside, metric, LEVEL, *residual))
    found = {(row["arm"], row["reference"]): row for row in rows}
    prefix = "own_" if "own" in options else ""
    if (arm, other) in found:
        return _interval(found[arm, other], prefix)
    if (other, arm) in found:
        middle, low, high = _interval(found[other, arm], prefix)
        return -middle, -high, -low
    raise ValueError(f"{what}: the tables of {profile} do not compare these")


def _interval(row: dict, prefix: str = "") -> tuple[float, float, float]:
    return row["difference"], row[f"{prefix}difference_low"], row[f"{prefix}difference_high"]
