"""The delta rule in chunks of tokens, in plain PyTorch: what runs where no kernel does.

The recurrence of :mod:`pyrepr.reference.delta_rule` takes T steps of a few small operations each; in chunks (Yang et
al. 2024, section 3) there are T / C steps, and all else is matrix products over all chunks at once. With G the sum of
g over a chunk up to and including a token, S the state before the chunk, S' after it, and u_t = β_t (v_t − S̄ᵀk_t):

    A_tj = β_t Σ k_t k_j e^{G_t − G_j} for j < t        P_tj = Σ q_t k_j e^{G_t − G_j} for j ≤ t
    U = (I + A)⁻¹ β (V − (e^G K) S)        O = (e^G Q) S + P U        S' = e^{G_C} S + (e^{G_C − G} K)ᵀ U

G_t − G_j is summed over the tokens between, not subtracted, and never with t < j: decays of any strength, e^{−∞} too,
neither overflow nor take precision from weaker ones. Without β nothing is erased, and U = V.

Gradients are by hand, since a leaf op has no autograd inside: with dU = Pᵀ dO + (e^{G_C − G} K) dS' and
Z = (I + A)⁻ᵀ dU, everything else follows from the products above; an exponent that multiplies x gets the gradient x dx,
summed over what it multiplies. Between a token and itself no decay stands, nor between a chunk's last token and S':
what they give to dQ and dK is added after dg is made, where it would enter with both signs and leave its rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _cut(x: Tensor, size: int) -> Tensor:
    """[B, T, HV, ...] -> [B, HV, n, C, ...], with zeros after the last token."""
    missing = -x.shape[1] % size
    x = torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], 1) if missing else x
    return x.unflatten(1, (-1, size)).movedim(3, 1)


def _uncut(x: Tensor, total: int) -> Tensor:
    """The inverse of :func:`_cut`."""
    return x.movedim(1, 3).flatten(1, 2)[:, :total]


class Chunks:
    """A run of tokens of every sequence, cut into chunks; q is scaled, heads are repeated, everything has one dtype."""

    def __init__(
        self,
        q: Tensor,  # [B, T, HV, K]
        k: Tensor,  # [B, T, HV, K]
        v: Tensor,  # [B, T, HV, V]
        g: Tensor | None,  # [B, T, HV], [B, T, HV, K] or None
        beta: Tensor | None,  # [B, T, HV]; None: nothing is erased
        p: Tensor | None = None,  # [B, T, HV, K], what is read to be erased; None: k
        undecayed: bool = False,  # whether p reads the state before its decay; then no gate per key
    ) -> None:
        # A gate per key takes C passes over [T, K] to make the pairs: smaller chunks.
        size = min(16 if g is not None and g.dim() == 4 else 64, max(1, q.shape[1]))
        self.total, self.gate = q.shape[1], None if g is None else g.dim()
        self.q, self.k, self.v = (_cut(x, size) for x in (q, k, v))
        self.apart, self.undecayed = p is not None, undecayed
        self.p = self.k if p is None else _cut(p, size)
        self.beta = None if beta is None else _cut(beta, size)[..., None]
        g = q.new_zeros(1, q.shape[1], 1, 1) if g is None else g[..., None] if g.dim() == 3 else g
        self.g = _cut(g, size)  # [B, HV, n, C, 1 or K]
        self.decay = self.g.cumsum(-2).exp()
        after = torch.cat([self.g[..., 1:, :], torch.zeros_like(self.g[..., :1, :])], -2)
        self.tail = after.flip(-2).cumsum(-2).flip(-2).exp()
        self.end = self.decay[..., -1, :, None]  # [B, HV, n, 1 or K, 1]
        qk, *kk = self._pairs()
        self.qk = qk.tril()
        if self.beta is None:
            return
        self.kk = kk[0].tril(-1)
        unit = torch.eye(size, dtype=q.dtype, device=q.device).expand_as(self.kk)
        self.inverse = torch.linalg.solve_triangular(self.beta * self.kk, unit, upper=False, unitriangular=True)
        self.erase = self.inverse @ (self.beta * self._before(self.decay) * self.p)

    def _before(self, decays: Tensor) -> Tensor:
        """Decays up to every token as p sees them: without the token's own where it reads the state before."""
        if not self.undecayed:
            return decays
        return torch.cat([torch.ones_like(decays[..., :1, :]), decays[..., :-1, :]], -2)

    def _later(self, j: int) -> Tensor:
        """e^{G_t − G_j} for the tokens t of a chunk, [B, HV, n, C, K]; 1 where t < j, which nobody asks for."""
        between = self.g.clone()
        between[..., : j + 1, :] = 0
        return between.cumsum(-2).exp()

    def _decays(self) -> Tensor:
        """e^{G_t − G_j} for one gate a token, [B, HV, n, C, C]; 1 where t < j."""
        size = self.g.shape[-2]
        return self.g.expand(*self.g.shape[:-1], size).tril(-1).cumsum(-2).exp()

    def _pairs(self) -> list[Tensor]:
        """Σ x_t k_j e^{G_t − G_j} with x = q and, where something is erased, x = p; right for j ≤ t, j < t."""
        rows = [self.q] if self.beta is None else [self.q, self.p]
        if self.gate != 4:
            decays = self._decays()
            return [x @ self.k.mT * seen for x, seen in zip(rows, (decays, self._before(decays)), strict=False)]
        columns = []
        for j in range(self.k.shape[-2]):
            later = self._later(j) * self.k[..., j : j + 1, :]
            columns.append([(x * later).sum(-1) for x in rows])
        return [torch.stack(column, -1) for column in zip(*columns, strict=True)]

    def _pairs_backward(self, d_qk: Tensor, d_kk: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of :meth:`_pairs` in q_t, p_t and k_j; those of the pairs are zero for j > t."""
        if self.gate != 4:
            decays = self._decays()
            d_qk, d_kk = d_qk * decays, d_kk * self._before(decays)
            return d_qk @ self.k, d_kk @ self.k, d_qk.mT @ self.q + d_kk.mT @ self.p
        dq, dp, columns = torch.zeros_like(self.q), torch.zeros_like(self.k), []
        for j in range(self.k.shape[-2]):
            later, own = self._later(j), self.k[..., j : j + 1, :]
            of_q, of_p = (d[..., j, None] * later for d in (d_qk, d_kk))  # [B, HV, n, C, K]
            dq += of_q * own
            dp += of_p * own
            columns.append((of_q * self.q + of_p * self.p).sum(-2))
        return dq, dp, torch.stack(columns, -2)

    def states(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The states before each chunk [B, HV, n, K, V], U [B, HV, n, C, V], and the last state [B, HV, K, V]."""
        values = self.v if self.beta is None else self.inverse @ (self.beta * self.v)
        keys = (self.tail * self.k).mT
        before, updates = [], []
        for i in range(self.k.shape[2]):
            before.append(state)
            updates.append(values[:, :, i] if self.beta is None else values[:, :, i] - self.erase[:, :, i] @ state)
            state = self.end[:, :, i] * state + keys[:, :, i] @ updates[-1]
        return torch.stack(before, 2), torch.stack(updates, 2), state

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """o [B, T, HV, V] and the last state [B, HV, K, V]."""
        before, updates, state = self.states(state)
        return _uncut(self.decay * self.q @ before + self.qk @ updates, self.total), state

    def backward(
        self, state: Tensor, grad_o: Tensor, grad_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor]:
        """Gradients in q, k, v, g, beta, p and the state that :meth:`forward` was given."""
        before, updates, _ = self.states(state)
        grad_o = _cut(grad_o, self.k.shape[3])
        d_updates, after, grad_state = self._through_states(grad_o, grad_state)
        d_qk, d_kk, dv, dbeta = (grad_o @ updates.mT).tril(), torch.zeros_like(self.qk), d_updates, None
        if self.beta is not None:
            z = self.inverse.mT @ d_updates
            d_a = -(z @ updates.mT).tril(-1)
            dv, d_kk = self.beta * z, self.beta * d_a
            dbeta = (z * (self.v - self._before(self.decay) * self.p @ before)).sum(-1) + (d_a * self.kk).sum(-1)
        own = d_qk.diagonal(dim1=-2, dim2=-1)[..., None]
        dq, dp, dk = self._pairs_backward(d_qk.tril(-1), d_kk)
        dq = dq + self.decay * (grad_o @ before.mT)
        if self.beta is not None:
            dp = dp - self._before(self.decay) * (dv @ before.mT)
        dk_tail = self.tail * (updates @ after.mT)
        last = self._last()
        dk_end, dk_tail = dk_tail * last, dk_tail.masked_fill(last, 0)
        dk = dk + dk_tail
        dg = None
        if self.gate is not None:
            read = self.p * dp
            sums = self.q * dq - self.k * dk
            sums[..., -1, :] += (self.k * dk_tail).sum(-2) + (self.end * before * after).sum(-1)
            # What p reads before the decay of token t has the decays up to token t − 1.
            sums = sums + (torch.cat([read[..., 1:, :], read[..., :1, :] * 0], -2) if self.undecayed else read)
            sums = sums if self.gate == 4 else sums.sum(-1)
            along = -2 if self.gate == 4 else -1
            dg = _uncut(sums.flip(along).cumsum(along).flip(along), self.total)
        dq, dk = dq + own * self.k, dk + own * self.q + dk_end
        if not self.apart:
            dk, dp = dk + dp, None
        dq, dk, dv = (_uncut(x, self.total) for x in (dq, dk, dv))
        dbeta, dp = (None if x is None else _uncut(x, self.total) for x in (dbeta, dp))
        return dq, dk, dv, dg, dbeta, dp, grad_state

    def _last(self) -> Tensor:
        """Which tokens are the last of their chunks, [n, C, 1]."""
        count, size = self.k.shape[2:4]
        places = torch.arange(count * size, device=self.k.device).view(count, size, 1)
        return (places % size == size - 1) | (places == self.total - 1)

    def _through_states(self, grad_o: Tensor, grad_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dU, the gradients of the states after each chunk, and of the first state."""
        updates = self.qk.mT @ grad_o
        read = (self.decay * self.q).mT @ grad_o
        keys = self.tail * self.k
        found, after = [], []
        for i in reversed(range(self.k.shape[2])):
            after.append(grad_state)
            found.append(updates[:, :, i] + keys[:, :, i] @ grad_state)
            grad_state = read[:, :, i] + self.end[:, :, i] * grad_state
            if self.beta is not None:
                grad_state = grad_state - self.erase[:, :, i].mT @ found[-1]
        return torch.stack(found[::-1], 2), torch.stack(after[::-1], 2), grad_state
