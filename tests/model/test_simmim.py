import pytest
import torch

from simmimlib.model.encoders import create_encoder
from simmimlib.model.simmim import SimMIM
from simmimlib.model.targets import TARGETS, ClusterTarget
from simmimlib.weights.checkpoints import METHODS
from small_models import ENCODERS, build


@pytest.mark.parametrize("in_chans", [1, 3, 4])
@pytest.mark.parametrize("name", ENCODERS)
def test_shapes(name, in_chans):
    encoder, images, mask = build(name, in_chans)
    output = SimMIM(encoder)(images, mask)
    assert output.prediction.shape == images.shape and output.loss.shape == ()
    features = encoder(images, mask)
    height, width = images.shape[2:]
    assert features.shape == (2, encoder.num_features, height // encoder.stride, width // encoder.stride)


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "l3"}, "loss = 'l3': allowed are l1, l2, smooth_l1"),
        ({"scope": "most"}, "scope = 'most': allowed are masked, all"),
        ({"target": "hog"}, "target = 'hog': allowed are pixels, normalised_pixels, bins_8"),
        ({"resolution": 0.3}, "resolution = 0.3: allowed with stride 8 are 1, 1/2, 1/4, 1/8"),
        ({"resolution": 3 / 8}, "resolution = 0.375: allowed with stride 8"),
        ({"resolution": 2}, "resolution = 2: allowed with stride 8"),
        ({"resolution": 1 / 16}, "resolution = 0.0625: allowed with stride 8"),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(ValueError) as error:
        SimMIM(build("vit")[0], **changes)
    assert message in str(error.value)


def test_a_low_resolution_prediction_is_repeated_to_be_shown():
    encoder, images, mask = build("vit")
    output = SimMIM(encoder, resolution=1 / 4)(images, mask)
    assert torch.equal(output.prediction, output.raw.repeat_interleave(4, 2).repeat_interleave(4, 3))


def test_head_and_target_are_fitted_to_the_encoder_and_the_resolution():
    encoder, _, _ = build("swin wide")  # a feature map of 2 x 3
    windows = {block.window_size for stage in SimMIM(encoder, "inverse_swin_t").head.stages for block in stage.blocks}
    assert windows == {(1, 1)}
    model = SimMIM(encoder, target="normalised_pixels", resolution=1 / 4)
    assert model.target.patch == 8, "a patch is what one position of the feature map predicts"


@pytest.mark.parametrize("method", ["simmim", "mae", "fcmae"])
def test_a_mask_of_another_grid_is_refused(method):
    name, kwargs = ("convnextv2_atto", {}) if method == "fcmae" else ("vit_tiny_patch16_224", {"depth": 1})
    encoder = create_encoder(name, 64, mask_token=method == "simmim", **kwargs)
    model = METHODS[method](encoder)
    side = 64 // encoder.patch_size
    mask = torch.zeros(2, side // 2, side // 2, dtype=torch.bool)
    for refuses in (model, encoder) if method == "simmim" else (model,):
        with pytest.raises(ValueError) as error:
            refuses(torch.randn(2, 3, 64, 64), mask)
        assert str(error.value) == f"mask of shape {tuple(mask.shape)}: must be (2, {side}, {side})"
