"""How good are generated digits? What a classifier of the real ones makes of them.

A number that needs no network and no pretrained weights: logistic regression is fitted to real,
labelled images and asked about the generated ones. Digits that look like digits are told with about
the confidence of real ones, and all classes occur. Noise is told with confidence as well, so the
score ranks runs of one system on one data set; it is no substitute for looking at them.
"""

from dataclasses import dataclass

import numpy as np

from mlx_impl.data import Dataset
from mlx_impl.images import Images

FITTED_TO = 5000  # images at most


@dataclass(frozen=True)
class Score:
    """A classifier's verdict on generated images.

    accuracy: of the classifier on real images that it was not fitted to.
    real_confidence, confidence: the mean probability of the class it chooses, for those real images
        and for the generated ones.
    histogram: how many generated images it takes for each class.
    """

    accuracy: float
    real_confidence: float
    confidence: float
    histogram: tuple[int, ...]

    @property
    def classes(self) -> float:
        """exp of the histogram's entropy: 10 for ten equally frequent digits, 1 for only one."""
        p = np.array(self.histogram) / sum(self.histogram)
        return float(np.exp(-sum(q * np.log(q) for q in p if q > 0)))

    def __str__(self) -> str:
        counts = "  ".join(f"{label}: {n}" for label, n in enumerate(self.histogram))
        return (
            f"confidence {self.confidence:.3f} (real images: {self.real_confidence:.3f})\n"
            f"classes    {self.classes:.1f} of {len(self.histogram)}   {counts}\n"
            f"classifier {100 * self.accuracy:.1f} % right on real images it had not seen"
        )


def score(images: Images, real: Dataset) -> Score:
    """Score generated images (N, H, W, C) by real ones (M, H, W, C) with labels.

    Raises ValueError: no labels, or images of another size. ImportError: scikit-learn is missing.
    """
    if real.labels is None:
        raise ValueError("the real images have no labels")
    if images.shape[1:] != real.images.shape[1:]:
        raise ValueError(f"images of {images.shape[1:]} held against {real.images.shape[1:]}")
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ImportError(
            "a score needs scikit-learn: python -m pip install scikit-learn"
        ) from error
    order = np.random.default_rng(0).permutation(len(real.images))
    held_out, fitted = np.split(order, [len(order) // 5])
    fitted, held_out = fitted[:FITTED_TO], held_out[:FITTED_TO]

    def features(x: Images) -> Images:
        return x.reshape(len(x), -1)

    classifier = LogisticRegression(C=0.01, max_iter=1000)
    classifier.fit(features(real.images[fitted]), real.labels[fitted])
    probabilities = classifier.predict_proba(features(images))
    chosen = classifier.classes_[probabilities.argmax(1)]
    return Score(
        accuracy=float(classifier.score(features(real.images[held_out]), real.labels[held_out])),
        real_confidence=float(
            classifier.predict_proba(features(real.images[held_out])).max(1).mean()
        ),
        confidence=float(probabilities.max(1).mean()),
        histogram=tuple(np.bincount(chosen, minlength=int(real.labels.max()) + 1).tolist()),
    )
