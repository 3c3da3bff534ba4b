import copy

import numpy as np
import pytest
import torch

from conftest import TINY
from simmimlib.data.batches import validation_batches
from simmimlib.data.packed import open_packed
from simmimlib.model.encoders import blocks_of, create_encoder
from simmimlib.train.features import block_features, check_block, extract
from simmimlib.weights.export import export_timm

SWIN = {"embed_dim": 16, "depths": (1, 2, 1), "num_heads": (1, 2, 2), "window_size": 4}
BEIT = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
ENCODERS = {  # all with inputs of 32 pixels
    "vit_tiny_patch16_224": {**TINY, "depth": 3},
    "deit_tiny_distilled_patch16_224": {**TINY, "depth": 3},
    "simmim_vit_base": BEIT,
    "swin_tiny_patch4_window7_224": SWIN,
    "swinv2_tiny_window8_256": SWIN,
    "convnextv2_atto": {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)},
}
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ENCODERS)
@torch.inference_mode()
def test_each_block_gives_the_mean_of_its_patch_tokens(name):
    torch.manual_seed(0)
    encoder = create_encoder(name, 32, **ENCODERS[name]).eval()
    images, outputs = torch.randn(2, 3, 32, 32), []
    stages = getattr(encoder.model, "layers", getattr(encoder.model, "stages", [encoder.model]))
    plain = [block for stage in stages for block in stage.blocks]
    hooks = [block.register_forward_hook(lambda module, inputs, output: outputs.append(output)) for block in plain]
    last = encoder(images)  # [B, D, h, w]
    for hook in hooks:
        hook.remove()
    depth, prefix = len(outputs), getattr(encoder.model, "num_prefix_tokens", 0)
    assert depth == {"swin": 4, "swinv2": 4, "convnextv2": 4}.get(name.partition("_")[0], 3)
    places = (2, 3) if "convnext" in name else (1, 2)
    expected = [o[:, prefix:].mean(1) if o.ndim == 3 else o.mean(places) for o in outputs]
    model = export_timm(encoder).eval()
    found = block_features(model, images, range(depth + 1))
    assert list(found) == list(range(depth + 1)) and len(blocks_of(model)) == depth
    for block, features in enumerate([last.mean((2, 3)), *expected]):
        torch.testing.assert_close(found[block], features, rtol=1e-4, atol=1e-5)
        assert list(block_features(model, images, [block])) == [block]
    assert not any(module._forward_hooks for module in model.modules()), "no hook is left behind"


@pytest.fixture
def encoder():
    """A ViT with stochastic depth, as pre-training with it saves one."""
    torch.manual_seed(0)
    return create_encoder("vit_tiny_patch16_224", 16, **TINY, drop_path_rate=0.9)


def normalised(data):
    images = torch.from_numpy(np.array(data.val.images)).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (data.mean, data.std))
    return (images - mean) / std


def test_features_are_of_whole_images_in_order_in_float32(packed_folder, encoder):
    data, model = open_packed(packed_folder), export_timm(encoder).eval()
    batches = validation_batches(data.val, data, 16, 5, CPU)
    expected = block_features(model, normalised(data), [0, 1])
    torch.testing.assert_close(extract(model, batches, torch.float32, [0, 1]), expected)
    rough = extract(model, batches, torch.bfloat16)[0]
    assert rough.dtype == torch.float32 and not rough.equal(expected[0])
    torch.testing.assert_close(rough, expected[0], rtol=0.1, atol=0.1)


def test_features_are_taken_in_evaluation_mode(packed_folder, encoder):
    """Of a model that was in training mode, where paths are dropped."""
    data, model = open_packed(packed_folder), export_timm(encoder)
    batches = validation_batches(data.val, data, 16, 5, CPU)
    expected = block_features(copy.deepcopy(model).eval(), normalised(data), [0, 1, 2])
    for _ in range(2):
        found = extract(model.train(), batches, torch.float32, [0, 1, 2])
        torch.testing.assert_close(found, expected)
    assert not any(module.training for module in model.modules())
    assert not any(features.requires_grad for features in found.values())


def test_blocks_count_from_one(encoder):
    for block in (0, 1, 2):
        check_block(encoder.model, block)
    for block in (-1, 3):
        with pytest.raises(ValueError, match=f"block = {block}: must be from 1 to 2, the encoder's blocks, or 0"):
            check_block(encoder.model, block)
