"""Finished runs, here and elsewhere: which of them count."""

import json
import re
import shutil

import pytest

from conftest import ROOT
from simmimlib.pipeline.arms import wanted_runs
from simmimlib.pipeline.profiles import load_profile
from simmimlib.report.runs import ORIGIN, PRETRAIN, PROBE, load_runs


@pytest.fixture
def params(monkeypatch):
    monkeypatch.chdir(ROOT)
    return load_profile("quick")


def finish(folder, params, arm, seed, top1, **origin):
    """Files of a finished run, without the run."""
    (wanted,) = (run for run in wanted_runs(params) if (run["arm"], run["seed"]) == (arm, seed))
    origin = dict.fromkeys(ORIGIN, "same") | origin
    for stage in ("pretrain", "finetune", "probe"):
        path = folder / "runs" / f"{arm}-{seed}" / stage
        path.mkdir(parents=True)
        given = {"data": wanted["stages"]["data"], stage: wanted["stages"][stage]}
        (path / "parameters.json").write_text(json.dumps(given))
        numbers = {"pretrain": dict.fromkeys(PRETRAIN, 1.0), "probe": dict.fromkeys(PROBE, 2.0)}
        own = numbers.get(stage, {"top1": top1, "top1_best": top1, "labelled_images": 1000})
        (path / "metrics.json").write_text(json.dumps(own | origin))


def load(folder, params):
    runs, left_out = load_runs(folder, wanted_runs(params))
    return ([] if runs.empty else list(zip(runs["arm"], runs["seed"], runs["top1"], strict=True))), left_out


def test_runs_of_several_machines_come_together(tmp_path, params):
    assert load(tmp_path, params) == ([], [])
    finish(tmp_path, params, "default", 0, 50.0)
    finish(tmp_path, params, "scratch", 1, 40.0)
    runs, _ = load_runs(tmp_path, wanted_runs(params))
    assert list(zip(runs["arm"], runs["seed"], strict=True)) == [("default", 0), ("scratch", 1)]
    assert runs["changes"].tolist() == ["", "epochs = 0"] and set(runs["probe_linear"]) == {2.0}
    runs.to_csv(tmp_path / "runs.csv", index=False)

    # elsewhere, with runs.csv alone, others are added; the ones of the file stay
    shutil.rmtree(tmp_path / "runs")
    finish(tmp_path, params, "reconstruct_all", 0, 51.0)
    assert load(tmp_path, params)[0] == [("default", 0, 50.0), ("reconstruct_all", 0, 51.0), ("scratch", 1, 40.0)]

    # a table from before settings were recorded holds nothing that can be taken
    runs.drop(columns="settings").to_csv(tmp_path / "runs.csv", index=False)
    assert load(tmp_path, params)[0] == [("reconstruct_all", 0, 51.0)]


@pytest.mark.parametrize(
    ("section", "name", "value", "why"),
    [
        (
            "finetune",
            "epochs",
            31,
            "its finetune was given other finetune parameters than params.yaml gives now (",
        ),
        (
            "data",
            "size",
            64,
            "its pretrain was given other data parameters than params.yaml gives now (",
        ),
    ],
)
def test_a_run_that_was_given_other_values_is_named_and_not_replaced(tmp_path, params, section, name, value, why):
    finish(tmp_path, params, "default", 0, 50.0)
    recorded, _ = load_runs(tmp_path, wanted_runs(params))
    params[section][name] = value
    now, _ = load_runs(tmp_path, wanted_runs(params))
    assert now.empty
    # an older row that was given just these values must not stand in for the run that lies there
    other = tmp_path / "other"
    finish(other, params, "default", 0, 60.0)
    load_runs(other, wanted_runs(params))[0].to_csv(tmp_path / "runs.csv", index=False)
    found, left_out = load(tmp_path, params)
    assert found == [] and len(left_out) == 1 and why in left_out[0], left_out
    assert re.search(rf"{name} = \d+, not {value}\)", left_out[0])
    assert left_out[0].startswith(f"{tmp_path}/runs/default-0 is left out: ")
    assert recorded["top1"].tolist() == [50.0]


def test_a_row_of_runs_csv_with_other_data_is_not_taken(tmp_path, params):
    finish(tmp_path, params, "default", 0, 50.0)
    load_runs(tmp_path, wanted_runs(params))[0].to_csv(tmp_path / "runs.csv", index=False)
    shutil.rmtree(tmp_path / "runs")
    assert load(tmp_path, params)[0]
    params["data"]["holdout_per_class"] = 10
    assert load(tmp_path, params)[0] == []


def test_stages_that_saw_different_images(tmp_path, params):
    finish(tmp_path, params, "default", 0, 50.0)
    path = tmp_path / "runs/default-0/probe/metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"data_digest": "another"}))
    found, left_out = load(tmp_path, params)
    assert found == [] and "its stages saw different images" in left_out[0]


def test_stages_of_two_commits_name_both(tmp_path, params):
    finish(tmp_path, params, "default", 0, 50.0, commit="one")
    path = tmp_path / "runs/default-0/probe/metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"commit": "two"}))
    runs, _ = load_runs(tmp_path, wanted_runs(params))
    assert runs["commit"].tolist() == ["one + two"]


def test_an_unfinished_run_does_not_count(tmp_path, params):
    finish(tmp_path, params, "default", 0, 50.0)
    (tmp_path / "runs/default-0/probe/metrics.json").unlink()
    assert load(tmp_path, params) == ([], [])
