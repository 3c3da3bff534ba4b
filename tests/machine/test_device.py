import pytest
import torch

from simmimlib.machine.device import pick_device, resolve_precision


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_is_bfloat16_only_where_the_gpu_has_it(monkeypatch, native, expected):
    """Older GPUs emulate it, slower than float32."""
    asked = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: asked.append(options) or native)
    assert resolve_precision("auto", torch.device("cuda")) == expected
    assert asked == [{"including_emulation": False}]
    assert resolve_precision("auto", torch.device("cpu")) == torch.float32


def test_a_gpu_that_is_named_becomes_the_current_one(monkeypatch):
    """Its generator is then the one that is seeded."""
    chosen = []
    monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
    for name in ("cuda:1", "cuda", "cpu"):
        monkeypatch.setenv("SIMMIM_DEVICE", name)
        assert pick_device() == torch.device(name)
    assert chosen == [1]
