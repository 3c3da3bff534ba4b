"""What a run writes and shows."""

import json

import pandas as pd
import pytest
import torch

from simmimlib.train.finetune import finetune
from simmimlib.train.pretrain import pretrain
from small_runs import finetune_settings, pretrain_settings, watch_steps


def test_results_that_cannot_be_written(packed_folder):
    with pytest.raises(OSError, match=r"out = '/proc/run': must be a folder that can be written to"):
        pretrain(pretrain_settings(packed_folder, "/proc/run"))


def test_a_batch_larger_than_the_set(tmp_path, packed_folder):
    with pytest.raises(ValueError, match="batch_size = 17: must be at most 16, the images to train on"):
        pretrain(pretrain_settings(packed_folder, tmp_path / "run", batch_size=17))


def test_deterministic(tmp_path, packed_folder):
    seen = []
    settings = pretrain_settings(packed_folder, tmp_path / "run", deterministic=True, epochs=1)
    pretrain(settings, on_epoch=lambda rows: seen.append(torch.are_deterministic_algorithms_enabled()))
    assert seen == [True] and not torch.are_deterministic_algorithms_enabled()


def test_runs_under_way_are_seen_line_by_line(tmp_path, packed_folder, capfd):
    pretrain(pretrain_settings(packed_folder, tmp_path / "run", epochs=2))
    lines = capfd.readouterr().out.strip().splitlines()
    assert len(lines) == 2 and lines[1].startswith("pretrain epoch 2/2: loss ")
    assert "img/s" in lines[1] and lines[1].endswith("0 s left")


def test_the_log_grows_with_each_epoch(tmp_path, packed_folder):
    lengths, files = [], []

    def look(rows):
        lengths.append((len(rows), len(pd.read_csv(tmp_path / "run/log.csv"))))
        files.append(sorted(path.name for path in (tmp_path / "run").iterdir()))

    finetune(finetune_settings(packed_folder, tmp_path / "run", epochs=3), look)
    assert lengths == [(1, 1), (2, 2), (3, 3)]
    assert files == [["log.csv"]] * 3, "results are written when there is one"
    log = pd.read_csv(tmp_path / "run/log.csv")
    assert list(log) == ["epoch", "loss", "grad_norm", "lr", "skipped", "top1"]
    assert log["epoch"].tolist() == [1, 2, 3] and log["skipped"].tolist() == [0, 0, 0]


def test_the_log_holds_means_over_the_steps_and_the_last_rate(tmp_path, packed_folder, monkeypatch):
    """Of the top layer; with layer decay the others have lower ones."""
    norms = []
    clip = torch.nn.utils.clip_grad_norm_

    def noted(parameters, largest):
        norms.append(clip(parameters, largest))
        return norms[-1]

    monkeypatch.setattr("simmimlib.train.loop.clip_grad_norm_", noted)
    settings = finetune_settings(packed_folder, tmp_path / "run", epochs=4, warmup_epochs=2.0, layer_decay=0.5)
    finetune(settings)
    log = pd.read_csv(tmp_path / "run/log.csv")
    means = torch.stack(norms).view(4, 2).mean(1)
    torch.testing.assert_close(torch.tensor(log["grad_norm"]).float(), means)
    peak, start = 0.1 * 8 / 512, 0.1 * 8 / 512  # base_warmup_lr is as high
    assert log["lr"][:2].tolist() == pytest.approx([start, peak])


def test_metrics_say_where_they_come_from(tmp_path, packed_folder):
    metrics = pretrain(pretrain_settings(packed_folder, tmp_path / "run", epochs=2, seed=3))
    assert metrics == json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["images_seen"] == 2 * 16 and metrics["seed"] == 3 and metrics["skipped_steps"] == 0
    assert metrics["images_per_second"] == pytest.approx(32 / metrics["wall_seconds"])
    assert metrics["data"] == "images" and len(metrics["data_digest"]) > 8
    assert {"device", "precision", "versions", "commit", "code"} < metrics.keys()


def test_what_an_earlier_run_left_is_cleared_before_the_first_step(tmp_path, packed_folder, monkeypatch):
    finetune(finetune_settings(packed_folder, tmp_path / "run", epochs=1))
    (tmp_path / "run/notes.txt").write_text("mine")
    seen = []
    watch_steps(monkeypatch, lambda run, inputs: seen.append(sorted(p.name for p in (tmp_path / "run").iterdir())))
    finetune(finetune_settings(packed_folder, tmp_path / "run", epochs=1, seed=1))
    assert seen[0] == ["notes.txt"], "and nothing that is not a run's"
