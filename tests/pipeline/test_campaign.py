import sys
from types import SimpleNamespace

from simmimlib.pipeline.campaign import Running, minutes_left


def test_a_run_under_way_says_where_it_stands(tmp_path, monkeypatch):
    """Ten runs of an hour each must not be silent for an hour."""
    monkeypatch.chdir(tmp_path)
    said = "finetune epoch 10/20: loss 1.2, top1 45.2, 270 img/s, 30 s left"
    one = Running("mine-default-0", True, [[sys.executable, "-c", f"print({said!r} + chr(10))"]])
    one.process.wait()
    assert one.standing() == f"mine-default-0, 0.0 min: {said}"
    one.log.write_text("")
    assert one.standing() == "mine-default-0, 0.0 min: ..."


def test_time_left_knows_that_runs_without_pretraining_are_short():
    running = [SimpleNamespace(trained=True, minutes=8.0), SimpleNamespace(trained=False, minutes=1.0)]
    assert minutes_left(running, [], {True: 10.0, False: 3.0}, 2) == 2
    assert minutes_left(running, [True, False, False], {True: 10.0, False: 3.0}, 2) == 12
    assert minutes_left(running[:1], [False], {True: 10.0}, 1) == 12, "of a kind that is not known yet, the other's"
    assert minutes_left(running[:1], [], {True: 5.0}, 1) == 0
