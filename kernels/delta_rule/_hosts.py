"""Family `delta_rule` in Triton: the leaf ops of ``pyrepr/ops/delta_rule.py`` on the GPU.

Forward: ``_prepare`` makes what a chunk owes to its own tokens, for all chunks at once, 2 C numbers a token in the
inputs' dtype; ``_scan`` carries the state through the chunks and writes the output. Too few sequences and heads to
fill the GPU are cut into segments (see ``_scan``). Backward: the forward scan again, from the states the forward kept,
leaves the state before every chunk; the scan in reverse leaves its gradient after every chunk; ``_gradient`` does the
rest, for all chunks at once. A gate per key takes ``_kda`` in place of ``_prepare`` and ``_gradient``. A few tokens
are decoded by ``_recurrent``.

The state is float32. Operands of products have the inputs' dtype, sums are float32; float32 inputs go through
``tf32x3``. Nothing here synchronises with the device: packed sequences are laid out by a kernel, in as many slots as
T and N allow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from pyrepr.kernels._launch import Config, Variant, architecture, assert_bounds, launch
from pyrepr.kernels.delta_rule import _variants as table
from pyrepr.kernels.delta_rule._prepare import FACTORS
from pyrepr.kernels.delta_rule._shared import ALIGNMENT, cut, dense, filled, rows, strides_of
from pyrepr.kernels.delta_rule._variants import CHUNK, WIDTHS, representative_variants, variants
from torch import Tensor

from pyrepr import _ptxas
from pyrepr.backend import Unsupported, triton_interprets

__all__ = ["backward", "forward", "representative_variants", "update_", "variants"]

OUT, STATES, MAPS = table.MODES
# Segments of a sequence: merging them is a chain of as many products. An estimate, not measured yet.
MOST_SEGMENTS = 16
SHORT = 16  # tokens a sequence up to which the recurrence is run as it stands


class Problem:
    """The inputs as the kernels take them (see ``_shared``), and what the sizes alone say about the work."""

    def __init__(self, q, k, v, g, beta, initial_state, cu_seqlens, scale, use_qk_l2norm, segment, slots=0):
        self.dtype, self.device = v.dtype, v.device
        if self.dtype not in CHUNK or q.dtype != self.dtype or k.dtype != self.dtype:
            raise Unsupported(
                f"backend 'triton' takes q, k, v of one dtype, float32, bfloat16 or float16; v is {v.dtype}"
            )
        if k.shape[3] > WIDTHS[-1]:
            raise Unsupported(f"backend 'triton' takes K up to {WIDTHS[-1]}, got {k.shape[3]}")
        self.B, self.T, self.H = k.shape[:3]
        self.HV, self.gate = v.shape[2], 0 if g is None else g.dim() - 2
        self.asked = k.shape[3], v.shape[3]
        self.K, self.V = (triton.cdiv(width, ALIGNMENT) * ALIGNMENT for width in self.asked)
        self.q, self.k, self.v = rows(filled(q, self.K)), rows(filled(k, self.K)), rows(filled(v, self.V))
        self.beta = dense(beta.to(torch.float32))
        self.g = None if g is None else dense(filled(g.to(torch.float32), *[self.K] * (self.gate == 2)))
        self.initial = None if initial_state is None else self.state(initial_state)
        self.scale, self.normalize = scale, int(use_qk_l2norm)
        self.C = CHUNK[self.dtype]
        self.width = table.width_of(self.K)
        self.NT = triton.cdiv(self.T, self.C)
        self.L = max(1, triton.cdiv(segment, self.C), triton.cdiv(self.NT, MOST_SEGMENTS))  # chunks of a segment
        self.cu_seqlens = cu_seqlens
        self.packed = cu_seqlens is not None
        if cu_seqlens is None:
            self.N = self.B
            self.chunk_slots = self.B * self.NT
            self.segment_slots = self.B * triton.cdiv(self.NT, self.L)
        else:
            self.cu_seqlens = dense(cu_seqlens.to(torch.int64))
            self.N = cu_seqlens.numel() - 1
            self.chunk_slots = self.T // self.C + self.N
            self.segment_slots = self.chunk_slots // self.L + self.N
        if slots:  # as many as there are states kept: never fewer than there are segments
            self.segment_slots = min(self.segment_slots, slots)

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def new_states(self, count: int) -> Tensor:
        return self.new(count, self.HV, self.K, self.V, dtype=torch.float32)

    def state(self, x: Tensor) -> Tensor:
        """States [*, HV, K, V] from a caller."""
        return dense(filled(x, self.K, self.V))

    def kept(self, x: Tensor) -> Tensor:
        """States that an earlier forward returned as kept, [*, HV, V, K] but for their shape."""
        K, V = self.asked
        return dense(filled(x.view(len(x), self.HV, V, K), self.V, self.K)).view(len(x), self.HV, self.K, self.V)

    def returned(self, o: Tensor, final: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A forward's results as the caller asked for them."""
        K, V = self.asked
        kept = cut(kept.view(len(kept), self.HV, self.V, self.K), V, K).view(len(kept), self.HV, K, V)
        return cut(o, V), cut(final, K, V), kept

    def run(self, variant: Variant, programs: int, **arguments: Any) -> None:
        """Launches; what the kernel takes of the problem's own is filled in, flags become integers."""
        own = {
            **dict(q=self.q, k=self.k, v=self.v, beta=self.beta, g=self.beta if self.g is None else self.g),
            **dict(B=self.B, T=self.T, NT=self.NT, L=self.L, H=self.H, HV=self.HV, K=self.K, V=self.V, N=self.N),
            **dict(scale=self.scale, normalize=self.normalize, gate=self.gate, packed=int(self.packed)),
            **strides_of(q=self.q, k=self.k, v=self.v),
        }
        own |= arguments
        launch(variant, (programs,), {name: own[name] for name in variant.signature}, self.device)


@dataclass
class Layout:
    """Where packed sequences, segments and chunks stand (see ``_index``); empty tensors where nothing is packed."""

    sequences: Tensor
    segments: Tensor
    chunks: Tensor

    def __init__(self, p: Problem) -> None:
        count = (p.N, p.segment_slots, p.chunk_slots) if p.packed else (0, 0, 0)
        self.sequences, self.segments, self.chunks = (
            p.new(n, w, dtype=torch.int64) for n, w in zip(count, (4, 2, 2), strict=True)
        )
        if p.packed:
            valid = p.new(1, dtype=torch.bool)
            slots = {"chunk_slots": p.chunk_slots, "segment_slots": p.segment_slots}
            p.run(table.index_variant(p.dtype), p.N + 1, cu_seqlens=p.cu_seqlens, valid=valid, **slots, **vars(self))
            assert_bounds(valid, p.T)


class Chunks:
    """X, P and the factors of every chunk, and the decayed rows of a gate per key (see ``_prepare`` and ``_kda``)."""

    def __init__(self, p: Problem, layout: Layout, with_x: bool = False) -> None:
        self.x_beta, self.p = (p.new(p.chunk_slots, p.HV, p.C, p.C) for _ in range(2))
        self.x = torch.empty_like(self.x_beta) if with_x else self.x_beta
        self.with_x = with_x
        self.solved = {"x": self.x, "x_beta": self.x_beta, "chunks": layout.chunks}
        self.factors = p.new(p.chunk_slots, p.HV, FACTORS.value, p.C, dtype=torch.float32)
        # What the scans take besides: with a gate per key, the rows that stand in for q and k.
        self.rows: dict[str, Tensor] = {"k_tail": p.k, "last": self.factors}
        (self._prepare_per_key if p.gate == 2 else self._prepare)(p)

    def _prepare(self, p: Problem) -> None:
        def run(config: Config) -> None:
            variant = table.prepare_variant(config, p.dtype, p.gate == 1, self.with_x)
            p.run(variant, p.chunk_slots * p.HV, p=self.p, factors=self.factors, **self.solved)

        table.PREPARE[p.dtype.itemsize].run(p.device, run, (p.gate,))

    def _prepare_per_key(self, p: Problem) -> None:
        a = p.new(*self.p.shape, dtype=torch.float32)
        decayed = {n: p.new(p.chunk_slots, p.HV, p.C, p.K) for n in ("q_decayed", "k_decayed", "k_tail")}
        last = p.new(p.chunk_slots, p.HV, p.K, dtype=torch.float32)
        outputs = {"a": a, "p": self.p, "factors": self.factors, "last": last, **decayed}

        def run(config: Config) -> None:
            programs = p.chunk_slots * p.HV * (p.C // 16)
            p.run(table.kda_prepare_variant(config, p.dtype), programs, chunks=self.solved["chunks"], **outputs)

        table.KDA_PREPARE[p.dtype.itemsize].run(p.device, run)
        p.run(table.invert_variant(p.dtype, self.with_x), p.chunk_slots * p.HV, a=a, **self.solved)
        self.rows = {"q": decayed["q_decayed"], "k": decayed["k_decayed"], "k_tail": decayed["k_tail"], "last": last}

    @property
    def arguments(self) -> dict[str, Tensor]:
        return {"x": self.x, "x_beta": self.x_beta, "p": self.p, "factors": self.factors, **self.rows}


class Scan:
    """Launches of the scans over one problem."""

    def __init__(self, p: Problem, layout: Layout, chunks: Chunks) -> None:
        self.p, self.layout, self.chunks = p, layout, chunks
        self.common = {**chunks.arguments, "sequences": layout.sequences, "segments": layout.segments}
        self.gate = 2 if p.gate == 2 else int(p.gate == 1 or p.normalize)
        self.common |= {"only_m": 0, "keep": 0, "split": 0}

    def units(self, split: bool) -> int:
        return self.p.segment_slots if split else self.p.N

    def forward(self, mode: int, starts: Tensor, final: Tensor, *, split: bool = False, only_m: bool = False, **more):
        """`starts`, `final` and what else a mode reads or writes; something stands in for what it does not touch."""
        p = self.p
        initial = final if p.initial is None else p.initial
        tensors = {"o": p.v, "states": p.v, "values": p.v, "mapped": final, "initial": initial}
        tensors |= {"starts": starts, "final": final, "has_initial": int(p.initial is not None)}
        tensors |= {"split": int(split), "only_m": int(only_m), **more}

        def run(config: Config) -> None:
            config = table.narrowed(config, p.V)
            width = config.blocks["BV"]
            blocks = (0 if only_m else triton.cdiv(p.V, width)) + (triton.cdiv(p.K, width) if mode == MAPS else 0)
            variant = table.scan_variant(config, p.dtype, p.width, self.gate, mode)
            p.run(variant, self.units(split) * p.HV * blocks, **{**self.common, **tensors})

        table.SCAN[p.dtype.itemsize, p.width, p.gate == 2].run(p.device, run, (mode, split))

    def reverse(self, offsets: bool, grad_o: Tensor, starts: Tensor, grad_final: Tensor, grad_initial: Tensor, **more):
        """The same for the way back; `offsets`: N' of the segments alone."""
        p = self.p
        tensors = {"grad_states": p.v, "residuals": p.v, "grad_v": p.v, "grad_o": grad_o, "starts": starts}
        tensors |= {"grad_final": grad_final, "grad_initial": grad_initial, **more}

        def run(config: Config) -> None:
            config = table.narrowed(config, p.V)
            programs = self.units(bool(more.get("split"))) * p.HV * triton.cdiv(p.V, config.blocks["BV"])
            variant = table.reverse_variant(config, p.dtype, p.width, self.gate, offsets)
            p.run(variant, programs, **{**self.common, **tensors})

        table.REVERSE[p.dtype.itemsize, p.width, p.gate == 2].run(p.device, run, (offsets,))

    def merge(self, offsets: Tensor, mapped: Tensor, initial: Tensor | None, final: Tensor, reverse: bool) -> Tensor:
        """The states before the segments; `final` gets the one after the last."""
        p = self.p
        starts = torch.empty_like(offsets)
        more = {"initial": final if initial is None else initial, "has_initial": int(initial is not None)}
        more |= {"offsets": offsets, "mapped": mapped, "starts": starts, "final": final}

        def run(config: Config) -> None:
            programs = p.N * p.HV * triton.cdiv(p.V, config.blocks["BV"])
            variant = table.merge_variant(config, p.C, reverse)
            p.run(variant, programs, sequences=self.layout.sequences, **more)

        table.MERGE.run(p.device, run, (p.width,))
        return starts

    def new_maps(self) -> Tensor:
        p = self.p
        return p.new(p.segment_slots, p.HV, p.K, p.K, dtype=torch.float32)


def _fills(p: Problem) -> int:
    """Multiprocessors there are to fill; the interpreter has one. Launches without a GPU (tests) count an H100's."""
    if p.device.type == "cpu":
        return 1 if triton_interprets() else 132
    return torch.cuda.get_device_properties(p.device).multi_processor_count


def _worth_splitting(p: Problem) -> bool:
    """Splitting doubles the work of the scan, so it pays where half of the GPU or more would idle."""
    return p.N * p.HV * triton.cdiv(p.V, 128) * 2 <= _fills(p) and p.segment_slots > 2 * p.N


def forward(
    q: Tensor,  # [B, T, H, K]
    k: Tensor,  # [B, T, H, K]
    v: Tensor,  # [B, T, HV, V]
    g: Tensor | None,  # [B, T, HV] or [B, T, HV, K]
    beta: Tensor,  # [B, T, HV]
    initial_state: Tensor | None,  # [N, HV, K, V]
    cu_seqlens: Tensor | None,  # [N + 1]
    scale: float,
    use_qk_l2norm: bool,
    slots: int,
    segment: int,
    split: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # [B, T, HV, V], [N, HV, K, V], [slots, HV, K, V]
    """o, final state, and the states before every `segment` tokens (rounded up to chunks), if there are `slots`.

    The kept states are laid out [slots, HV, V, K]. split: cut the sequences into segments; default: where that pays.
    """
    p = Problem(q, k, v, g, beta, initial_state, cu_seqlens, scale, use_qk_l2norm, segment, slots)
    o, final, kept = p.new(p.B, p.T, p.HV, p.V), p.new_states(p.N), p.new_states(slots)
    if not slots and p.T * p.B <= SHORT * p.N:
        _recur(p, o, final)
        return p.returned(o, final, kept)
    layout = Layout(p)
    scan = Scan(p, layout, Chunks(p, layout))
    if _worth_splitting(p) if split is None else split:
        offsets, mapped = p.new_states(slots or p.segment_slots), scan.new_maps()
        scan.forward(MAPS, offsets, final, split=True, mapped=mapped)
        starts = scan.merge(offsets, mapped, p.initial, final, reverse=False)
        scan.forward(OUT, starts, final, split=True, o=o)
        if slots:
            kept = starts
    else:
        scan.forward(OUT, kept if slots else final, final, o=o, keep=int(slots > 0))
    return p.returned(o, final, kept)


def _recur(p: Problem, o: Tensor, final: Tensor) -> None:
    def run(config: Config) -> None:
        states = {"initial": final if p.initial is None else p.initial, "has_initial": int(p.initial is not None)}
        bounds = p.cu_seqlens if p.packed else p.new(0, dtype=torch.int64)
        programs = p.N * p.HV * triton.cdiv(p.V, config.blocks["BV"])
        p.run(
            table.recurrent_variant(config, p.dtype, p.width), programs, o=o, final=final, cu_seqlens=bounds, **states
        )

    if p.packed:
        Layout(p)  # checks the bounds
    if p.initial is not None and p.initial.data_ptr() == final.data_ptr():  # in place: a search could not repeat it
        run(table.RECURRENT[p.width].rows[architecture(p.device)])
    else:
        table.RECURRENT[p.width].run(p.device, run)


def update_(
    state: Tensor,  # [N, HV, K, V]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    initial_state: Tensor | None,  # [N, HV, K, V], which is `state`, or no part of it
    cu_seqlens: Tensor | None,
    scale: float,
    use_qk_l2norm: bool,
    segment: int,
) -> Tensor:  # [B, T, HV, V]
    """o; `state` is the final state after. Decoding reads the initial state and writes the final one, each once."""
    p = Problem(q, k, v, g, beta, initial_state, cu_seqlens, scale, use_qk_l2norm, segment)
    if p.T * p.B > SHORT * p.N:
        o, final, _ = forward(q, k, v, g, beta, initial_state, cu_seqlens, scale, use_qk_l2norm, 0, segment)
        state.copy_(final)
        return o
    there = state.is_contiguous() and state.data_ptr() % ALIGNMENT == 0 and p.asked == (p.K, p.V)
    final = state if there else p.new_states(p.N)
    o = p.new(p.B, p.T, p.HV, p.V)
    _recur(p, o, final)
    if final is not state:
        state.copy_(cut(final, *p.asked))
    return cut(o, p.asked[1])


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    checkpoints: Tensor,  # as forward kept them; [0, HV, K, V]: none
    grad_o: Tensor,  # [B, T, HV, V]
    grad_state: Tensor,  # [N, HV, K, V]
    scale: float,
    use_qk_l2norm: bool,
    segment: int,
    split: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients in q, k, v, g (empty without one), beta and the initial state, in their dtypes."""
    if v.is_cuda and (doubt := _ptxas.doubted(torch.cuda.get_device_capability(v.device)[0])):
        raise Unsupported(f"backend 'triton' does not run the delta rule's backward here: {doubt}")
    slots = checkpoints.shape[0]
    p = Problem(q, k, v, g, beta, initial_state, cu_seqlens, scale, use_qk_l2norm, segment, slots)
    if v.is_cuda and (why := table.uncompilable(architecture(v.device), p.dtype, p.gate)):
        raise Unsupported(f"backend 'triton' does not run the delta rule's backward here: {why}")
    split = _worth_splitting(p) if split is None else split
    layout = Layout(p)
    scan = Scan(p, layout, Chunks(p, layout, with_x=True))
    grad_o = dense(filled(grad_o.to(p.dtype), p.V))
    grad_final = p.state(grad_state.to(torch.float32))
    mapped = scan.new_maps() if split else None
    walked = _states(scan, p.kept(checkpoints), mapped)
    walked["grad_states"] = torch.empty_like(walked["states"])
    walked["residuals"], dv, ds = torch.empty_like(grad_o), torch.empty_like(grad_o), p.new_states(p.N)
    written = {"grad_states": walked["grad_states"], "residuals": walked["residuals"], "grad_v": dv}
    if mapped is None:
        scan.reverse(False, grad_o, ds, grad_final, ds, **written)
    else:
        offsets = p.new_states(p.segment_slots)
        scan.reverse(True, grad_o, offsets, grad_final, ds, split=1)
        starts = scan.merge(offsets, mapped, grad_final, ds, reverse=True)
        scan.reverse(False, grad_o, starts, grad_final, ds, split=1, **written)
    gradients = _gradients_per_key if p.gate == 2 else _gradients
    dq, dk, dg, dbeta = gradients(p, layout, scan.chunks, grad_o, walked)
    if p.normalize:
        _through_norm(p, p.q, dq)
        _through_norm(p, p.k, dk)
    K, V = p.asked
    dg = p.new(0, dtype=torch.float32) if g is None else cut(dg, *[K] * (p.gate == 2)).to(g.dtype)
    return cut(dq, K), cut(dk, K), cut(dv, V), dg, dbeta.to(beta.dtype), cut(ds, K, V)


def _states(scan: Scan, checkpoints: Tensor, mapped: Tensor | None) -> dict[str, Tensor]:
    """The state before every chunk and V', from the kept states where there are some; M into `mapped`."""
    p = scan.p
    states = p.new(p.chunk_slots, p.HV, p.V, p.K)
    walked = {"states": states, "values": p.new(p.B, p.T, p.HV, p.V)}
    final = p.new_states(p.N)
    starts = checkpoints
    if mapped is not None:
        kept = checkpoints.shape[0] > 0
        offsets = final if kept else p.new_states(p.segment_slots)
        scan.forward(MAPS, offsets, final, split=True, only_m=kept, mapped=mapped)
        if not kept:
            starts = scan.merge(offsets, mapped, p.initial, final, reverse=False)
    split = starts.shape[0] > 0
    scan.forward(STATES, starts if split else final, final, split=split, **walked)
    return walked


def _gradients(p: Problem, layout: Layout, chunks: Chunks, grad_o: Tensor, walked: dict[str, Tensor]) -> tuple:
    """dq, dk [B, T, H, K], and dg, dbeta [B, T, HV] float32."""
    dq, dk = (p.new(p.B, p.T, p.H, p.K) for _ in range(2))
    inputs = {"factors": chunks.factors, "chunks": layout.chunks, "grad_o": grad_o}

    def run(config: Config) -> tuple[Tensor, Tensor]:
        blocks = triton.cdiv(p.K, config.blocks["BK"])
        dbeta, dg = (p.new(blocks, p.B, p.T, p.HV, dtype=torch.float32) for _ in range(2))
        outputs = {"grad_q": dq, "grad_k": dk, "grad_beta": dbeta, "grad_g": dg}
        variant = table.gradient_variant(config, p.dtype, p.gate == 1)
        p.run(variant, p.chunk_slots * p.H * blocks, **inputs, **walked, **outputs)
        return dbeta, dg

    dbeta, dg = table.GRADIENT[p.dtype.itemsize].run(p.device, run, (p.gate,))
    return dq, dk, dg.sum(0), dbeta.sum(0)


def _gradients_per_key(p: Problem, layout: Layout, chunks: Chunks, grad_o: Tensor, walked: dict[str, Tensor]) -> tuple:
    """dq, dk [B, T, H, K], dg [B, T, HV, K] float32 and dbeta [B, T, HV] float32."""
    blocks = triton.cdiv(p.K, table.KDA_WIDTH)
    dq, dk = (p.new(p.B, p.T, p.HV, p.K) for _ in range(2))
    dg = p.new(p.B, p.T, p.HV, p.K, dtype=torch.float32)
    dbeta = p.new(blocks, p.B, p.T, p.HV, dtype=torch.float32)
    pairs = {name: torch.empty_like(chunks.p) for name in ("d", "m")}
    outputs = {"grad_q": dq, "grad_k": dk, "grad_beta": dbeta, "grad_g": dg}
    inputs = {"chunks": layout.chunks, "factors": chunks.factors, "grad_o": grad_o, **walked, **pairs}

    def run(config: Config) -> None:
        heads = p.chunk_slots * p.HV
        p.run(table.kda_pairs_variant(config, p.dtype), heads, **inputs)
        p.run(table.kda_gradient_variant(config, p.dtype), heads * blocks * (p.C // 16), **inputs, **outputs)
        p.run(table.kda_gate_variant(config, p.dtype), heads * blocks, **inputs, **chunks.rows, grad_g=dg)

    table.KDA_GRADIENT[p.dtype.itemsize].run(p.device, run)
    if p.H != p.HV:
        dq, dk = (x.unflatten(2, (p.H, -1)).sum(3, dtype=torch.float32).to(p.dtype) for x in (dq, dk))
    return dq, dk, dg, dbeta.sum(0)


def _through_norm(p: Problem, x: Tensor, grad: Tensor) -> None:
    count = p.B * p.T * p.H
    programs = triton.cdiv(count, table.NORM.blocks["R"])
    p.run(table.norm_gradient_variant(p.dtype, p.width), programs, x=x, grad=grad, count=count, **strides_of(x=x))
