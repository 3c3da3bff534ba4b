"""Statistics over seeds: every arm against the default, ours beside the paper's. No training code.

Intervals are 95 % Student-t intervals over seeds; differences to the default are paired by seed, which removes what
the arms of one seed share (initial weights, labelled subset, data order).
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from simmimlib.runtime import whole_file, write_csv, write_json
from simmimlib.settings import Settings, arm_changes, load_yaml, require, run_settings

# Differences below half a point count as "no difference": the largest that the paper itself calls none is 0.4.
MARGIN = 0.5
QUESTIONS = {
    "default": "Default",
    "pretraining": "Does pre-training help?",
    "scope": "Predict the masked pixels or reconstruct all?",
    "loss": "Which loss?",
    "head": "How heavy a head?",
    "ratio": "Random masks: which ratio?",
    "patch": "Random masks: which patch size?",
    "strategy": "Square or block-wise masks?",
    "target": "Which target?",
    "resolution": "Which resolution to predict?",
}


@dataclass
class TableSettings(Settings):
    """Settings of ``notebooks/04_ablations.ipynb``, explained in its parameters cell."""

    profile: str = "quick"
    images: int = 8
    out: str = ""

    def check(self):
        self.load_profile()
        require(self.images > 0, "images", self.images, "1 or more")

    def load_profile(self) -> dict:
        return load_yaml("profile", self.profile)

    @property
    def folder(self) -> Path:
        return Path(self.out or f"results/{self.profile}")


def load_arms(names: list[str]) -> pd.DataFrame:
    """One row an arm: question, label, the paper's value and how sure it is; ``scratch`` and ``default`` included."""
    rows = []
    for name in dict.fromkeys(["default", "scratch", *names]):
        arm = load_yaml("arm", name)
        if arm["question"] not in QUESTIONS:
            raise ValueError(f"arms/{name}.yaml: question = {arm['question']!r}: allowed are {', '.join(QUESTIONS)}")
        rows.append({"arm": name, **{key: arm[key] for key in ("question", "label", "paper", "paper_status")}})
    table = pd.DataFrame(rows)
    order = table["question"].map(list(QUESTIONS).index)
    return table.assign(paper=table["paper"].astype(float)).iloc[order.argsort(kind="stable")].reset_index(drop=True)


def load_runs(folder, profile: dict, arms: list[str]) -> pd.DataFrame:
    """One row a finished run of the profile, in the order of arms and seeds.

    A run is finished when ``<folder>/runs/<arm>-<seed>/finetune/metrics.json`` is there and it was given what the
    profile and the arm give now; runs that lie on another machine are taken from ``<folder>/runs.csv``, where an
    earlier call recorded them, under the same condition.
    """
    folder, rows = Path(folder), []
    recorded = {}
    if (folder / "runs.csv").is_file():
        table = pd.read_csv(folder / "runs.csv", dtype={"settings": str}, keep_default_na=False, na_values=[""])
        recorded = {(row["arm"], row["seed"], row.get("settings")): row for row in table.to_dict("records")}
    for arm in arms:
        for seed in profile["seeds"]:
            wanted = run_settings(profile, arm, seed)
            key = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:10]
            run = {"arm": arm, "seed": seed, "changes": arm_changes(arm), "settings": key}
            metrics = read_run(folder / "runs" / f"{arm}-{seed}", wanted)
            if metrics:
                rows.append(run | metrics)
            elif (arm, seed, key) in recorded:
                rows.append(recorded[arm, seed, key])
    return pd.DataFrame(rows)


def read_run(folder: Path, wanted: dict[str, dict]) -> dict:
    """Metrics of both stages, those of pre-training with a prefix; {} if it is not finished or was given other values.

    ``wanted`` is what ``run_settings`` says of the run.
    """
    row = {}
    for stage in ("finetune", "pretrain"):
        if stage not in wanted:
            continue
        files = [folder / stage / name for name in ("parameters.json", "metrics.json")]
        if not all(file.is_file() for file in files):
            return {}
        given, metrics = (json.loads(file.read_text()) for file in files)
        if given != wanted[stage]:
            return {}
        if stage == "pretrain":
            keys = ("loss", "val_loss", "avg_dist", "parameters", "images_seen", "images_per_second", "wall_seconds")
            metrics = {f"pretrain_{key}": metrics[key] for key in keys}
        row |= metrics
    return row


def interval(values) -> tuple[float, float, float]:
    """Mean and its 95 % Student-t interval; the interval is not a number for fewer than two values."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return values.mean(), np.nan, np.nan
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return values.mean(), values.mean() - half, values.mean() + half


def verdict(low: float, high: float, paper_difference: float) -> str:
    """Do our numbers say what the paper says? ``low``, ``high``: interval of our difference to the default.

    Where the paper sees no difference (below the margin), we agree if our whole interval lies within the margin and
    disagree if it lies outside. Where it sees one, we agree if our interval excludes zero on the paper's side, and
    disagree if it excludes zero on the other side or lies within the margin. Anything else is undecided.
    """
    if np.isnan(paper_difference):
        return "not in the paper"
    if np.isnan(low):
        return "undecided at this scale"
    within = low > -MARGIN and high < MARGIN
    if abs(paper_difference) < MARGIN:
        agrees, disagrees = within, low > MARGIN or high < -MARGIN
    else:
        agrees = low > 0 if paper_difference > 0 else high < 0
        disagrees = within or (high < 0 if paper_difference > 0 else low > 0)
    return "agrees" if agrees else "disagrees" if disagrees else "undecided at this scale"


def compare(runs: pd.DataFrame, arms: pd.DataFrame) -> pd.DataFrame:
    """The table of arms: mean top-1, interval, paired difference to the default, the paper's numbers, verdict.

    ``avg_dist`` (pixels, mean over seeds) is that of the arm's masks, where it pre-trains.

    Raises:
        ValueError: no run of the default arm is there.
    """
    if "default" not in set(runs.get("arm", [])):
        raise ValueError("there is no finished run of the default arm, which all others are compared with")
    top1 = runs.pivot(index="seed", columns="arm", values="top1")
    best = runs.groupby("arm")["top1_best"].mean()
    avg_dist = runs.reindex(columns=["arm", "pretrain_avg_dist"]).groupby("arm")["pretrain_avg_dist"].mean()
    paper_default = arms.set_index("arm")["paper"]["default"]
    rows = []
    for arm in arms.itertuples():
        if arm.arm not in top1:
            continue
        mean, low, high = interval(top1[arm.arm].dropna())
        row = {**arm._asdict(), "seeds": int(top1[arm.arm].count()), "top1": mean, "low": low, "high": high}
        row |= {"top1_best": best[arm.arm], "avg_dist": avg_dist[arm.arm]}
        if arm.arm != "default":
            difference, d_low, d_high = interval((top1[arm.arm] - top1["default"]).dropna())
            paper_difference = round(arm.paper - paper_default, 4)
            row |= {"difference": difference, "difference_low": d_low, "difference_high": d_high}
            row |= {"paper_difference": paper_difference, "verdict": verdict(d_low, d_high, paper_difference)}
        rows.append(row)
    return pd.DataFrame(rows).drop(columns="Index")


def to_markdown(table: pd.DataFrame, profile: str, runs: pd.DataFrame) -> str:
    """One small table per question, each beginning with the default."""
    first = runs.iloc[0]
    notes = [
        f"Validation top-1 in percent; {first['data']}, {first['labels']} labelled images for fine-tuning; "
        f"{first['device']}, {first['precision']}; {first['versions']}. Repeat with `make repro PROFILE={profile}`.",
        "",
        "Intervals are 95 % Student-t over seeds; differences to the default are paired by seed. The paper's numbers "
        "are ImageNet-1K, Swin-B; *unverified* ones were recalled, not checked against the paper. Verdicts compare "
        f"differences, not levels: gaps under {MARGIN} points count as none.",
    ]
    lines = [f"# Ablations, profile {profile}", "", *notes, ""]
    default = table[table["arm"] == "default"]
    for question, heading in QUESTIONS.items():
        arms = table[table["question"] == question]
        if question == "default" or arms.empty:
            continue
        lines += [
            f"## {heading}",
            "",
            "| arm | seeds | top-1, last epoch (95 % interval) | best epoch | difference to default (95 % interval) "
            "| paper | paper's difference | verdict |",
            "|---|---|---|---|---|---|---|---|",
        ]
        lines += [_markdown_row(row) for row in pd.concat([default, arms]).itertuples()] + [""]
    return "\n".join(lines)


def _markdown_row(row) -> str:
    ours = f"{row.top1:.1f} ({row.low:.1f} to {row.high:.1f})"
    difference = "–"
    if row.arm != "default":
        difference = f"{row.difference:+.1f} ({row.difference_low:+.1f} to {row.difference_high:+.1f})"
    paper = paper_difference = "–"
    if not np.isnan(row.paper):
        mark = " (unverified)" if row.paper_status == "recalled" else ""
        paper = f"{row.paper:.1f}{mark}"
        paper_difference = "–" if row.arm == "default" else f"{row.paper_difference:+.1f}"
    final = "–" if row.arm == "default" else row.verdict
    cells = (row.label, row.seeds, ours, f"{row.top1_best:.1f}", difference, paper, paper_difference, final)
    return "| " + " | ".join(map(str, cells)) + " |"


def write_tables(folder, runs: pd.DataFrame, table: pd.DataFrame, markdown: str) -> None:
    """Writes ``runs.csv``, ``ablations.csv``, ``ablations.md`` and, for ``dvc metrics show``, ``summary.json``."""
    folder = Path(folder)
    write_csv(folder / "runs.csv", runs)
    write_csv(folder / "ablations.csv", table.round(4))
    with whole_file(folder / "ablations.md") as temporary:
        temporary.write_text(markdown)
    keys = ["top1", "low", "high", "difference", "verdict"]
    write_json(folder / "summary.json", json.loads(table.set_index("arm")[keys].round(2).to_json(orient="index")))
