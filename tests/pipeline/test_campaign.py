import sys

from simmimlib.pipeline.campaign import Running


def test_a_run_under_way_says_where_it_stands(tmp_path, monkeypatch):
    """Ten runs of an hour each must not be silent for an hour."""
    monkeypatch.chdir(tmp_path)
    said = "finetune epoch 10/20: loss 1.2, top1 45.2, 270 img/s, 30 s left"
    one = Running("mine-default-0", True, [[sys.executable, "-c", f"print({said!r} + chr(10))"]])
    one.process.wait()
    assert one.standing() == f"mine-default-0, 0.0 min: {said}"
    one.log.write_text("")
    assert one.standing() == "mine-default-0, 0.0 min: ..."
