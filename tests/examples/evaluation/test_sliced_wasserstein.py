"""The sliced Wasserstein distance, against scipy's one-dimensional distance, a closed form and its properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import convolve1d
from scipy.stats import wasserstein_distance

from evaluation import sliced_wasserstein as sw
from evaluation.sliced_wasserstein import distances, laplacian_pyramid, sliced_wasserstein, slices
from training.data import procedural_faces as faces


def portraits(count: int, size: int, first: int = 0) -> torch.Tensor:
    return torch.from_numpy(faces.render(faces.traits(count, first=first), size))


def pyramid(images: np.ndarray) -> list[np.ndarray]:
    """Bands by scipy's convolution; the image between two sizes is the zero-stuffed one, blurred, times four."""

    def blur(x: np.ndarray) -> np.ndarray:
        for axis in (2, 3):
            x = convolve1d(x, np.array([1, 4, 6, 4, 1]) / 16, axis=axis, mode="mirror")
        return x

    bands = []
    while min(images.shape[2:]) >= 32:
        small = blur(images)[:, :, ::2, ::2]
        stuffed = np.zeros_like(images)
        stuffed[:, :, ::2, ::2] = small
        bands.append(images - 4 * blur(stuffed))
        images = small
    return [*bands, images]


def patches(band: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """(images · corners, C · 49), one corner after the other."""
    return np.array([image[:, y : y + 7, x : x + 7].ravel() for image in band for y, x in corners.T])


@pytest.mark.parametrize(("channels", "size"), [(3, 32), (1, 33), (3, 70)])
def test_against_scipy(channels: int, size: int) -> None:
    real, fake = (torch.rand(3, channels, size, size) * 2 - 1 for _ in range(2))
    fake = fake * 0.7 + 0.2
    expected = []
    both = zip(pyramid(real.double().numpy()), pyramid(fake.double().numpy()), strict=True)
    for level, (ours, theirs) in enumerate(both):
        mean, deviation = ours.mean((0, 2, 3), keepdims=True), ours.std((0, 2, 3), keepdims=True)
        corners, directions = sw.draw(5, level, ours.shape)
        apart = []
        for positions, vectors in zip(corners, directions.numpy(), strict=True):
            one, other = (patches((band - mean) / deviation, positions) @ vectors for band in (ours, theirs))
            apart += [wasserstein_distance(a, b) for a, b in zip(one.T, other.T, strict=True)]
        expected.append(1000 * np.mean(apart))
    measured = sliced_wasserstein(real, fake, seed=5)
    assert list(measured) == [*(str(band.shape[2]) for band in pyramid(real.numpy())), "mean"]
    # float32 against float64: values of order 1, times 1000.
    np.testing.assert_allclose(list(measured.values()), [*expected, np.mean(expected)], rtol=1e-4, atol=1e-3)


def test_directions_are_unit_vectors_and_patches_cover_the_image() -> None:
    corners, vectors = sw.draw(0, 0, (1, 3, 16, 20))
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones_like(vectors[:, 0]))
    assert corners.min() == 0
    assert (corners.max(axis=(0, 2)) == (9, 13)).all()  # the last positions where 7 pixels fit


def test_a_shift_has_a_closed_form() -> None:
    # All images brighter by s deviations: every projection moves by s Σ_k w_k, whose mean size over random unit vectors
    # of n = 147 components is s √(2 / π) (1 + O(1/n)); fine bands do not see a constant.
    real = torch.rand(40, 3, 32, 32) - 0.5
    _, last = laplacian_pyramid(real)
    shift = 0.4 * last.std((0, 2, 3), correction=0)
    measured = sliced_wasserstein(real, real + shift[:, None, None])
    # The mean of 256 half-normal directions has a relative error of √(π / 2 − 1) / 16 = 5 %; four of them, rounded.
    assert measured["16"] == pytest.approx(1000 * 0.4 * math.sqrt(2 / math.pi), rel=0.2)
    assert measured["32"] == pytest.approx(0, abs=0.01)


def test_equal_sets_are_at_zero_in_any_order() -> None:
    images = portraits(30, 32)
    assert set(sliced_wasserstein(images, images).values()) == {0.0}
    mixed = images[torch.randperm(30)]
    assert sliced_wasserstein(images, mixed)["mean"] < 1e-2  # sums in another order
    assert sliced_wasserstein(images, portraits(30, 32, first=30))["mean"] > 1


def test_grows_with_noise_and_blur() -> None:
    real, fake = portraits(200, 32), portraits(200, 32, first=200).float()
    random = torch.Generator().manual_seed(0)
    noise = torch.randn(fake.shape, generator=random)
    noisy = [sliced_wasserstein(real, (fake + s * noise).clamp(0, 255).byte())["32"] for s in (0, 8, 24, 64)]
    assert noisy == sorted(noisy)
    assert noisy[1] > 1.5 * noisy[0]
    blurred = [sliced_wasserstein(real, F.avg_pool2d(fake, k, 1, k // 2).byte())["32"] for k in (1, 3, 5)]
    assert blurred == sorted(blurred)
    assert blurred[1] > 3 * blurred[0]


def test_brightness_and_contrast_count() -> None:
    real, fake = portraits(100, 32), portraits(100, 32, first=100)
    same = sliced_wasserstein(real, fake)["mean"]
    assert sliced_wasserstein(real, (fake * 0.8).byte())["mean"] > 3 * same


def test_the_seed_decides_and_the_global_generator_is_left_alone() -> None:
    real, fake = portraits(20, 16), portraits(20, 16, first=20)
    state = torch.get_rng_state()
    first = sliced_wasserstein(real, fake, seed=1)
    assert sliced_wasserstein(real, fake, seed=1) == first
    assert sliced_wasserstein(real, fake, seed=2) != first
    assert sliced_wasserstein(real, fake) == sliced_wasserstein(real, fake, seed=0)  # scores of two versions compare
    assert torch.equal(state, torch.get_rng_state())


def test_bytes_and_floating_point_mean_the_same() -> None:
    real, fake = portraits(10, 16), portraits(10, 16, first=10)
    floats = sliced_wasserstein(real.float() / 127.5 - 1, fake.double() / 127.5 - 1)
    assert floats == pytest.approx(sliced_wasserstein(real, fake), rel=1e-4)


def test_images_without_content_have_a_distance() -> None:
    assert math.isfinite(sliced_wasserstein(torch.zeros(4, 1, 32, 32), torch.rand(4, 1, 32, 32))["mean"])


@pytest.mark.parametrize("count", [1, sw.CHUNK + 1])
def test_any_number_of_images(count: int) -> None:
    images = portraits(count, 16)
    kept = slices(images)
    assert kept.projections[0].shape == (sw.ROUNDS * sw.DIRECTIONS, count * sw.PATCHES)
    assert (np.diff(kept.projections[0], axis=1) >= 0).all()
    assert distances(kept, slices(images, like=kept))["mean"] == 0


def test_the_images_at_a_time_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither to the scales, which are those of all images, nor to the distances."""
    real, fake = portraits(7, 32), portraits(7, 32, first=7) // 2
    expected = sliced_wasserstein(real, fake)
    monkeypatch.setattr(sw, "CHUNK", 3)
    assert sliced_wasserstein(real, fake) == pytest.approx(expected, rel=1e-5)  # float32, in another order of summation


@pytest.mark.parametrize(
    ("real", "fake", "message"),
    [
        ((4, 3, 15, 16), (4, 3, 15, 16), r"16 pixels or more, got \(4, 3, 15, 16\)"),
        ((0, 3, 16, 16), (0, 3, 16, 16), r"got \(0, 3, 16, 16\)"),
        ((4, 2, 16, 16), (4, 2, 16, 16), r"got \(4, 2, 16, 16\)"),
        ((4, 3, 16), (4, 3, 16), r"got \(4, 3, 16\)"),
        ((4, 3, 16, 16), (3, 3, 16, 16), r"as many generated images as real ones, got 3 and 4"),
        ((4, 3, 16, 16), (4, 3, 32, 32), r"16 pixels like the real ones, got 32"),
        ((4, 3, 16, 16), (4, 1, 16, 16), r"3 channels like the real images, got 1"),
    ],
)
def test_wrong_images_are_named(real: tuple[int, ...], fake: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sliced_wasserstein(torch.rand(real), torch.rand(fake))


def test_integers_that_are_not_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"uint8, or as floating point in \[-1, 1\], got torch\.int64"):
        sliced_wasserstein(torch.zeros(2, 3, 16, 16).long(), torch.zeros(2, 3, 16, 16).long())
