from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from simmimlib.weights.checkpoints import load_checkpoint, load_model, save_model
from simmimlib.weights.formats import read_state, to_simmimlib
from small_models import build_official, hugging_face, to_official


class Dangerous:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_untrusted_and_broken_files_are_refused(tmp_path):
    model = build_official("vit")
    state = to_official(model.state_dict())
    torch.save({"model": state, "config": Dangerous(tmp_path / "ran")}, tmp_path / "pickled.pth")
    torch.save({"model": state}, tmp_path / "whole.pth")
    save_model(tmp_path / "whole.safetensors", model)
    for name in ("whole.pth", "whole.safetensors"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name.replace("whole", "half")).write_bytes(content[: len(content) // 2])
        (tmp_path / name.replace("whole", "empty")).write_bytes(b"")
        (tmp_path / name.replace("whole", "foreign")).write_bytes(b"<html>not found</html>" * 100)
    (tmp_path / "whole.txt").write_text("weights")
    broken = [
        "pickled.pth",
        "whole.txt",
        *(f"{a}{b}" for a in ("half", "empty", "foreign") for b in (".pth", ".safetensors")),
    ]
    for name in broken:
        with pytest.raises(ValueError, match=f"{name}': must be a whole .safetensors file, or a .pth, .pt, .bin file"):
            load_checkpoint(tmp_path / name, model)
    assert not (tmp_path / "ran").exists()
    (tmp_path / "folder").mkdir()
    for name, message in (("folder", "a folder must hold model.safetensors or"), ("none.pth", "there is no such file")):
        with pytest.raises(ValueError, match=message):
            load_checkpoint(tmp_path / name, model)
    torch.save({"epoch": 3, "optimizer": {}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth': must hold tensors by name"):
        load_checkpoint(tmp_path / "other.pth", model)
    with pytest.raises(ValueError, match="the dictionary: must hold tensors by name"):
        load_checkpoint({"model": {"head.0.bias": [0.0]}}, model)
    load_checkpoint(str(tmp_path / "whole.pth"), model)
    load_model(tmp_path / "whole.safetensors")


def styles():
    model = build_official("swin")
    encoder = model.encoder.state_dict()
    plain = {name: tensor for name, tensor in encoder.items() if not name.endswith("mask_token")}
    yield "simmimlib's", model.state_dict(), model.state_dict()
    yield "simmimlib's encoder", encoder, model.encoder.state_dict(prefix="encoder.")
    yield "the official Swin's", to_official(model.state_dict()), model.state_dict()
    timm_names = {name.removeprefix("model."): tensor for name, tensor in plain.items()}
    yield "the official ViT's or timm's", timm_names, {f"encoder.{name}": tensor for name, tensor in plain.items()}
    yield "Hugging Face's", hugging_face("swin").state_dict(), model.state_dict()
    yield "Hugging Face's", hugging_face("plain vit").state_dict(), build_official("plain vit").state_dict()


def test_names_tell_whose_weights_they_are():
    for style, given, ours in styles():
        told, renamed = to_simmimlib(given)
        derived = {name for name in {**renamed, **ours} if name.endswith(("relative_position_index", "attn_mask"))}
        assert told == style and renamed.keys() - derived == ours.keys() - derived
        assert all(renamed[name].shape == ours[name].shape for name in renamed.keys() - derived)


def test_query_key_and_value_are_joined_in_timms_order_or_left_as_they_are():
    parts = {f"vit.layers.0.attention.{part}_proj.bias": torch.full((2,), i) for i, part in enumerate("qkv")}
    _, joined = to_simmimlib(parts)
    assert list(joined) == ["encoder.model.blocks.0.attn.qkv.bias"]
    assert joined.popitem()[1].tolist() == [0, 0, 1, 1, 2, 2]
    key = parts.pop("vit.layers.0.attention.k_proj.bias")
    assert list(to_simmimlib(parts)[1]) == [f"encoder.model.blocks.0.attn.{part}_bias" for part in "qv"]  # BEiT's
    assert list(to_simmimlib({"vit.layers.0.attention.k_proj.bias": key})[1]) == ["encoder.model.blocks.0.attn.k.bias"]


def test_of_a_folder_the_newer_file_is_read(tmp_path):
    torch.save({"old": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    assert list(read_state(tmp_path)) == ["old"]
    save_file({"new": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert list(read_state(tmp_path)) == list(read_state(str(tmp_path))) == ["new"]
