"""The ops inside torch's machinery: opcheck, torch.compile, torch.export, fake and meta tensors."""

from __future__ import annotations

import io

import pytest
import torch
from reference import NAMED, outputs
from torch.library import opcheck

import refine_ext as rx
from refine_ext.divergence import parse_divergence

pytestmark = pytest.mark.usefixtures("device")
ops = torch.ops.refine_ext
FAMILY = ("kl", "gan", "pearson_chi2", "jeffreys")  # one of each form of backward formula


def tracked(*shape: int, name: str = "kl", dtype=torch.float64) -> torch.Tensor:
    return outputs(name, shape, dtype).requires_grad_()


@pytest.mark.parametrize("name", FAMILY)
def test_opcheck_density_ratio(name):
    code = parse_divergence("test", name)
    for shape, dtype in (((7,), torch.float64), ((3, 5), torch.float32), ((2, 2, 3), torch.bfloat16)):
        h = tracked(*shape, name=name, dtype=dtype)
        shared, full = torch.rand(shape[-1]).to(dtype) + 0.1, torch.rand(shape).to(dtype) + 0.1
        shift = torch.full(shape[:-1], 0.25, dtype=torch.float64)
        for weights, given in ((None, None), (shared, shift), (full, None)):
            opcheck(ops.density_ratio.default, (h, weights, given, *code, False, True))
        h = h.detach()
        opcheck(ops.density_ratio.default, (h, shared, None, *code, True, False))
        arguments = (h, None, None, *code, False, True)
        opcheck(ops.density_ratio_out.default, arguments, {"out": torch.empty_like(h)})


@pytest.mark.parametrize("name", FAMILY)
def test_opcheck_backward_of_density_ratio(name):
    code = parse_divergence("test", name)
    h = outputs(name, (2, 6))
    w = torch.rand(2, 6, dtype=torch.float64) + 0.1
    for weights in (None, w):
        for solved in (True, False):
            shift = None if solved else torch.tensor(0.2, dtype=torch.float64)
            log_ratio, stats = ops.density_ratio(h, weights, shift, *code, False, True)
            arguments = [torch.randn_like(h), torch.randn_like(stats), log_ratio, stats]
            arguments = [x.clone().requires_grad_() for x in arguments]
            opcheck(ops.density_ratio_backward.default, (*arguments, weights, solved, *code))


@pytest.mark.parametrize("name", FAMILY)
def test_opcheck_bounds(name):
    code = parse_divergence("test", name)
    dtype = torch.float32 if name == "gan" else torch.float64
    real, fake = tracked(2, 5, name=name, dtype=dtype), tracked(2, 6, name=name, dtype=dtype)
    for tight in (True, False):
        opcheck(ops.variational_bound.default, (real, fake, tight, *code))
        _, stats = ops.variational_bound(real, fake, tight, *code)
        grad = torch.randn(2, dtype=dtype, requires_grad=True)
        opcheck(ops.variational_bound_backward.default, (grad, fake, stats.detach(), tight, *code))
    logits = [torch.randn(2, n, dtype=dtype, requires_grad=True) for n in (5, 6)]
    opcheck(ops.dual_bound.default, (*logits, *code))
    opcheck(ops.dual_output.default, (logits[0], *code))
    for conjugate in (True, False):
        opcheck(ops.dual_slope.default, (torch.randn(2, dtype=dtype), logits[0], conjugate, *code))
        opcheck(ops.dual_slope.default, (torch.randn(2, 5, dtype=dtype), logits[0], conjugate, *code))


@pytest.mark.kernels("cpu")
def test_every_density_ratio_op_is_checked_here():
    """A new op of this family must come with its opcheck."""
    names = {
        schema.name.partition("::")[2]
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("refine_ext::")
    }
    family = {n for n in names if n.startswith(("density_ratio", "variational_bound", "dual_"))}
    assert family == {
        "density_ratio", "density_ratio_out", "density_ratio_backward", "variational_bound",
        "variational_bound_backward", "dual_bound", "dual_output", "dual_slope",
    }  # fmt: skip


def refine(h, w=None, dim=None):
    r = rx.density_ratio(h, "jensen_shannon", dim=dim, base_weights=w)
    return r.log_ratio, r.ratio, r.weights, r.shift, r.ess, r.max_weight, r.log_normalizer


# Inductor's C++ takes seconds a graph; the graph itself is the same with "aot_eager".
@pytest.mark.parametrize(
    ("dim", "dynamic", "backend"),
    [(None, False, "inductor"), (0, True, "aot_eager"), (-1, True, "aot_eager"), (-1, False, "aot_eager")],
)
def test_compiled_density_ratio(dim, dynamic, backend):
    torch._dynamo.reset()
    compiled = torch.compile(refine, fullgraph=True, dynamic=dynamic, backend=backend)
    for shape in ((6, 8), (5, 9)):
        h = torch.randn(shape)
        for got, want in zip(compiled(h, dim=dim), refine(h, dim=dim), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMED)
def test_compiled_training_step(name):
    """Forward and backward in one graph, weights and all; equal to eager."""
    torch._dynamo.reset()

    def step(real, fake, logit_real, logit_fake):
        bound = rx.variational_bound(real, fake, name) + rx.variational_bound(
            logit_real, logit_fake, name, tight=False, kind="logit"
        )
        r = rx.density_ratio(fake * 0.5, name)
        return bound + rx.logistic_loss(logit_real, logit_fake) + r.shift + r.weights.square().sum()

    tensors = [
        tracked(9, name=name), tracked(11, name=name),
        torch.randn(9, dtype=torch.float64, requires_grad=True),
        torch.randn(11, dtype=torch.float64, requires_grad=True),
    ]  # fmt: skip
    want = step(*tensors)
    gradients = torch.autograd.grad(want, tensors)
    backend = "inductor" if name == "kl" else "aot_eager"
    got = torch.compile(step, fullgraph=True, backend=backend)(*tensors)
    torch.testing.assert_close(got, want)
    for one, other in zip(torch.autograd.grad(got, tensors), gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_compiled_under_autocast(device):
    torch._dynamo.reset()
    network = torch.nn.Linear(4, 1)
    x = torch.randn(20, 4)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            h = network(x).squeeze(-1)
            return rx.variational_bound(h, h * 2, "kl"), rx.density_ratio(h, "kl").log_ratio

    bound, log_ratio = step(x)
    assert bound.dtype == log_ratio.dtype == torch.float32
    bound.backward()
    assert torch.isfinite(network.weight.grad).all()


def test_compiling_warns_of_nothing(recwarn):
    torch._dynamo.reset()
    compiled = torch.compile(refine, fullgraph=True, backend="aot_eager")
    compiled(torch.randn(7))
    ours = [str(w.message) for w in recwarn if "refine_ext" in str(w.message) or "lru_cache" in str(w.message)]
    assert not ours


def test_compiled_into_out():
    torch._dynamo.reset()

    def into(h, out):
        return rx.density_ratio(h, "kl", out=out).shift

    h, out = torch.randn(40), torch.empty(40)
    shift = torch.compile(into, fullgraph=True)(h, out)
    want = rx.density_ratio(h, "kl")
    torch.testing.assert_close(out, want.log_ratio)
    torch.testing.assert_close(shift, want.shift)


class Refiner(torch.nn.Module):
    def forward(self, real, fake):
        r = rx.density_ratio(fake, "squared_hellinger", dim=-1)
        return r.weights, r.shift, rx.variational_bound(real, fake, "squared_hellinger")


def test_export():
    batch = torch.export.Dim("batch", min=2, max=1000)
    example = torch.randn(4, 10), torch.randn(4, 10)
    program = torch.export.export(Refiner(), example, dynamic_shapes=({0: batch}, {0: batch}))
    stored = io.BytesIO()
    torch.export.save(program, stored)
    stored.seek(0)
    loaded = torch.export.load(stored).module()
    for size in (4, 7):
        tensors = torch.randn(size, 10), torch.randn(size, 10)
        for got, want in zip(loaded(*tensors), Refiner()(*tensors), strict=True):
            torch.testing.assert_close(got, want)
    assert "refine_ext" in str(program.graph)


@pytest.mark.kernels("cpu")
@pytest.mark.parametrize("dim", [None, 0, 1])
def test_meta_tensors(dim):
    h, w = torch.empty(4, 6, device="meta"), torch.empty(4, 6, device="meta")
    result = rx.density_ratio(h, "gan", dim=dim, base_weights=w)
    groups = {None: (), 0: (6,), 1: (4,)}[dim]
    assert result.log_ratio.shape == result.weights.shape == (4, 6) and result.log_ratio.is_meta
    assert result.shift.shape == result.ess.shape == groups
    assert result.shift.dtype == torch.float64
    bound = rx.variational_bound(h, w, "gan")
    assert bound.shape == () and bound.dtype == torch.float32 and bound.is_meta
    assert rx.variational_bound(h.double(), w, "gan", kind="logit").dtype == torch.float64


@pytest.mark.kernels("cpu")
def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        h = torch.empty(2, 1_000_000_000_000, requires_grad=True)
        result = rx.density_ratio(h, "gan", dim=1)
        assert result.log_ratio.shape == (2, 1_000_000_000_000)
        (gradient,) = torch.autograd.grad(result.shift.sum(), h)
        assert gradient.shape == h.shape
