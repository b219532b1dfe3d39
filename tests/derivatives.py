"""Every way of taking a derivative, as functions of (f, x, v): a scalar function, a vector and a direction."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad, functional
from torch.utils.checkpoint import checkpoint

F = torch.func


def _leaf(x):
    return x.clone().requires_grad_()


def _gradient(f, x, **options):
    return torch.autograd.grad(f(x), x, **options)[0]


def backward(f, x, v):
    x = _leaf(x)
    f(x).backward()
    return x.grad


def dual(f, x, v):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, v))).tangent


def grad_of_grad(f, x, v):
    x = _leaf(x)
    return torch.autograd.grad((_gradient(f, x, create_graph=True) * v).sum(), x)[0]


def penalty(f, x, v):
    x = _leaf(x)
    (f(x) + _gradient(f, x, create_graph=True).square().sum()).backward()
    return x.grad


def dual_over_reverse(f, x, v):
    x = _leaf(x)
    with forward_ad.dual_level():
        twin = forward_ad.make_dual(x, v)
        return forward_ad.unpack_dual(torch.autograd.grad(f(twin), twin)[0]).tangent


def third(f, x, v):
    x = _leaf(x)
    once = (_gradient(f, x, create_graph=True) * v).sum()
    twice = (torch.autograd.grad(once, x, create_graph=True)[0] * v).sum()
    return torch.autograd.grad(twice, x)[0]


def hvp_of_checkpoint(f, x, v):
    return grad_of_grad(lambda x: checkpoint(f, x, use_reentrant=False), x, v)


def reentrant(f, x, v):
    return backward(lambda x: checkpoint(f, x, use_reentrant=True), x, v)


def saved_elsewhere(f, x, v):
    with torch.autograd.graph.save_on_cpu():
        return _gradient(f, _leaf(x))


def vjp_later(f, x, v):
    """The pullback is called outside of its transform."""
    return F.vjp(f, x)[1](torch.ones((), dtype=x.dtype))[0]


def few(x):
    """Five to nine of the elements, or all of fewer."""
    return torch.arange(0, len(x), max(1, len(x) // 5))


def hessian_by_columns(f, x, v):
    """In a few of x's elements: each takes a backward pass of its own."""
    return functional.hessian(lambda some: f(x.index_copy(0, few(x), some)), x[few(x)])


def pairs(x, v):
    return torch.stack([x, x + v], 1)


FIRST = {
    "backward": backward,
    "func.grad": lambda f, x, v: F.grad(f)(x),
    "jacrev": lambda f, x, v: F.jacrev(f)(x),
    "jvp": lambda f, x, v: F.jvp(f, (x,), (v,))[1],
    "jacfwd": lambda f, x, v: F.jacfwd(f)(x),
    "dual numbers": dual,
    "vjp, later": vjp_later,
    "reentrant checkpoint": reentrant,
    "saved tensor hooks": saved_elsewhere,
    "vmap": lambda f, x, v: F.vmap(f, in_dims=1)(pairs(x, v)),
    "vmap of grad": lambda f, x, v: F.vmap(F.grad(f), in_dims=1)(pairs(x, v)),
    "vmap of vmap of grad": lambda f, x, v: F.vmap(F.vmap(F.grad(f)))(pairs(x, v).T[None]),
    "grad of vmap": lambda f, x, v: F.grad(lambda x: F.vmap(f, in_dims=1)(x).sum())(pairs(x, v)),
    "vmap of jvp": lambda f, x, v: F.vmap(lambda x: F.jvp(f, (x,), (v,))[1], in_dims=1)(pairs(x, v)),
    "jacobian, vectorized": lambda f, x, v: functional.jacobian(f, x, vectorize=True),
}
SECOND = {
    "grad of grad": grad_of_grad,
    "func.grad of func.grad": lambda f, x, v: F.grad(lambda x: (F.grad(f)(x) * v).sum())(x),
    "gradient penalty": penalty,
    "autograd hvp": lambda f, x, v: functional.hvp(f, x, v)[1],
    "autograd vhp": lambda f, x, v: functional.vhp(f, x, v)[1],
    "forward over reverse": lambda f, x, v: F.jvp(F.grad(f), (x,), (v,))[1],
    "reverse over forward": lambda f, x, v: F.grad(lambda x: F.jvp(f, (x,), (v,))[1])(x),
    "forward over forward": lambda f, x, v: F.jvp(lambda x: F.jvp(f, (x,), (v,))[1], (x,), (v,))[1],
    "dual numbers over reverse": dual_over_reverse,
    "hvp of a checkpoint": hvp_of_checkpoint,
    "vmap of hvp": lambda f, x, v: F.vmap(lambda x: F.jvp(F.grad(f), (x,), (v,))[1], in_dims=1)(pairs(x, v)),
}
HESSIANS = {
    "hessian": lambda f, x, v: F.hessian(f)(x),
    "jacrev of jacrev": lambda f, x, v: F.jacrev(F.jacrev(f))(x),
    "jacfwd of jacfwd": lambda f, x, v: F.jacfwd(F.jacfwd(f))(x),
    "autograd hessian": hessian_by_columns,
    "autograd hessian, vectorized": lambda f, x, v: functional.hessian(f, x, vectorize=True),
    "autograd hessian, forward": lambda f, x, v: functional.hessian(
        f, x, vectorize=True, outer_jacobian_strategy="forward-mode"
    ),
}
MODES = FIRST | SECOND | HESSIANS | {"third": third}
