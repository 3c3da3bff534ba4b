import pandas as pd
import pytest
from tables_data import ARMS, runs

from conftest import ROOT
from simmimlib.pipeline.arms import load_arms
from simmimlib.report import figures
from simmimlib.report.statistics import compare


@pytest.fixture
def arms(monkeypatch):
    monkeypatch.chdir(ROOT)
    return load_arms()


def points_of(axis):
    return sorted(tuple(line.get_xydata()[0].round(1)) for line in axis.get_lines() if line.get_marker() == "o")


@pytest.mark.slow
def test_accuracy_over_avg_dist_shows_the_mask_arms_on_the_relative_axis(arms):
    frame = runs(default=[50, 65, 80], l2=[51, 66, 81], ratio_20=[48, 63, 77])
    frame["pretrain_avg_dist"] = frame["arm"].map({"default": 2.4, "l2": 2.4, "ratio_20": 1.6})
    ours, paper = figures.accuracy_over_avg_dist(compare(frame, ARMS), 32, arms).axes
    assert points_of(ours) == [(5.0, 62.7), (7.5, 65.0)]
    assert ours.get_xlabel() == "AvgDist of the masks, % of the image's side"
    values = {tuple(xy) for line in paper.get_lines() for xy in line.get_xydata().round(1)}
    assert any(abs(x - 8.2) < 0.15 and y == 82.8 for x, y in values), "15.7 of 192 pixels: the paper's default"
    assert sum(y == 81.9 for _, y in values) == 1, "its worst, 4-pixel patches"


def test_accuracy_over_images_seen_begins_untrained():
    frame = runs(default=[50, 65, 80], scratch=[40, 50, 60])
    frame["pretrain_images_seen"] = frame["arm"].map({"default": 72000, "scratch": 0})
    frame["probe_linear"], frame["probe_knn"] = 40.0, 30.0
    (axis,) = figures.accuracy_over_images_seen(compare(frame, ARMS)).axes
    (line,) = (line for line in axis.get_lines() if len(line.get_xdata()) == 2 and line.get_linestyle() == "-")
    assert line.get_xydata().tolist() == [[0, 50], [72, 65]]


def test_accuracy_over_blocks_puts_the_output_last_and_draws_the_floor():
    def blocks(shift):
        rows = [(-1, 38, 37), (0, 40, 30), (1, 33, 24), (2, 41, 28)]
        return pd.DataFrame([(b, lin + shift, knn) for b, lin, knn in rows], columns=["block", "linear", "knn"])

    linear, knn = figures.accuracy_over_blocks({"Default": [blocks(0), blocks(2)]}).axes
    (line,) = (line for line in linear.get_lines() if line.get_marker() == "o")
    assert line.get_ydata().tolist() == [34, 42, 41]
    assert [tick.get_text() for tick in linear.get_xticklabels()] == ["1", "2", "output"]
    assert "raw pixels, 39.0" in [text.get_text() for text in linear.texts]
    assert knn.get_title() == "k-NN" and [text.get_text() for text in knn.texts] == ["raw pixels, 37.0"]


def test_arms_beside_the_paper_shows_all_values():
    """No fixed axis that could hide an arm far from the others."""
    frame = runs(default=[50, 52, 54], scratch=[5, 6, 7], l2=[95, 96, 97])
    ours, paper = figures.arms_beside_paper(compare(frame, ARMS)).axes
    for mean in (6, 52, 96):
        assert ours.get_xlim()[0] < mean < ours.get_xlim()[1]
    assert paper.get_xlim()[0] < 82.7 < paper.get_xlim()[1]


def test_differences_beside_the_papers():
    """A profile without an arm of the paper's grid has no mark, an arm without a difference there no row."""
    small = compare(runs(default=[50, 52], scratch=[5, 6]), ARMS)
    grid = compare(runs(default=[50, 52, 54], scratch=[5, 6, 7], reconstruct_all=[49, 51, 54], l2=[51]), ARMS)
    profiles = {"small": small.to_dict("records"), "grid": grid.to_dict("records")}
    figure = figures.differences_beside_paper(profiles)
    (axis,) = figure.axes
    assert [tick.get_text() for tick in axis.get_yticklabels()] == ["All", "L2"]
    (container,) = axis.containers
    assert container.get_label() == "grid" and container[0].get_xdata().round(2).tolist() == [-0.67, 1]
    low, high = container[2][0].get_segments()[0][:, 0]
    row = grid.set_index("arm").loc["reconstruct_all"]
    assert (low, high) == pytest.approx((row["difference_low"], row["difference_high"]), abs=1e-3)
    assert container[2][0].get_segments()[1][:, 0].tolist() == [1, 1]  # no interval of one seed
    paper = next(line for line in axis.get_lines() if line.get_marker() == "D")
    assert paper.get_xdata() == pytest.approx([-1.1, -0.1])


def test_curves_of_logs_that_were_not_validated_every_epoch():
    log = pd.DataFrame({"epoch": [1, 2, 3], "top1": [None, 40.0, 50.0]})
    (axis,) = figures.curves({"Default": [log]}, "top1", "top-1, %").axes
    assert axis.get_lines()[0].get_xydata().tolist() == [[2, 40], [3, 50]]


def test_one_seed_beside_means_of_several_is_told_apart():
    log = pd.DataFrame({"epoch": [1, 2], "loss": [1.0, 0.5]})
    (axis,) = figures.curves({"Default": [log, log], "L2": [log]}, "loss", "loss").axes
    assert [(line.get_label(), line.get_linestyle()) for line in axis.get_lines()] == [
        ("Default", "-"),
        ("L2 (one seed)", "--"),
    ]


def test_accuracy_over_depth_draws_heads_beside_decoders(arms):
    """Over the seeds that all arms of a panel have: the third of the reference is left out."""
    names = ["default", "simmim_xavier", "head_blocks_1", "head_blocks_8", "simmim_mae_target", "mae", "mae_depth_4"]
    values = {name: [50.0 + i, 52.0 + i] for i, name in enumerate(names)}
    values["simmim_xavier"] += [90.0]
    frame = runs(**values)
    frame["probe_linear"], frame["probe_linear_best"] = 40.0, 41.0
    head, decoder = figures.accuracy_over_depth(frame, arms, {"raw pixels": 37.0}).axes
    for axis, depths, means in ((head, ["0", "1", "8"], [52, 53, 54]), (decoder, ["1", "4"], [56, 57])):
        assert [tick.get_text() for tick in axis.get_xticklabels()] == depths
        tuned = next(line for line in axis.get_lines() if line.get_linestyle() == "-" and line.get_marker() == "o")
        assert tuned.get_ydata().tolist() == means
        assert 37.0 in [line.get_ydata()[0] for line in axis.get_lines()]
    alone = figures.accuracy_over_depth(frame[frame["arm"] != "mae_depth_4"], arms, {}).axes
    assert [len(axis.get_xticks()) for axis in alone] == [3]
