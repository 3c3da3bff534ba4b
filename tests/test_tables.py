import json
import shutil

import numpy as np
import pandas as pd
import pytest

from conftest import ROOT
from simmimlib.figures import accuracy_over_avg_dist
from simmimlib.settings import load_yaml, run_settings
from simmimlib.tables import compare, interval, load_runs, to_markdown, verdict, write_tables

ARMS = pd.DataFrame(
    {
        "arm": ["default", "scratch", "reconstruct_all", "l2"],
        "question": ["default", "pretraining", "scope", "loss"],
        "label": ["Default", "Scratch", "All", "L2"],
        "paper": [82.8, np.nan, 81.7, 82.7],
        "paper_status": ["sure", None, "sure", "recalled"],
    }
)


def runs(**top1):
    rows = [
        {"arm": arm, "seed": seed, "top1": value, "top1_best": value + 1, "data": "d", "labels": 10, "device": "CPU"}
        | {"precision": "float32", "versions": "torch 2"}
        for arm, values in top1.items()
        for seed, value in enumerate(values)
    ]
    return pd.DataFrame(rows)


def test_interval_is_students():
    """Mean 2, standard deviation 1, three values: 2 +- 4.303 / sqrt(3)."""
    assert interval([1, 2, 3]) == pytest.approx((2, 2 - 2.4841, 2 + 2.4841), abs=1e-3)
    assert np.isnan(interval([5])[1])


def test_differences_are_paired_by_seed():
    """Seeds differ by 30 points, arms by exactly 2: the paired interval does not see the seeds."""
    table = compare(runs(default=[50, 65, 80], scratch=[40, 55, 70], reconstruct_all=[48, 63, 78]), ARMS).set_index(
        "arm"
    )
    row = table.loc["reconstruct_all"]
    assert row["difference"] == row["difference_low"] == row["difference_high"] == pytest.approx(-2)
    assert row["paper_difference"] == pytest.approx(-1.1) and row["verdict"] == "agrees"
    assert table.loc["default", "high"] - table.loc["default", "low"] > 50
    assert table.loc["scratch", "verdict"] == "not in the paper"
    assert "l2" not in table.index


def test_a_missing_seed_is_left_out_of_the_pairs():
    frame = runs(default=[50, 60, 70], l2=[51, 61, 71])
    frame = frame[~((frame["arm"] == "l2") & (frame["seed"] == 2))]
    row = compare(frame, ARMS).set_index("arm").loc["l2"]
    assert row["seeds"] == 2 and row["difference"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("low", "high", "paper", "expected"),
    [
        (-2.0, -0.1, -1.1, "agrees"),
        (0.1, 2.0, -1.1, "disagrees"),
        (-0.4, 0.4, -1.1, "disagrees"),
        (-2.0, 0.6, -1.1, "undecided at this scale"),
        (-0.4, 0.3, -0.1, "agrees"),
        (-0.4, 0.6, -0.1, "undecided at this scale"),
        (0.6, 1.5, -0.1, "disagrees"),
        (-9.0, -0.6, -0.1, "disagrees"),
        (np.nan, np.nan, -0.1, "undecided at this scale"),
        (1.0, 2.0, np.nan, "not in the paper"),
    ],
)
def test_verdict(low, high, paper, expected):
    assert verdict(low, high, paper) == expected


def test_markdown_and_files(tmp_path):
    frame = runs(default=[50, 65, 80], l2=[51, 66, 81], reconstruct_all=[48, 63, 77])
    table = compare(frame, ARMS)
    markdown = to_markdown(table, "quick", frame)
    assert "| L2 | 3 | 66.0 (28.7 to 103.3)" in markdown and "82.7 (unverified) | -0.1 |" in markdown
    write_tables(tmp_path, frame, table, markdown)
    pd.testing.assert_frame_equal(compare(pd.read_csv(tmp_path / "runs.csv"), ARMS), table)
    with pytest.raises(ValueError, match="no finished run of the default arm"):
        compare(frame[frame["arm"] != "default"], ARMS)


def finish(folder, profile, arm, seed, top1):
    """Files of a finished run, without the run."""
    for stage, values in run_settings(profile, arm, seed).items():
        if stage == "data":
            continue
        path = folder / "runs" / f"{arm}-{seed}" / stage
        path.mkdir(parents=True)
        (path / "parameters.json").write_text(json.dumps(values))
        keys = ("loss", "val_loss", "avg_dist", "parameters", "images_seen", "images_per_second", "wall_seconds")
        metrics = dict.fromkeys(keys, 1.0) | ({"top1": top1, "top1_best": top1} if stage == "finetune" else {})
        (path / "metrics.json").write_text(json.dumps(metrics))


def test_runs_of_several_machines_come_together(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    profile = load_yaml("profile", "quick")
    arms = ["scratch", "default", "l2"]
    assert load_runs(tmp_path, profile, arms).empty
    finish(tmp_path, profile, "default", 0, 50.0)
    finish(tmp_path, profile, "scratch", 1, 40.0)
    runs = load_runs(tmp_path, profile, arms)
    assert list(zip(runs["arm"], runs["seed"], strict=True)) == [("scratch", 1), ("default", 0)]
    assert runs["changes"].tolist() == ["", ""] and runs["pretrain_loss"].isna().tolist() == [True, False]
    runs.to_csv(tmp_path / "runs.csv", index=False)

    # elsewhere, with runs.csv alone, others are added; the ones of the file stay
    shutil.rmtree(tmp_path / "runs")
    finish(tmp_path, profile, "l2", 0, 51.0)
    more = load_runs(tmp_path, profile, arms)
    assert more["top1"].tolist() == [40.0, 50.0, 51.0] and more["changes"].tolist()[2] == "loss = l2"

    # a table from before settings were recorded holds nothing that can be taken
    runs.drop(columns="settings").to_csv(tmp_path / "runs.csv", index=False)
    assert len(load_runs(tmp_path, profile, arms)) == 1

    # runs that were given other values are not of this profile
    profile["finetune"]["epochs"] += 1
    assert load_runs(tmp_path, profile, arms).empty


def test_accuracy_over_avg_dist_shows_the_mask_arms():
    arms = pd.concat([ARMS, ARMS.iloc[[3]].assign(arm="ratio_20", question="ratio", label="Ratio 0.2", paper=np.nan)])
    frame = runs(default=[50, 65, 80], l2=[51, 66, 81], ratio_20=[48, 63, 77])
    frame["pretrain_avg_dist"] = frame["arm"].map({"default": 15.7, "l2": 15.7, "ratio_20": 8.8})
    axis = accuracy_over_avg_dist(compare(frame, arms), 192).axes[0]
    points = sorted(tuple(line.get_xydata()[0].round(1)) for line in axis.get_lines() if line.get_marker() == "o")
    assert points == [(8.8, 62.7), (15.7, 65.0)]
    assert axis.get_xlabel() == "AvgDist of the masks, pixels"
