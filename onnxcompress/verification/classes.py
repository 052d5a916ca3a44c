"""Classifiers: how often both models choose the same class, and how often each is right.

A model does not say that it is a classifier, so an output is taken for one when

- labels are given and they fit: one whole number per sample, each below the number of classes C of
  an output [N, C] (trailing axes of length 1 do not count), or
- its rows, along the last axis, are probabilities: none negative, each row adding up to 1, or
- it is [N, C] and its rows look like a classifier's logits: the softmax of a row has a mean maximum
  of at least 0.3. Embeddings have flat softmaxes, or the same position on top for every sample. An
  output of the shape of an input is none either (an autoencoder's).

Without labels the original must choose more than one class over the samples, else agreement says
nothing: a model that answers the same to every random input would agree with a destroyed one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxcompress.verification.metrics import Array, Floats

_LOGITS_CONFIDENCE = 0.3
_Z95 = 1.959963984540054


@dataclass(frozen=True, slots=True)
class Agreement:
    """How often two classifiers choose the same class.

    Attributes:
        output: Output name.
        classes: Number of classes C.
        decisions: Rows compared (samples, or positions of samples).
        top1_ratio: Share of decisions whose top class is the same in both, 0 to 1.
        top5_ratio: Share of decisions whose top class in the original is among the result's first
            five; None with five classes or fewer.
        because: Why the output is taken for a classifier's.
    """

    output: str
    classes: int
    decisions: int
    top1_ratio: float
    top5_ratio: float | None
    because: str


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Top-1 of both models on labelled samples, and their paired difference.

    Attributes:
        output: Output name.
        samples: Labelled samples N.
        original_ratio: Share that the original has right, 0 to 1.
        result_ratio: Share that the result has right.
        difference_ratio: Result minus original.
        difference_low_ratio: Lower end of the 95 % interval of the difference.
        difference_high_ratio: Upper end.
        only_original: Samples that only the original has right.
        only_result: Samples that only the result has right.
    """

    output: str
    samples: int
    original_ratio: float
    result_ratio: float
    difference_ratio: float
    difference_low_ratio: float
    difference_high_ratio: float
    only_original: int
    only_result: int


def paired_interval(only_first: int, only_second: int, samples: int) -> tuple[float, float]:
    """95 % interval of the difference of two proportions measured on the same samples.

    Adjusted Wald, for second minus first: with b and c the samples that only one of the two has
    right, p = (b + 1)/(N + 2) and q = (c + 1)/(N + 2),

        q - p  ±  1.96 sqrt( (p + q - (q - p)²) / (N + 2) )

    It holds its level for small N and has a width above 0 when no sample differs.

    Source: Bonett and Price 2012, "Adjusted Wald confidence interval for a difference of binomial
        proportions
    based on paired data", J. Educ. Behav. Stat. 37(4); recommended by Fagerland, Lydersen and Laake
    2014.

    Raises:
        ValueError: If there are no samples.
    """
    if samples <= 0:
        raise ValueError("an interval needs at least one sample")
    p, q = (only_first + 1) / (samples + 2), (only_second + 1) / (samples + 2)
    half = _Z95 * math.sqrt((p + q - (q - p) ** 2) / (samples + 2))
    return max(-1.0, q - p - half), min(1.0, q - p + half)


class ClassMeter:
    """Streams one output of both models and decides at the end whether it was a classifier's.

    Args:
        name: Output name.
        may_be_logits: Whether it may count as a classifier's because of its values alone.
    """

    def __init__(self, name: str, *, may_be_logits: bool = True) -> None:
        self._name = name
        self._may_be_logits = may_be_logits
        self._rank = 0
        self._classes = 0
        self._decisions = self._top1 = self._top5 = 0
        self._confidence = 0.0
        self._seen: npt.NDArray[np.bool_] = np.zeros(0, dtype=np.bool_)
        self._possible = True
        self._probabilities = True
        self._labelled = self._original_right = self._result_right = self._both_right = 0
        self._labels_fit = True

    def update(
        self, original: Array, result: Array, samples: int, labels: Array | None = None
    ) -> None:
        """Add a batch of ``samples`` samples and, where there are any, their labels [samples]."""
        shape = original.shape
        while len(shape) > 2 and shape[-1] == 1:
            shape = shape[:-1]
        fits = len(shape) >= 2 and shape[-1] >= 2 and shape[0] == samples
        if not fits or original.dtype.kind != "f" or self._classes not in (0, shape[-1]):
            self._possible = False
        if not self._possible:
            return
        self._rank, self._classes = len(shape), shape[-1]
        y = original.reshape(-1, self._classes).astype(np.float64)
        z = result.reshape(-1, self._classes).astype(np.float64)
        self._add_rows(y, z)
        if labels is not None:
            self._add_labels(y.argmax(axis=1), z.argmax(axis=1), labels)

    def _add_rows(self, y: Floats, z: Floats) -> None:
        top_y, top_z = y.argmax(axis=1), z.argmax(axis=1)
        self._decisions += len(y)
        self._top1 += int(np.count_nonzero(top_y == top_z))
        if self._classes > 5:
            five = np.argpartition(-z, 5, axis=1)[:, :5]
            self._top5 += int(np.count_nonzero((five == top_y[:, None]).any(axis=1)))
        if not len(self._seen):
            self._seen = np.zeros(self._classes, dtype=np.bool_)
        self._seen[top_y] = True
        sums = y.sum(axis=1)
        self._probabilities &= bool((y >= 0).all() and np.allclose(sums, 1.0, rtol=0, atol=1e-2))
        with np.errstate(invalid="ignore", over="ignore"):
            softmax_sums = np.exp(y - y.max(axis=1, keepdims=True)).sum(axis=1)
            self._confidence += float((1.0 / softmax_sums).sum())

    def _add_labels(self, y: Array, z: Array, labels: Array) -> None:
        fit = labels.ndim == 1 and len(labels) == len(y) and labels.dtype.kind in "iuf"
        if fit and len(labels):
            whole = labels.dtype.kind != "f" or bool(np.all(labels == np.floor(labels)))
            fit = whole and bool(labels.min() >= 0 and labels.max() < self._classes)
        if not fit:
            self._labels_fit = False
            return
        right_y, right_z = y == labels, z == labels
        self._labelled += len(labels)
        self._original_right += int(np.count_nonzero(right_y))
        self._result_right += int(np.count_nonzero(right_z))
        self._both_right += int(np.count_nonzero(right_y & right_z))

    def _because(self) -> str | None:
        if not self._possible or not self._decisions:
            return None
        if self._labels_fit and self._labelled:
            return "the labels fit it"
        if np.count_nonzero(self._seen) < 2:
            return None
        if self._probabilities:
            return "its rows are probabilities"
        confidence = self._confidence / self._decisions
        if self._may_be_logits and self._rank == 2 and confidence >= _LOGITS_CONFIDENCE:
            return f"its rows look like logits (mean softmax maximum {confidence:.2f})"
        return None

    def agreement(self) -> Agreement | None:
        """The agreement; None when the output does not look like a classifier's."""
        because = self._because()
        if because is None:
            return None
        return Agreement(
            output=self._name,
            classes=self._classes,
            decisions=self._decisions,
            top1_ratio=self._top1 / self._decisions,
            top5_ratio=self._top5 / self._decisions if self._classes > 5 else None,
            because=because,
        )

    def accuracy(self) -> Accuracy | None:
        """Top-1 of both; None without labels that fit this output."""
        if not self._possible or not self._labels_fit or not self._labelled:
            return None
        n = self._labelled
        only_original = self._original_right - self._both_right
        only_result = self._result_right - self._both_right
        low, high = paired_interval(only_original, only_result, n)
        return Accuracy(
            output=self._name,
            samples=n,
            original_ratio=self._original_right / n,
            result_ratio=self._result_right / n,
            difference_ratio=(only_result - only_original) / n,
            difference_low_ratio=low,
            difference_high_ratio=high,
            only_original=only_original,
            only_result=only_result,
        )
