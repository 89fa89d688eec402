"""Whether a net is right as often as it says.

C. Guo et al., On Calibration of Modern Neural Networks, ICML 2017, arXiv:1706.04599.
"""

from typing import Any

import numpy as np

from flax_resnet.evaluate import wilson_interval

_BINS = 15


def calibration(confidence: np.ndarray, correct: np.ndarray) -> dict[str, Any]:
    """What the page shows of it: the "error" and "bins", a dict for each that has examples."""
    counts, confidences, accuracies = calibration_bins(confidence, correct, _BINS)
    bins = [
        {
            "low": i / _BINS,
            "high": (i + 1) / _BINS,
            "count": int(counts[i]),
            "right": round(counts[i] * accuracies[i]),
            "confidence": confidences[i],
            "accuracy": accuracies[i],
            "interval": wilson_interval(round(counts[i] * accuracies[i]), int(counts[i])),
        }
        for i in np.flatnonzero(counts)
    ]
    error = calibration_error(counts, confidences, accuracies)
    return {"error": error, "bins": bins, "number": _BINS, "most": int(counts.max())}


def calibration_bins(
    confidence: np.ndarray, correct: np.ndarray, bins: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean confidence and accuracy of examples by confidence, in bins of equal width.

    Args:
      confidence: float [N], the probability of each prediction; above 0, at most 1.
      correct: bool [N].
      bins: how many; each has its upper bound, and not its lower one.

    Returns:
      Examples, int [bins], and their mean confidence and accuracy, float [bins], which are
      NaN for a bin without examples.
    """
    of_each = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    counts, sums, hits = (
        np.bincount(of_each, weights, minlength=bins) for weights in (None, confidence, correct)
    )
    with np.errstate(invalid="ignore"):
        return counts, sums / counts, hits / counts


def calibration_error(counts: np.ndarray, confidence: np.ndarray, accuracy: np.ndarray) -> float:
    """Expected calibration error, of `calibration_bins`: their mean gap, by examples."""
    return float(np.nansum(counts * np.abs(accuracy - confidence)) / counts.sum())
