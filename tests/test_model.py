import pytest
import torch

from simmimlib.checkpoints import export_timm, load_checkpoint, load_simmim, save_simmim
from simmimlib.encoders import create_encoder
from simmimlib.heads import HEADS, create_head
from simmimlib.masking import MaskGenerator
from simmimlib.simmim import SimMIM
from simmimlib.targets import TARGETS, ClusterTarget, create_target

SMALL_VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}
SMALL_SWIN = {"embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8)}
ENCODERS = {
    "vit": ("vit_tiny_patch16_224", 64, {**SMALL_VIT, "patch_size": 8}),
    "vit32": ("vit_base_patch32_224", 96, SMALL_VIT),
    "deit distilled": ("deit_tiny_distilled_patch16_224", 64, SMALL_VIT),
    "vit dynamic": ("vit_tiny_patch16_224", 64, {**SMALL_VIT, "dynamic_img_size": True}),
    "beit": ("beit_base_patch16_224", 64, SMALL_VIT),
    "simmim vit": ("simmim_vit_base", 64, SMALL_VIT),
    "swin": ("swin_tiny_patch4_window7_224", 64, {**SMALL_SWIN, "window_size": 4}),
    "swin padded": ("swin_tiny_patch4_window7_224", 96, SMALL_SWIN),
    "swin v2": ("swinv2_tiny_window8_256", 64, {**SMALL_SWIN, "window_size": 4}),
    "swin wide": ("swin_tiny_patch4_window7_224", (64, 96), {**SMALL_SWIN, "window_size": 2}),
}


def build(name, in_chans=3):
    timm_name, size, kwargs = ENCODERS[name]
    torch.manual_seed(0)
    encoder = create_encoder(timm_name, size, in_chans, **kwargs).eval()
    height, width = (size, size) if isinstance(size, int) else size
    images = torch.randn(2, in_chans, height, width)
    mask = MaskGenerator(size, 32, encoder.patch_size)(2, torch.Generator().manual_seed(0))
    return encoder, images, mask


@pytest.mark.parametrize("in_chans", [1, 3, 4])
@pytest.mark.parametrize("name", ENCODERS)
def test_shapes(name, in_chans):
    encoder, images, mask = build(name, in_chans)
    output = SimMIM(encoder)(images, mask)
    assert output.prediction.shape == images.shape and output.loss.shape == ()
    features = encoder(images, mask)
    height, width = images.shape[2:]
    assert features.shape == (2, encoder.num_features, height // encoder.stride, width // encoder.stride)


@pytest.mark.parametrize("name", ENCODERS)
def test_masked_pixels_cannot_influence_the_output(name):
    encoder, images, mask = build(name)
    hidden = mask.repeat_interleave(encoder.patch_size, 1).repeat_interleave(encoder.patch_size, 2).unsqueeze(1)
    with torch.no_grad():
        features = encoder(images, mask)
        assert torch.equal(encoder(torch.where(hidden, 1e3, images), mask), features)
        assert not torch.allclose(encoder(torch.where(hidden, images, 1e3), mask), features)
        encoder.model.patch_embed.mask_token += 1  # and the mask token does
        assert not torch.allclose(encoder(images, mask), features)


@pytest.mark.parametrize("name", ["vit", "beit", "swin", "swin v2", "deit distilled"])
def test_without_a_mask_it_is_timm(name):
    encoder, images, _ = build(name)
    plain = export_timm(encoder).eval()
    assert not any("mask_token" in key for key in plain.state_dict())
    with torch.no_grad():
        expected = plain.forward_features(images)
        if expected.ndim == 3:
            expected = expected[:, plain.num_prefix_tokens :].unflatten(1, encoder.model.patch_embed.grid_size)
        assert torch.equal(encoder(images), expected.permute(0, 3, 1, 2))


def test_shared_relative_bias_is_copied_into_every_block():
    encoder, images, _ = build("simmim vit")
    torch.nn.init.normal_(encoder.model.rel_pos_bias.relative_position_bias_table)
    plain = export_timm(encoder).eval()
    with torch.no_grad():
        expected = plain.forward_features(images)[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
        torch.testing.assert_close(encoder(images), expected)


@pytest.mark.parametrize("name", ["vit", "simmim vit", "swin", "swin v2"])
def test_another_resolution_for_fine_tuning(name):
    encoder, _, _ = build(name)
    model = export_timm(encoder, 10, "avg", image_size=128).eval()
    assert model(torch.randn(1, 3, 128, 128)).shape == (1, 10)


@pytest.mark.parametrize("loss", ["l1", "l2", "smooth_l1"])
def test_loss_scope(loss):
    """A visible pixel of the target never moves the masked loss; it moves the loss over all pixels."""
    encoder, images, mask = build("swin")
    hidden = mask.repeat_interleave(4, 1).repeat_interleave(4, 2).unsqueeze(1)
    fixed = encoder(images, mask)  # features that stay, so that only the target moves
    encoder.forward = lambda images, mask: fixed
    for scope in ("masked", "all"):
        model = SimMIM(encoder, loss=loss, scope=scope)
        with torch.no_grad():
            before = model(images, mask).loss
            visible_moved = model(torch.where(hidden, images, images + 1), mask).loss
            hidden_moved = model(torch.where(hidden, images + 1, images), mask).loss
        assert hidden_moved != before
        assert (visible_moved == before) == (scope == "masked")


def test_loss_is_the_mean_over_the_masked_pixels_of_the_batch():
    encoder, images, mask = build("vit")
    mask[0] = False
    mask[0, 0, 0] = True  # images with different numbers of masked pixels: the mean is over the batch, not per image
    for loss, error in (("l1", lambda d: d.abs()), ("l2", lambda d: d**2)):
        output = SimMIM(encoder, loss=loss)(images, mask)
        hidden = mask.repeat_interleave(8, 1).repeat_interleave(8, 2).unsqueeze(1).expand_as(images)
        torch.testing.assert_close(output.loss, error(output.prediction - images)[hidden].mean())


def test_linear_head_is_one_convolution():
    """3072 = 32 x 32 x 3 channels for Swin; pixels of one position stay in its own square."""
    head = create_head("linear", 8, 32)
    assert head[0].out_channels == 3072 and head[0].kernel_size == (1, 1)
    features = torch.zeros(1, 8, 2, 2)
    base = head(features)
    features[0, :, 0, 1] = 1
    moved = (head(features) != base).any(1)[0]
    assert moved[:32, 32:].any() and not moved[:, :32].any() and not moved[32:].any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: create_encoder("resnet50", 224), "encoder = 'resnet50': this family cannot take mask tokens"),
        (lambda: create_encoder("swin_tny_patch4_window7_224", 224), "did you mean swin_tiny_patch4_window7_224"),
        (lambda: create_encoder("vit_tiny_patch16_224", 60), "image_size = 60: must be a multiple of 16"),
        (lambda: create_encoder("swin_tiny_patch4_window7_224", 48), "image_size = 48: must be a multiple of 32"),
        (lambda: create_head("deep", 8, 32), "head = 'deep': allowed are linear"),
        (lambda: SimMIM(build("vit")[0], loss="l3"), "loss = 'l3': allowed are l1, l2, smooth_l1"),
        (lambda: SimMIM(build("vit")[0], scope="most"), "scope = 'most': allowed are masked, all"),
        (lambda: build("vit")[0](torch.zeros(1, 3, 64, 64), torch.zeros(1, 4, 4).bool()), "must be (1, 8, 8)"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)


def test_checkpoint_round_trip(tmp_path):
    encoder, images, mask = build("swin")
    model = SimMIM(encoder, loss="l2", scope="all")
    save_simmim(tmp_path / "model.safetensors", model)
    again = load_simmim(tmp_path / "model.safetensors").eval()
    with torch.no_grad():
        assert torch.equal(again(images, mask).loss, model(images, mask).loss)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_checkpoint_that_does_not_fit(tmp_path):
    model = SimMIM(build("vit")[0])
    state = model.state_dict()
    state["head.0.weight"] = state["head.0.weight"][:5]
    del state["head.0.bias"]
    with pytest.raises(ValueError, match=r"(?s)2 places.*head.0.bias: missing.*head.0.weight: \(5, 32, 1, 1\)"):
        load_checkpoint(state, model)
    (tmp_path / "junk.safetensors").write_bytes(b"junk" * 100)
    with pytest.raises(ValueError, match="not a file written by simmimlib"):
        load_simmim(tmp_path / "junk.safetensors")
    with pytest.raises(ValueError, match="there is no such file"):
        load_simmim(tmp_path / "none.safetensors")


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


@pytest.mark.parametrize("resolution", [1, 1 / 2, 1 / 16, 1 / 32])
def test_resolution(resolution):
    """The target is the mean over the pixels that a predicted one covers; a mask keeps its share of them."""
    encoder, images, mask = build("swin")
    output = SimMIM(encoder, resolution=resolution)(images, mask)
    side = round(64 * resolution)
    assert output.raw.shape == (2, 3, side, side) and output.prediction.shape == images.shape
    small = torch.nn.functional.adaptive_avg_pool2d(images, side)
    hidden = torch.nn.functional.adaptive_avg_pool2d(mask[:, None].float(), side) if side <= 16 else None
    if hidden is not None:
        expected = ((output.raw - small).abs() * hidden).sum() / hidden.sum() / 3
        torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize("target", TARGETS)
def test_targets_train_and_show(target):
    encoder, images, mask = build("vit")
    model = SimMIM(encoder, target=target, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25))
    if isinstance(model.target, ClusterTarget):
        model.target.fit(torch.randn(4, 3, 64, 64))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(6):
        output = model(images, mask)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[-1] < losses[0] and output.prediction.shape == images.shape


def test_colour_bins_and_clusters_find_the_nearest_colour():
    images = torch.rand(2, 3, 8, 8)
    bins = create_target("bins_8", mean=0.5, std=0.25)
    normalised = (images - 0.5) / 0.25
    assert (bins.best(normalised) - normalised).abs().max() <= 0.5 / 8 / 0.25 + 1e-5
    logits = torch.nn.functional.one_hot((images * 8).long(), 8).permute(0, 4, 1, 2, 3).flatten(1, 2).float() * 50
    assert (
        torch.equal(bins.pixels(logits, normalised), bins.best(normalised))
        and bins.errors(logits, normalised).max() < 1e-4
    )
    clusters = create_target("clusters_512")
    clusters.fit(torch.rand(20, 3, 32, 32))
    assert (clusters.best(images) - images).norm(dim=1).mean() < 0.08


def test_normalised_pixels_are_shown_in_their_own_colours():
    """A perfect prediction of the normalised patches comes back as the image."""
    images = torch.rand(2, 3, 16, 16) * 3 + 5
    target = create_target("normalised_pixels", patch=8)
    patches = images.unfold(2, 8, 8).unfold(3, 8, 8)  # [B, C, 2, 2, 8, 8]
    mean, std = patches.mean((1, 4, 5), keepdim=True), (patches.var((1, 4, 5), keepdim=True) + 1e-6).sqrt()
    perfect = ((patches - mean) / std).permute(0, 1, 2, 4, 3, 5).reshape(2, 3, 16, 16)
    torch.testing.assert_close(target.errors(perfect, images), torch.zeros_like(images), atol=1e-4, rtol=0)
    torch.testing.assert_close(target.pixels(perfect, images), images)


def test_without_the_final_norm():
    torch.manual_seed(0)
    encoder = create_encoder("vit_tiny_patch16_224", 32, final_norm=False, patch_size=8, **SMALL_VIT)
    images = torch.randn(1, 3, 32, 32)
    plain = export_timm(encoder).eval()
    with torch.no_grad():
        expected = plain.forward_features(images)[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
        torch.testing.assert_close(encoder.eval()(images), expected)
    assert export_timm(encoder, 10, "avg")(images).shape == (1, 10)
