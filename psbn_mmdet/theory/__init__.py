"""Why filters collapse and how psBN brings them back, as numbers (arXiv 2001.11216).

Section 4 of the paper follows one filter ``y = ReLU(gamma * x_hat + beta)``, ``x_hat ~ N(0, 1)``,
through one step of SGD on nothing but noise (:mod:`.theorem`: ``K``, ``J``, ``drift``,
``simulate_drift``). Section 5 is about a filter that no longer fires, so that weight decay alone
moves it (:mod:`.dynamics`: ``C``, ``C_increment``, ``decay_factors``, ``decay_path`` and the
forecast ``steps_until_active``). :mod:`.figures` draws both.

In section 4 ``beta`` is what the layer adds: for psBN give ``beta + alpha``. In section 5 ``beta``
is the trained parameter and ``alpha`` stands on its own, as in Eq. 6.
"""

from .dynamics import C, C_increment, decay_factors, decay_path, steps_until_active
from .theorem import Estimate, J, K, Normal, Uniform, drift, log_abs_K, simulate_drift

__all__ = [
    "C",
    "C_increment",
    "Estimate",
    "J",
    "K",
    "Normal",
    "Uniform",
    "decay_factors",
    "decay_path",
    "drift",
    "log_abs_K",
    "simulate_drift",
    "steps_until_active",
]
