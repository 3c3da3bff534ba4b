import torch
from torchvision.transforms import RandomResizedCrop

from simmimlib.data.crops import centre_boxes, crop, flip, random_resized_boxes, resize


def test_crops_are_distributed_like_torchvisions(generator):
    """Mean and spread of left, top, width and height over 4,000 draws agree with RandomResizedCrop's."""
    image = torch.empty(3, 120, 200)
    torch.manual_seed(0)
    reference = torch.tensor(
        [RandomResizedCrop.get_params(image, (0.67, 1), (3 / 4, 4 / 3)) for _ in range(4000)]
    ).float()
    top, left, height, width = reference.T
    boxes = random_resized_boxes(torch.tensor([[200.0, 120.0]]).repeat(4000, 1), 0.67, generator)
    left_, top_, right_, bottom_ = (boxes * torch.tensor([200, 120, 200, 120])).T
    for ours, theirs in ((left_, left), (top_, top), (right_ - left_, width), (bottom_ - top_, height)):
        assert abs(ours.mean() - theirs.mean()) < 2.5 and abs(ours.std() - theirs.std()) < 2.5
    assert boxes.min() >= 0 and boxes.max() <= 1


def test_crop_cuts_the_box(generator):
    images = torch.rand(2, 3, 8, 8) * 255
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.25, 0.5, 0.75, 1.0]])
    torch.testing.assert_close(crop(images, boxes, 8)[0], images[0])
    torch.testing.assert_close(crop(images, boxes, 4)[1], images[1, :, 4:8, 2:6])
    flipped = crop(images, boxes[:, [2, 1, 0, 3]], 8)
    torch.testing.assert_close(flipped[0], images[0].flip(-1))


def test_centre_crop_has_the_right_shape():
    left, top, right, bottom = centre_boxes(torch.tensor([[200.0, 100.0]]), 0.8)[0].tolist()
    assert [round((right - left) * 200), round((bottom - top) * 100)] == [80, 80]


def test_crops_keep_at_least_the_smallest_area_and_an_allowed_shape(generator):
    sizes = torch.tensor([[200.0, 100.0], [64.0, 64.0], [90.0, 150.0]]).repeat(500, 1)
    boxes = random_resized_boxes(sizes, 0.2, generator)
    width, height = (boxes[:, 2:] - boxes[:, :2]).mul(sizes).unbind(1)
    corners = boxes * sizes.repeat(1, 2)
    assert (corners - corners.round()).abs().max() < 1e-3, "whole pixels of the original image"
    share = width * height / sizes.prod(1)
    assert share.min() > 0.19 and share.max() <= 1 and share.max() > 0.9  # sides are rounded to pixels
    assert (width / height).min() > 0.73 and (width / height).max() < 1.36


def test_crops_reach_every_edge_equally_often(generator):
    left, top, right, bottom = random_resized_boxes(torch.tensor([[8.0, 8.0]]).repeat(4000, 1), 0.3, generator).T
    free = (right - left < 0.99) & (bottom - top < 0.99)
    shares = [(at[free] == edge).float().mean() for at, edge in ((left, 0), (top, 0), (right, 1), (bottom, 1))]
    assert min(shares) > 0.25 and max(shares) - min(shares) < 0.05


def test_where_no_draw_fits_the_largest_allowed_crop_of_the_centre_is_taken(generator):
    """At a share of 0.9 no box of an allowed shape fits into these."""
    boxes = random_resized_boxes(torch.tensor([[400.0, 100.0], [100.0, 400.0]]), 0.9, generator)
    wide, high = (boxes * torch.tensor([[400.0, 100.0] * 2, [100.0, 400.0] * 2])).tolist()
    assert [round(v) for v in wide] == [133, 0, 266, 100] and [round(v) for v in high] == [0, 133, 100, 266]


def test_flip_exchanges_left_and_right_where_it_is_asked_for():
    boxes = torch.tensor([[0.1, 0.2, 0.5, 0.9], [0.3, 0.1, 0.8, 0.6]])
    flipped = flip(boxes, torch.tensor([True, False]))
    assert torch.equal(flipped, torch.tensor([[0.5, 0.2, 0.1, 0.9], [0.3, 0.1, 0.8, 0.6]]))
    images = torch.rand(2, 3, 20, 20) * 255
    torch.testing.assert_close(crop(images, flipped, 8)[0], crop(images, boxes, 8)[0].flip(-1), rtol=0, atol=1e-2)


def test_resizing_is_antialiased_and_stays_within_pixels():
    stripes = torch.zeros(1, 1, 32, 32)
    stripes[..., 1::4] = stripes[..., 2::4] = 255  # finer than the small image can show: half is light
    assert (resize(stripes, 8)[..., 2:-2] - 127.5).abs().max() < 8
    edge = torch.zeros(1, 1, 16, 16)
    edge[..., 8:] = 255
    for resized in (resize(edge, 24, "bicubic"), crop(edge, torch.tensor([[0.0, 0, 1, 1]]), 24, "bicubic")):
        assert resized.min() == 0 and resized.max() == 255  # bicubic overshoots at an edge
    assert not torch.equal(resize(edge, 24, "bicubic"), resize(edge, 24))
    assert not torch.equal(*(crop(edge, torch.tensor([[0.0, 0, 1, 1]]), 24, kind) for kind in ("bicubic", "bilinear")))


def test_beyond_the_edge_of_an_image_its_border_goes_on():
    images = torch.full((1, 1, 8, 8), 200.0)
    assert (crop(images, torch.tensor([[-0.1, -0.1, 1.1, 1.1]]), 8) - 200).abs().max() < 1e-3


def test_no_image_is_cut_to_none():
    """Of several processes one may have no share of a batch."""
    assert crop(torch.zeros(0, 3, 8, 6), torch.zeros(0, 4), 5).shape == (0, 3, 5, 5)
