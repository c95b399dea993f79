"""The score of generated digits tells digits from what is none, and variety from one digit."""

import numpy as np
import pytest

from mlx_impl.data import Dataset, load_dataset
from mlx_impl.quality import Score, score


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits", (8, 8))


@pytest.fixture(scope="module")
def of_real_digits(digits) -> Score:
    return score(digits.images[:400], digits)


def test_real_digits_score_like_real_digits(of_real_digits):
    assert of_real_digits.accuracy > 0.93
    assert abs(of_real_digits.confidence - of_real_digits.real_confidence) < 0.03
    assert sum(of_real_digits.histogram) == 400
    assert of_real_digits.classes > 9.9


def test_noise_and_averages_score_less(digits, of_real_digits):
    rng = np.random.default_rng(0)
    noise = rng.permuted(digits.images[:400].reshape(400, 64), axis=1).reshape(400, 8, 8, 1)
    assert score(noise, digits).confidence < of_real_digits.confidence - 0.2
    blurred = (digits.images[:400] + digits.images[400:800]) / 2
    assert score(blurred, digits).confidence < of_real_digits.confidence - 0.2


def test_one_digit_only_is_seen(digits):
    threes = digits.images[digits.labels == 3]
    found = score(threes, digits)
    assert found.histogram[3] > 0.9 * len(threes)
    assert found.classes < 2
    assert "classes    1." in str(found)


def test_images_that_cannot_be_scored(digits):
    with pytest.raises(ValueError, match="no labels"):
        score(digits.images, Dataset(digits.images, None))
    with pytest.raises(ValueError, match=r"images of \(9, 8, 1\) held against \(8, 8, 1\)"):
        score(np.zeros((2, 9, 8, 1), np.float32), digits)
