import pandas as pd
import pytest
from tables_data import ARMS, runs

from simmimlib.report.statistics import compare
from simmimlib.report.tables import to_markdown, write_tables


@pytest.fixture
def frame():
    return runs(default=[50, 65, 80], l2=[51, 66, 81], reconstruct_all=[48, 63, 77])


def markdown_of(frame, left_out=(), pictures=None):
    return to_markdown(compare(frame, ARMS), "quick", frame, list(left_out), pictures or {})


def test_a_row_of_the_table(frame):
    markdown = markdown_of(frame)
    assert (
        "| L2 | 3 | 66.0 (28.7 to 103.3) | 67.0 | – | – | +1.0 (+0.2 to +1.8) | 82.7 | -0.1 | undecided at this scale |"
        in markdown
    )
    assert "## Which loss?" in markdown and markdown.count("| Default | 3 |") == 2, "one table a question"


def test_every_combination_of_machine_and_commit_is_named(frame):
    assert "- 9 runs: digits, a CPU, float32, torch 2, commit abc, code def" in markdown_of(frame)
    frame.loc[frame["arm"] == "l2", ["device", "commit"]] = ["a GPU", "xyz"]
    markdown = markdown_of(frame)
    assert "- 6 runs: digits, a CPU, float32, torch 2, commit abc, code def" in markdown
    assert "- 3 runs: digits, a GPU, float32, torch 2, commit xyz, code def" in markdown
    assert "+1.0 (+0.2 to +1.8) †" in markdown and "† the runs of some pairs differ in device" in markdown
    assert "-2.3 (-3.1 to -1.6) |" in markdown, "the pairs of the other arm are of one machine"


def test_what_is_left_out_is_named(frame):
    assert "Not in the tables:\n\n- results/x/runs/l2-3 is left out: why" in markdown_of(
        frame, ["results/x/runs/l2-3 is left out: why"]
    )


def test_floors_and_probes(frame):
    frame["probe_linear"], frame["probe_knn"] = 41.25, 30.0
    frame.loc[0, ["probe_linear_pixels", "probe_knn_pixels"]] = [38.4, 37.0]
    markdown = markdown_of(frame)
    assert "Raw pixels: linear probe 38.4, k-NN 37.0." in markdown
    assert "| 67.0 | 41.2 | 30.0 |" in markdown


def test_pictures_stand_with_their_question(frame):
    markdown = markdown_of(frame, pictures={"": ["figures/arms.png"], "loss": ["figures/loss-top1.png"]})
    assert markdown.index("![arms](figures/arms.png)") < markdown.index("## Which loss?")
    assert markdown.index("| L2 |") < markdown.index("![loss top1](figures/loss-top1.png)")


def test_a_reference_of_its_own_is_the_first_row_and_probes_have_a_table():
    frame = runs(default=[50, 60], mae=[40, 50], mae_2=[41, 52], own_scratch=[10, 20], own=[15, 25])
    frame["probe_linear"], frame["probe_linear_best"], frame["pretrain_images_per_second"] = 41.25, 43.0, 200.0
    probes = compare(frame, ARMS, "probe_linear", "paper_linear")
    probes["operations"], probes["ms"] = 21.5, 1000 / probes["fastest"]
    markdown = to_markdown(compare(frame, ARMS), "quick", frame, [], {}, probes)
    sections = dict(part.split("\n", 1) for part in markdown.split("## ")[1:])
    assert sections["Which conv?"].index("| Own scratch | 2 |") < sections["Which conv?"].index("| Own | 2 |")
    assert "difference to the first row" in sections["Which conv?"] and "| Own scratch |" in sections["Which conv?"]
    assert sections["Which conv?"].count("Own scratch") == 1 and "forward" not in sections["Which conv?"]
    assert "| MAE 2 | 2 | 41.2 (41.2 to 41.2) | 43.0 | 21.5 | 5.0 |" in sections["Which depth?"]
    assert "| MAE | 2 | 45.0 (-18.5 to 108.5) | 46.0 | 41.2 | – | – | 84.8 | – | – |" in sections["Which depth?"]
    assert "| 70.0 | +4.5 |" in sections["Which depth?"] and "| 84.9 | +0.1 |" in sections["Which depth?"]


SEPARATE = "## Would a separate error for each start change the conclusions?"
STARTS = {"default": "one", "l2": "one", "mae": "other", "mae_2": "other"}


def separate(frame, probes=False):
    """The part of a page about the error of each start, "" if it has none."""
    starts = {arm: STARTS[arm] for arm in set(frame["arm"])}
    linear = compare(frame, ARMS, "probe_linear", "paper_linear", starts=starts) if probes else None
    page = to_markdown(compare(frame, ARMS, starts=starts), "quick", frame, [], {}, linear)
    return page.partition(SEPARATE)[2]


def test_a_separate_error_for_each_start_may_change_a_verdict():
    """The other start's runs vary by tens of points: with one error nothing is decided, with its own L2 is."""
    part = separate(runs(default=[50, 65, 80], l2=[52, 67, 82.1], mae=[40, 90, 20], mae_2=[90, 40, 60]))
    assert "| one | 2 | 6 | 0.04 (2) |" in part and "| other | 2 | 6 | 38.94 (2) |" in part
    (row,) = [line for line in part.splitlines() if line.startswith("| top-1 ")]
    assert row.startswith("| top-1 | L2 | Default | +2.0 (-")
    assert row.endswith(", undecided | +2.0 (+1.9 to +2.2), disagrees | 2 |")


def test_arms_of_different_starts_and_the_linear_probe():
    """By their own pairs, 7, 1 and 7 points, MAE's gain is not told from zero, its linear probe's steps of 2 are."""
    frame = runs(default=[50, 65, 80], l2=[50.1, 65, 80], mae=[57, 66, 87], mae_2=[57, 66.1, 87])
    frame["probe_linear"] = 20.0 + 2 * frame["arm"].str.len() + 0.1 * frame["seed"]
    part = separate(frame, probes=True)
    (row,) = [line for line in part.splitlines() if "| MAE | Default |" in line]
    assert row.startswith("| top-1 | MAE | Default | +5.0 (+") and row.endswith("| +5.0 (-3.6 to +13.6) | 2 |")
    assert "| start | arms | runs | top-1 | linear probe |" in part and "| linear probe | MAE" not in part


def test_of_a_separate_error_there_may_be_nothing_to_tell():
    alike = runs(default=[50, 65, 80], l2=[51, 66, 81.1], mae=[60, 75, 90.1], mae_2=[61, 76, 91])
    assert "every verdict is the same, and the same intervals exclude zero." in separate(alike)
    # without the arm that it is compared with, of one seed, or of one start
    assert not separate(runs(default=[50, 65], mae_2=[61, 76])) and not separate(runs(default=[50], l2=[51], mae=[60]))
    assert not separate(runs(default=[50, 65, 80], l2=[51, 66, 81.1]))


def test_of_the_default_alone_there_is_nothing_to_tell_apart(frame):
    alone = markdown_of(frame[frame["arm"] == "default"])
    assert "Standard deviation" not in alone and "of differences: top-1 0." in markdown_of(frame)


def test_files(tmp_path, frame):
    table = compare(frame, ARMS)
    curves = pd.DataFrame({"arm": ["default"], "epoch": [1]})
    write_tables(tmp_path, frame, curves, table, table, markdown_of(frame))
    again = compare(pd.read_csv(tmp_path / "runs.csv"), ARMS)
    pd.testing.assert_frame_equal(again, table)  # runs.csv recomputes every verdict
    files = ["ablations.csv", "ablations.md", "curves.csv", "probes.csv", "runs.csv", "summary.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == files
