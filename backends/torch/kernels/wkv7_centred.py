"""Triton kernels of the generalised delta rule for bounded decays: solve and grad of one chunk, beside wkv7_triton.

With c_t the log-decay from the chunk's middle to token t: rq = scale r e^c_t, aq = a e^c_(t-1), kk = k e^-c_t, bb = b e^-c_t;
S the state decayed to the middle, A_xy = x y^T over causal pairs, T = (I - A_ab)^-1. Then u_t = S_(t-1) a_t is
u = T (aq S + A_ak v), out = rq S + A_rk v + A_rb u, and the chunk ends with S + kk^T v + bb^T u.
"""
from radlads.backends.torch.kernels.chunks import decay_exp, gate_load, split_dot, tile_load, tile_store
from radlads.backends.torch.kernels.lang import tl, triton
from radlads.backends.torch.kernels.wkv7_triton import wkv7_inverse


@triton.jit
def chunk_place(cu_seqlens, chunk_seq, chunk_start, chunk, T, NT, C: tl.constexpr, VARLEN: tl.constexpr):
    """First token of a chunk and the number of tokens from there to the end of its sequence (<= 0: no such chunk)."""
    if VARLEN:
        seq = tl.load(chunk_seq + chunk)
        safe = tl.maximum(seq, 0)
        begin = tl.load(cu_seqlens + safe)
        first = (chunk - tl.load(chunk_start + safe)) * C
        length = tl.where(seq < 0, 0, tl.load(cu_seqlens + safe + 1) - begin - first)
    else:
        begin = (chunk // NT) * T
        first = (chunk % NT) * C
        length = T - first
    return (begin + first).to(tl.int64), length


@triton.jit
def centred_decay(log_w, row, col, length, stride, N: tl.constexpr, C: tl.constexpr, CLAMP: tl.constexpr, DOT: tl.constexpr,
                  PREC: tl.constexpr):
    """Log-decays of a block of channels, and their sums from the chunk's middle up to and including each token."""
    x = gate_load(log_w, row, col, length, stride, N, CLAMP)
    t = row[:, None]
    s = row[None, :]
    sign = tl.where((s >= C // 2) & (s <= t), 1.0, 0.0) - tl.where((s < C // 2) & (s > t), 1.0, 0.0)
    if (DOT == tl.bfloat16) and (x.dtype == tl.bfloat16):
        span = tl.dot(sign.to(DOT), x)
    else:
        span = split_dot(sign, x.to(tl.float32), tl.zeros(x.shape, tl.float32), DOT, PREC, True)
    return x.to(tl.float32), span


@triton.jit
def half_decay(x, row, C: tl.constexpr, LATE: tl.constexpr):
    """exp of the decay over one half of the chunk, per channel of x (C, K)."""
    mine = (row >= C // 2) if LATE else (row < C // 2)
    return decay_exp(tl.sum(tl.where(mine[:, None], x, 0.0), 0))


@triton.jit(do_not_specialize=["T", "NT"])
def wkv7_centred_solve_kernel(r, log_w, k, a, b, solve, a_rb, from_v, out_v, from_state, out_state, keys, betas, whole,
                              cu_seqlens, chunk_seq, chunk_start, T, NT, H, scale,
                              N: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, CLAMP: tl.constexpr, DOT: tl.constexpr,
                              PREC: tl.constexpr, SOLVE_LEVELS: tl.constexpr, KNOWN: tl.constexpr, VARLEN: tl.constexpr):
    """wkv7_solve_kernel's factors; KNOWN reads the solution matrix and A_rb, which the forward kept."""
    h = tl.program_id(0)
    chunk = tl.program_id(1)
    token, length = chunk_place(cu_seqlens, chunk_seq, chunk_start, chunk, T, NT, C, VARLEN)
    if length <= 0:
        return
    stride = H * N
    base = token * stride + h * N
    place = (chunk * H + h).to(tl.int64)
    row = tl.arange(0, C)
    cell = place * C * C + row[:, None] * C + row[None, :]
    strict = row[:, None] > row[None, :]
    causal = row[:, None] >= row[None, :]
    # Two pair matrices at a time: four take too many registers.
    ab = tl.zeros((C, C), tl.float32)
    ak = tl.zeros((C, C), tl.float32)
    for block in range(0, N, BK):
        col = block + tl.arange(0, BK)
        x, span = centred_decay(log_w + base, row, col, length, stride, N, C, CLAMP, DOT, PREC)
        back = decay_exp(-span)
        aq = (tile_load(a + base, row, col, length, stride, N) * decay_exp(span - x)).to(DOT)
        kk = (tile_load(k + base, row, col, length, stride, N) * back).to(DOT)
        ak = tl.dot(aq, tl.trans(kk), ak, input_precision=PREC)
        if not KNOWN:
            bb = (tile_load(b + base, row, col, length, stride, N) * back).to(DOT)
            ab = tl.dot(aq, tl.trans(bb), ab, input_precision=PREC)
    if KNOWN:
        inverse = tl.load(solve + cell)
    else:
        # float16 holds eleven bits, and no entry leaves its range unless the recurrence itself explodes within a chunk.
        inverse = wkv7_inverse(tl.where(strict, ab, 0.0), C, SOLVE_LEVELS, tl.float16 if DOT == tl.bfloat16 else DOT, PREC)
        inverse = inverse.to(DOT)
        tl.store(solve + cell, inverse)
    uv = tl.dot(inverse, tl.where(strict, ak, 0.0).to(DOT), input_precision=PREC).to(DOT)
    tl.store(from_v + cell, uv)
    rb = tl.zeros((C, C), tl.float32)
    rk = tl.zeros((C, C), tl.float32)
    for block in range(0, N, BK):
        col = block + tl.arange(0, BK)
        x, span = centred_decay(log_w + base, row, col, length, stride, N, C, CLAMP, DOT, PREC)
        back = decay_exp(-span)
        rq = (tile_load(r + base, row, col, length, stride, N) * (decay_exp(span) * scale)).to(DOT)
        kk = (tile_load(k + base, row, col, length, stride, N) * back).to(DOT)
        rk = tl.dot(rq, tl.trans(kk), rk, input_precision=PREC)
        if not KNOWN:
            bb = (tile_load(b + base, row, col, length, stride, N) * back).to(DOT)
            rb = tl.dot(rq, tl.trans(bb), rb, input_precision=PREC)
    if KNOWN:
        rb = tl.load(a_rb + cell)
    else:
        rb = tl.where(causal, rb, 0.0).to(DOT)
        tl.store(a_rb + cell, rb)
    tl.store(out_v + cell, tl.dot(rb, uv, tl.where(causal, rk, 0.0), input_precision=PREC).to(DOT))
    tile = place * C * N
    for block in range(0, N, BK):
        col = block + tl.arange(0, BK)
        x, span = centred_decay(log_w + base, row, col, length, stride, N, C, CLAMP, DOT, PREC)
        early = half_decay(x, row, C, False)
        late = half_decay(x, row, C, True)
        tl.store(whole + place * N + col, early * late, mask=col < N)
        back = decay_exp(-span) * late[None, :]
        tile_store(keys + tile, tile_load(k + base, row, col, length, stride, N) * back, row, col, C, N, N)
        tile_store(betas + tile, tile_load(b + base, row, col, length, stride, N) * back, row, col, C, N, N)
        aq = (tile_load(a + base, row, col, length, stride, N) * (decay_exp(span - x) * early[None, :])).to(DOT)
        us = tl.dot(inverse, aq, input_precision=PREC).to(DOT)
        tile_store(from_state + tile, us, row, col, C, N, N)
        rq = tile_load(r + base, row, col, length, stride, N) * (decay_exp(span) * (early * scale)[None, :])
        tile_store(out_state + tile, tl.dot(rb, us, rq, input_precision=PREC), row, col, C, N, N)


@triton.jit
def pair_grad(read, value, STRICT: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr):
    """d(pair matrix): gradient rows (of out, or of u where STRICT) times values (v or u), over the causal pairs."""
    row = tl.arange(0, C)
    if STRICT:
        pairs = row[:, None] > row[None, :]
    else:
        pairs = row[:, None] >= row[None, :]
    return tl.where(pairs, tl.dot(read, tl.trans(value), input_precision=PREC), 0.0).to(DOT)


@triton.jit(do_not_specialize=["T", "NT"])
def wkv7_centred_grad_kernel(r, log_w, k, v, a, b, u, checkpoint, d_out, du, d_checkpoint, dr, d_log_w, dk, da, db,
                             cu_seqlens, chunk_seq, chunk_start, T, NT, H, HV, scale,
                             N: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, CLAMP: tl.constexpr,
                             DOT: tl.constexpr, PREC: tl.constexpr, VARLEN: tl.constexpr):
    """Gradients of r, log_w, k, a, b of one chunk of one head, one block of key channels after the other.

    A factor times its gradient is what it gives to the log-decay in its exponent; those of pairs within the chunk are taken
    from the rounded factors, so that a query's share cancels exactly against its keys' shares before both.
    """
    h = tl.program_id(0)
    chunk = tl.program_id(1)
    token, length = chunk_place(cu_seqlens, chunk_seq, chunk_start, chunk, T, NT, C, VARLEN)
    if length <= 0:
        return
    stride = H * N
    stride_v = HV * N
    base = token * stride + h * N
    base_v = token * stride_v + (h // (H // HV)) * N
    corner = (chunk * H + h).to(tl.int64) * N * N
    row = tl.arange(0, C)
    val = tl.arange(0, BV)
    do = tile_load(d_out + base, row, val, length, stride, N).to(DOT)
    vv = tile_load(v + base_v, row, val, length, stride_v, N).to(DOT)
    uu = tile_load(u + base, row, val, length, stride, N).to(DOT)
    dd = tile_load(du + base, row, val, length, stride, N).to(DOT)
    d_rk = pair_grad(do, vv, False, C, DOT, PREC)
    d_rb = pair_grad(do, uu, False, C, DOT, PREC)
    d_ak = pair_grad(dd, vv, True, C, DOT, PREC)
    d_ab = pair_grad(dd, uu, True, C, DOT, PREC)
    for block in range(0, N, BK):
        col = block + tl.arange(0, BK)
        x, span = centred_decay(log_w + base, row, col, length, stride, N, C, CLAMP, DOT, PREC)
        early = half_decay(x, row, C, False)[None, :]
        back = decay_exp(-span)
        kk = (tile_load(k + base, row, col, length, stride, N) * back).to(DOT)
        bb = (tile_load(b + base, row, col, length, stride, N) * back).to(DOT)
        old = tile_load(checkpoint + corner, col, val, N, N, N).to(DOT)
        do = tile_load(d_out + base, row, val, length, stride, N).to(DOT)
        grad = tl.dot(do, tl.trans(old), input_precision=PREC) * early
        grad = tl.dot(d_rk, kk, grad, input_precision=PREC)
        grad = tl.dot(d_rb, bb, grad, input_precision=PREC)
        away = decay_exp(span) * scale
        rq = (tile_load(r + base, row, col, length, stride, N) * away).to(DOT)
        tile_store(dr + base, grad * away, row, col, length, stride, N)
        upto = rq * grad
        dd = tile_load(du + base, row, val, length, stride, N).to(DOT)
        grad = tl.dot(dd, tl.trans(old), input_precision=PREC) * early
        grad = tl.dot(d_ak, kk, grad, input_precision=PREC)
        grad = tl.dot(d_ab, bb, grad, input_precision=PREC)
        before = decay_exp(span - x)
        aq = (tile_load(a + base, row, col, length, stride, N) * before).to(DOT)
        tile_store(da + base, grad * before, row, col, length, stride, N)
        here = aq * grad
        upto += here
        new = tile_load(d_checkpoint + corner, col, val, N, N, N).to(DOT)
        late = half_decay(x, row, C, True)[None, :]
        w_grad = tl.sum(old.to(tl.float32) * new.to(tl.float32), 1)[None, :] * (early * late) - here
        pairs = tl.dot(tl.trans(d_rk), rq, input_precision=PREC)
        pairs = tl.dot(tl.trans(d_ak), aq, pairs, input_precision=PREC)
        vv = tile_load(v + base_v, row, val, length, stride_v, N).to(DOT)
        write = tl.dot(vv, tl.trans(new), input_precision=PREC) * late
        tile_store(dk + base, (pairs + write) * back, row, col, length, stride, N)
        upto -= kk * pairs
        after = kk * write
        pairs = tl.dot(tl.trans(d_rb), rq, input_precision=PREC)
        pairs = tl.dot(tl.trans(d_ab), aq, pairs, input_precision=PREC)
        uu = tile_load(u + base, row, val, length, stride, N).to(DOT)
        write = tl.dot(uu, tl.trans(new), input_precision=PREC) * late
        tile_store(db + base, (pairs + write) * back, row, col, length, stride, N)
        upto -= bb * pairs
        after += bb * write
        w_grad = split_dot(row[:, None] <= row[None, :], upto, w_grad, DOT, PREC, True)
        w_grad = split_dot(row[:, None] > row[None, :], after, w_grad, DOT, PREC, True)
        tile_store(d_log_w + base, w_grad, row, col, length, stride, N)
