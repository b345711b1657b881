"""What density_ratio refuses: in one line the function, the argument, what it got and what is allowed."""

from __future__ import annotations

import math

import pytest
import torch

import refine_ext as rx

H = torch.linspace(-1, 1, 6)
MATRIX = torch.zeros(2, 3)
CASES = [
    # h
    (TypeError, [1.0, 2.0], {}, "h must be a torch.Tensor, got list"),
    (TypeError, 1.0, {}, "h must be a torch.Tensor, got float"),
    (TypeError, torch.arange(4), {}, "h must be float64, float32, float16 or bfloat16, got torch.int64"),
    (TypeError, torch.zeros(4, dtype=torch.complex64), {}, "h must be float64, .* got torch.complex64"),
    (TypeError, torch.zeros(4, dtype=torch.bool), {}, "h must be float64, .* got torch.bool"),
    (ValueError, torch.empty(0), {}, r"h must not be empty, got shape \[0\]"),
    (ValueError, torch.empty(3, 0), {"dim": 1}, r"h must not be empty, got shape \[3, 0\]"),
    (ValueError, torch.empty(0, 3), {"dim": 1}, r"h must not be empty, got shape \[0, 3\]"),
    (ValueError, torch.tensor([1.0, math.nan]), {}, "h must hold no NaN or .inf"),
    (ValueError, torch.full((3,), -math.inf), {}, "h must hold .* at least one finite value"),
    # dim
    (ValueError, H, {"dim": 1}, r"dim must be in \[-1, 0\], got 1"),
    (ValueError, MATRIX, {"dim": -3}, r"dim must be in \[-2, 1\], got -3"),
    (ValueError, torch.tensor(1.0), {"dim": 0}, "dim must be .*, got 0"),
    (TypeError, MATRIX, {"dim": 0.5}, "dim must be an integer.*, got float"),
    # names
    (ValueError, H, {"divergence": "chi2"}, "divergence must be one of kl, .*alpha:<a>, got 'chi2'"),
    (ValueError, H, {"divergence": "alpha:1"}, "alpha must be a finite number other than 0 .*, got 'alpha:1'"),
    (TypeError, H, {"divergence": 2}, "divergence must be a string, got int"),
    (TypeError, H, {"divergence": None}, "divergence must be a string, got NoneType"),
    (TypeError, H, {"divergence": ["kl"]}, "divergence must be a string, got list"),
    (ValueError, H, {"kind": "logits"}, "kind must be one of variational, logit, got 'logits'"),
    (ValueError, H, {"output": "weights"}, "output must be log_ratio or ratio, got 'weights'"),
    (ValueError, H, {"nan_policy": "omit"}, "nan_policy must be raise or propagate, got 'omit'"),
    # base_weights
    (TypeError, H, {"base_weights": [1.0] * 6}, "base_weights must be a torch.Tensor, got list"),
    (ValueError, H, {"base_weights": torch.ones(5)}, r"base_weights must have shape \[6\] or \[6\], got \[5\]"),
    (ValueError, MATRIX, {"base_weights": torch.ones(2), "dim": 1}, r"base_weights must have shape .*, got \[2\]"),
    (ValueError, MATRIX, {"base_weights": torch.ones(3)}, r"base_weights must have shape .*, got \[3\]"),
    (
        TypeError,
        H,
        {"base_weights": torch.ones(6, dtype=torch.complex64)},
        "base_weights must be real, got torch.complex64",
    ),
    (ValueError, H, {"base_weights": torch.zeros(6)}, "h must hold .*base weights .* not all zero"),
    (ValueError, H, {"base_weights": -torch.ones(6)}, "h must hold .*base weights .* non-negative"),
    (ValueError, H, {"base_weights": torch.tensor([1, 1, 1, 1, 1, math.inf])}, "h must hold .*base weights"),
    (ValueError, H, {"base_weights": torch.ones(6, device="meta")}, "base_weights is on meta, h is on cpu"),
    # shift
    (TypeError, H, {"shift": "0"}, "shift must be a number or a tensor, got str"),
    (TypeError, H, {"shift": [[1.0], [2.0, 3.0]]}, "shift must be a number or a tensor, got list"),
    (ValueError, H, {"shift": torch.zeros(2)}, r"shift must be one number or have shape \[\], got \[2\]"),
    (ValueError, MATRIX, {"shift": torch.zeros(3), "dim": 1}, r"shift must be .* shape \[2\], got \[3\]"),
    (ValueError, H, {"shift": math.nan}, "shift must be finite, got nan"),
    (ValueError, H, {"shift": math.inf}, "shift must be finite, got inf"),
    (ValueError, H, {"shift": 0.5, "divergence": "reverse_kl"}, r"shift puts h outside the domain of f\*"),
    (ValueError, MATRIX, {"shift": torch.tensor([1.0, -9.0]), "divergence": "gan", "dim": 1}, r"\(group 1\)"),
    # out
    (ValueError, H, {"out": torch.empty(5)}, r"out must be a torch.float32 tensor of shape \[6\], got \[5\]"),
    (ValueError, H, {"out": torch.empty(6).double()}, "out must be a torch.float32 tensor .*float64"),
    (ValueError, H, {"out": [0.0] * 6}, "out must be a torch.float32 tensor .* got list"),
    (ValueError, H, {"out": torch.empty(6, device="meta")}, "out is on meta, h is on cpu"),
]


@pytest.mark.parametrize(("kind", "h", "arguments", "message"), CASES)
def test_refused(kind, h, arguments, message):
    with pytest.raises(kind, match=r"^density_ratio: .*(" + message + ")") as caught:
        rx.density_ratio(h, **arguments)
    assert "\n" not in str(caught.value)


def test_a_refused_call_leaves_out_as_it_was_or_nan():
    """Never a half-written answer that looks like one."""
    h = torch.tensor([0.0, 1.0, math.nan])
    out = torch.full((3,), 7.0)
    with pytest.raises(ValueError):
        rx.density_ratio(h, "gan", out=out)
    assert (out == 7.0).all() or out.isnan().all()


def test_sparse_and_quantised_tensors_are_refused():
    for h in (torch.eye(3).to_sparse(), torch.eye(3).to_sparse_csr()):
        with pytest.raises((TypeError, ValueError), match=r"^density_ratio: h must be .*(dense|strided)"):
            rx.density_ratio(h)


def test_a_device_without_kernels_says_why():
    if torch.cuda.is_available():
        pytest.skip("this machine has the device")
    from refine_ext._library import require_device

    class Elsewhere:
        device = torch.device("cuda")

    with pytest.raises(ValueError, match=r"^density_ratio: h is on cuda, but the CUDA kernels cannot run: .+"):
        require_device("density_ratio", "h", Elsewhere())
    Elsewhere.device = torch.device("xpu")
    with pytest.raises(ValueError, match=r"h is on xpu; supported devices are cpu and cuda"):
        require_device("density_ratio", "h", Elsewhere())


def test_out_that_overlaps_itself_is_refused():
    with pytest.raises((ValueError, RuntimeError)):
        rx.density_ratio(torch.randn(3, 4), out=torch.empty(4).expand(3, 4))


def test_out_that_overlaps_the_input_elsewhere():
    """A pass that writes into a shifted view of h must not read samples already overwritten."""
    for name in ("kl", "gan"):
        for n in (100, 300000):
            storage = torch.randn(n + 1)
            for h, out in ((storage[:n], storage[1:]), (storage[1:], storage[:n])):
                want = rx.density_ratio(h.clone(), name).log_ratio
                rx.density_ratio(h, name, out=out)
                torch.testing.assert_close(out, want, rtol=1e-6, atol=1e-6)
