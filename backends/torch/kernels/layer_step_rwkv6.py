"""Triton kernels of layer_step that only RAD-RWKV6 needs: token shift, five inputs, vector decay. Equations 6.1 to 6.8.

x (count, K) is what the layer's norm takes; each row's last normed input and its state lie in slots of a pool, as in decode.py.
"""
from radlads.backends.torch.kernels.decode import place_of
from radlads.backends.torch.kernels.lang import tl, triton
from radlads.backends.torch.kernels.layer_step import low_product, rotated, rows_product
from radlads.backends.torch.kernels.prologue_triton import one_minus_exp


@triton.jit
def shift_low_kernel(x, gain, shift, slots, maa_x, weight, low, pool, eps, K: tl.constexpr, WIDTH: tl.constexpr,
                     COLS: tl.constexpr, BK: tl.constexpr, HAS_SLOTS: tl.constexpr):
    """low (count, WIDTH): tanh(u W1) of 6.1. u is the norm of x, of unknown size until the end, beside the token before."""
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)[:, None]
    item = tl.program_id(1)
    slot, known = place_of(slots, item, pool, HAS_SLOTS)
    now = tl.zeros((COLS, BK), tl.float32)
    past = tl.zeros((COLS, BK), tl.float32)
    square = tl.zeros((COLS, BK), tl.float32)
    same = col * 0
    for start in tl.range(0, K, BK, loop_unroll_factor=2):
        k = start + tl.arange(0, BK)[None, :]
        inside = (col < WIDTH) & (k < K)
        ww = tl.load(weight + k * WIDTH + col, mask=inside, other=0.0).to(tl.float32)
        xx = tl.load(x + item * K + same + k, mask=inside, other=0.0).to(tl.float32)
        share = tl.load(maa_x + same + k, mask=inside, other=0.0).to(tl.float32)
        square += xx * xx
        now += xx * tl.load(gain + same + k, mask=inside, other=0.0).to(tl.float32) * (1.0 - share) * ww
        past += tl.load(shift + slot * K + same + k, mask=inside & known, other=0.0).to(tl.float32) * share * ww
    u = tl.sum(now, 1) * tl.rsqrt(tl.sum(square, 1) / K + eps) + tl.sum(past, 1)
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    tl.store(low + item * WIDTH + col, 2.0 * tl.sigmoid(2.0 * u) - 1.0, mask=col < WIDTH)


@triton.jit
def shift_kernel(x, gain, shift, slots, low, weight, maa_r, maa_k, maa_v, maa_w, maa_g, mixes, count, pool, eps,
                 K: tl.constexpr, R: tl.constexpr, COLS: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
                 HAS_SLOTS: tl.constexpr):
    """mixes (5, count, K): the inputs of 6.2. The normed x takes the place of the token before it, in `shift`."""
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    item = tl.program_id(1)
    slot, known = place_of(slots, item, pool, HAS_SLOTS)
    square = tl.zeros((BK,), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        xx = tl.load(x + item * K + k, mask=k < K, other=0.0).to(tl.float32)
        square += xx * xx
    seen = col < K
    here = tl.load(x + item * K + col, mask=seen, other=0.0).to(tl.float32)
    here = here * tl.rsqrt(tl.sum(square, 0) / K + eps) * tl.load(gain + col, mask=seen, other=0.0).to(tl.float32)
    last = shift + slot * K + col
    delta = tl.load(last, mask=seen & known, other=0.0).to(tl.float32) - here
    tl.store(last, here.to(shift.dtype.element_ty), mask=seen & known)
    for i in tl.static_range(5):
        base = maa_r
        if i == 1:
            base = maa_k
        elif i == 2:
            base = maa_v
        elif i == 3:
            base = maa_w
        elif i == 4:
            base = maa_g
        share = low_product(low + (item * 5 + i) * R, weight + i * R * K, col, R, K, COLS, BR)
        share += tl.load(base + col, mask=seen, other=0.0).to(tl.float32)
        tl.store(mixes + (i * count + item) * K + col, (here + delta * share).to(mixes.dtype.element_ty), mask=seen)


@triton.jit
def project_shifted_kernel(mixes, wq, bq, wk, bk, wv, bv, wg, w1, qkvg, low, count, K: tl.constexpr, C: tl.constexpr,
                           CKV: tl.constexpr, R: tl.constexpr, M: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
                           BK: tl.constexpr, BIAS: tl.constexpr):
    """qkvg (count, 2 C + 2 CKV), the gate through its sigmoid, and low (count, R), of the five inputs (5, count, K)."""
    item = tl.arange(0, M)[:, None]
    WIDE: tl.constexpr = 2 * C + 2 * CKV
    wide = tl.cdiv(WIDE, ROWS)
    pid = tl.program_id(0)
    if pid < wide:
        first = pid * ROWS
        weight = wq
        bias = bq
        start = 0
        rows = C
        which = 0
        if first >= C + 2 * CKV:
            weight = wg
            start = C + 2 * CKV
            which = 4
        elif first >= C + CKV:
            weight = wv
            bias = bv
            start = C + CKV
            rows = CKV
            which = 2
        elif first >= C:
            weight = wk
            bias = bk
            start = C
            rows = CKV
            which = 1
        row = first - start + tl.arange(0, ROWS)
        x = mixes + which * count * K
        out = rows_product(x, x, weight, row, rows, K, 1, count, 0.0, K, M, ROWS, BK, False)
        if BIAS:
            out += tl.load(bias + row, mask=(row < rows) & (which < 4), other=0.0).to(tl.float32)[None, :]
        if which == 4:
            out = tl.sigmoid(out)
        tl.store(qkvg + item * WIDE + start + row[None, :], out, mask=(item < count) & (row[None, :] < rows))
    else:
        col = (pid - wide) * COLS + tl.arange(0, COLS)
        x = mixes + 3 * count * K
        small = rows_product(x, x, w1, col, R, 1, R, count, 0.0, K, M, COLS, BK, False)
        tl.store(low + item * R + col[None, :], 2.0 * tl.sigmoid(2.0 * small) - 1.0, mask=(item < count) & (col[None, :] < R))


@triton.jit
def decay_kernel(low, base, weight, log_w, clamp, C: tl.constexpr, R: tl.constexpr, COLS: tl.constexpr, BR: tl.constexpr):
    """log_w (count, C) of 6.4."""
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    item = tl.program_id(1)
    d = low_product(low + item * R, weight, col, R, C, COLS, BR) + tl.load(base + col, mask=col < C, other=0.0).to(tl.float32)
    tl.store(log_w + item * C + col, tl.maximum(-tl.exp(d), clamp), mask=col < C)


@triton.jit
def mix6_kernel(qkvg, log_w, cos, sin, state, slots, out, pool, scale, H: tl.constexpr, HKV: tl.constexpr, N: tl.constexpr,
                BN: tl.constexpr, BV: tl.constexpr, ROPE: tl.constexpr, ANGLES: tl.constexpr, BALANCE: tl.constexpr,
                HAS_SLOTS: tl.constexpr):
    """6.5 to 6.8 from the projections: the states in place, out (count, H N) gated. ANGLES: from one row's to the next's."""
    val = tl.program_id(0) * BV + tl.arange(0, BV)
    h = tl.program_id(1)
    item = tl.program_id(2)
    slot, known = place_of(slots, item, pool, HAS_SLOTS)
    C: tl.constexpr = H * N
    WIDE: tl.constexpr = 2 * (H + HKV) * N
    col = tl.arange(0, BN)
    seen = col < N
    base = qkvg + item * WIDE
    head = h // (H // HKV)
    q = rotated(base + h * N, cos + item * ANGLES, sin + item * ANGLES, col, N, ROPE)
    k = rotated(base + C + head * N, cos + item * ANGLES, sin + item * ANGLES, col, N, ROPE)
    v = tl.load(base + C + (HKV + head) * N + val, mask=val < N, other=0.0)
    gate = tl.load(base + C + 2 * HKV * N + h * N + val, mask=val < N, other=0.0)
    mine = item * C + h * N
    decay = tl.load(log_w + mine + col, mask=seen, other=0.0)
    if BALANCE:
        k *= one_minus_exp(decay)
    inside = (val[:, None] < N) & seen[None, :] & known
    cell = state + (slot * H + h) * N * N + val[:, None] * N + col[None, :]
    new = tl.load(cell, mask=inside, other=0.0) * tl.exp(decay)[None, :] + v[:, None] * k[None, :]
    tl.store(cell, new, mask=inside)
    o = tl.sum(new * q[None, :], 1) * scale * gate
    tl.store(out + mine + val, o.to(out.dtype.element_ty), mask=val < N)
