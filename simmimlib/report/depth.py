"""The open question: how do fine-tuning and linear probes depend on the depth of SimMIM's head or MAE's decoder?

One contrast is judged, fixed before the first run: the change with each doubling of the depth.
"""

import numpy as np
import pandas as pd

from simmimlib.report.statistics import interval

QUESTIONS = {  # and what their depth is of
    "head_depth": "SimMIM: transformer blocks in the head",
    "decoder_depth": "MAE: transformer blocks in the decoder",
}
METRICS = {
    "top1": "fine-tuning",
    "probe_linear": "linear probe, encoder's output",
    "probe_linear_best": "linear probe, best block",
}


def depth_of(changes: dict) -> int:
    """Blocks of an arm's decoder (MAE) or head (SimMIM; 0: a linear layer), from its changes in pre-training."""
    if changes.get("method") == "mae":
        return changes.get("decoder_depth", 1)
    head = changes.get("head", "linear")
    return int(head.removeprefix("blocks_")) if head.startswith("blocks_") else 0


def by_depth(runs: pd.DataFrame, arms: dict[str, dict], question: str, metric: str) -> pd.DataFrame:
    """Values of a question's arms and their reference: a row a seed that all of them have, a column a depth."""
    own = [arm for arm in arms if arms[arm]["question"] == question]
    wanted = [arms[own[0]]["reference"]["arm"], *own] if own else []
    of_depth = {arm: depth_of(arms[arm]["pretrain"]) for arm in wanted}
    rows = runs[runs["arm"].isin(of_depth)]
    rows = rows.assign(depth=rows["arm"].map(of_depth))
    return rows.pivot(index="seed", columns="depth", values=metric).dropna()


def trend(values: pd.DataFrame) -> tuple[float, float, float]:
    """Change with each doubling of the depth, from one block on, and its 95 % interval over the seeds.

    Args:
        values: from ``by_depth``.

    Of each seed, the slope of the least-squares line over log2(depth).
    """
    values = values.drop(columns=0, errors="ignore")  # the linear head
    if values.shape[1] < 2:
        return np.nan, np.nan, np.nan
    return interval(np.polyfit(np.log2(values.columns.to_numpy(float)), values.to_numpy(float).T, 1)[0])


def trend_line(runs: pd.DataFrame, arms: dict[str, dict], question: str) -> str:
    """The trends of a question in a sentence; "" where there are fewer than two depths or seeds."""
    found = []
    for metric, label in METRICS.items():
        values = by_depth(runs, arms, question, metric)
        mean, low, high = trend(values)
        if np.isnan(low):
            return ""
        mean = round(mean, 1) + 0.0  # -0.0 is 0.0; the sign of a bound says something
        low, high = (round(value, 6) + 0.0 for value in (low, high))
        found.append(f"{label} {mean:+.1f} ({low:+.1f} to {high:+.1f})")
    depths = [depth for depth in values if depth != 0]
    return (
        f"Points with each doubling of the depth, from {depths[0]} to {depths[-1]} blocks, 95 % intervals over "
        f"{len(values)} seeds: {'; '.join(found)}."
    )
