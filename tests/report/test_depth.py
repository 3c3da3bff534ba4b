import numpy as np
import pandas as pd
import pytest
from tables_data import runs

from conftest import ROOT
from simmimlib.pipeline.arms import load_arms
from simmimlib.report.depth import by_depth, depth_of, trend, trend_line


def test_depths_of_heads_and_decoders():
    assert depth_of({"positions": "sincos"}) == depth_of({"head": "mlp"}) == 0
    assert depth_of({"head": "blocks_8"}) == 8
    assert depth_of({"method": "mae"}) == 1 and depth_of({"method": "mae", "decoder_depth": 4}) == 4


def test_the_trend_is_a_slope_for_each_doubling_and_leaves_the_linear_head_out():
    """Seeds rise by 1, 2 and 3 points with each doubling: 2 +- 4.303 / sqrt(3)."""
    values = pd.DataFrame({0: [99, -99, 0], 1: [50, 60, 70], 2: [51, 62, 73], 8: [53, 66, 79]})
    assert trend(values) == pytest.approx((2, 2 - 2.4841, 2 + 2.4841), abs=1e-3)
    assert np.isnan(trend(values[[0, 1]])[0])


def test_a_question_is_told_over_the_seeds_that_all_its_arms_have(monkeypatch):
    monkeypatch.chdir(ROOT)
    arms = load_arms()
    frame = runs(mae=[50, 60, 70], mae_depth_2=[51, 62, 73], mae_depth_8=[53, 66])
    frame["probe_linear"], frame["probe_linear_best"] = frame["top1"] - 10, 41.0
    assert by_depth(frame, arms, "decoder_depth", "top1").to_dict() == {
        1: {0: 50, 1: 60},
        2: {0: 51, 1: 62},
        8: {0: 53, 1: 66},
    }
    line = trend_line(frame, arms, "decoder_depth")
    assert "from 1 to 8 blocks, 95 % intervals over 2 seeds: fine-tuning +1.5 (-4.9 to +7.9)" in line
    assert "best block +0.0 (+0.0 to +0.0)." in line
    assert trend_line(frame, arms, "head_depth") == "" and by_depth(frame, arms, "head_depth", "top1").empty
