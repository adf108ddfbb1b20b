"""Triton kernels of the generalised delta rule: solve (per chunk), scan, and their backward pair.

With u_t = S_{t-1} a_t the recurrence is linear attention over two (key, value) streams, (k, v) and (b, u); inside a chunk
u = T (a-queries S_0 + A_ak v) with T = (I - A_ab)^-1. States are held as (key, value) and accumulated in float32.
"""
from radlads.backends.torch.kernels.chunks import (
    decay_exp,
    decay_key_state,
    decay_pair_factors,
    decay_pair_mask,
    decay_query_state,
    gate_load,
    tile_load,
    tile_store,
)
from radlads.backends.torch.kernels.lang import tl, triton


@triton.jit
def wkv7_merge_blocks(A, inverse, HALF: tl.constexpr, C: tl.constexpr, PREC: tl.constexpr):
    """From the inverses of diagonal blocks of HALF tokens to those of twice as many."""
    row = tl.arange(0, C)
    lower = ((row[:, None] // (2 * HALF)) == (row[None, :] // (2 * HALF))) \
        & ((row[:, None] // HALF) > (row[None, :] // HALF))
    step = tl.dot(tl.where(lower, A, 0.0), inverse, input_precision=PREC)
    return tl.dot(inverse, step, inverse, input_precision=PREC)


@triton.jit
def wkv7_inverse(A, C: tl.constexpr, LEVELS: tl.constexpr, PREC: tl.constexpr):
    """(I - A)^-1 of a strictly lower (C, C) matrix, C = 2^LEVELS, by doubling blocks: as stable as substitution."""
    row = tl.arange(0, C)
    pair = ((row[:, None] // 2) == (row[None, :] // 2)) & (row[:, None] > row[None, :])
    inverse = tl.where(pair, A, 0.0) + tl.where(row[:, None] == row[None, :], 1.0, 0.0)
    for level in tl.static_range(1, LEVELS):
        inverse = wkv7_merge_blocks(A, inverse, 1 << level, C, PREC)
    return inverse


@triton.jit(do_not_specialize=["T", "NT"])
def wkv7_solve_kernel(r, log_w, k, a, b, solve, a_ak, a_rb, a_rk, cu_seqlens, chunk_seq, chunk_start, T, NT, H, scale,
                      N: tl.constexpr, BN: tl.constexpr, C: tl.constexpr, DIAG: tl.constexpr, LEVELS: tl.constexpr,
                      CLAMP: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr, GATE_PREC: tl.constexpr,
                      SOLVE_PREC: tl.constexpr, SOLVE_LEVELS: tl.constexpr, INLINE: tl.constexpr,
                      VARLEN: tl.constexpr):
    h = tl.program_id(0)
    chunk = tl.program_id(1)
    if VARLEN:
        seq = tl.load(chunk_seq + chunk)
        if seq < 0:
            return
        begin = tl.load(cu_seqlens + seq)
        first = (chunk - tl.load(chunk_start + seq)) * C
        length = tl.load(cu_seqlens + seq + 1) - begin - first
    else:
        begin = (chunk // NT) * T
        first = (chunk % NT) * C
        length = T - first
    base = (begin + first).to(tl.int64) * H * N + h * N
    stride = H * N
    row = tl.arange(0, C)
    col = tl.arange(0, BN)
    x = gate_load(log_w + base, row, col, length, stride, N, CLAMP)
    A = tl.zeros((C, C), tl.float32)
    ak = tl.zeros((C, C), tl.float32)
    rb = tl.zeros((C, C), tl.float32)
    rk = tl.zeros((C, C), tl.float32)
    past = decay_exp(-x.to(tl.float32))
    for level in tl.static_range(LEVELS):
        query, key = decay_pair_factors(x, level, C, DIAG, GATE_PREC)
        strict = decay_pair_mask(level, C, DIAG, True)
        aq = (tile_load(a + base, row, col, length, stride, N) * (query * past)).to(DOT)
        bk = (tile_load(b + base, row, col, length, stride, N) * key).to(DOT)
        A += tl.where(strict, tl.dot(aq, tl.trans(bk), input_precision=PREC), 0.0)
        if not INLINE:
            causal = decay_pair_mask(level, C, DIAG, False)
            rq = (tile_load(r + base, row, col, length, stride, N) * (query * scale)).to(DOT)
            kk = (tile_load(k + base, row, col, length, stride, N) * key).to(DOT)
            ak += tl.where(strict, tl.dot(aq, tl.trans(kk), input_precision=PREC), 0.0)
            rb += tl.where(causal, tl.dot(rq, tl.trans(bk), input_precision=PREC), 0.0)
            rk += tl.where(causal, tl.dot(rq, tl.trans(kk), input_precision=PREC), 0.0)
    cell = (chunk * H + h).to(tl.int64) * C * C + row[:, None] * C + row[None, :]
    tl.store(solve + cell, wkv7_inverse(A, C, SOLVE_LEVELS, SOLVE_PREC).to(DOT))
    if not INLINE:
        tl.store(a_ak + cell, ak.to(DOT))
        tl.store(a_rb + cell, rb.to(DOT))
        tl.store(a_rk + cell, rk.to(DOT))


@triton.jit
def wkv7_half_decay(x, row, C: tl.constexpr, LATE: tl.constexpr):
    """exp of the decay over one half of the chunk, per key channel."""
    mine = (row >= C // 2) if LATE else (row < C // 2)
    return decay_exp(tl.sum(tl.where(mine[:, None], x.to(tl.float32), 0.0), 0))


@triton.jit(do_not_specialize=["T", "NT"])
def wkv7_scan_kernel(r, log_w, k, v, a, b, solve, a_ak, a_rb, a_rk, state_in, out, u_out, checkpoint, state_out,
                     cu_seqlens, chunk_start, T, NT, H, HV, scale,
                     N: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, CLAMP: tl.constexpr,
                     DOT: tl.constexpr, PREC: tl.constexpr, GATE_PREC: tl.constexpr, INLINE: tl.constexpr,
                     HAS_STATE: tl.constexpr, SAVE: tl.constexpr, VARLEN: tl.constexpr):
    """One value tile of one head of one sequence: outputs, and for training u and the state before each chunk."""
    tile = tl.program_id(0)
    h = tl.program_id(1)
    seq = tl.program_id(2)
    hv = h // (H // HV)
    if VARLEN:
        begin = tl.load(cu_seqlens + seq)
        length = tl.load(cu_seqlens + seq + 1) - begin
        chunk = tl.load(chunk_start + seq).to(tl.int64)
    else:
        begin = seq * T
        length = T
        chunk = (seq * NT).to(tl.int64)
    row = tl.arange(0, C)
    col = tl.arange(0, BN)
    val = tile * BV + tl.arange(0, BV)
    stride = H * N
    stride_v = HV * N
    base = tl.cast(begin, tl.int64) * stride + h * N
    base_v = tl.cast(begin, tl.int64) * stride_v + hv * N
    corner = (seq * H + h).to(tl.int64) * N * N + val[None, :] * N + col[:, None]
    inside = (col[:, None] < N) & (val[None, :] < N)
    causal = row[:, None] >= row[None, :]
    strict = row[:, None] > row[None, :]
    state = tl.zeros((BN, BV), tl.float32)
    if HAS_STATE:
        state = tl.load(state_in + corner, mask=inside, other=0.0)
    for _ in range(0, tl.cdiv(length, C)):
        x = gate_load(log_w + base, row, col, length, stride, N, CLAMP)
        if SAVE:
            saved = checkpoint + (chunk * H + h) * N * N + col[:, None] * N + val[None, :]
            tl.store(saved, state.to(DOT), mask=inside)
        if INLINE:
            # Bounded decay: all factors and the state are taken relative to the middle of the chunk.
            query, key = decay_pair_factors(x, 0, C, C, GATE_PREC)
            state *= wkv7_half_decay(x, row, C, False)[:, None]
        else:
            query = decay_query_state(x, C, GATE_PREC)
            key = decay_key_state(x, C, GATE_PREC)
        # Tiles are loaded next to their use: five of them at once do not fit in registers.
        old = state.to(DOT)
        cell = (chunk * H + h) * C * C + row[:, None] * C + row[None, :]
        rq = (tile_load(r + base, row, col, length, stride, N) * (query * scale)).to(DOT)
        kk = (tile_load(k + base, row, col, length, stride, N) * key).to(DOT)
        vv = tile_load(v + base_v, row, val, length, stride_v, N).to(DOT)
        if INLINE:
            rk = tl.where(causal, tl.dot(rq, tl.trans(kk), input_precision=PREC), 0.0).to(DOT)
        else:
            rk = tl.load(a_rk + cell)
        o = tl.dot(rk, vv, input_precision=PREC)
        o = tl.dot(rq, old, o, input_precision=PREC)
        aq = (tile_load(a + base, row, col, length, stride, N) * (query * decay_exp(-x.to(tl.float32)))).to(DOT)
        if INLINE:
            ak = tl.where(strict, tl.dot(aq, tl.trans(kk), input_precision=PREC), 0.0).to(DOT)
        else:
            ak = tl.load(a_ak + cell)
        u = tl.dot(ak, vv, input_precision=PREC)
        u = tl.dot(aq, old, u, input_precision=PREC)
        bk = (tile_load(b + base, row, col, length, stride, N) * key).to(DOT)
        if INLINE:
            rb = tl.where(causal, tl.dot(rq, tl.trans(bk), input_precision=PREC), 0.0).to(DOT)
        else:
            rb = tl.load(a_rb + cell)
            state *= decay_exp(tl.sum(x.to(tl.float32), 0))[:, None]
        u = tl.dot(tl.load(solve + cell), u.to(DOT), input_precision=PREC).to(DOT)
        o = tl.dot(rb, u, o, input_precision=PREC)
        state = tl.dot(tl.trans(kk), vv, state, input_precision=PREC)
        state = tl.dot(tl.trans(bk), u, state, input_precision=PREC)
        if INLINE:
            state *= wkv7_half_decay(x, row, C, True)[:, None]
        tile_store(out + base, o, row, val, length, stride, N)
        if SAVE:
            tile_store(u_out + base, u, row, val, length, stride, N)
        base += C * stride
        base_v += C * stride_v
        length -= C
        chunk += 1
    tl.store(state_out + corner, state, mask=inside)


@triton.jit(do_not_specialize=["T", "NT"])
def wkv7_reverse_kernel(r, log_w, a, b, solve, a_rb, d_out, d_state_out, du_out, d_checkpoint, d_state_in,
                        cu_seqlens, chunk_start, T, NT, H, scale,
                        N: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, CLAMP: tl.constexpr,
                        DOT: tl.constexpr, PREC: tl.constexpr, GATE_PREC: tl.constexpr, INLINE: tl.constexpr,
                        HAS_STATE: tl.constexpr, NEED_STATE: tl.constexpr, VARLEN: tl.constexpr):
    """The scan from the end: d(u) of each token and d(state) after each chunk, of one value tile."""
    tile = tl.program_id(0)
    h = tl.program_id(1)
    seq = tl.program_id(2)
    if VARLEN:
        begin = tl.load(cu_seqlens + seq)
        length = tl.load(cu_seqlens + seq + 1) - begin
        chunk = tl.load(chunk_start + seq).to(tl.int64)
    else:
        begin = seq * T
        length = T
        chunk = (seq * NT).to(tl.int64)
    row = tl.arange(0, C)
    col = tl.arange(0, BN)
    val = tile * BV + tl.arange(0, BV)
    stride = H * N
    corner = (seq * H + h).to(tl.int64) * N * N + val[None, :] * N + col[:, None]
    inside = (col[:, None] < N) & (val[None, :] < N)
    causal = row[:, None] >= row[None, :]
    d_state = tl.zeros((BN, BV), tl.float32)
    if HAS_STATE:
        d_state = tl.load(d_state_out + corner, mask=inside, other=0.0)
    chunks = tl.cdiv(length, C)
    base = (tl.cast(begin, tl.int64) + (chunks - 1) * C) * stride + h * N
    chunk += chunks - 1
    length -= (chunks - 1) * C
    for _ in range(0, chunks):
        x = gate_load(log_w + base, row, col, length, stride, N, CLAMP)
        do = tile_load(d_out + base, row, val, length, stride, N).to(DOT)
        cell = (chunk * H + h) * C * C + row[:, None] * C + row[None, :]
        saved = d_checkpoint + (chunk * H + h) * N * N + col[:, None] * N + val[None, :]
        tl.store(saved, d_state.to(DOT), mask=inside)
        if INLINE:
            query, key = decay_pair_factors(x, 0, C, C, GATE_PREC)
            d_state *= wkv7_half_decay(x, row, C, True)[:, None]
        else:
            query = decay_query_state(x, C, GATE_PREC)
            key = decay_key_state(x, C, GATE_PREC)
        bk = (tile_load(b + base, row, col, length, stride, N) * key).to(DOT)
        rq = (tile_load(r + base, row, col, length, stride, N) * (query * scale)).to(DOT)
        if INLINE:
            rb = tl.where(causal, tl.dot(rq, tl.trans(bk), input_precision=PREC), 0.0).to(DOT)
        else:
            rb = tl.load(a_rb + cell)
        du = tl.dot(tl.trans(rb), do, input_precision=PREC)
        du = tl.dot(bk, d_state.to(DOT), du, input_precision=PREC)
        du = tl.dot(tl.trans(tl.load(solve + cell)), du.to(DOT), input_precision=PREC).to(DOT)
        aq = (tile_load(a + base, row, col, length, stride, N) * (query * decay_exp(-x.to(tl.float32)))).to(DOT)
        tile_store(du_out + base, du, row, val, length, stride, N)
        if not INLINE:
            d_state *= decay_exp(tl.sum(x.to(tl.float32), 0))[:, None]
        d_state = tl.dot(tl.trans(rq), do, d_state, input_precision=PREC)
        d_state = tl.dot(tl.trans(aq), du, d_state, input_precision=PREC)
        if INLINE:
            d_state *= wkv7_half_decay(x, row, C, False)[:, None]
        base -= C * stride
        length += C
        chunk -= 1
    if NEED_STATE:
        tl.store(d_state_in + corner, d_state, mask=inside)


@triton.jit
def wkv7_query_grad(q, gate, k, b, d_read, state, d_k, d_b, grad, w_grad, row, col, length, stride, scale,
                    N: tl.constexpr, C: tl.constexpr, DIAG: tl.constexpr, LEVELS: tl.constexpr, CLAMP: tl.constexpr,
                    DOT: tl.constexpr, PREC: tl.constexpr, GATE_PREC: tl.constexpr, SOLVE_PREC: tl.constexpr,
                    STRICT: tl.constexpr):
    """Stores the gradient of r (or, STRICT, of a, which meets the state one token earlier) and adds to d(log_w).

    z = query * d(query) is what a query gives to the log-decays before it. Inside the chunk it is taken from the rounded
    factors, so that it cancels exactly against the keys' share of the same pairs.
    """
    x = gate_load(gate, row, col, length, stride, N, CLAMP)
    raw = tile_load(q, row, col, length, stride, N) * scale
    factor = decay_query_state(x, C, GATE_PREC)
    if STRICT:
        factor *= decay_exp(-x.to(tl.float32))
    total = tl.dot(d_read, tl.trans(state), input_precision=PREC) * factor
    z = raw * total
    for level in tl.static_range(LEVELS):
        query, key = decay_pair_factors(x, level, C, DIAG, GATE_PREC)
        mask = decay_pair_mask(level, C, DIAG, STRICT)
        kk = (tile_load(k, row, col, length, stride, N) * key).to(DOT)
        d_query = tl.dot(tl.where(mask, d_k, 0.0).to(DOT), kk, input_precision=PREC)
        bk = (tile_load(b, row, col, length, stride, N) * key).to(DOT)
        d_query = tl.dot(tl.where(mask, d_b, 0.0).to(DOT), bk, d_query, input_precision=PREC)
        if STRICT:
            query *= decay_exp(-x.to(tl.float32))
        total += d_query * query
        z += d_query * (raw * query).to(DOT)
    tile_store(grad, total * scale, row, col, length, stride, N)
    if STRICT:
        after = row[:, None] < row[None, :]
    else:
        after = row[:, None] <= row[None, :]
    return tl.dot(after.to(tl.float32), z, w_grad, input_precision=SOLVE_PREC)


@triton.jit
def wkv7_key_grad(k, gate, r, a, value, d_state, d_r, d_a, grad, w_grad, row, col, length, stride, scale,
                  N: tl.constexpr, C: tl.constexpr, DIAG: tl.constexpr, LEVELS: tl.constexpr, CLAMP: tl.constexpr,
                  DOT: tl.constexpr, PREC: tl.constexpr, GATE_PREC: tl.constexpr, SOLVE_PREC: tl.constexpr):
    """Stores the gradient of k (or b) and adds to d(log_w)."""
    x = gate_load(gate, row, col, length, stride, N, CLAMP)
    raw = tile_load(k, row, col, length, stride, N).to(tl.float32)
    total = tl.dot(value, tl.trans(d_state), input_precision=PREC) * decay_key_state(x, C, GATE_PREC)
    w_grad = tl.dot((row[:, None] > row[None, :]).to(tl.float32), raw * total, w_grad, input_precision=SOLVE_PREC)
    z = tl.zeros(raw.shape, tl.float32)
    for level in tl.static_range(LEVELS):
        query, key = decay_pair_factors(x, level, C, DIAG, GATE_PREC)
        mask = decay_pair_mask(level, C, DIAG, False)
        rq = (tile_load(r, row, col, length, stride, N) * (query * scale)).to(DOT)
        d_key = tl.dot(tl.trans(tl.where(mask, d_r, 0.0).to(DOT)), rq, input_precision=PREC)
        aq = (tile_load(a, row, col, length, stride, N) * (query * decay_exp(-x.to(tl.float32)))).to(DOT)
        d_key = tl.dot(tl.trans(tl.where(mask, d_a, 0.0).to(DOT)), aq, d_key, input_precision=PREC)
        total += d_key * key
        z -= d_key * (raw * key).to(DOT)
    tile_store(grad, total, row, col, length, stride, N)
    return tl.dot((row[:, None] <= row[None, :]).to(tl.float32), z, w_grad, input_precision=SOLVE_PREC)


@triton.jit
def wkv7_value_grad(r, gate, k, a, d_out, du, d_state, row, col, length, stride, scale,
                    N: tl.constexpr, C: tl.constexpr, DIAG: tl.constexpr, LEVELS: tl.constexpr, CLAMP: tl.constexpr,
                    DOT: tl.constexpr, PREC: tl.constexpr, GATE_PREC: tl.constexpr):
    x = gate_load(gate, row, col, length, stride, N, CLAMP)
    key = (tile_load(k, row, col, length, stride, N) * decay_key_state(x, C, GATE_PREC)).to(DOT)
    v_grad = tl.dot(key, d_state, input_precision=PREC)
    rk = tl.zeros((C, C), tl.float32)
    ak = tl.zeros((C, C), tl.float32)
    for level in tl.static_range(LEVELS):
        query, key = decay_pair_factors(x, level, C, DIAG, GATE_PREC)
        kk = tl.trans((tile_load(k, row, col, length, stride, N) * key).to(DOT))
        rq = (tile_load(r, row, col, length, stride, N) * (query * scale)).to(DOT)
        rk += tl.where(decay_pair_mask(level, C, DIAG, False), tl.dot(rq, kk, input_precision=PREC), 0.0)
        aq = (tile_load(a, row, col, length, stride, N) * (query * decay_exp(-x.to(tl.float32)))).to(DOT)
        ak += tl.where(decay_pair_mask(level, C, DIAG, True), tl.dot(aq, kk, input_precision=PREC), 0.0)
    v_grad = tl.dot(tl.trans(rk.to(DOT)), d_out, v_grad, input_precision=PREC)
    return tl.dot(tl.trans(ak.to(DOT)), du, v_grad, input_precision=PREC)


@triton.jit(do_not_specialize=["T", "NT"])
def wkv7_grad_kernel(r, log_w, k, v, a, b, u, checkpoint, d_out, du, d_checkpoint,
                     dr, d_log_w, dk, dv, da, db, cu_seqlens, chunk_seq, chunk_start, T, NT, H, HV, scale,
                     N: tl.constexpr, BN: tl.constexpr, C: tl.constexpr, DIAG: tl.constexpr, LEVELS: tl.constexpr,
                     CLAMP: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr, GATE_PREC: tl.constexpr,
                     SOLVE_PREC: tl.constexpr, VARLEN: tl.constexpr):
    """All gradients of one chunk of one head from the states at its two ends; chunks are independent.

    One gradient after the other, each reading its inputs again (from the L2 cache): together they do not fit in registers.
    """
    h = tl.program_id(0)
    chunk = tl.program_id(1)
    if VARLEN:
        seq = tl.load(chunk_seq + chunk)
        if seq < 0:
            return
        begin = tl.load(cu_seqlens + seq)
        first = (chunk - tl.load(chunk_start + seq)) * C
        length = tl.load(cu_seqlens + seq + 1) - begin - first
    else:
        begin = (chunk // NT) * T
        first = (chunk % NT) * C
        length = T - first
    stride = H * N
    base = (begin + first).to(tl.int64) * stride + h * N
    base_v = (begin + first).to(tl.int64) * (HV * N) + (h // (H // HV)) * N
    row = tl.arange(0, C)
    col = tl.arange(0, BN)
    causal = row[:, None] >= row[None, :]
    strict = row[:, None] > row[None, :]
    do = tile_load(d_out + base, row, col, length, stride, N).to(DOT)
    dy = tile_load(du + base, row, col, length, stride, N)
    vv = tile_load(v + base_v, row, col, length, HV * N, N).to(DOT)
    uu = tile_load(u + base, row, col, length, stride, N)
    corner = (chunk * H + h).to(tl.int64) * N * N + col[:, None] * N + col[None, :]
    inside = (col[:, None] < N) & (col[None, :] < N)
    state = tl.load(checkpoint + corner, mask=inside, other=0.0)
    d_state = tl.load(d_checkpoint + corner, mask=inside, other=0.0)
    d_rk = tl.where(causal, tl.dot(do, tl.trans(vv), input_precision=PREC), 0.0).to(DOT)
    d_rb = tl.where(causal, tl.dot(do, tl.trans(uu), input_precision=PREC), 0.0).to(DOT)
    d_ak = tl.where(strict, tl.dot(dy, tl.trans(vv), input_precision=PREC), 0.0).to(DOT)
    d_ab = tl.where(strict, tl.dot(dy, tl.trans(uu), input_precision=PREC), 0.0).to(DOT)
    x = gate_load(log_w + base, row, col, length, stride, N, CLAMP)
    across = tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 1) * decay_exp(tl.sum(x.to(tl.float32), 0))
    w_grad = tl.zeros((C, BN), tl.float32) + across[None, :]
    w_grad = wkv7_query_grad(r + base, log_w + base, k + base, b + base, do, state, d_rk, d_rb, dr + base, w_grad,
                             row, col, length, stride, scale, N, C, DIAG, LEVELS, CLAMP, DOT, PREC, GATE_PREC,
                             SOLVE_PREC, False)
    w_grad = wkv7_query_grad(a + base, log_w + base, k + base, b + base, dy, state, d_ak, d_ab, da + base, w_grad,
                             row, col, length, stride, 1.0, N, C, DIAG, LEVELS, CLAMP, DOT, PREC, GATE_PREC,
                             SOLVE_PREC, True)
    w_grad = wkv7_key_grad(k + base, log_w + base, r + base, a + base, vv, d_state, d_rk, d_ak, dk + base, w_grad,
                           row, col, length, stride, scale, N, C, DIAG, LEVELS, CLAMP, DOT, PREC, GATE_PREC, SOLVE_PREC)
    w_grad = wkv7_key_grad(b + base, log_w + base, r + base, a + base, uu, d_state, d_rb, d_ab, db + base, w_grad,
                           row, col, length, stride, scale, N, C, DIAG, LEVELS, CLAMP, DOT, PREC, GATE_PREC, SOLVE_PREC)
    tile_store(d_log_w + base, w_grad, row, col, length, stride, N)
    v_grad = wkv7_value_grad(r + base, log_w + base, k + base, a + base, do, dy, d_state, row, col, length, stride, scale,
                             N, C, DIAG, LEVELS, CLAMP, DOT, PREC, GATE_PREC)
    tile_store(dv + base, v_grad, row, col, length, stride, N)
