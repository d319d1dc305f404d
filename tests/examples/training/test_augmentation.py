"""Augmentations against their definitions, one image at a time."""

from __future__ import annotations

import pytest
import torch

from training.augmentation import POLICIES, augmentation, color, cutout, noise, translation


def test_translation_moves_by_whole_pixels_and_fills_with_zero() -> None:
    size, reach = 16, 2
    images = torch.rand(400, 2, size, size) + 1  # no zero of their own
    shifts = set()
    for image, moved in zip(images, translation(images), strict=True):
        matches = []
        for down in range(-reach, reach + 1):
            for right in range(-reach, reach + 1):
                expected = torch.zeros_like(image)
                rows, columns = slice(max(0, -down), size - max(0, down)), slice(max(0, -right), size - max(0, right))
                source = image[:, max(0, down) : size + min(0, down), max(0, right) : size + min(0, right)]
                expected[:, rows, columns] = source
                if torch.equal(expected, moved):
                    matches.append((down, right))
        assert len(matches) == 1
        shifts.add(matches[0])
    assert len(shifts) == (2 * reach + 1) ** 2  # 400 draws of 25: each is missed with probability 1e-7


def test_cutout_removes_one_square_of_half_the_size() -> None:
    size = 16
    images = torch.rand(300, 3, size, size) + 1
    cut = cutout(images)
    removed = cut == 0
    assert (removed == removed[:, :1]).all()  # in all channels alike
    assert torch.equal(cut[~removed], images[~removed])
    centers = set()
    for mask in removed[:, 0]:
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        assert mask.sum() == len(rows) * len(columns)
        assert (rows.diff() == 1).all() and (columns.diff() == 1).all()  # noqa: PT018
        assert size // 4 <= len(rows) <= size // 2
        centers.add((rows[0].item(), columns[0].item()))
    assert len(centers) > 50


def test_color_is_brightness_then_saturation_then_contrast() -> None:
    images = torch.rand(5, 3, 4, 4, dtype=torch.float64) * 2 - 1
    torch.manual_seed(3)
    changed = color(images)
    torch.manual_seed(3)
    numbers = torch.rand(3, 5, 1, 1, 1, dtype=torch.float64)
    for image, got, (brightness, saturation, contrast) in zip(
        images, changed, numbers.flatten(1).T.tolist(), strict=True
    ):
        expected = image + brightness - 0.5
        gray = expected.mean(0, keepdim=True)
        expected = (expected - gray) * 2 * saturation + gray
        level = expected.mean()
        expected = (expected - level) * (contrast + 0.5) + level
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_noise_has_its_strength() -> None:
    images = torch.zeros(50, 3, 32, 32)
    # The standard deviation of 153 600 samples is known to 0.2 %.
    assert noise(images, 0.3).std().item() == pytest.approx(0.3, rel=0.01)


@pytest.mark.parametrize("policy", POLICIES)
def test_differentiable_twice(policy: str) -> None:
    """With the same random numbers each policy is a smooth function of its images."""
    images = torch.rand(1, 2, 8, 8, dtype=torch.float64, requires_grad=True)

    def augment(images: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        return POLICIES[policy](images).square()

    assert torch.autograd.gradcheck(augment, images, fast_mode=True)
    assert torch.autograd.gradgradcheck(augment, images, fast_mode=True)


@pytest.mark.parametrize("policy", POLICIES)
def test_each_image_gets_its_own(policy: str) -> None:
    images = (torch.rand(1, 3, 16, 16) + 1).expand(64, 3, 16, 16)
    assert len({image.numpy().tobytes() for image in POLICIES[policy](images)}) > 10


def test_policies_are_applied_in_order() -> None:
    images = torch.rand(4, 3, 16, 16)
    torch.manual_seed(5)
    expected = noise(cutout(color(images)), 0.1)
    torch.manual_seed(5)
    assert torch.equal(augmentation("color,cutout", 0.1)(images), expected)


@pytest.mark.parametrize("none", ["", "none"])
def test_none_changes_nothing(none: str) -> None:
    images = torch.rand(2, 3, 8, 8)
    assert augmentation(none)(images) is images


@pytest.mark.parametrize(("policies", "message"), [("colour", "got 'colour'"), ("color,color", "named twice")])
def test_unknown_policies(policies: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        augmentation(policies)
