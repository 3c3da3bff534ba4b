import pytest
import torch
from timm.models.vision_transformer import Block

from simmimlib.model.encoders import create_encoder
from simmimlib.model.heads import BLOCKS, HEADS, create_head
from simmimlib.model.simmim import SimMIM


def test_linear_head_is_one_convolution():
    """3072 = 32 x 32 x 3 channels for Swin; pixels of one position stay in its own square."""
    head = create_head("linear", 8, 32)
    assert head[0].out_channels == 3072 and head[0].kernel_size == (1, 1)
    features = torch.zeros(1, 8, 2, 2)
    base = head(features)
    features[0, :, 0, 1] = 1
    moved = (head(features) != base).any(1)[0]
    assert moved[:32, 32:].any() and not moved[:, :32].any() and not moved[32:].any()


@pytest.mark.parametrize(("head", "millions"), [("linear", 89.87), ("mlp", 90.9), ("inverse_swin_t", 115.0)])
def test_parameters_of_the_papers_heads(head, millions):
    """Swin-B at 192: the paper's 89.9 / 90.9 / 115.2 million (mmpretrain: 89.87)."""
    with torch.device("meta"):
        encoder = create_encoder("swin_base_patch4_window7_224", 192, window_size=6)
        count = sum(p.numel() for p in SimMIM(encoder, head).parameters()) / 1e6
    assert count == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    ("stride", "channels", "grid"), [(32, 3, (2, 2)), (16, 1, (3, 3)), (4, 12, (4, 6)), (6, 2, (5, 5))]
)
def test_heads_fit_any_stride_and_channels(head, stride, channels, grid):
    output = create_head(head, 24, stride, channels, grid)(torch.randn(1, 24, *grid))
    assert output.shape == (1, channels, grid[0] * stride, grid[1] * stride)


@pytest.mark.parametrize(("depth", "width", "heads"), [(1, 24, 1), (2, 192, 3), (4, 100, 1), (8, 200, 2)])
def test_blocks_are_so_many_transformer_blocks_before_the_linear_head(depth, width, heads):
    head = create_head(f"blocks_{depth}", width, 8, 2)
    blocks = [module for module in head.modules() if isinstance(module, Block)]
    assert len(blocks) == depth and {block.attn.num_heads for block in blocks} == {heads}
    linear = create_head("linear", width, 8, 2)
    assert [type(module) for module in head[1:]] == [type(module) for module in linear]
    assert head[1].weight.shape == linear[0].weight.shape
    # the block of a ViT: 12 d² + 13 d parameters, MLPs of four times the width; one norm behind them all
    expected = depth * (12 * width**2 + 13 * width) + 2 * width
    assert sum(parameter.numel() for parameter in head[0].parameters()) == expected


def test_blocks_of_a_given_width():
    """As a decoder of MAE: a linear layer to that width in front, and the linear head takes that width."""
    head = create_head("blocks_2", 24, 4, width=16, heads=4)
    blocks = [module for module in head.modules() if isinstance(module, Block)]
    assert {(block.attn.num_heads, block.norm1.normalized_shape) for block in blocks} == {(4, (16,))}
    assert head[0].embed.weight.shape == (16, 24) and head[1].weight.shape == (48, 16, 1, 1)
    assert head(torch.randn(2, 24, 3, 5)).shape == (2, 3, 12, 20)
    with pytest.raises(ValueError, match="decoder_width = 18: must be a multiple of the 4 decoder_heads"):
        create_head("blocks_2", 24, 4, width=18, heads=4)
    with pytest.raises(ValueError, match="decoder_heads = 2: must be 0 with head = 'mlp', which has no transformer"):
        create_head("mlp", 24, 4, heads=2)


def test_blocks_are_vision_transformer_blocks_on_the_tokens():
    torch.manual_seed(0)
    head = create_head("blocks_2", 24, 4)
    features = torch.randn(2, 24, 3, 5)
    tokens = torch.stack([features[:, :, i // 5, i % 5] for i in range(15)], 1)  # [B, h * w, D], row by row
    for block in head[0].blocks:
        tokens = block(tokens)
    tokens = head[0].norm(tokens)
    expected = torch.stack([torch.stack([tokens[:, 5 * i + j] for j in range(5)], 2) for i in range(3)], 2)
    torch.testing.assert_close(head(features), head[2](head[1](expected)))


def test_blocks_and_inverse_swins_start_as_timms_transformers():
    torch.manual_seed(0)
    for kind in ("blocks_1", "inverse_swin_t"):
        head = create_head(kind, 192, 8)
        for module in head.modules():
            if isinstance(module, torch.nn.Linear):
                assert 0.018 < module.weight.std() < 0.022
                assert module.bias is None or not module.bias.any()


@pytest.mark.parametrize("width", [32, 40])
@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_let_gradients_reach_the_encoder(kind, width):
    torch.manual_seed(0)
    encoder = create_encoder("vit_tiny_patch16_224", 32, patch_size=8, embed_dim=width, depth=1, num_heads=2)
    model = SimMIM(encoder, kind)
    output = model(torch.randn(2, 3, 32, 32), torch.rand(2, 4, 4) < 0.5)
    assert output.prediction.shape == (2, 3, 32, 32)
    output.loss.backward()
    still = [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert not still


def test_every_hidden_position_of_a_block_head_sees_the_others():
    """What tells it from the linear head: a prediction depends on the features elsewhere, too."""
    torch.manual_seed(0)
    features = torch.randn(1, 24, 2, 2)
    moved = features.clone()
    moved[0, :, 0, 1] += torch.randn(24)
    for kind, elsewhere in (("linear", False), ("mlp", False), ("blocks_1", True)):
        head = create_head(kind, 24, 8)
        changed = (head(features) != head(moved)).any(1)[0]
        assert changed[:8, 8:].any() and changed[:, :8].any() == elsewhere


def test_unknown_heads_are_refused():
    for kind in ("deep", "blocks_3"):
        with pytest.raises(ValueError, match=f"head = '{kind}': allowed are linear, mlp, blocks_1, blocks_2, blocks_4"):
            create_head(kind, 8, 32)


def test_only_the_linear_head_is_linear():
    torch.manual_seed(0)
    features = torch.randn(1, 24, 2, 2)
    for kind, linear in (("linear", True), ("mlp", False), ("blocks_1", False)):
        head = create_head(kind, 24, 8)
        bias = head(features * 0)
        moved, twice = head(features) - bias, head(2 * features) - bias
        assert torch.allclose(twice, 2 * moved, atol=1e-5) == linear


def test_windows_of_an_inverse_swin_fit_without_padding():
    for grid in ((4, 6), (6, 6), (3, 5)):
        head = create_head("inverse_swin_t", 24, 16, grid=grid)
        for step, stage in enumerate(head.stages):
            for block in stage.blocks:
                assert all(side * 2**step % window == 0 for side, window in zip(grid, block.window_size, strict=True))


def test_an_inverse_swin_normalises_before_its_pixels():
    seen = []
    head = create_head("inverse_swin_t", 24, 16, grid=(2, 2))
    head.pixels.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    head(10 * torch.randn(1, 24, 2, 2))
    assert seen[0].mean(1).abs().max() < 1e-4 and (seen[0].var(1, correction=0) - 1).abs().max() < 0.1
