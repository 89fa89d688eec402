"""Whether a net is right as often as it says.

C. Guo et al., On Calibration of Modern Neural Networks, ICML 2017, arXiv:1706.04599.
"""

from typing import Any

import numpy as np

from flax_resnet.evaluate import wilson_interval

_BINS = 15


def calibration(confidence: np.ndarray, correct: np.ndarray) -> dict[str, Any]:
    """What the page shows: the expected calibration "error", and "bins", each with its examples.

    Args:
      confidence: float [N], the probability of each prediction; above 0, at most 1.
      correct: bool [N].
    """
    # A bin has its upper bound, and not its lower one.
    bin_of_each = np.clip(np.ceil(confidence * _BINS).astype(int) - 1, 0, _BINS - 1)
    bins = []
    for i in np.unique(bin_of_each).tolist():
        inside = bin_of_each == i
        count, right = int(inside.sum()), int(correct[inside].sum())
        bins.append(
            {
                "low": i / _BINS,
                "high": (i + 1) / _BINS,
                "count": count,
                "right": right,
                "confidence": float(confidence[inside].mean()),
                "accuracy": right / count,
                "interval": wilson_interval(right, count),
            }
        )
    gaps = sum(one["count"] * abs(one["accuracy"] - one["confidence"]) for one in bins)
    most = max(one["count"] for one in bins)
    return {"error": gaps / len(confidence), "bins": bins, "number": _BINS, "most": most}
