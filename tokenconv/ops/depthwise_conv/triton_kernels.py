"""The Triton kernels: a forward pass that moves two tensors, a backward pass that moves five.

Tokens stay as they lie: ``x[b, n, c]`` at ``x + b*stride_b + n*stride_n + c``, so halves of a
packed projection and sequences with class tokens are read where they are. A program has ``BC``
channels of a strip of columns, and goes down the rows; every row is read once for all rows of the
kernel that it meets. Sizes of the grid are no constants, so one compilation serves all images.

Shape letters: B batch, N tokens = P prefix + T*H*W grid, C channels, K kernel side.
"""

import triton
import triton.language as tl

# --- activations, in float32 ---


@triton.jit
def _normal_tail(size):
    """``Phi(-size)`` of the normal distribution, as ``exp2`` of a polynomial.

    A minimax fit of degree 6 to its logarithm on 0 to 6.5, to 7.4e-5 of the value: a third of the
    last bit of float16, and far less to compute than an error function.
    """
    log = 0.006880693783110404 + size * (-0.0005615157008673896 + size * 2.0086304678137714e-05)
    log = -0.46245349868536834 + size * (-0.05027283281422619 + size * log)
    log = -1.0001062782598202 + size * (-1.1496217239014563 + size * log)
    return tl.exp2(log)


@triton.jit
def _activate(z, ACT: tl.constexpr, EXACT: tl.constexpr):
    if ACT == "gelu":
        if EXACT:
            return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
        size = tl.minimum(tl.abs(z), 6.5)
        return tl.where(z <= 0, 0.0, z) - size * _normal_tail(size)
    elif ACT == "gelu_tanh":
        return z * tl.sigmoid(z * (1.5957691216057308 + 0.07135481627260025 * z * z))
    elif ACT == "silu":
        return z * tl.sigmoid(z)
    elif ACT == "relu":
        return tl.where(z <= 0, 0.0, z)  # NaN stays
    else:
        return z


@triton.jit
def _slope(z, ACT: tl.constexpr, EXACT: tl.constexpr):
    """The derivative of the activation."""
    if ACT == "gelu":
        density = 0.3989422804014327 * tl.exp2(-0.7213475204444817 * z * z)
        if EXACT:
            below = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        else:
            tail = _normal_tail(tl.minimum(tl.abs(z), 6.5))
            below = tl.where(z > 0, 1.0 - tail, tail)
        return below + z * density
    elif ACT == "gelu_tanh":
        s = tl.sigmoid(z * (1.5957691216057308 + 0.07135481627260025 * z * z))
        inner = 1.5957691216057308 + 0.21406444881780074 * z * z
        return s + z * s * (1.0 - s) * inner
    elif ACT == "silu":
        s = tl.sigmoid(z)
        return s + z * s * (1.0 - s)
    else:
        return tl.where(z > 0, 1.0, 0.0)


# --- what both passes read ---


@triton.jit
def _tap(
    weight, c, valid_c, K: tl.constexpr, ROW: tl.constexpr, COL: tl.constexpr, FLIP: tl.constexpr,
    RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Weights ``[BC]`` of one tap; a residual is 1 in the middle of the kernel."""
    k: tl.constexpr = (K * K - 1 - ROW * K - COL) if FLIP else (ROW * K + COL)
    tap = tl.load(weight + c * (K * K) + k, mask=valid_c, other=0.0).to(tl.float32)
    if RESIDUAL and ROW == K // 2 and COL == K // 2:
        tap += 1.0
    return tap


@triton.jit
def _taps(weight, c, valid_c, K: tl.constexpr, FLIP: tl.constexpr, RESIDUAL: tl.constexpr):
    taps = ()
    for i in tl.static_range(K):
        for j in tl.static_range(K):
            taps = taps + (_tap(weight, c, valid_c, K, i, j, FLIP, RESIDUAL),)
    return taps


@triton.jit
def _within(row, H, c):
    """Whether a row is one of ``H``, ``[1, BC]``: of scalars the interpreter makes no masks."""
    rows = (row + tl.zeros_like(c))[None, :]
    return (rows >= 0) & (rows < H)


@triton.jit
def _read(base, row, col, H, W, stride_n, c, valid_c, EDGE: tl.constexpr):
    """Tokens ``[TW, BC]`` of one row, zero outside the grid; only rows are checked inside."""
    mask = _within(row, H, c) & valid_c[None, :]
    if EDGE:
        mask = mask & (col >= 0)[:, None] & (col < W)[:, None]
    start = base + (row * W).to(tl.int64) * stride_n
    return tl.load(start + col[:, None] * stride_n + c[None, :], mask=mask, other=0.0).to(
        tl.float32
    )


# --- forward, and the gradient of the input ---


@triton.jit
def _strip(
    x, weight, bias, gate, y, stride_xn, stride_gn, stride_yn, first_row, first_col, H, W, c,
    valid_c, K: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BC: tl.constexpr,
    ACT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr, RESIDUAL: tl.constexpr,
    FLIP: tl.constexpr, EXACT: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """``TH`` rows of ``TW`` columns; every row of the input is read once, added where it goes."""
    if K == 3:  # larger kernels would not fit into registers, and are read again
        taps = _taps(weight, c, valid_c, K, FLIP, RESIDUAL)
    start = tl.zeros([TW, BC], tl.float32)
    if HAS_BIAS:
        start += tl.load(bias + c, mask=valid_c, other=0.0).to(tl.float32)[None, :]
    sums = ()
    for _ in tl.static_range(TH):
        sums = sums + (start,)
    col = first_col + tl.arange(0, TW)
    for r in tl.static_range(TH + K - 1):
        row = first_row + r - K // 2
        for j in tl.static_range(K):
            value = _read(x, row, col + j - K // 2, H, W, stride_xn, c, valid_c, EDGE)
            grown = ()
            for o in tl.static_range(TH):
                if r >= o and r - o < K:
                    if K == 3:
                        tap = taps[(r - o) * K + j]
                    else:
                        tap = _tap(weight, c, valid_c, K, r - o, j, FLIP, RESIDUAL)
                    grown = grown + (sums[o] + value * tap[None, :],)
                else:
                    grown = grown + (sums[o],)
            sums = grown
        if r >= K - 1:
            done = row - K // 2
            out = _activate(sums[r - K + 1], ACT, EXACT)
            mask = _within(done, H, c) & valid_c[None, :]
            if EDGE:
                mask = mask & (col < W)[:, None]
            at = (done * W).to(tl.int64)
            if HAS_GATE:
                here = gate + at * stride_gn + col[:, None] * stride_gn + c[None, :]
                out *= tl.load(here, mask=mask, other=0.0).to(tl.float32)
            here = y + at * stride_yn + col[:, None] * stride_yn + c[None, :]
            tl.store(here, out.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["images", "T", "H", "W", "P"])
def convolve(
    x, weight, bias, gate, y, images, T, H, W, P, C,
    stride_xb, stride_xn, stride_gb, stride_gn, stride_yb, stride_yn,
    K: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BC: tl.constexpr, ACT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr, RESIDUAL: tl.constexpr, FLIP: tl.constexpr,
    PREFIX: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """``y = act(conv(x) + bias) * gate`` on the grid; programs at the end do the prefix tokens.

    ``images`` counts frames: ``B*T``. ``FLIP`` turns the kernel round, which makes the gradient of
    the input out of that of the output.
    """
    pid = tl.program_id(0)
    blocks, strips, slabs = tl.cdiv(C, BC), tl.cdiv(W, TW), tl.cdiv(H, TH)
    c = (pid % blocks) * BC + tl.arange(0, BC)
    valid_c = c < C
    pid = pid // blocks
    if pid < images * slabs * strips:
        first_col = (pid % strips) * TW
        pid = pid // strips
        first_row = (pid % slabs) * TH
        image = pid // slabs
        b = (image // T).to(tl.int64)
        n = (P + (image % T) * H * W).to(tl.int64)
        x += b * stride_xb + n * stride_xn
        gate += b * stride_gb + n * stride_gn
        y += b * stride_yb + n * stride_yn
        if (first_col >= K // 2) & (first_col + TW + K // 2 <= W):
            _strip(
                x, weight, bias, gate, y, stride_xn, stride_gn, stride_yn, first_row, first_col, H,
                W, c, valid_c, K, TH, TW, BC, ACT, HAS_BIAS, HAS_GATE, RESIDUAL, FLIP, EXACT, False,
            )  # fmt: skip
        else:
            _strip(
                x, weight, bias, gate, y, stride_xn, stride_gn, stride_yn, first_row, first_col, H,
                W, c, valid_c, K, TH, TW, BC, ACT, HAS_BIAS, HAS_GATE, RESIDUAL, FLIP, EXACT, True,
            )  # fmt: skip
    else:
        b = (pid - images * slabs * strips).to(tl.int64)
        for p in range(P):
            if PREFIX == "zero":
                out = tl.zeros([BC], tl.float32)
            else:
                at = x + b * stride_xb + p * stride_xn + c
                out = tl.load(at, mask=valid_c, other=0.0).to(tl.float32)
            if PREFIX == "act":
                out = _activate(out, ACT, EXACT)
                if HAS_GATE:
                    at = gate + b * stride_gb + p * stride_gn + c
                    out *= tl.load(at, mask=valid_c, other=0.0).to(tl.float32)
            at = y + b * stride_yb + p * stride_yn + c
            tl.store(at, out.to(y.dtype.element_ty), mask=valid_c)


# --- the other gradients ---


@triton.jit
def _neighbour(base, row, col, i, j, H, W, stride_n, c, inside, K: tl.constexpr):
    """Tokens ``[TW, BC]`` under one tap, zero outside the grid; nothing where no token is."""
    above, left = row + i - K // 2, col + j - K // 2
    mask = _within(above, H, c) & inside & (left >= 0)[:, None] & (left < W)[:, None]
    start = base + (above * W).to(tl.int64) * stride_n
    return tl.load(start + left[:, None] * stride_n + c[None, :], mask=mask, other=0.0).to(
        tl.float32
    )


@triton.jit(do_not_specialize=["images", "T", "H", "W", "P", "parts"])
def gradients(
    x, weight, bias, gate, dy, dz, dgate, partial, images, T, H, W, P, C, parts,
    stride_xb, stride_xn, stride_gb, stride_gn, stride_db, stride_dn, stride_zb, stride_zn,
    K: tl.constexpr, TW: tl.constexpr, BC: tl.constexpr, ACT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr, RESIDUAL: tl.constexpr,
    PREFIX: tl.constexpr, EXACT: tl.constexpr,
    NEEDS_Z: tl.constexpr, NEEDS_GATE: tl.constexpr, NEEDS_WEIGHT: tl.constexpr,
):  # fmt: skip
    """Gradients of what is activated (``dz``), of the gate, and parts of those of the weights.

    What is activated is computed anew. A program goes through its part of all tiles and sums in
    registers; the parts, ``partial[part, K*K + 1, C]``, are added outside, always in one order.
    ``dz`` and ``dgate`` lie alike.
    """
    pid = tl.program_id(0)
    blocks, strips = tl.cdiv(C, BC), tl.cdiv(W, TW)
    c = (pid % blocks) * BC + tl.arange(0, BC)
    valid_c = c < C
    part = pid // blocks
    ACTIVATES: tl.constexpr = ACT != "none" or HAS_GATE
    if part < parts:
        if ACTIVATES and K == 3:
            taps = _taps(weight, c, valid_c, K, False, RESIDUAL)
        sums = ()
        for _ in tl.static_range(K * K + 1):
            sums = sums + (tl.zeros([TW, BC], tl.float32),)
        tiles = images * strips * H
        each = tl.cdiv(tiles, parts)
        for tile in range(part * each, tl.minimum(part * each + each, tiles)):
            row = tile % H
            col = ((tile // H) % strips) * TW + tl.arange(0, TW)
            image = tile // (H * strips)
            b = (image // T).to(tl.int64)
            n = (P + (image % T) * H * W).to(tl.int64)
            x_here = x + b * stride_xb + n * stride_xn
            inside = (col < W)[:, None] & valid_c[None, :]
            n += row * W
            here = dy + b * stride_db + n * stride_dn + col[:, None] * stride_dn + c[None, :]
            d = tl.load(here, mask=inside, other=0.0).to(tl.float32)
            values = ()
            if ACTIVATES:
                z = tl.zeros([TW, BC], tl.float32)
                if HAS_BIAS:
                    z += tl.load(bias + c, mask=valid_c, other=0.0).to(tl.float32)[None, :]
                for i in tl.static_range(K):
                    for j in tl.static_range(K):
                        value = _neighbour(x_here, row, col, i, j, H, W, stride_xn, c, inside, K)
                        if K == 3:
                            z += value * taps[i * K + j][None, :]
                            values = values + (value,)
                        else:
                            z += value * _tap(weight, c, valid_c, K, i, j, False, RESIDUAL)[None, :]
                to = b * stride_zb + n * stride_zn + col[:, None] * stride_zn + c[None, :]
                if HAS_GATE:
                    if NEEDS_GATE:
                        own = d * _activate(z, ACT, EXACT)
                        tl.store(dgate + to, own.to(dgate.dtype.element_ty), mask=inside)
                    here = gate + b * stride_gb + n * stride_gn
                    here += col[:, None] * stride_gn + c[None, :]
                    d *= tl.load(here, mask=inside, other=0.0).to(tl.float32)
                if ACT != "none":
                    d *= _slope(z, ACT, EXACT)
                if NEEDS_Z:
                    tl.store(dz + to, d.to(dz.dtype.element_ty), mask=inside)
            if NEEDS_WEIGHT:
                grown = ()
                for i in tl.static_range(K):
                    for j in tl.static_range(K):
                        if ACTIVATES and K == 3:
                            value = values[i * K + j]
                        else:
                            value = _neighbour(
                                x_here, row, col, i, j, H, W, stride_xn, c, inside, K
                            )
                        grown = grown + (sums[i * K + j] + d * value,)
                sums = grown + (sums[K * K] + d,)
        if NEEDS_WEIGHT:
            here = partial + part.to(tl.int64) * (K * K + 1) * C + c
            for k in tl.static_range(K * K + 1):
                tl.store(here + k * C, tl.sum(sums[k], 0), mask=valid_c)
    else:
        b = (part - parts).to(tl.int64)
        for p in range(P):
            d = tl.load(dy + b * stride_db + p * stride_dn + c, mask=valid_c, other=0.0).to(
                tl.float32
            )
            own = tl.zeros([BC], tl.float32)
            if PREFIX == "zero":
                d = tl.zeros([BC], tl.float32)
            elif PREFIX == "act":
                z = tl.load(x + b * stride_xb + p * stride_xn + c, mask=valid_c, other=0.0)
                z = z.to(tl.float32)
                if HAS_GATE:
                    own = d * _activate(z, ACT, EXACT)
                    g = tl.load(gate + b * stride_gb + p * stride_gn + c, mask=valid_c, other=0.0)
                    d *= g.to(tl.float32)
                if ACT != "none":
                    d *= _slope(z, ACT, EXACT)
            at = b * stride_zb + p * stride_zn + c
            if NEEDS_GATE:
                tl.store(dgate + at, own.to(dgate.dtype.element_ty), mask=valid_c)
            if NEEDS_Z:
                tl.store(dz + at, d.to(dz.dtype.element_ty), mask=valid_c)
