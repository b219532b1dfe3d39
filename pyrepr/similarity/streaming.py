"""CKA over more samples than fit in memory: one pass over a data loader, any number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyrepr._checks import memory
from pyrepr.ops._gram_gradient import layer_pairs
from pyrepr.ops.gram import moments_op_
from pyrepr.reference._dtypes import compute_dtype
from pyrepr.similarity._checks import check_count, check_estimator, check_layers
from pyrepr.similarity._hsic import hsic_table, layer_list, normalise, warn_if_degenerate
from pyrepr.similarity.kernels import Kernel, as_kernel

MODES = ("exact", "minibatch")


class StreamingCKA:
    """All-pairs CKA, fed batch by batch.

    ``mode="exact"`` (linear kernel) gives the value of all samples at once, however they were cut into batches. It
    keeps moments instead of samples: X_aᵀX_b for every pair of layers that is compared and a few vectors, in float64;
    8·(Σ d_a d_b) bytes, independent of the number of samples. For very wide layers (Σ d_a d_b ≫ memory) use
    ``mode="minibatch"``: Σ_batches HSIC(a, b) / √(Σ HSIC(a, a) · Σ HSIC(b, b)) (Nguyen et al. 2020), a ratio of sums
    that keeps [L, L] numbers; with the unbiased estimator its expectation depends little on the batch size. A short
    last batch counts like any other; below 4 samples it is an error.

    Args:
        estimator: ``"unbiased"`` (default, see :func:`pyrepr.cka`) or ``"biased"``.
        mode: ``"exact"`` (default) or ``"minibatch"``.
        kernel, bandwidth, sigma: see :class:`pyrepr.Kernel`; ``mode="exact"`` takes ``"linear"`` only.

    Example:
        >>> stream = pyrepr.StreamingCKA()
        >>> for batch in loader:
        ...     stream.update(layers_of(model_a, batch), layers_of(model_b, batch))
        >>> stream.compute()  # [La, Lb]
    """

    def __init__(
        self,
        *,
        estimator: str = "unbiased",
        mode: str = "exact",
        kernel: str | Kernel = "linear",
        bandwidth: float = 1.0,
        sigma: float | None = None,
    ) -> None:
        check_estimator(estimator)
        if mode not in MODES:
            raise ValueError(f"mode must be 'exact' or 'minibatch', got {mode!r}")
        spec = as_kernel(kernel, bandwidth, sigma)
        if mode == "exact" and spec.name != "linear":
            raise ValueError(
                f"kernel must be 'linear' in mode 'exact', got {spec.name!r}; mode 'minibatch' takes any kernel"
            )
        self.estimator = estimator
        self.mode = mode
        self.kernel = spec
        self._widths: list[int] = []
        self._split = 0
        self._state: dict[str, Any] = {}

    @property
    def samples(self) -> int:
        """How many samples have been seen."""
        return int(self._state.get("n", 0))

    @torch.no_grad()
    def update(self, xs: Sequence[Tensor] | Tensor, ys: Sequence[Tensor] | Tensor | None = None) -> StreamingCKA:
        """Adds a batch: the same layers in the same order every time, row i of all of them one sample.

        Args:
            xs: layers [n, d_l] of one network, as a list or a tensor [L, n, d]; n may differ between calls.
            ys: layers of the other network for the same n samples; ``None`` compares xs with itself.

        Raises:
            ValueError, TypeError: also if the number or widths of layers differ from the first call; nothing is added.
        """
        names, layers = layer_list("xs", xs)
        split = 0
        if ys is not None:
            split = len(layers)
            more_names, more = layer_list("ys", ys)
            names, layers = names + more_names, layers + more
        layers = check_layers(names, layers)
        widths = [x.shape[1] for x in layers]
        if self._widths and (widths, split) != (self._widths, self._split):
            raise ValueError(
                f"xs and ys must have the layers of the first update, widths {_layout(self._widths, self._split)}, "
                f"got {_layout(widths, split)}"
            )
        if self.mode == "minibatch":
            check_count(layers[0].shape[0], self.estimator, "a batch in mode 'minibatch'")
            added = self._minibatch(layers, split)
        elif layers[0].shape[0] == 0:
            return self
        else:
            added = self._moments(layers, split)
        self._widths, self._split = widths, split
        self._state = added if not self._state else self._add(self._state, added)
        return self

    def _minibatch(self, layers: list[Tensor], split: int) -> dict[str, Any]:
        table, floor = hsic_table(layers, self.kernel, self.estimator, split=split)
        return {"n": layers[0].shape[0], "hsic": table, "floor": floor}

    def _moments(self, layers: list[Tensor], split: int) -> dict[str, Any]:
        """Moments of one batch around the shift of the stream (the mean of its first batch)."""
        m, n, device = len(layers), layers[0].shape[0], layers[0].device
        shift = self._state.get("shift")
        if shift is None:
            # First row plus mean difference: exact for constant features.
            shift = [x[0].double() + (x.double() - x[0].double()).mean(0) for x in layers]
            pairs = layer_pairs(m, split)
            size = 8 * sum(layers[a].shape[1] * layers[b].shape[1] for a, b in pairs)
            if device.type == "cpu" and size > (have := memory()):
                raise MemoryError(
                    f"mode 'exact' would keep {size / 2**30:.1f} GiB of moments (layers of up to "
                    f"{max(x.shape[1] for x in layers)} features), more than this machine's {have / 2**30:.1f}; "
                    "use mode='minibatch'"
                )
            blocks = [
                torch.zeros(layers[a].shape[1], layers[b].shape[1], dtype=torch.float64, device=device)
                for a, b in pairs
            ]
        else:
            blocks = self._state["blocks"]  # added to in place: the one large thing here
        centred = [(x.double() - s).to(compute_dtype(x.dtype)) for x, s in zip(layers, shift, strict=True)]
        moments_op_(blocks, centred, [layer for pair in layer_pairs(m, split) for layer in pair])
        wide = [x.double() for x in centred]
        q = torch.stack([x.square().sum(1) for x in wide])  # [M, n] squared norms
        return {
            "n": n,
            "shift": shift,
            "blocks": blocks,
            "sums": [x.sum(0) for x in wide],  # Σ x
            "norm_sums": q.sum(1),  # Σ q_a
            "norm_products": q @ q.T,  # Σ q_a q_b
            "norm_rows": [q @ x for x in wide],  # [M, d_b], Σ q_a x_b
        }

    def _add(self, one: dict[str, Any], two: dict[str, Any]) -> dict[str, Any]:
        """The sum of two states with the same shift."""
        total: dict[str, Any] = {}
        for key, value in one.items():
            other = two[key]
            if key == "shift" or (key == "blocks" and other is value):  # blocks are added to in place
                total[key] = value
            elif isinstance(value, list):
                total[key] = [a + b for a, b in zip(value, other, strict=True)]
            else:
                total[key] = torch.maximum(value, other) if key == "floor" else value + other
        return total

    def _moved(self, state: dict[str, Any], shift: list[Tensor]) -> dict[str, Any]:
        """The same moments around another shift: x ↦ x + e with e the old shift minus the new one, expanded."""
        n, m = state["n"], len(self._widths)
        e = [old - new for old, new in zip(state["shift"], shift, strict=True)]
        sums, t, products, rows = state["sums"], state["norm_sums"], state["norm_products"], state["norm_rows"]
        ee = torch.stack([v @ v for v in e])
        es = torch.stack([v @ s for v, s in zip(e, sums, strict=True)])
        new_t = t + 2 * es + n * ee
        new_products, new_rows, new_blocks = products.clone(), [r.clone() for r in rows], []
        for (a, b), block in zip(layer_pairs(m, self._split), state["blocks"], strict=True):
            whole = block.triu() + block.triu(1).T if a == b else block
            new_products[a, b] = new_products[b, a] = (
                products[a, b]
                + 2 * (rows[b][a] @ e[b] + rows[a][b] @ e[a])
                + ee[b] * t[a]
                + ee[a] * t[b]
                + 4 * e[a] @ (whole @ e[b])
                + 2 * (ee[b] * es[a] + ee[a] * es[b])
                + n * ee[a] * ee[b]
            )
            new_rows[b][a] = rows[b][a] + 2 * (e[a] @ whole) + ee[a] * sums[b] + new_t[a] * e[b]
            new_rows[a][b] = rows[a][b] + 2 * (whole @ e[b]) + ee[b] * sums[a] + new_t[b] * e[a]
            moved = torch.addr(whole, sums[a], e[b])
            new_blocks.append(moved.addr_(e[a], sums[b]).addr_(e[a], e[b], alpha=n))
        return {
            "n": n,
            "shift": shift,
            "blocks": new_blocks,
            "sums": [s + n * v for s, v in zip(sums, e, strict=True)],
            "norm_sums": new_t,
            "norm_products": new_products,
            "norm_rows": new_rows,
        }

    @torch.no_grad()
    def compute(self) -> Tensor:
        """The CKA so far: [Lx, Ly] float64 (or [Lx, Lx]); more updates may follow.

        Raises:
            ValueError: before the first update, or with fewer samples than the estimator needs.
        """
        if not self._state:
            raise ValueError("compute needs at least one update, got none")
        names = [f"xs[{i}]" for i in range(self._split or len(self._widths))]
        names += [f"ys[{i}]" for i in range(len(self._widths) - len(names))]
        table, floor = (self._state["hsic"], self._state["floor"]) if self.mode == "minibatch" else self._exact_hsic()
        own = warn_if_degenerate(table.diagonal(), floor, names)
        split = self._split
        return normalise(table[:split, split:], own[:split], own[split:]) if split else normalise(table, own, own)

    def _exact_hsic(self) -> tuple[Tensor, Tensor]:
        n, m = self._state["n"], len(self._widths)
        check_count(n, self.estimator, "the stream")
        mean = [shift + s / n for shift, s in zip(self._state["shift"], self._state["sums"], strict=True)]
        state = self._moved(self._state, mean)
        table = torch.full_like(state["norm_products"], torch.nan)
        for (a, b), block in zip(layer_pairs(m, self._split), state["blocks"], strict=True):
            table[a, b] = table[b, a] = block.square().sum()
        if self.estimator == "biased":
            return table / (n - 1) ** 2, torch.zeros(m, dtype=torch.float64, device=table.device)
        q, t = state["norm_products"], state["norm_sums"]
        table = table - n / (n - 2) * q + torch.outer(t, t) / ((n - 1) * (n - 2))
        return table / (n * (n - 3)), torch.zeros(m, dtype=torch.float64, device=table.device)

    @torch.no_grad()
    def merge(self, other: StreamingCKA) -> StreamingCKA:
        """Adds the samples another stream has seen (other shards of the data); `other` is not changed.

        Raises:
            ValueError: if the streams differ in estimator, mode, kernel or layers.
        """
        if not isinstance(other, StreamingCKA):
            raise TypeError(f"other must be a StreamingCKA, got {type(other).__name__}")
        for option in ("estimator", "mode", "kernel"):
            if getattr(self, option) != getattr(other, option):
                raise ValueError(f"other must have {option} {getattr(self, option)!r}, got {getattr(other, option)!r}")
        if not other._state:
            return self
        if not self._state:
            self.load_state_dict(other.state_dict())
            return self
        if (self._widths, self._split) != (other._widths, other._split):
            raise ValueError(
                f"other must have layers of widths {_layout(self._widths, self._split)}, "
                f"got {_layout(other._widths, other._split)}"
            )
        state = other._state if self.mode == "minibatch" else self._moved(other._state, self._state["shift"])
        self._state = self._add(self._state, state)
        return self

    @torch.no_grad()
    def all_reduce(self, group: Any = None) -> StreamingCKA:
        """Adds up the streams of all processes of a ``torch.distributed`` group; afterwards all hold the whole.

        Every process must call it; one that has seen no sample yet takes part. Tensors stay on their device, so use
        a backend that can reduce there (gloo for the CPU, nccl for CUDA).
        """
        from torch import distributed

        layouts: list[Any] = [None] * distributed.get_world_size(group)
        distributed.all_gather_object(layouts, (self._widths, self._split) if self._state else None, group=group)
        filled = [rank for rank, layout in enumerate(layouts) if layout is not None]
        if not filled:
            return self
        if any(layouts[rank] != layouts[filled[0]] for rank in filled):
            raise ValueError(f"all processes must stream the same layers, got {layouts}")
        first = [self.state_dict() if distributed.get_rank(group) == filled[0] else None]
        distributed.broadcast_object_list(first, group=group, group_src=filled[0])
        start = StreamingCKA(estimator=self.estimator, mode=self.mode, kernel=self.kernel)
        start.load_state_dict(_zeroed(first[0]))  # type: ignore[arg-type]
        start.merge(self)
        for key, value in start._state.items():
            if key == "n":
                count = torch.tensor(value)
                distributed.all_reduce(count, group=group)
                start._state[key] = int(count)
            elif key != "shift":
                op = distributed.ReduceOp.MAX if key == "floor" else distributed.ReduceOp.SUM
                for tensor in value if isinstance(value, list) else [value]:
                    distributed.all_reduce(tensor, op=op, group=group)
        self._widths, self._split, self._state = start._widths, start._split, start._state
        return self

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on later or elsewhere: tensors, numbers and names; ``torch.save`` takes it."""
        state = {k: [t.clone() for t in v] if isinstance(v, list) else v for k, v in self._state.items()}
        return {
            "estimator": self.estimator,
            "mode": self.mode,
            "kernel": vars(self.kernel).copy(),
            "widths": list(self._widths),
            "split": self._split,
            "state": state,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave, options included.

        Raises:
            ValueError: if it is not such a dict.
        """
        missing = {"estimator", "mode", "kernel", "widths", "split", "state"} - set(state_dict)
        if missing:
            raise ValueError(f"state_dict must come from StreamingCKA.state_dict(), got one without {sorted(missing)}")
        self.estimator, self.mode = state_dict["estimator"], state_dict["mode"]
        self.kernel = Kernel(**state_dict["kernel"])
        self._widths, self._split = list(state_dict["widths"]), state_dict["split"]
        state = state_dict["state"]
        self._state = {k: [t.clone() for t in v] if isinstance(v, list) else v for k, v in state.items()}


def _layout(widths: list[int], split: int) -> str:
    return f"{widths[:split]} and {widths[split:]}" if split else str(widths)


def _zeroed(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state of a stream with the same layers and shift that has seen nothing."""
    state = {}
    for key, value in state_dict["state"].items():
        if key == "shift":
            state[key] = value
        elif isinstance(value, list):
            state[key] = [torch.zeros_like(t) for t in value]
        else:
            state[key] = torch.zeros_like(value) if isinstance(value, Tensor) else 0
    return {**state_dict, "state": state}
