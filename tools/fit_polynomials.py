"""Polynomial coefficients of csrc/cpu/simd.h and csrc/math: near-minimax fits in 60 digits.

Prints each coefficient list, lowest degree first, and the fit's worst relative error against the
function it serves. Run it to reproduce or to change a degree: `python tools/fit_polynomials.py`.
"""

from mpmath import atanh, chebyfit, cos, expm1, log, log1p, mp, mpf, pi, sin, sqrt

mp.dps = 60


def exp_tail(r):
    """(e^r - 1 - r) / r^2, the Q of e^r - 1 = r + r^2 Q(r)."""
    if abs(r) < mpf(10) ** -12:
        return mpf(1) / 2 + r / 6 + r * r / 24
    return (expm1(r) - r) / r**2


def log_tail(z):
    """(log(m) - 2 s) / s^3 with s = (m - 1) / (m + 1) and z = s^2."""
    if z < mpf(10) ** -20:
        return mpf(2) / 3 + 2 * z / 5
    s = sqrt(z)
    return (2 * atanh(s) - 2 * s) / s**3


def log1p_tail(f):
    """-2 (log(1 + f) - f) / f^2."""
    if abs(f) < mpf(10) ** -12:
        return 1 - 2 * f / 3 + f * f / 2
    return -2 * (log1p(f) - f) / f**2


def exp2_tail(f):
    """(2^f - 1) / f."""
    return (mpf(2) ** f - 1) / f if abs(f) > mpf(10) ** -12 else log(2) + f * log(2) ** 2 / 2


def sine_factor(z):
    """sin(2 pi f) / f with z = f^2."""
    if z < mpf(10) ** -30:
        return 2 * pi - (2 * pi) ** 3 * z / 6
    return sin(2 * pi * sqrt(z)) / sqrt(z)


def cosine_tail(z):
    """(cos(2 pi f) - 1) / f^2 with z = f^2."""
    if z < mpf(10) ** -20:
        return -((2 * pi) ** 2) / 2 + (2 * pi) ** 4 * z / 24
    return (cos(2 * pi * sqrt(z)) - 1) / z


def fit(name, function, interval, degree, relative_to, widened=1):
    coefficients = chebyfit(function, [widened * end for end in interval], degree + 1)[::-1]
    low, high = interval
    worst = mpf(0)
    for i in range(2001):
        x = low + (high - low) * i / 2000
        value = sum(c * x**k for k, c in enumerate(coefficients))
        worst = max(worst, abs(relative_to(x, value) - relative_to(x, function(x))))
    print(f"{name}: worst relative error {mp.nstr(worst, 3)}")
    print("  {" + ", ".join(mp.nstr(c, 18) for c in coefficients) + "}")


if __name__ == "__main__":
    half = log(2) / 2 + mpf(2) ** -20
    top = ((sqrt(2) - 1) / (sqrt(2) + 1)) ** 2 + mpf(2) ** -20
    for bits, exp_degree, log_degree, unit_degree in ((24, 4, 2, 4), (53, 10, 6, 9)):
        print(f"--- {bits} bits")
        fit("exp_tail", exp_tail, [-half, half], exp_degree, lambda r, q: r * q if r else q)
        fit("log_tail", log_tail, [mpf(0), top], log_degree, lambda z, p: z * p / 2)
        fit("log_tail, log1p of [0, 1]", log_tail, [mpf(0), mpf(1) / 9], unit_degree, lambda z, p: z * p / 2)
    print("--- powers of two")
    # A line fitted to an interval wider by sqrt(3/2) has an error that times f is the same at three extremes.
    for steps, degree, widened in ((32, 1, sqrt(1.5)), (1, 4, 1), (1, 10, 1)):
        bound = mpf(1) / (2 * steps)
        fit(f"exp2_tail, {steps} steps", exp2_tail, [-bound, bound], degree, lambda f, q: f * q / mpf(2) ** f, widened)
    print("--- normals")
    fit("log1p_tail", log1p_tail, [-mpf(1) / 2, mpf(0)], 7, lambda f, q: f * q / (2 - f * log1p_tail(f)))
    eighth = [mpf(0), mpf(1) / 64]
    for sine_degree, cosine_degree in ((3, 3), (6, 6)):
        fit("sine_factor", sine_factor, eighth, sine_degree, lambda z, p: p / sine_factor(z))
        fit("cosine_tail", cosine_tail, eighth, cosine_degree, lambda z, p: z * p / cos(2 * pi * sqrt(z)))
