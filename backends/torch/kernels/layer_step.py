"""Triton kernels that take a few rows one token through a decoder layer, reading each weight once.

A matrix times a few vectors is bound by the matrix's bytes, and a layer by its launches: what lies between two matrices is done
in the kernel of the one before or after. What goes into a matrix has the model's dtype, what comes out of one float32.
"""
from radlads.backends.torch.kernels.decode import place_of
from radlads.backends.torch.kernels.lang import tl, triton


@triton.jit
def rows_product(x, gain, weight, row, rows, step_row, step_k, count, eps, K: tl.constexpr, M: tl.constexpr,
                 ROWS: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr):
    """(M, ROWS) float32: x (count, K) against rows of a weight; NORM: against x over its root mean square, times gain."""
    if M == 1:
        out = row_product(x, gain, weight, row, rows, step_row, step_k, eps, K, ROWS, BK, NORM)[None, :]
    else:
        item = tl.arange(0, M)
        acc = tl.zeros((M, ROWS, BK), tl.float32)
        square = tl.zeros((M, BK), tl.float32)
        for start in tl.range(0, K, BK, loop_unroll_factor=2):
            k = start + tl.arange(0, BK)
            ww = tl.load(weight + row[:, None] * step_row + k[None, :] * step_k,
                         mask=(row[:, None] < rows) & (k[None, :] < K), other=0.0)
            xx = tl.load(x + item[:, None] * K + k[None, :], mask=(item[:, None] < count) & (k[None, :] < K),
                         other=0.0).to(tl.float32)
            if NORM:
                square += xx * xx
                xx *= tl.load(gain + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
            acc += xx[:, None, :] * ww.to(tl.float32)[None, :, :]
        out = tl.sum(acc, 2)
        if NORM:
            out *= tl.rsqrt(tl.sum(square, 1) / K + eps)[:, None]
    return out


@triton.jit
def row_product(x, gain, weight, row, rows, step_row, step_k, eps, K: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr,
                NORM: tl.constexpr):
    """rows_product of one row of x. Every tile has the weight's shape: no thread then waits for another inside the loop."""
    acc = tl.zeros((ROWS, BK), tl.float32)
    square = tl.zeros((ROWS, BK), tl.float32)
    same = row[:, None] * 0
    for start in tl.range(0, K, BK, loop_unroll_factor=4):
        k = start + tl.arange(0, BK)[None, :]
        inside = row[:, None] < rows
        if K % BK != 0:
            inside = inside & (k < K)
        ww = tl.load(weight + row[:, None] * step_row + k * step_k, mask=inside, other=0.0)
        xx = tl.load(x + same + k, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            square += xx * xx
            xx *= tl.load(gain + same + k, mask=inside, other=0.0).to(tl.float32)
        acc += xx * ww.to(tl.float32)
    out = tl.sum(acc, 1)
    if NORM:
        out *= tl.rsqrt(tl.sum(square, 1) / K + eps)
    return out


@triton.jit
def project_kernel(x, gain, wq, bq, wk, bk, wv, bv, w1, a1, v1, g1, qkv, low, count, eps, K: tl.constexpr, C: tl.constexpr,
                   CKV: tl.constexpr, RW: tl.constexpr, RA: tl.constexpr, RV: tl.constexpr, RG: tl.constexpr, M: tl.constexpr,
                   ROWS: tl.constexpr, COLS: tl.constexpr, BK: tl.constexpr, BIAS: tl.constexpr):
    """qkv (count, C + 2 CKV) and low (count, RW + RA + RV + RG), with their activations, of the normed x (count, K)."""
    item = tl.arange(0, M)[:, None]
    wide = tl.cdiv(C + 2 * CKV, ROWS)
    pid = tl.program_id(0)
    if pid < wide:
        first = pid * ROWS
        weight = wq
        start = 0
        rows = C
        if first >= C + CKV:
            weight = wv
            start = C + CKV
            rows = CKV
        elif first >= C:
            weight = wk
            start = C
            rows = CKV
        row = first - start + tl.arange(0, ROWS)
        out = rows_product(x, gain, weight, row, rows, K, 1, count, eps, K, M, ROWS, BK, True)
        if BIAS:
            bias = bq
            if first >= C + CKV:
                bias = bv
            elif first >= C:
                bias = bk
            out += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[None, :]
        tl.store(qkv + item * (C + 2 * CKV) + start + row[None, :], out, mask=(item < count) & (row[None, :] < rows))
    else:
        # The first matrices of the low-rank pairs, columns of (K, rank).
        part = pid - wide
        narrow = w1
        rank = RW
        place = 0
        kind = 0
        if part >= tl.cdiv(RW, COLS):
            part -= tl.cdiv(RW, COLS)
            narrow = a1
            rank = RA
            place = RW
            kind = 1
            if part >= tl.cdiv(RA, COLS):
                part -= tl.cdiv(RA, COLS)
                narrow = g1
                rank = RG
                place = RW + RA
                kind = 2
                if part >= tl.cdiv(RG, COLS):
                    part -= tl.cdiv(RG, COLS)
                    narrow = v1
                    rank = RV
                    place = RW + RA + RG
                    kind = 3
        col = part * COLS + tl.arange(0, COLS)
        small = rows_product(x, gain, narrow, col, rank, 1, rank, count, eps, K, M, COLS, BK, True)
        if kind == 0:
            small = 2.0 * tl.sigmoid(2.0 * small) - 1.0  # tanh
        if kind == 2:
            small = tl.sigmoid(small)
        tl.store(low + item * (RW + RA + RG + RV) + place + col[None, :], small, mask=(item < count) & (col[None, :] < rank))


@triton.jit
def low_product(low, weight, col, rank, C: tl.constexpr, COLS: tl.constexpr, BR: tl.constexpr):
    """(COLS,) float32: low (rank,) times the columns of weight (rank, C)."""
    acc = tl.zeros((BR, COLS), tl.float32)
    for first in range(0, rank, BR):
        r = first + tl.arange(0, BR)
        xx = tl.load(low + r, mask=r < rank, other=0.0)
        ww = tl.load(weight + r[:, None] * C + col[None, :], mask=(r[:, None] < rank) & (col[None, :] < C), other=0.0)
        acc += xx[:, None] * ww.to(tl.float32)
    return tl.sum(acc, 0)


@triton.jit
def expand_kernel(low, w0, w2, a0, a2, g2, v0, v2, parts, count, C: tl.constexpr, RW: tl.constexpr, RA: tl.constexpr,
                  RV: tl.constexpr, RG: tl.constexpr, COLS: tl.constexpr, BR: tl.constexpr):
    """parts (4, count, C): the log-decay over its bound, the in-context rate, the gate, the share of the first layer's values."""
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    kind = tl.program_id(1)
    item = tl.program_id(2)
    weight = w2
    base = w0
    rank = RW
    start = 0
    if kind == 1:
        weight = a2
        base = a0
        rank = RA
        start = RW
    elif kind == 2:
        weight = g2
        rank = RG
        start = RW + RA
    elif kind == 3:
        weight = v2
        base = v0
        rank = RV
        start = RW + RA + RG
    out = low_product(low + item * (RW + RA + RG + RV) + start, weight, col, rank, C, COLS, BR)
    if kind != 2:
        out = tl.sigmoid(out + tl.load(base + col, mask=col < C, other=0.0).to(tl.float32))
    tl.store(parts + (kind * count + item) * C + col, out, mask=col < C)


@triton.jit
def rotated(x, cos, sin, col, N: tl.constexpr, ROPE: tl.constexpr):
    """Channels of one head, rotated in half-split form."""
    here = tl.load(x + col, mask=col < N, other=0.0)
    if ROPE:
        other = tl.load(x + (col + N // 2) % N, mask=col < N, other=0.0)
        half = col % (N // 2)
        c = tl.load(cos + half, mask=col < N, other=0.0).to(tl.float32)
        s = tl.load(sin + half, mask=col < N, other=0.0).to(tl.float32)
        here = here * c + tl.where(col < N // 2, -other, other) * s
    return here


@triton.jit
def mix_kernel(qkv, parts, cos, sin, v_first, state, slots, out, count, pool, low, scale, H: tl.constexpr,
               HKV: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, ROPE: tl.constexpr,
               ANGLES: tl.constexpr, MIX_FIRST: tl.constexpr, HAS_SLOTS: tl.constexpr):
    """7.1 to 7.9 of variant C from the projections: states of a pool (pool, H, N, N) in place, out (count, H N) gated.

    low: the bound of the log-decay. v_first: qkv of the first recurrent layer. ANGLES: from one row's angles to the next's.
    """
    val = tl.program_id(0) * BV + tl.arange(0, BV)
    h = tl.program_id(1)
    item = tl.program_id(2)
    slot, known = place_of(slots, item, pool, HAS_SLOTS)
    C: tl.constexpr = H * N
    WIDE: tl.constexpr = (H + 2 * HKV) * N
    col = tl.arange(0, BN)
    seen = col < N
    base = qkv + item * WIDE
    head = h // (H // HKV)
    r = rotated(base + h * N, cos + item * ANGLES, sin + item * ANGLES, col, N, ROPE)
    k = rotated(base + C + head * N, cos + item * ANGLES, sin + item * ANGLES, col, N, ROPE)
    mine = item * C + h * N
    log_w = low * tl.load(parts + mine + col, mask=seen, other=0.0)
    a = tl.load(parts + count * C + mine + col, mask=seen, other=0.0)
    gate = tl.load(parts + 2 * count * C + mine + val, mask=val < N, other=0.0)
    at_v = item * WIDE + C + (HKV + head) * N + val
    v = tl.load(qkv + at_v, mask=val < N, other=0.0)
    if MIX_FIRST:
        share = tl.load(parts + 3 * count * C + mine + val, mask=val < N, other=0.0)
        v += share * (tl.load(v_first + at_v, mask=val < N, other=0.0) - v)
    kappa = k / tl.maximum(tl.sqrt(tl.sum(k * k, 0)), 1e-12)
    decay = tl.exp(log_w)
    k = k * (1.0 - decay + a)
    inside = (val[:, None] < N) & seen[None, :] & known
    cell = state + (slot * H + h) * N * N + val[:, None] * N + col[None, :]
    old = tl.load(cell, mask=inside, other=0.0)
    new = old * decay[None, :] + v[:, None] * k[None, :] - tl.sum(old * kappa[None, :], 1)[:, None] * (kappa * a)[None, :]
    tl.store(cell, new, mask=inside)
    o = tl.sum(new * r[None, :], 1) * scale * gate
    tl.store(out + mine + val, o.to(out.dtype.element_ty), mask=val < N)


@triton.jit
def add_linear_kernel(x, weight, bias, residual, out, rows, count, K: tl.constexpr, M: tl.constexpr, ROWS: tl.constexpr,
                      BK: tl.constexpr, BIAS: tl.constexpr):
    """out (count, rows) = residual + x (count, K) weight^T + bias."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    item = tl.arange(0, M)[:, None]
    y = rows_product(x, x, weight, row, rows, K, 1, count, 0.0, K, M, ROWS, BK, False)
    if BIAS:
        y += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[None, :]
    inside = (item < count) & (row[None, :] < rows)
    y += tl.load(residual + item * rows + row[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(out + item * rows + row[None, :], y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gated_units_kernel(x, gain, gate, gate_bias, up, up_bias, out, rows, count, eps, K: tl.constexpr, M: tl.constexpr,
                       ROWS: tl.constexpr, BK: tl.constexpr, BIAS: tl.constexpr):
    """out (count, rows): SiLU(W_gate x) * W_up x of the normed x (count, K)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    item = tl.arange(0, M)[:, None]
    g = rows_product(x, gain, gate, row, rows, K, 1, count, eps, K, M, ROWS, BK, True)
    u = rows_product(x, gain, up, row, rows, K, 1, count, eps, K, M, ROWS, BK, True)
    if BIAS:
        g += tl.load(gate_bias + row, mask=row < rows, other=0.0).to(tl.float32)[None, :]
        u += tl.load(up_bias + row, mask=row < rows, other=0.0).to(tl.float32)[None, :]
    y = g * tl.sigmoid(g) * u
    tl.store(out + item * rows + row[None, :], y.to(out.dtype.element_ty), mask=(item < count) & (row[None, :] < rows))
