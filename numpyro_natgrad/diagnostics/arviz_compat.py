# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Calls of ArviZ that work in version 0.x, which is one package, and in 1.x, several with other signatures.

ArviZ is imported inside of the functions, because its import takes longer than a small fit.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np


def psis(log_weights: np.ndarray) -> tuple[np.ndarray, float]:
    """Pareto-smoothed importance sampling (Vehtari, Simpson, Gelman, Yao & Gabry 2024, JMLR 25:72).

    :param log_weights: finite log p − log q of independent draws, ``(S,)``, nats.
    :return: log weights, smoothed and normalised to a sum of 1, ``(S,)``, and k-hat, the Pareto shape of their tail.
    """
    try:
        from arviz_stats.base import array_stats
    except ImportError:
        import arviz

        smoothed, k_hat = arviz.psislw(log_weights)
    else:
        # ArviZ 1.x expects log likelihoods, the negatives of log weights.
        smoothed, k_hat = array_stats.psislw(-log_weights)
    return np.asarray(smoothed), float(k_hat)


def inference_data(posterior: Mapping[str, np.ndarray], statistics: Mapping[str, np.ndarray], **labels: Any) -> Any:
    """One chain of draws, ``(S, *shape)``, and of statistics, ``(S,)``; ``labels`` as for :func:`.to_arviz`."""
    import arviz

    from_dict: Any = arviz.from_dict
    groups = {"posterior": _one_chain(posterior), "sample_stats": _one_chain(statistics)}
    if "InferenceData" in vars(arviz):  # 0.x takes groups as keywords, 1.x as a dict
        return from_dict(**groups, **labels)
    return from_dict(groups, **labels)


def _one_chain(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.asarray(x)[None] for name, x in values.items()}
