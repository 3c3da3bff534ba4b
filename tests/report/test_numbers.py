"""Differences in prose follow from the tables."""

import re

import pandas as pd
import pytest
from scipy import stats
from tables_data import ARMS, runs

from simmimlib.report.numbers import renumbered
from simmimlib.report.statistics import compare, residual


@pytest.fixture
def project(tmp_path):
    values = {"default": [50.0, 54.0, 52.0], "l2": [51.0, 54.5, 52.8], "scratch": [44.0, 45.0, 46.6]}
    frame = runs(**values).assign(probe_linear=lambda own: own["top1"] / 2)
    folder = tmp_path / "results/cifar10-cpu"
    folder.mkdir(parents=True)
    frame.to_csv(folder / "runs.csv", index=False)
    compare(frame, ARMS, "probe_linear", "paper_linear").to_csv(folder / "probes.csv", index=False)
    return tmp_path, {"cifar10-cpu": compare(frame, ARMS).to_dict("records")}


def interval_of(rows, arm, sign=1):
    (row,) = (row for row in rows if row["arm"] == arm)
    found = [sign * row[f"difference{end}"] for end in ("", "_low", "_high")]
    return found if sign > 0 else [found[0], found[2], found[1]]


def test_each_way_of_writing_is_kept(project):
    root, tables = project
    middle, low, high = interval_of(tables["cifar10-cpu"], "scratch", -1)
    linear = interval_of(pd.read_csv(root / "results/cifar10-cpu/probes.csv").to_dict("records"), "l2")
    text = """Up by 1.0 (0.5 to 1.5)<!--n: default - scratch-->, as 9.9 points
    (1.1 to 2.2)<!--n: default - scratch--> or (+0.0, -1.0
    to +1.0<!--n: scratch - default-->), or +1.2<!--n: l2 - default; probe_linear--> alone; 3.3 (2.2 to 4.4) stays."""
    assert renumbered(text, root, tables) == (
        f"Up by {middle:.1f} ({low:.1f} to {high:.1f})<!--n: default - scratch-->, as {middle:.1f} points\n"
        f"    ({low:.1f} to {high:.1f})<!--n: default - scratch--> or ({-middle:+.1f}, {-high:+.1f}\n"
        f"    to {-low:+.1f}<!--n: scratch - default-->), or {linear[0]:+.1f}<!--n: l2 - default; probe_linear--> "
        "alone; 3.3 (2.2 to 4.4) stays."
    )
    again = renumbered(text, root, tables)
    assert renumbered(again, root, tables) == again


def test_any_two_arms_at_95_percent_by_themselves(project):
    root, tables = project
    said = renumbered("+0.0 (+0.0 to +0.0)<!--n: l2 - scratch; each-->", root, tables)
    assert said.startswith("+7.6 (") and said.endswith(")<!--n: l2 - scratch; each-->")
    # a question of one arm has the same level
    one = "+0.0 (+0.0 to +0.0)<!--n: l2 - default{}-->"
    each, joint = (renumbered(one.format(kind), root, tables).partition("<")[0] for kind in ("; each", ""))
    assert each == joint


def test_the_error_of_the_arms_own_start(project):
    """Of arms that share it, jointly and by themselves; of a pair that does not, the paired t-test."""
    root, _ = project
    values = {"default": [50.0, 54.0, 52.0], "l2": [51.0, 54.5, 52.8], "smooth_l1": [52.0, 53.5, 54.8]}
    frame = runs(**values, scratch=[44.0, 45.0, 46.6]).assign(probe_linear=lambda own: own["top1"] ** 2 / 100)
    starts = dict.fromkeys(values, "one") | {"scratch": "other"}
    tables = {"cifar10-cpu": compare(frame, ARMS, starts=starts).to_dict("records")}
    frame.to_csv(root / "results/cifar10-cpu/runs.csv", index=False)
    probes = compare(frame, ARMS, "probe_linear", "paper_linear", starts=starts)
    probes.to_csv(root / "results/cifar10-cpu/probes.csv", index=False)

    def said(what):
        return renumbered(f"+0.0 (+0.0 to +0.0)<!--n: {what}-->", root, tables).partition("<")[0]

    def expected(metric, arm, level, same, sign=1):
        wide = frame.pivot(index="seed", columns="arm", values=metric)
        sd, df = residual(wide[same])
        middle, half = (
            sign * (wide[arm] - wide["default"]).mean(),
            stats.t.ppf((1 + level) / 2, df) * sd * (2 / 3) ** 0.5,
        )
        return f"{middle:+.1f} ({middle - half:+.1f} to {middle + half:+.1f})"

    for metric, option in (("top1", ""), ("probe_linear", "; probe_linear")):
        assert said(f"l2 - default{option}; own") == expected(metric, "l2", 0.975, list(values))
        assert said(f"l2 - default{option}; each; own") == expected(metric, "l2", 0.95, list(values))
        assert said(f"default - l2{option}; own") == expected(metric, "l2", 0.975, list(values), -1)
        assert said(f"scratch - default{option}; own") == expected(metric, "scratch", 0.95, ["scratch", "default"])
    assert said("l2 - default; own") != said("l2 - default; each; own") != said("l2 - default; each")
    for arms, of in (("l2 - typo", tables), ("l2 - default", project[1])):
        with pytest.raises(ValueError, match=f"{arms}; own: the tables of cifar10-cpu do not tell where these start"):
            renumbered(f"+1.0<!--n: {arms}; own-->", root, of)


def test_what_the_tables_do_not_say_is_refused(project):
    root, tables = project
    with pytest.raises(ValueError, match="l2 - scratch: the tables of cifar10-cpu do not compare these"):
        renumbered("+1.0 (+0.0 to +2.0)<!--n: l2 - scratch-->", root, tables)
    for text, said in (
        ("1.0 points<!--n: l2 - default-->", "l2 - default: there is no number, or number"),
        ("1.0 (95 %: 0.1 to 2.0)<!--n: l2 - default-->", "l2 - default: there is no number, or number"),
        ("1.0 <!-- n: l2 - default -->", "l2 - default: there is no number, or number"),
        ("1.0<!--n: l2 - default; twice-->", "l2 - default; twice: what follows the arms is unknown"),
        ("1.0<!--n: l2 - default; quick-->", "l2 - default; quick: what follows the arms is unknown"),
        ("1.0<!--n: l2 - mae; each-->", "l2 - mae; each is now nan nan nan: too few runs"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            renumbered(text, root, tables)
    # +0.8 (-1.3 to +2.8): no longer beyond zero
    with pytest.raises(ValueError, match=r"l2 - default is now 0\.8 -.* without a sign, as beyond zero"):
        renumbered("a gain of 1.0 (0.2 to 1.8)<!--n: l2 - default-->", root, tables)
