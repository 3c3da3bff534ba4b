import numpy as np
import pandas as pd
import pytest
from scipy import stats
from tables_data import ARMS, runs

from simmimlib.report.statistics import by_start, compare, interval, residual, verdict


def test_interval_is_students():
    """Mean 2, standard deviation 1, three values: 2 +- 4.303 / sqrt(3)."""
    assert interval([1, 2, 3]) == pytest.approx((2, 2 - 2.4841, 2 + 2.4841), abs=1e-3)
    assert np.isnan(interval([5])[1])


def test_differences_are_paired_by_seed():
    """Seeds differ by 30 points, arms by exactly 2: the paired interval does not see the seeds."""
    table = compare(runs(default=[50, 65, 80], scratch=[40, 55, 70], reconstruct_all=[48, 63, 78]), ARMS)
    table = table.set_index("arm")
    row = table.loc["reconstruct_all"]
    found = [row["difference"], row["difference_low"], row["difference_high"]]
    assert found == pytest.approx([-2, -2, -2])
    assert row["paper_difference"] == pytest.approx(-1.1) and row["verdict"] == "agrees"
    assert table.loc["default", "high"] - table.loc["default", "low"] > 50
    assert table.loc["scratch", "verdict"] == "not in the paper"
    assert "l2" not in table.index


def test_verdicts_of_a_question_hold_jointly():
    """Two arms: each difference at 97.5 %; alone at 95 %. One error for both, with six degrees of freedom."""
    frame = runs(default=[50, 60, 70], l2=[50, 61, 72], smooth_l1=[50, 61, 72], reconstruct_all=[50, 61, 72])
    table = compare(frame, ARMS).set_index("arm")
    half = table["difference_high"] - table["difference"]
    # squares left after seeds and arms: 1.5, so that a run has the variance 1 / 4
    assert half["l2"] == half["smooth_l1"] == pytest.approx(2.9687 * np.sqrt(2 / 4 / 3), abs=1e-3)
    assert half["reconstruct_all"] == pytest.approx(2.4469 * np.sqrt(2 / 4 / 3), abs=1e-3)
    assert table.loc["l2", "level"] == pytest.approx(0.975) and table.loc["l2", "df"] == 6


def test_arms_that_are_not_finished_count_in_the_level():
    frame = runs(default=[50, 60, 70], l2=[50, 61, 72])
    planned = {"default": 3, "l2": 3, "smooth_l1": 3, "reconstruct_all": 3}
    row = compare(frame, ARMS, planned=planned).set_index("arm").loc["l2"]
    assert row["level"] == pytest.approx(0.975) and row["planned"] == 3
    assert compare(frame, ARMS).set_index("arm").loc["l2", "level"] == pytest.approx(0.95)


def test_with_a_single_arm_it_is_the_paired_t_test():
    """Seeds that only one of the two has change nothing."""
    values = {"default": [50, 60, 71, 65], "scratch": [41, 55, 60]}
    row = compare(runs(**values), ARMS).set_index("arm").loc["scratch"]
    expected = stats.ttest_rel(values["scratch"], values["default"][:3]).confidence_interval()
    assert (row["difference_low"], row["difference_high"]) == pytest.approx(tuple(expected), abs=1e-4) and row[
        "df"
    ] == 2


def test_residual_of_a_two_way_layout_with_a_run_missing():
    """By hand: of seeds 0 and 1 the four values are an effect of the seed, one of the arm, and +-0.5 each."""
    values = pd.DataFrame({"a": [1.0, 4.0, 9.0], "b": [3.0, 8.0, np.nan]})
    assert residual(values) == (pytest.approx(1.0), 1)
    assert residual(values.iloc[:1])[1] == 0 and np.isnan(residual(values.iloc[:1])[0])


STARTS = {"default": "one", "l2": "one", "mae": "other", "mae_2": "other", "scratch": "one"}


def test_an_error_of_each_starts_own():
    """Arms of one start take the error of that start's runs, across starts it is the paired t-test."""
    frame = runs(default=[50, 60, 71], l2=[51, 63, 70], mae=[70, 60, 58], mae_2=[75, 52, 60], scratch=[40, 55, 59])
    table = compare(frame, ARMS, starts=STARTS).set_index("arm")
    values = frame.pivot(index="seed", columns="arm", values="top1")
    assert table.loc["default", "start"] == "one" and np.isnan(table.loc["default", "own_residual_sd"])
    for arm, same in (("l2", ["default", "l2", "scratch"]), ("mae_2", ["mae", "mae_2"])):
        sd, df = residual(values[same])
        row = table.loc[arm]
        half = stats.t.ppf((1 + row["level"]) / 2, df) * sd * np.sqrt(2 / 3)
        assert (row["own_residual_sd"], row["own_df"]) == (pytest.approx(sd, abs=1e-4), df)
        expected = row["difference"] - half, row["difference"] + half
        assert (row["own_difference_low"], row["own_difference_high"]) == pytest.approx(expected, abs=1e-3)
    across = stats.ttest_rel(values["mae"], values["default"]).confidence_interval()
    row = table.loc["mae"]
    assert (row["own_difference_low"], row["own_difference_high"]) == pytest.approx(tuple(across), abs=1e-3)
    spreads = by_start(frame, STARTS, "top1").set_index("start")
    assert spreads.loc["one", "runs"] == 9 and spreads.loc["other", "arms"] == 2
    assert spreads.loc["one", "sd"] == pytest.approx(residual(values[["default", "l2", "scratch"]])[0])


def test_joint_intervals_cover_the_truth():
    """Five arms that equal the default, three seeds, 200 draws: all five intervals hold zero in 95 % of them."""
    generator = np.random.default_rng(0)
    names = ["default", "l2", "smooth_l1", "a", "b", "c"]
    arms = ARMS | dict.fromkeys("abc", ARMS["l2"])
    held = []
    for _ in range(200):
        noise = generator.normal(size=(6, 3)) + 5 * generator.normal(size=3)
        table = compare(runs(**dict(zip(names, noise, strict=True))), arms).set_index("arm").loc[names[1:]]
        held.append(((table["difference_low"] < 0) & (table["difference_high"] > 0)).all())
    assert 0.93 <= np.mean(held) <= 0.99


def test_a_question_may_have_a_reference_of_its_own():
    """Its first arm, which is then compared with nothing; or an arm of another question, with the paper's values."""
    frame = runs(default=[50, 60], mae=[40, 50], mae_2=[41, 52], mae_8=[43, 53], own_scratch=[10, 20], own=[15, 25])
    table = compare(frame, ARMS).set_index("arm")
    assert table.loc["mae", "difference"] == pytest.approx(-10) and table.loc["mae_2", "difference"] == pytest.approx(
        1.5
    )
    assert table.loc["mae_2", "paper_difference"] == pytest.approx(0.1) and table.loc["mae_2", "level"] == 0.975
    assert table.loc["own", "difference"] == pytest.approx(5) and table.loc["own", "level"] == pytest.approx(0.95)
    assert np.isnan(table.loc["own_scratch", "difference"]) and np.isnan(table.loc["own", "paper_difference"])
    frame["probe_linear"] = frame["top1"] / 2
    probes = compare(frame, ARMS, "probe_linear", "paper_linear").set_index("arm")
    assert probes.loc["mae_8", "paper_difference"] == pytest.approx(8.0) and probes.loc["mae_8", "verdict"] == "agrees"
    alone = compare(frame[frame["arm"] != "mae"], ARMS).set_index("arm")
    assert alone.loc["mae_2", "pairs"] == 0 and alone.loc["mae_2", "verdict"] == "undecided at this scale"


def test_an_arm_may_be_compared_in_several_questions():
    """Its other rows are marked, have that question's reference, and count among its arms."""
    gain = {"question": "gain", "place": 6, "heading": "Which gain?", "probes": True}
    gain["reference"] = {"arm": "scratch", "paper": None, "paper_linear": None}
    arms = ARMS | {arm: ARMS[arm] | {"also": [gain]} for arm in ("default", "mae")}
    table = compare(runs(default=[50, 60], scratch=[40, 52], mae=[45, 54], mae_2=[46, 56]), arms)
    again = table[table["repeated"]].set_index("arm")
    assert again.index.tolist() == ["default", "mae"] and set(again["question"]) == {"gain"}
    assert again["difference"].tolist() == [9, 3.5] and set(again["level"]) == {0.975}
    assert again["paper_difference"].isna().all()
    assert table["question"].tolist() == ["default", "pretraining", "method", "gain", "gain", "depth"]
    assert table.loc[~table["repeated"], "arm"].tolist() == ["default", "scratch", "mae", "mae_2"]


def test_a_missing_seed_is_left_out_of_the_pairs():
    frame = runs(default=[50, 60, 70], l2=[51, 61, 71])
    frame = frame[~((frame["arm"] == "l2") & (frame["seed"] == 2))]
    row = compare(frame, ARMS).set_index("arm").loc["l2"]
    assert row["seeds"] == row["pairs"] == 2 and row["difference"] == pytest.approx(1)


@pytest.mark.parametrize("name", ["device", "precision", "versions", "code", "data_digest"])
def test_pairs_that_differ_in_origin_are_counted(name):
    frame = runs(default=[50, 60, 70], l2=[51, 61, 71])
    assert compare(frame, ARMS).set_index("arm").loc["l2", "mixed"] == 0
    frame.loc[(frame["arm"] == "l2") & (frame["seed"] == 1), name] = "another"
    assert compare(frame, ARMS).set_index("arm").loc["l2", "mixed"] == 1


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
        (0.1, 2.0, 0.6, "agrees"),
        (-2.0, -0.1, 0.6, "disagrees"),
        (np.nan, np.nan, -0.1, "undecided at this scale"),
        (1.0, 2.0, np.nan, "not in the paper"),
    ],
)
def test_verdict(low, high, paper, expected):
    assert verdict(low, high, paper) == expected


def test_another_metric_is_compared_the_same_way():
    frame = runs(default=[50, 60, 70], l2=[51, 61, 71]).assign(probe_linear=[10, 20, 30, 13, 23, 33])
    table = compare(frame, ARMS, "probe_linear").set_index("arm")
    assert table.loc["l2", "difference"] == pytest.approx(3) and table.loc["default", "mean"] == 20
    frame.loc[0, "probe_linear"] = np.nan
    assert compare(frame, ARMS, "probe_linear").set_index("arm").loc["l2", "pairs"] == 2


def test_no_default():
    with pytest.raises(ValueError, match="no finished run of the default arm"):
        compare(runs(l2=[51, 66]), ARMS)
    with pytest.raises(ValueError, match="no finished run of the default arm"):
        compare(pd.DataFrame(), ARMS)
