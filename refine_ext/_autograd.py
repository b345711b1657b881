"""Gradients of the registered ops, which are recorded in one of two ways.

torch's dispatcher does it for whoever calls an op itself, and for torch.compile. Our own calls record the same formulas
as a torch.autograd.Function: in half the time, which at small sizes is more than the kernel's, and also where
torch.func transforms the caller, which registered gradients do not support.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function


class _Recorded(NamedTuple):
    plain: type[Function]
    # Its context is set up apart, as torch.func wants it; this takes torch twice the time.
    transformed: type[Function]


_RECORDED: dict[Any, _Recorded] = {}


def is_transformed() -> bool:
    """Whether this runs inside a transform of torch.func."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def register_gradient(
    name: str, backward: Callable[..., Any], setup: Callable[..., None], vmap: Callable[..., Any]
) -> None:
    """Make `backward`, with the context that `setup` fills, the gradient of an op of tensors and numbers, not lists.

    Args:
        name: the op's, without its namespace.
        backward: as of a torch.autograd.Function; it calls ops by `differentiable`.
        setup: (ctx, inputs, output), as its setup_context.
        vmap: (call, info, in_dims, *inputs), as its vmap for a batch dimension; it calls ops by ``call(op, *inputs)``.
    """
    torch.library.register_autograd(f"refine_ext::{name}", backward, setup_context=setup)
    # Within the dispatcher's rule the transform is still the current one.
    torch.library.register_vmap(f"refine_ext::{name}", partial(vmap, lambda op, *inputs: op(*inputs)))
    op = getattr(torch.ops.refine_ext, name).default

    def run(*inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = run(*inputs)
        setup(ctx, inputs, output)
        return output

    both = {"backward": staticmethod(backward), "vmap": staticmethod(partial(vmap, differentiable))}
    apart = {"forward": staticmethod(run), "setup_context": staticmethod(setup)}
    _RECORDED[op] = _Recorded(
        type(name, (Function,), {"forward": staticmethod(forward), **both}), type(name, (Function,), {**apart, **both})
    )


def recorded(op: Any, *inputs: Any) -> Any:
    """``op(*inputs)``, of which autograd takes note."""
    if op not in _RECORDED or torch.compiler.is_compiling():
        return op(*inputs)
    if is_transformed():
        return _RECORDED[op].transformed.apply(*inputs)
    # In the dispatcher autocast comes first: gradients are of what it has cast.
    return op(*inputs) if torch._C._is_any_autocast_enabled() else _RECORDED[op].plain.apply(*inputs)


def unrecorded(op: Any, *inputs: Any, **out: Any) -> Any:
    """``op(*inputs, **out)`` where no input needs a gradient, past the dispatcher's Python layer for autograd."""
    if torch.compiler.is_compiling():
        return op(*inputs, **out)
    if is_transformed() and not out:
        # Of several nested transforms another one may differentiate.
        return recorded(op, *inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*inputs, **out)


def differentiable(op: Any, *inputs: Any) -> Any:
    """``op(*inputs)``, recorded where an input needs a gradient."""
    tracked = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
    return recorded(op, *inputs) if tracked else unrecorded(op, *inputs)


def gradients(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    upstream: Tensor | None = None,
    *,
    create_graph: bool = True,
) -> list[Tensor | None]:
    """Vector-Jacobian products of ``function(*inputs)``, made of torch's operations; of a number, without `upstream`.

    Differentiable again if `create_graph`.
    """
    if is_transformed():
        value, pullback, *_ = torch.func.vjp(function, *inputs)
        return list(pullback(torch.ones_like(value) if upstream is None else upstream))
    with torch.enable_grad():
        # Aliases: one input may itself depend on another, and only the function's own dependence is wanted.
        leaves = [x.view_as(x) if x.requires_grad and create_graph else x.detach().requires_grad_() for x in inputs]
        value = function(*leaves)
        return list(torch.autograd.grad(value, leaves, upstream, create_graph=create_graph, allow_unused=True))
