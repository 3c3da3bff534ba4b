import pytest
import torch

from simmimlib.model.targets import create_target, pixel_errors, scoped_mean


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


def test_smooth_l1_turns_linear_at_beta():
    error = torch.tensor([0.0, 0.25, 0.5, 1.0, 3.0])
    for beta in (0.5, 2.0):
        expected = torch.where(error < beta, error**2 / (2 * beta), error - beta / 2)
        given = pixel_errors(error.view(1, 1, 1, -1), torch.zeros(1, 1, 1, 5), "smooth_l1", beta)
        torch.testing.assert_close(given.flatten(), expected)
        target = create_target("pixels", 1, "smooth_l1", beta)
        assert torch.equal(target.errors(error.view(1, 1, 1, -1), torch.zeros(1, 1, 1, 5)), given)


def test_bins_take_the_mean_and_deviation_of_each_channel():
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.25]
    target = create_target("bins_256", mean=mean, std=std)
    pixels = torch.rand(2, 3, 4, 4)
    normalised = (pixels - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    shown = target.best(normalised) * target.std + target.mean
    assert target.channels == 768 and (shown - pixels).abs().max() <= 0.5 / 256 + 1e-5
    # beyond the range of pixels: the first and the last bin
    assert (target.best(normalised - 100) * target.std + target.mean - 0.5 / 256).abs().max() < 1e-5
    assert (target.best(normalised + 100) * target.std + target.mean - 255.5 / 256).abs().max() < 1e-5


def test_cross_entropies_are_those_of_the_true_class():
    torch.manual_seed(0)
    images = torch.rand(1, 2, 2, 2)
    bins = create_target("bins_8", 2, mean=0.0, std=1.0)
    logits = torch.randn(1, 16, 2, 2)
    classes = (images * 8).long()
    for channel, row, column in ((0, 0, 1), (1, 1, 0)):
        scores = logits[0, channel::2, row, column].log_softmax(0)  # a bin's channels lie together
        true = classes[0, channel, row, column]
        torch.testing.assert_close(bins.errors(logits, images)[0, channel, row, column], -scores[true])
    clusters = create_target("clusters_512", 2)
    clusters.colours.copy_(torch.rand(512, 2))
    logits = torch.randn(1, 512, 2, 2)
    nearest = (clusters.colours - images[0, :, 1, 0]).norm(dim=1).argmin()
    errors = clusters.errors(logits, images)
    assert errors.shape == (1, 1, 2, 2)
    torch.testing.assert_close(errors[0, 0, 1, 0], -logits[0, :, 1, 0].log_softmax(0)[nearest])
    chosen = clusters.pixels(logits, images)[0, :, 1, 0]
    assert torch.equal(chosen, clusters.colours[logits[0, :, 1, 0].argmax()])


def test_masked_mean_is_over_the_batch_and_nothing_masked_is_no_error():
    errors = torch.arange(16.0).view(2, 2, 2, 2)
    mask = torch.tensor([[[[True, False], [False, False]]], [[[True, True], [True, False]]]])
    expected = torch.stack([errors[0, :, 0, 0], errors[1, :, 0, 0], errors[1, :, 0, 1], errors[1, :, 1, 0]]).mean()
    torch.testing.assert_close(scoped_mean(errors, mask, "masked"), expected, rtol=1e-5, atol=0)
    assert scoped_mean(errors, mask & False, "masked") == 0
    assert scoped_mean(errors, mask, "all") == errors.mean()


def test_bad_input():
    with pytest.raises(ValueError, match="target = 'hog': allowed are pixels, normalised_pixels, bins_8, bins_256"):
        create_target("hog")
    with pytest.raises(ValueError, match="loss = 'l3': allowed are l1, l2, smooth_l1"):
        create_target("pixels", loss="l3")
    with pytest.raises(ValueError, match="loss = 'l3': allowed are l1, l2, smooth_l1"):
        pixel_errors(torch.zeros(1), torch.zeros(1), "l3")
    with pytest.raises(ValueError, match="scope = 'most': allowed are masked, all"):
        scoped_mean(torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1), "most")
    with pytest.raises(ValueError, match="a patch of one value has no variance"):
        create_target("normalised_pixels", 1, patch=1)
    assert create_target("normalised_pixels", 3, patch=1).channels == 3
