"""The kernels of family `causal_conv1d` for the width every model has: down the tokens, the last in registers."""

import triton
import triton.language as tl
from pyrepr.kernels.causal_conv1d._shared import POINTERS, SIZES, activation, initial_value, only_if, slope


@triton.jit
def _pointers(x, t, d, st, sd, UNIT: tl.constexpr, TURNED: tl.constexpr):
    """To token t of the channels d."""
    if TURNED:
        return x + (d.to(tl.int64) * sd + t)
    row = x + tl.cast(t, tl.int64) * st
    found = row + d
    if UNIT > 1:
        found = tl.multiple_of(found, 16)
    return found


@triton.jit
def _halves(tile):
    """The first and the second half of the columns."""
    return tl.split(tl.permute(tl.reshape(tile, [tile.shape[0], 2, tile.shape[1] // 2]), (0, 2, 1)))


@triton.jit
def _columns(tile):
    """[BLOCK_D, 4] or [BLOCK_D, 8] as a tuple of columns; a thread has them all, so nothing moves."""
    a, b = _halves(tile)
    if tile.shape[1] == 4:
        return tl.split(a) + tl.split(b)
    else:
        return _columns(a) + _columns(b)


@triton.jit
def _rows(x, t, d, T, D, st, sd, ROWS: tl.constexpr, UNIT: tl.constexpr, TURNED: tl.constexpr):
    """Tokens t to t + ROWS of x as a tuple of [BLOCK_D], 0 where there are none."""
    rows = ()
    if TURNED:
        for start in tl.static_range(0, ROWS, UNIT):
            own = t + start + tl.arange(0, UNIT)
            tile = x + (d.to(tl.int64)[:, None] * sd + own[None, :])
            mask = (d < D)[:, None] & (own < T)[None, :]
            rows = rows + _columns(tl.load(tl.multiple_of(tile, [1, 16]), mask=mask, other=0.0))
    else:
        for i in tl.static_range(ROWS):
            p = _pointers(x, t + i, d, st, sd, UNIT, TURNED)
            rows += (tl.load(p, mask=d < only_if(t + i < T, D), other=0.0),)
    return rows


@triton.jit
def _history(x, initial, t, place, n, d, D, st, sd, has_initial, WIDTH: tl.constexpr, TURNED: tl.constexpr):
    """What stands WIDTH − 1 to 1 tokens before token t, which is number `place` of sequence n."""
    found = ()
    for j in tl.static_range(WIDTH - 1):
        back = WIDTH - 1 - j
        mask = d < only_if(back <= place, D)
        value = tl.load(_pointers(x, t - back, d, st, sd, 1, TURNED), mask=mask, other=0.0).to(tl.float32)
        mask = d < only_if((back > place) & (has_initial != 0), D)
        found += (value + initial_value(initial, n, place + j, d, D, WIDTH, mask),)
    return found


@triton.jit
def _filter(weight, d, D, WIDTH: tl.constexpr):
    """The taps of weight [D, WIDTH]."""
    taps = ()
    for j in tl.static_range(WIDTH):
        taps += (tl.load(weight + d.to(tl.int64) * WIDTH + j, mask=d < D, other=0.0).to(tl.float32),)
    return taps


@triton.jit
def _convolve(start, taps, history, value, WIDTH: tl.constexpr):
    """start + Σ_j w_j x_{t−W+1+j}"""
    y = start
    for j in tl.static_range(WIDTH - 1):
        y += taps[j] * history[j]
    return y + taps[WIDTH - 1] * value


@triton.jit
def _moved(history, value, WIDTH: tl.constexpr):
    """The history one token later."""
    found = ()
    for j in tl.static_range(1, WIDTH - 1):
        found += (history[j],)
    found += (value,)
    return found


@triton.jit
def _where(T, D, span, BLOCK_D: tl.constexpr):
    """A program's row of the batch, first token, and channels."""
    blocks, spans = tl.cdiv(D, BLOCK_D), tl.cdiv(T, span)
    part = tl.program_id(0) // blocks
    d = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    return (part // spans).to(tl.int64), part % spans * span, d


@triton.jit
def _multiples(T, D, UNIT: tl.constexpr, TURNED: tl.constexpr):
    """D and T as they are, but so that the compiler sees that masks are the same for UNIT neighbours."""
    if TURNED:
        return D, T // UNIT * UNIT
    else:
        return D // UNIT * UNIT, T


@triton.jit
def _place(position, number, b, t, T, PACKED: tl.constexpr):
    """Of token t < T of row b: how many of its sequence come before it, W − 1 standing for more, and the sequence."""
    if PACKED:
        row = b * T + tl.minimum(t, T - 1)
        return tl.load(position + row), tl.load(number + row)
    else:
        return t, b.to(tl.int32)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=POINTERS)
def forward_kernel(
    x,  # [B, T, D], strides xb, xt, xd
    weight,  # [D, WIDTH]
    bias,  # [D], read if has_bias
    initial,  # [N, D, WIDTH − 1] in x's dtype, read if has_initial
    position,  # [B, T] int32 of PACKED sequences
    number,  # [B, T] int32
    out,  # [B, T, D]
    xb,
    xt,
    xd,
    T,
    D,
    span,
    has_bias,
    has_initial,
    silu,
    WIDTH: tl.constexpr,
    UNIT: tl.constexpr,  # what the dense axis' size and the other strides are multiples of
    TURNED: tl.constexpr,  # xt is 1, otherwise xd is
    PACKED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    b, first, d = _where(T, D, span // ROWS * ROWS, BLOCK_D)
    dense, total = _multiples(T, D, UNIT, TURNED)
    x += b * xb
    taps = _filter(weight, d, D, WIDTH)
    constant = tl.load(bias + d, mask=d < only_if(has_bias != 0, D), other=0.0).to(tl.float32)
    place, n = _place(position, number, b, first, T, PACKED)
    history = _history(x, initial, first, place, n, d, D, xt, xd, has_initial, WIDTH, TURNED)
    for start in range(first, tl.minimum(first + span, T), ROWS):
        rows = _rows(x, start, d, total, dense, xt, xd, ROWS, UNIT, TURNED)
        for i in tl.static_range(ROWS):
            t = start + i
            if PACKED:
                place, n = _place(position, number, b, t, T, PACKED)
                if place == 0:
                    history = _history(x, initial, t, place, n, d, D, xt, xd, has_initial, WIDTH, TURNED)
            value = rows[i].to(tl.float32)
            y = activation(_convolve(constant, taps, history, value, WIDTH), silu)
            history = _moved(history, value, WIDTH)
            target = _pointers(out + b * T * D, t, d, dense, 1, 1 if TURNED else UNIT, False)
            tl.store(target, y.to(out.dtype.element_ty), mask=d < only_if(t < T, dense))


@triton.jit
def _emit(
    dx,
    taps,
    slopes,  # dy of the last WIDTH − 1 tokens
    dy,
    places,  # of the same, PACKED
    place,
    first,
    b,
    t,
    d,
    T,
    D,
    WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    PACKED: tl.constexpr,
):
    """dx of token t − WIDTH + 1 = Σ_k w_{W−1−k} dy_{t−W+1+k}, where that token sees it: of its own sequence."""
    own = t - (WIDTH - 1)
    total = taps[WIDTH - 1] * slopes[0]
    for k in tl.static_range(1, WIDTH - 1):
        seen = tl.where(places[k] >= k, slopes[k], 0.0) if PACKED else slopes[k]
        total += taps[WIDTH - 1 - k] * seen
    total += taps[0] * (tl.where(place >= WIDTH - 1, dy, 0.0) if PACKED else dy)
    target = _pointers(dx + b * T * D, own, d, D, 1, UNIT, False)
    tl.store(target, total.to(dx.dtype.element_ty), mask=d < only_if((own >= first) & (own < T), D))


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=POINTERS)
def backward_kernel(
    x,  # [B, T, D], strides xb, xt, xd
    weight,  # [D, WIDTH] float32
    bias,  # [D] float32, read if has_bias
    initial,  # [N, D, WIDTH − 1] in x's dtype, read if has_initial
    position,  # [B, T] int32 of PACKED sequences
    number,  # [B, T] int32
    grad,  # [B, T, D]
    dx,  # [B, T, D]
    partial,  # [spans, WIDTH + 1, D] float32: the gradients of the taps and of the bias
    xb,
    xt,
    xd,
    T,
    D,
    span,
    has_bias,
    has_initial,
    silu,
    WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    TURNED: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    OUT: tl.constexpr = 1 if TURNED else UNIT
    b, first, d = _where(T, D, span // ROWS * ROWS, BLOCK_D)
    dense, total = _multiples(T, D, UNIT, TURNED)
    x += b * xb
    grad += b * T * D
    taps = _filter(weight, d, D, WIDTH)
    constant = tl.load(bias + d, mask=d < only_if(has_bias != 0, D), other=0.0)
    place, n = _place(position, number, b, first, T, PACKED)
    history = _history(x, initial, first, place, n, d, D, xt, xd, has_initial, WIDTH, TURNED)
    nothing = tl.zeros([BLOCK_D], tl.float32)
    slopes, places, sums, shift = (), (), (nothing,), nothing
    for _ in tl.static_range(WIDTH - 1):
        slopes += (nothing,)
        places += (tl.cast(0, tl.int32),)
        sums += (nothing,)
    count = tl.cdiv(tl.minimum(span // ROWS * ROWS, T - first), ROWS) * ROWS
    for start in range(first, first + count, ROWS):
        rows = _rows(x, start, d, total, dense, xt, xd, ROWS, UNIT, TURNED)
        above = _rows(grad, start, d, T, dense, dense, 1, ROWS, OUT, False)
        for i in tl.static_range(ROWS):
            t = start + i
            if PACKED:
                place, n = _place(position, number, b, t, T, PACKED)
                if place == 0:
                    history = _history(x, initial, t, place, n, d, D, xt, xd, has_initial, WIDTH, TURNED)
            value = rows[i].to(tl.float32)
            dy = above[i].to(tl.float32) * slope(_convolve(constant, taps, history, value, WIDTH), silu)
            added = ()
            for j in tl.static_range(WIDTH - 1):
                added += (sums[j] + dy * history[j],)
            added += (sums[WIDTH - 1] + dy * value,)
            sums, shift = added, shift + dy
            _emit(dx, taps, slopes, dy, places, place, first, b, t, d, T, dense, WIDTH, OUT, PACKED)
            history, slopes = _moved(history, value, WIDTH), _moved(slopes, dy, WIDTH)
            if PACKED:
                places = _moved(places, place, WIDTH)
    for i in tl.static_range(WIDTH - 1):
        t = first + count + i
        if PACKED:
            place, n = _place(position, number, b, t, T, PACKED)
            if place == 0:
                history = _history(x, initial, t, place, n, d, D, xt, xd, has_initial, WIDTH, TURNED)
        mask = d < only_if(t < T, dense)
        value = tl.load(_pointers(x, t, d, xt, xd, OUT, TURNED), mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(_pointers(grad, t, d, dense, 1, OUT, False), mask=mask, other=0.0).to(tl.float32)
        dy *= slope(_convolve(constant, taps, history, value, WIDTH), silu)
        _emit(dx, taps, slopes, dy, places, place, first, b, t, d, T, dense, WIDTH, OUT, PACKED)
        history, slopes = _moved(history, value, WIDTH), _moved(slopes, dy, WIDTH)
        if PACKED:
            places = _moved(places, place, WIDTH)
    sums += (shift,)
    target = partial + (tl.program_id(0) // tl.cdiv(D, BLOCK_D)).to(tl.int64) * (WIDTH + 1) * D + d
    for j in tl.static_range(WIDTH + 1):
        tl.store(target + tl.cast(j, tl.int64) * D, sums[j], mask=d < D)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=POINTERS)
def sums_kernel(
    partial,  # [parts, W + 1, D] float32
    dweight,  # [D, W]
    dbias,  # [D], written if has_bias
    parts,
    D,
    W,
    has_bias,
    BLOCK: tl.constexpr,
    BLOCK_S: tl.constexpr,  # parts read at a time
):
    count = (W + 1).to(tl.int64) * D
    own = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, parts, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        mask = (s < parts)[:, None] & (own < count)[None, :]
        total += tl.sum(tl.load(partial + s.to(tl.int64)[:, None] * count + own[None, :], mask=mask, other=0.0), 0)
    j, d = own // D, own % D
    tl.store(dweight + d * W + j, total.to(dweight.dtype.element_ty), mask=j < W)
    tl.store(dbias + d, total.to(dbias.dtype.element_ty), mask=j == tl.where(has_bias != 0, W, -1))


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=POINTERS)
def initial_gradient_kernel(
    x,  # [B, T, D], strides xb, xt, xd
    weight,  # [D, W] float32
    bias,  # [D] float32, read if has_bias
    initial,  # [N, D, W − 1] in x's dtype
    sequences,  # cu_seqlens [N + 1] int64, read if packed
    grad,  # [B, T, D]
    dinitial,  # out: [N, D, W − 1] float32
    xb,
    xt,
    xd,
    T,
    D,
    W,
    has_bias,
    silu,
    packed,
    BLOCK_D: tl.constexpr,
):
    """A program makes place p of sequence n: Σ_{q ≤ p} w_{p−q} dy_q over the sequence's first tokens."""
    blocks = tl.cdiv(D, BLOCK_D)
    d = (tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    n, p = (tl.program_id(0) // blocks // (W - 1)).to(tl.int64), tl.program_id(0) // blocks % (W - 1)
    mask = d < D
    first = tl.load(sequences + n, mask=packed != 0, other=0)
    length = tl.load(sequences + n + 1, mask=packed != 0, other=0) - first
    length = tl.where(packed != 0, length, T)
    x += tl.where(packed != 0, first * xt, n * xb)
    grad += tl.where(packed != 0, first, n * T) * D
    constant = tl.load(bias + d, mask=d < only_if(has_bias != 0, D), other=0.0)
    total = tl.zeros([BLOCK_D], tl.float32)
    for q in range(0, tl.minimum(p + 1, length).to(tl.int32)):
        y = constant
        for j in range(W):
            back = W - 1 - j
            seen = tl.load(x + tl.cast(q - back, tl.int64) * xt + d * xd, mask=d < only_if(back <= q, D), other=0.0)
            before = initial_value(initial, n, q + j, d, D, W, d < only_if(back > q, D))
            y += tl.load(weight + d * W + j, mask=mask, other=0.0) * (seen.to(tl.float32) + before)
        above = tl.load(grad + tl.cast(q, tl.int64) * D + d, mask=mask, other=0.0).to(tl.float32)
        total += tl.load(weight + d * W + (p - q), mask=mask, other=0.0) * above * slope(y, silu)
    tl.store(dinitial + (n * D + d) * (W - 1) + p, total, mask=mask)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=POINTERS)
def update_kernel(
    state,  # [B, D, S], strides sb, sd, st; moves on by T tokens
    x,  # [B, T, D], strides xb, xt, xd
    weight,  # [D, W]
    bias,  # [D], read if has_bias
    out,  # [B, T, D]
    sb,
    sd,
    st,
    xb,
    xt,
    xd,
    T,
    D,
    S,
    W,
    has_bias,
    silu,
    BLOCK_D: tl.constexpr,
):
    blocks = tl.cdiv(D, BLOCK_D)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    d = (tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    mask = d < D
    state += b * sb + d * sd
    x += b * xb + d * xd
    constant = tl.load(bias + d, mask=d < only_if(has_bias != 0, D), other=0.0).to(tl.float32)
    for t in range(T):
        y = constant
        for first in range(0, W, 4):
            for i in tl.static_range(4):
                j = first + i
                source = tl.cast(t - W + 1 + j, tl.int64)
                old = tl.load(state + (S + source) * st, mask=d < only_if((j < W) & (source < 0), D), other=0.0)
                new = tl.load(x + source * xt, mask=d < only_if((j < W) & (source >= 0), D), other=0.0)
                tap = tl.load(weight + d * W + j, mask=d < only_if(j < W, D), other=0.0).to(tl.float32)
                y += tap * (old.to(tl.float32) + new.to(tl.float32))
        target = out + (b * T + t) * D + d
        tl.store(target, activation(y, silu).to(out.dtype.element_ty), mask=mask)
    # Every read of a place comes before the write to it, behind a barrier: a channel may be another thread's to write.
    for first in range(0, S, 4):
        moved = ()
        for i in tl.static_range(4):
            source = tl.cast(first + i, tl.int64) + T
            old = tl.load(state + source * st, mask=d < only_if(source < S, D), other=0.0)
            new = tl.load(x + (source - S) * xt, mask=d < only_if((source >= S) & (first + i < S), D), other=0.0)
            moved += (tl.where(source < S, old, new),)
        tl.debug_barrier()
        for i in tl.static_range(4):
            tl.store(state + tl.cast(first + i, tl.int64) * st, moved[i], mask=d < only_if(first + i < S, D))
