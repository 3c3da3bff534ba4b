"""What git keeps of finished runs for figures."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from simmimlib.report.figures import save
from simmimlib.report.records import drop_others, is_here, load_curves, picture_of, read_images, runs_in, write_images


def finish(folder, arm, seed, loss, stages=("pretrain", "finetune", "probe")):
    """The logs of a run; with all stages, of a finished one."""
    logs = {
        "pretrain": ("log.csv", {"epoch": [1, 2], "loss": [loss, loss / 3], "lr": [0.1, 0.1]}),
        "finetune": ("log.csv", {"epoch": [1, 2], "top1": [None, 50.0]}),
        "probe": ("blocks.csv", {"block": [-1, 0], "knn": [20.0, 30.0], "linear": [25.0, 35.0]}),
    }
    for stage in stages:
        own = folder / "runs" / f"{arm}-{seed}" / stage
        own.mkdir(parents=True)
        name, columns = logs[stage]
        pd.DataFrame(columns).to_csv(own / name, index=False)
        (own / "metrics.json").write_text("{}")


def runs_of(*keys):
    return pd.DataFrame(keys, columns=["arm", "seed", "settings"]).assign(top1=50.0)


def losses(curves):
    log = curves[curves["stage"] == "pretrain"]
    return list(zip(log["arm"], log["seed"], log["epoch"], log["loss"], strict=True))


def test_curves_of_runs_here_and_elsewhere(tmp_path):
    runs = runs_of(("default", 0, "1234567890"), ("l2", 0, "12e4567890"), ("l2", 1, "ff"))
    finish(tmp_path, "default", 0, 1.0)
    curves = load_curves(tmp_path, runs)
    assert losses(curves) == [("default", 0, 1, 1.0), ("default", 0, 2, 0.33333)]
    assert list(curves) == ["arm", "seed", "settings", "stage", "epoch", "loss", "top1", "block", "linear", "knn"]
    assert curves["stage"].tolist() == ["pretrain"] * 2 + ["finetune"] + ["probe"] * 2
    curves.to_csv(tmp_path / "curves.csv", index=False)

    finish(tmp_path, "l2", 0, 0.5)
    finish(tmp_path, "l2", 1, 9.0, stages=("pretrain",))  # under way
    (tmp_path / "runs/default-0").rename(tmp_path / "runs/elsewhere")
    assert is_here(tmp_path, "l2", 0) and not is_here(tmp_path, "l2", 1) and not is_here(tmp_path, "default", 0)
    curves = load_curves(tmp_path, runs)
    assert losses(curves)[:2] == [("default", 0, 1, 1.0), ("default", 0, 2, 0.33333)]
    assert losses(curves)[2:] == [("l2", 0, 1, 0.5), ("l2", 0, 2, 0.16667)]

    # trained again here: its own files count, not what was recorded
    curves.to_csv(tmp_path / "curves.csv", index=False)
    finish(tmp_path, "default", 0, 3.0)
    assert losses(load_curves(tmp_path, runs))[:2] == [("default", 0, 1, 3.0), ("default", 0, 2, 1.0)]


def test_curves_of_other_settings_do_not_count(tmp_path):
    finish(tmp_path, "default", 0, 1.0)
    load_curves(tmp_path, runs_of(("default", 0, "aa"))).to_csv(tmp_path / "curves.csv", index=False)
    (tmp_path / "runs/default-0").rename(tmp_path / "runs/elsewhere")
    assert len(load_curves(tmp_path, runs_of(("default", 0, "aa")))) == 5
    none = load_curves(tmp_path, runs_of(("default", 0, "bb")))
    assert len(none) == 0 and list(none)[:4] == ["arm", "seed", "settings", "stage"]
    assert len(load_curves(tmp_path, pd.DataFrame())) == 0


@pytest.mark.parametrize(("channels", "kept"), [(1, 1), (2, 1), (3, 3), (5, 3)])
def test_images_return_as_they_were(tmp_path, channels, kept):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 6, channels)) / 255
    path = picture_of(tmp_path, "l2", 1, "abc")
    write_images(path, pixels)
    assert path == tmp_path / "predictions/l2-1-abc.png"
    np.testing.assert_allclose(read_images(path), pixels[..., :kept], atol=1e-9)
    write_images(path, 2 * pixels - 0.5)  # predictions leave the range
    np.testing.assert_allclose(read_images(path), (2 * pixels - 0.5)[..., :kept].clip(0, 1), atol=0.5001 / 255)


def test_pictures_of_other_settings_are_dropped(tmp_path):
    drop_others(tmp_path, runs_of(("default", 0, "aa")))
    assert (tmp_path / "predictions").is_dir(), "the pipeline expects it"
    for settings in ("aa", "bb"):
        write_images(picture_of(tmp_path, "default", 0, settings), np.zeros((1, 2, 2, 3)))
    drop_others(tmp_path, runs_of(("default", 0, "aa"), ("l2", 0, "cc")))
    assert [path.name for path in (tmp_path / "predictions").iterdir()] == ["default-0-aa.png"]


def test_a_figure_names_the_runs_that_it_shows(tmp_path):
    path = tmp_path / "figures/loss-loss.png"
    assert runs_in(path) == set()
    figure, _ = plt.subplots()
    save(figure, path, {"l2-0", "default-0"})
    assert runs_in(path) == {"default-0", "l2-0"}
    save(figure, path)  # a figure of means
    assert runs_in(path) == set()
    plt.close(figure)
