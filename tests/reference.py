"""The f-divergences once more, from their definitions: references that share nothing with the kernels.

`definition` and `slope` are f and f' as the literature writes them, for mpmath numbers. `log_ratio`
is log (f*)' as a function of the output t in NumPy's extended precision. Shifts are found by bisection on the shift
itself.
"""

from __future__ import annotations

import mpmath
import numpy as np
import torch

# u / (1 + u) must not round to 1 at the largest u that tests use, e^200.
mpmath.mp.dps = 120

NAMED = (
    "kl", "reverse_kl", "jensen_shannon", "gan", "pearson_chi2", "neyman_chi2", "squared_hellinger", "jeffreys",
)  # fmt: skip
# Between, beyond and next to the values that have names of their own: -1, 0, 1/2, 1, 2.
ALPHAS = ("alpha:-2.5", "alpha:-0.5", "alpha:0.001", "alpha:0.3", "alpha:0.8", "alpha:0.999", "alpha:1.5", "alpha:3")
FAMILIES = NAMED + ALPHAS
# r = 0 below a finite output: the ratio is clipped, and log r is -inf over a range of outputs.
CLIPPED = ("pearson_chi2", "alpha:1.5", "alpha:3")
SUPREMUM = {
    "reverse_kl": 0.0, "jensen_shannon": float(np.log(2)), "gan": 0.0, "neyman_chi2": 1.0, "squared_hellinger": 1.0,
    **{name: 1 / (1 - float(name[6:])) for name in ALPHAS if float(name[6:]) < 1},
}  # fmt: skip


def alpha_of(name: str) -> float:
    return float(name.partition(":")[2] or 0)


def definition(name: str, u):
    """f(u), mpmath."""
    log, sqrt = mpmath.log, mpmath.sqrt
    if name.startswith("alpha"):
        a = mpmath.mpf(alpha_of(name))
        return (u**a - a * u - (1 - a)) / (a * (a - 1))
    return {
        "kl": lambda: u * log(u),
        "reverse_kl": lambda: -log(u),
        "jensen_shannon": lambda: u * log(u) - (u + 1) * log((u + 1) / 2),
        "gan": lambda: u * log(u) - (u + 1) * log(u + 1),
        "pearson_chi2": lambda: (u - 1) ** 2,
        "neyman_chi2": lambda: (1 - u) ** 2 / u,
        "squared_hellinger": lambda: (sqrt(u) - 1) ** 2,
        "jeffreys": lambda: (u - 1) * log(u),
    }[name]()


def slope(name: str, u):
    """f'(u), for mpmath numbers or a float64 tensor; a test checks it against differences of `definition`."""
    tensor = isinstance(u, torch.Tensor)
    log, sqrt, number = (torch.log, torch.sqrt, float) if tensor else (mpmath.log, mpmath.sqrt, mpmath.mpf)
    if name.startswith("alpha"):
        a = number(alpha_of(name))
        return (u ** (a - 1) - 1) / (a - 1)
    return {
        "kl": lambda: log(u) + 1,
        "reverse_kl": lambda: -1 / u,
        "jensen_shannon": lambda: log(2 * u / (1 + u)),
        "gan": lambda: log(u / (1 + u)),
        "pearson_chi2": lambda: 2 * (u - 1),
        "neyman_chi2": lambda: 1 - 1 / u**2,
        "squared_hellinger": lambda: 1 - 1 / sqrt(u),
        "jeffreys": lambda: log(u) + 1 - 1 / u,
    }[name]()


def log_ratio(name: str, t: np.ndarray) -> np.ndarray:
    """log (f*)'(t) in np.longdouble; NaN outside the domain of f*, -inf where the ratio is clipped to zero."""
    t = np.asarray(t, dtype=np.longdouble)
    one, two = np.longdouble(1), np.longdouble(2)
    with np.errstate(all="ignore"):
        if name == "logit":
            return t
        if name == "kl":
            return t - one
        if name == "reverse_kl":
            return -np.log(-t)
        if name == "jensen_shannon":
            # log(e^t / (2 - e^t)) by the distance to the edge.
            return _minus_log_expm1(np.log(two) - t)
        if name == "gan":
            return _minus_log_expm1(-t)
        if name == "pearson_chi2":
            return np.log1p(np.maximum(t / two, -one))
        if name == "neyman_chi2":
            return -np.log1p(-t) / two
        if name == "squared_hellinger":
            return -two * np.log1p(-t)
        if name == "jeffreys":
            return -_log_of_wright_omega(one - t)
        a = np.longdouble(alpha_of(name))
        z = (a - one) * t
        return np.log1p(np.maximum(z, -one) if a > 1 else z) / (a - one)


def _minus_log_expm1(u: np.ndarray) -> np.ndarray:
    """-log(e^u - 1), where e^u may overflow."""
    return np.where(u > 1, -u - np.log1p(-np.exp(-u)), -np.log(np.expm1(np.minimum(u, 1))))


def _log_of_wright_omega(z: np.ndarray) -> np.ndarray:
    """y with e^y + y = z, by plain Newton from the right, where the left side is convex."""
    y = np.where(z > 2, np.log(np.maximum(z, 2)), np.minimum(z, 1))
    for _ in range(8):  # from within one of the root, quadratically
        e = np.exp(y)
        y = y - (e + y - z) / (e + 1)
    return np.where(z == -np.inf, z, np.where(z == np.inf, z, y))


def score_factor(name: str, log_r: np.ndarray) -> np.ndarray:
    """d log r / dt at given log r: how much an error of the output or of the shift moves log r."""
    x = np.asarray(log_r, dtype=np.longdouble)
    with np.errstate(all="ignore"):
        if name in ("kl", "logit"):
            return np.ones_like(x)
        if name in ("jensen_shannon", "gan"):
            return 1 + np.exp(x)
        if name == "jeffreys":
            return 1 / (1 + np.exp(-x))
        if name == "reverse_kl":
            return np.exp(x)
        if name == "pearson_chi2":
            return np.exp(-x) / 2
        if name == "neyman_chi2":
            return np.exp(2 * x) / 2
        if name == "squared_hellinger":
            return 2 * np.exp(x / 2)
        return np.exp((1 - np.longdouble(alpha_of(name))) * x)


def log_ratio_below(name: str, u: np.ndarray) -> np.ndarray:
    """log (f*)'(s - u) for the supremum s of f*'s domain, where it has one; else log (f*)'(-u).

    s - u itself would lose the digits of a distance u that is small against s.
    """
    if name not in SUPREMUM:
        return log_ratio(name, -u)
    with np.errstate(all="ignore"):
        if name in ("jensen_shannon", "gan"):
            return _minus_log_expm1(u)
        # f' = s - r^(a-1) / (1 - a), where a is 0 for reverse_kl; the named ones are multiples of alpha.
        a, scale = {
            "reverse_kl": (0, 1),
            "neyman_chi2": (-1, 2),
            "squared_hellinger": (0.5, 0.5),
        }.get(name, (alpha_of(name), 1))
        below = np.longdouble(1) - np.longdouble(a)
        return -np.log(below * u / np.longdouble(scale)) / below


def _falling_root(function, low, high):
    """Where a falling function is zero, by Ridders' method: at least as fast as bisection, which needs 64 steps."""
    with np.errstate(all="ignore"):
        at_low, at_high, last = function(low), function(high), low
        while True:
            middle = (low + high) / 2
            at_middle = function(middle)
            found = middle + (middle - low) * at_middle / np.sqrt(at_middle**2 - at_low * at_high)
            # Where the function is infinite: bisection.
            found = found if low < found < high else middle
            if found in (low, high) or abs(found - last) <= 2 * np.spacing(abs(found)):
                return found
            last = found
            for x, y in ((middle, at_middle), (found, function(found))):
                if y == 0:
                    return x
                if y > 0 and x > low:
                    low, at_low = x, y
                if y < 0 and x < high:
                    high, at_high = x, y


def solve(name: str, h: np.ndarray, w: np.ndarray | None = None):
    """Log-ratios with E_Q r = 1 and their shift, by Ridders' method on the shift in np.longdouble.

    The unknown is the distance of the largest output from the edge of the domain, in logarithm, or its negative where
    f* has no edge.
    """
    h = np.asarray(h, dtype=np.longdouble)
    w = np.ones_like(h) if w is None else np.asarray(w, dtype=np.longdouble)
    highest = h[w > 0].max()
    below = highest - h
    edge = name in SUPREMUM

    def at(unknown):
        return np.where(w > 0, log_ratio_below(name, below + (np.exp(unknown) if edge else unknown)), -np.inf)

    def mean(unknown):
        with np.errstate(over="ignore"):
            return np.sum(w * np.exp(at(unknown))) / np.sum(w)

    low, high, width = np.longdouble(-1), np.longdouble(1), np.longdouble(1)
    while mean(low) < 1:
        low, width = low - width, 2 * width
    width = np.longdouble(1)
    while mean(high) > 1:
        high, width = high + width, 2 * width
    middle = _falling_root(lambda unknown: np.log(mean(unknown)), low, high)
    shift = highest + (np.exp(middle) - np.longdouble(SUPREMUM[name]) if edge else middle)
    # Samples of weight zero have a ratio too.
    return log_ratio_below(name, below + (np.exp(middle) if edge else middle)), shift


def mp_log_ratio(name: str, t) -> mpmath.mpf:
    """log (f*)'(t): the x with f'(e^x) = t, by bisection in 120 digits on `slope`; -inf where the ratio is clipped."""
    low, high = mpmath.mpf(-3000), mpmath.mpf(3000)
    if slope(name, mpmath.exp(low)) > t:
        return mpmath.mpf("-inf")
    for _ in range(420):
        middle = (low + high) / 2
        if slope(name, mpmath.exp(middle)) < t:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def outputs(name: str, shape, dtype=torch.float64, scale: float = 1.0, generator=None) -> torch.Tensor:
    """Random outputs in the domain of f*, away from its edge by a spread of distances."""
    draws = torch.randn(shape, dtype=torch.float64, generator=generator) * scale
    if name in SUPREMUM:
        draws = SUPREMUM[name] - 0.05 - draws.abs()
    elif name in CLIPPED:
        draws = draws.abs() - 1 / max(1.0, alpha_of(name) - 1) * 0.5
    return draws.to(dtype)


def seeded(seed: int) -> torch.Generator:
    """Random numbers for tensors on the default device."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def on_device(arguments: dict) -> dict:
    """A test's parameters, which are made when the tests are collected, on the default device."""
    device = torch.get_default_device()
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


def numpy_of(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy().astype(np.longdouble)
