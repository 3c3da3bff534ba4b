import subprocess

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from tables_data import ARMS, runs

from conftest import ROOT
from simmimlib.report.front import findings, judged, pooled, write_findings
from simmimlib.report.numbers import renumbered
from simmimlib.report.statistics import compare


@pytest.fixture
def project(tmp_path):
    for name, values in (
        ("quick", {"default": [50, 60], "scratch": [40, 50]}),
        (
            "cifar10-cpu",
            {"default": [50, 65, 80], "l2": [51, 66, 81], "reconstruct_all": [48, 63, 77], "ratio_20": [48]},
        ),
    ):
        (tmp_path / "results" / name).mkdir(parents=True)
        compare(runs(**values), ARMS).to_csv(tmp_path / "results" / name / "ablations.csv", index=False)
    return tmp_path


def test_a_row_an_arm_and_a_column_a_profile_with_results(project):
    lines = findings(judged(project)).splitlines()
    assert lines[0] == "| question | arm | paper | `quick` | `cifar10-cpu` |"
    assert lines[2].endswith("| 82.8 | 55.0 (-8.5 to 118.5), n = 2 | 65.0 (27.7 to 102.3), n = 3 |")
    assert "| Which scope? | All | -1.1 |  | **agrees**, -2.3 (-3.1 to -1.6), n = 3 |" in lines
    assert "| Which loss? | L2 | -0.1 |  | **undecided**, +1.0 (+0.2 to +1.8), n = 3 |" in lines
    assert "| Which pretraining? | Scratch |  | -10.0 (-10.0 to -10.0), n = 2 |  |" in lines
    assert [line.split(" | ")[1] for line in lines[3:]] == ["All", "L2", "Ratio 0.2", "Scratch"]


def test_other_references_are_named_and_unfinished_arms_counted(project):
    table = compare(runs(default=[50, 60], mae=[40, 50], mae_2=[41, 52]), ARMS)
    table["planned"] = [2, 5, 3]
    table.to_csv(project / "results/quick/ablations.csv", index=False)
    lines = findings(judged(project)).splitlines()
    assert any(line.endswith("MAE |  | -10.0 (-11.8 to -8.2), n = 2 of 5 |  |") for line in lines)
    # nothing to show of cifar10-cpu: no column
    heading = lines.index("| question | differences from | arm | paper | `quick` |")
    assert lines[heading + 2].startswith("| Which depth? | MAE | MAE 2 | +0.1 | **undecided**, +1.5 (")


FIRST = {"default": [50, 65, 80], "reconstruct_all": [48, 63, 77], "l2": [51, 66, 81], "smooth_l1": [50, 65, 81]}
SECOND = {"default": [70, 60, 71], "reconstruct_all": [69, 58, 70], "l2": [70, 61], "smooth_l1": [71, 60, 70]}


def two_sets(folder, second, first_seed=5):
    """One recipe, run from seeds 0 to 2 and from three others."""
    for seed, name, values in ((0, "cifar10-cpu", FIRST), (first_seed, "cifar10-replica", second)):
        table = runs(**values)
        table["seed"] += seed
        (folder / "results" / name).mkdir(parents=True)
        table.to_csv(folder / "results" / name / "runs.csv", index=False)
        rows = compare(table, ARMS, planned=dict.fromkeys(FIRST, 3))
        rows.to_csv(folder / "results" / name / "ablations.csv", index=False)
    return folder


def test_two_sets_of_runs_are_judged_together(tmp_path):
    root = two_sets(tmp_path, SECOND)
    default, scope, smooth = pooled(root)  # no L2, which the second set has not finished
    values = np.array([FIRST[arm] + SECOND[arm] for arm in ("default", "reconstruct_all", "smooth_l1")])
    rest = values - values.mean(0) - values.mean(1, keepdims=True) + values.mean()
    error = np.sqrt((rest**2).sum() / (5 * 2) * 2 / 6)
    assert (default["arm"], default["seeds"], default["mean"]) == ("default", 6, 66)
    for row, of, arms in ((scope, 1, 1), (smooth, 2, 2)):  # the question of smooth L1 has two arms
        mean, half = (values[of] - values[0]).mean(), stats.t.ppf(1 - 0.05 / arms / 2, 10) * error
        found = [row[key] for key in ("difference", "difference_low", "difference_high")]
        assert found == pytest.approx([mean, mean - half, mean + half])
    assert (scope["pairs"], scope["verdict"]) == (6, "agrees")
    lines = findings(judged(root)).splitlines()
    assert lines[0] == "| question | arm | paper | `cifar10-cpu` | `cifar10-replica` | `both` |"
    (l2,) = [line for line in lines if "| L2 |" in line]
    assert "n = 2 of 3" in l2 and l2.endswith("|  |")


def test_sets_without_a_finished_default_or_with_a_seed_in_common_are_not_pooled(tmp_path):
    begun = two_sets(tmp_path / "begun", {"default": [70, 60], "reconstruct_all": [69, 58, 70]})
    assert list(judged(begun)) == ["cifar10-cpu", "cifar10-replica"]
    with pytest.raises(ValueError, match="cifar10-cpu and cifar10-replica share seed 2: runs of one seed"):
        pooled(two_sets(tmp_path / "same", SECOND, first_seed=2))


def test_only_what_lies_between_the_marks_is_written(project):
    (project / "README.md").write_text(
        "before\n<!-- findings: written by python -m simmimlib.report.front -->\nold\n<!-- end of findings -->\nafter\n"
    )
    (project / "docs").mkdir()
    (project / "docs/results.md").write_text("-9.9<!--n: l2 - default-->\n")
    write_findings(project)
    text = (project / "README.md").read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text and "| All |" in text
    assert (project / "docs/results.md").read_text() == "+1.0<!--n: l2 - default-->\n"
    # all or none
    (project / "docs/results.md").write_text("9.9<!--n: reconstruct_all - default-->\n")
    (project / "README.md").write_text(text.replace("| All |", "| Some |"))
    with pytest.raises(ValueError, match="without a sign"):
        write_findings(project)
    assert "| Some |" in (project / "README.md").read_text()
    assert (project / "results/findings.png").stat().st_size > 10_000


def test_the_readme_shows_the_findings_of_the_results():
    if subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "results"], cwd=ROOT).returncode:
        pytest.skip("the results here were made again, or there is no git")
    rows, again = judged(ROOT), "python -m simmimlib.report.front writes them again"
    assert findings(rows) in (ROOT / "README.md").read_text(), again
    for document in (ROOT / "README.md", *ROOT.glob("docs/*.md")):
        assert renumbered(document.read_text(), ROOT, rows) == document.read_text(), again
    assert pd.read_csv(ROOT / "results/quick/ablations.csv")["difference"].notna().any()
