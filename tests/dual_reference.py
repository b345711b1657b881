"""The duals once more, in NumPy and SciPy: conjugates from the textbook table, the shift by scalar minimisation."""

from __future__ import annotations

import math

import numpy as np
import pytest

scipy_optimize = pytest.importorskip("scipy.optimize")
scipy_special = pytest.importorskip("scipy.special")


def conjugate(name: str):
    """f* in NumPy and the supremum of its domain, straight from the textbook table."""
    if name == "kl":
        return lambda t: np.exp(t - 1), math.inf
    if name == "reverse_kl":
        return lambda t: -1 - np.log(-t), 0.0
    if name == "jensen_shannon":
        return lambda t: -np.log(2 - np.exp(t)), math.log(2)
    if name == "gan":
        return lambda t: -np.log1p(-np.exp(t)), 0.0
    if name == "pearson_chi2":
        return lambda t: np.where(t >= -2, t * t / 4 + t, -1.0), math.inf
    if name == "neyman_chi2":
        return lambda t: 2 - 2 * np.sqrt(1 - t), 1.0
    if name == "squared_hellinger":
        return lambda t: t / (1 - t), 1.0
    if name == "jeffreys":

        def jeffreys(t):
            v = scipy_special.lambertw(np.exp(1 - t)).real
            return 1 / v + v + t - 2

        return jeffreys, math.inf
    a = float(name.split(":")[1])
    supremum = math.inf if a > 1 else 1 / (1 - a)
    return lambda t: (np.maximum(1 + (a - 1) * t, 0) ** (a / (a - 1)) - 1) / a, supremum


def reference_value(w, real, fake, name):
    """The tight objective by scalar minimisation over nu."""
    f_star, supremum = conjugate(name)
    h = fake @ w
    low = h.max() - supremum if supremum < math.inf else h.min() - 3.0
    low = max(low, h.min() - 3.0)
    width = h.max() + 3.0 - low

    def at(s):
        nu = low + width * s
        with np.errstate(all="ignore"):
            value = nu + f_star(h - nu).mean()
        return value if np.isfinite(value) else 1e30

    found = scipy_optimize.minimize_scalar(at, bounds=(1e-12, 1.0), method="bounded", options={"xatol": 1e-13})
    return real.mean(0) @ w - found.fun


def samples(seed: int = 0, width: int = 4):
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(width, width)) / math.sqrt(width)
    real = np.tanh(rng.normal(0.4, 1.0, (150, width)) @ mixing)
    fake = np.tanh(rng.normal(0.0, 1.3, (200, width)) @ mixing)
    return real, fake


FAMILIES = [
    "kl",
    "reverse_kl",
    "jensen_shannon",
    "gan",
    "pearson_chi2",
    "neyman_chi2",
    "squared_hellinger",
    "jeffreys",
    "alpha:0.5",
    "alpha:1.5",
    "alpha:3",
]


def generator(name: str):
    """f in NumPy, from the same table; the limit at u = 0 where it is finite and wanted."""
    log = np.log
    if name.startswith("alpha"):
        a = float(name.split(":")[1])
        return lambda u: (u**a - a * u - (1 - a)) / (a * (a - 1))
    return {
        "kl": lambda u: scipy_special.xlogy(u, u),
        "reverse_kl": lambda u: -log(u),
        "jensen_shannon": lambda u: scipy_special.xlogy(u, u) - (u + 1) * log((u + 1) / 2),
        "gan": lambda u: scipy_special.xlogy(u, u) - (u + 1) * log(u + 1),
        "pearson_chi2": lambda u: (u - 1) ** 2,
        "neyman_chi2": lambda u: (1 - u) ** 2 / u,
        "squared_hellinger": lambda u: (np.sqrt(u) - 1) ** 2,
        "jeffreys": lambda u: (u - 1) * log(u),
    }[name]
