"""Statistics over seeds: intervals, paired differences to a reference, verdicts beside the paper's. No torch.

Intervals of means are Student-t intervals over seeds. Differences are paired by seed, which removes what the arms of
one seed share (labelled images, order, the classifier's first weights; with timm's initial weights also the encoder).
What is left, the standard deviation of a run after the effects of its seed and its arm, is estimated once from all runs
of a profile, as in an analysis of variance with seeds as blocks; three seeds of one arm alone would leave two degrees
of freedom. With a single arm this is the paired t-test. Where a question has several arms, the intervals of its
differences, and with them its verdicts, hold jointly: each is at the level 1 - 0.05 / arms (Bonferroni), finished or
not.
"""

from collections import Counter
from collections.abc import Iterable

import numpy as np
import pandas as pd
from scipy import stats

# Differences below half a point count as "no difference": the largest that the paper itself calls none is 0.4.
MARGIN = 0.5
LEVEL = 0.95
PAIRED = ("data_digest", "device", "precision", "versions", "code")  # what the two runs of a pair should have in common
OWN = ("difference_low", "difference_high", "residual_sd", "df", "verdict")
UNDECIDED = "undecided at this scale"


def interval(values: Iterable[float], level: float = LEVEL) -> tuple[float, float, float]:
    """Mean and its Student-t interval; the interval is not a number for fewer than two values."""
    array = np.array(list(values), dtype=float)
    if len(array) < 2:
        return float(array.mean()) if len(array) else np.nan, np.nan, np.nan
    half = stats.t.ppf((1 + level) / 2, len(array) - 1) * array.std(ddof=1) / np.sqrt(len(array))
    return array.mean(), array.mean() - half, array.mean() + half


def verdict(low: float, high: float, paper_difference: float) -> str:
    """Do our numbers say what the paper says? ``low``, ``high``: interval of our difference to the default.

    Where the paper sees no difference (below the margin), we agree if our whole interval lies within the margin and
    disagree if it lies outside. Where it sees one, we agree if our interval excludes zero on the paper's side, and
    disagree if it excludes zero on the other side or lies within the margin. Anything else is undecided.
    """
    if np.isnan(paper_difference):
        return "not in the paper"
    if np.isnan(low):
        return UNDECIDED
    within = low > -MARGIN and high < MARGIN
    if abs(paper_difference) < MARGIN:
        agrees, disagrees = within, low > MARGIN or high < -MARGIN
    else:
        agrees = low > 0 if paper_difference > 0 else high < 0
        disagrees = within or (high < 0 if paper_difference > 0 else low > 0)
    return "agrees" if agrees else "disagrees" if disagrees else UNDECIDED


def compare(
    runs: pd.DataFrame,
    arms: dict[str, dict],
    metric: str = "top1",
    paper: str = "paper",
    planned: dict[str, int] | None = None,
    starts: dict[str, str] | None = None,
) -> pd.DataFrame:
    """The table of arms, those with finished runs, question by question; an arm of several questions has several rows.

    Columns: arm, question, heading, label, probes; repeated (in a question that is not its own); reference (the arm
    that those of the question are compared with) and reference_paper; paper; planned; seeds, mean, sd, low, high;
    pairs, difference, difference_low, difference_high (joint over the question's arms), level, residual_sd, df;
    paper_difference, verdict; mixed (of how many pairs the two runs differ in device, precision, versions, code or
    images); fastest (images a second in pre-training, of the fastest seed); means of the other numbers of the runs.
    With ``starts`` also start, and own_difference_low to own_verdict: the same with ``own_error``.

    Args:
        arms: ``pipeline.arms.load_arms()``.
        metric: the column of ``runs`` that is compared, in percent.
        paper: where an arm and its reference have the paper's value of it, ``"paper"`` or ``"paper_linear"``.
        planned: of each arm of the profile, its number of seeds; as many as there are if None.
        starts: of each arm, where its encoder starts (``starts.start_of``).

    Raises:
        ValueError: no run of the default arm is there.
    """
    if "default" not in set(runs.get("arm", [])):
        raise ValueError("there is no finished run of the default arm, which all others are compared with")
    of_arm = {arm: group.set_index("seed") for arm, group in runs.groupby("arm")}
    present = [arm for arm in arms if arm in of_arm]
    listed = [(arm, {**arms[arm], "repeated": False}) for arm in present]
    listed += [(arm, {**arms[arm], **about, "repeated": True}) for arm in present for about in arms[arm]["also"]]
    listed.sort(key=lambda one: one[1]["place"])
    planned = planned or {arm: len(of_arm[arm]) for arm in present}
    families = [(arm, about) for arm in planned for about in (arms[arm], *arms[arm]["also"])]
    counts = Counter(about["question"] for arm, about in families if arm != about["reference"]["arm"])
    values = runs.pivot(index="seed", columns="arm", values=metric)
    error = residual(values)
    rows = []
    for arm, about in listed:
        group, reference = of_arm[arm], about["reference"]
        row = {"arm": arm, **{key: about[key] for key in ("question", "heading", "label", "probes", "repeated")}}
        row |= {"reference": reference["arm"], "reference_paper": reference[paper]}
        # beside another reference, of which the paper has no value, an arm's own value would stand alone
        value = None if about["repeated"] and reference[paper] is None else about[paper]
        row |= {"paper": value, "planned": planned.get(arm, len(group))}
        known = value is not None and reference[paper] is not None
        paper_difference = value - reference[paper] if known else np.nan
        level = 1 - (1 - LEVEL) / max(counts[about["question"]], 1)  # in the default's own there is no arm to count
        beside = None if arm == reference["arm"] else of_arm.get(reference["arm"], group[:0])
        row |= judge(group, beside, metric, level, error, paper_difference)
        if starts:
            row["start"] = starts[arm]
        if starts and beside is not None and len(beside):
            own = own_error(values, starts, arm, reference["arm"])
            again = judge(group, beside, metric, level, own, paper_difference)
            row |= {f"own_{name}": again[name] for name in OWN}
        if "pretrain_images_per_second" in group:
            row["fastest"] = group["pretrain_images_per_second"].max()
        others = group.select_dtypes("number").drop(columns=metric, errors="ignore").mean()
        rows.append(row | {name: value for name, value in others.items() if name not in row})
    return pd.DataFrame(rows).round(4)  # as it is written, so that every table rounds the same number


def residual(values: pd.DataFrame) -> tuple[float, int]:
    """Standard deviation of a run after the effects of its seed and its arm, and the degrees of freedom.

    Args:
        values: a row a seed, a column an arm; not a number where a run is missing.
    """
    seeds, arms = np.nonzero(values.notna().to_numpy())
    found = values.to_numpy(float)[seeds, arms]
    effects = np.hstack([np.eye(values.shape[0])[seeds], np.eye(values.shape[1])[arms]])
    fitted, _, rank, _ = np.linalg.lstsq(effects, found)
    df = len(found) - int(rank)
    return (float(np.sqrt(((found - effects @ fitted) ** 2).sum() / df)) if df else np.nan), df


def own_error(values: pd.DataFrame, starts: dict[str, str], arm: str, reference: str) -> tuple[float, int]:
    """``residual`` of the arms that start as these two do or, where these start differently, of their pairs alone.

    What one error for all runs leaves out: the effect of a seed and the size of the error may differ between starts.

    Args:
        values: as of ``residual``.
        starts: of each arm, where its encoder starts.
    """
    same = [name for name in values.columns if starts[name] == starts[arm]]
    return residual(values[same if reference in same else [arm, reference]])


def by_start(runs: pd.DataFrame, starts: dict[str, str], metric: str) -> pd.DataFrame:
    """A row a start: arms, runs, and the ``residual`` of these runs, sd and df."""
    rows = []
    for start in dict.fromkeys(starts[arm] for arm in runs["arm"]):
        own = runs[runs["arm"].map(starts) == start]
        sd, df = residual(own.pivot(index="seed", columns="arm", values=metric))
        rows.append({"start": start, "arms": own["arm"].nunique(), "runs": len(own), "sd": sd, "df": df})
    return pd.DataFrame(rows)


def judge(
    group: pd.DataFrame,
    reference: pd.DataFrame | None,
    metric: str,
    level: float,
    error: tuple[float, int],
    paper_difference: float,
) -> dict:
    """An arm's part of a row of ``compare``: seeds to high, and beside another arm pairs to mixed.

    Args:
        group: its runs, by seed.
        reference: those of the arm that it is compared with, by seed; None for that arm itself.
        error: of ``residual``.
    """
    mean, low, high = interval(group[metric].dropna())
    row: dict = {"seeds": int(group[metric].count()), "mean": mean, "sd": group[metric].std()}
    row |= {"low": low, "high": high}
    if reference is not None:
        row |= paired(group, reference, metric, level, *error) | {"paper_difference": paper_difference}
        row["verdict"] = verdict(row["difference_low"], row["difference_high"], paper_difference)
    return row


def paired(
    group: pd.DataFrame, reference: pd.DataFrame, metric: str, level: float, residual_sd: float, df: int
) -> dict:
    """Difference to the reference over the seeds that both have; no interval for a single one."""
    seeds = group.index[group[metric].notna()].intersection(reference.index[reference[metric].notna()])
    difference = (group.loc[seeds, metric] - reference.loc[seeds, metric]).mean()
    half = np.nan
    if len(seeds) > 1:
        half = stats.t.ppf((1 + level) / 2, df) * residual_sd * np.sqrt(2 / len(seeds))
    origin = [name for name in PAIRED if name in group and name in reference]
    mixed = (group.loc[seeds, origin] != reference.loc[seeds, origin]).any(axis=1).sum() if origin else 0
    row = {"pairs": len(seeds), "difference": difference}
    row |= {"difference_low": difference - half, "difference_high": difference + half}
    return row | {"level": level, "residual_sd": residual_sd, "df": df, "mixed": int(mixed)}
