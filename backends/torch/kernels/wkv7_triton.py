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


@triton.jit
def wkv7_factors(r, log_w, k, a, b, row, col, length, stride, scale, N: tl.constexpr, C: tl.constexpr,
                 CLAMP: tl.constexpr, DOT: tl.constexpr, GATE_PREC: tl.constexpr, INLINE: tl.constexpr):
    """Decayed r, a, k, b of one block of key channels, and the decays of the state around them.

    INLINE (bounded decay): relative to the middle of the chunk, so that their products are the pairs' decays too; the
    state decays to the middle and from there to the end. Else: relative to the state at the chunk's start (r, a) or end.
    """
    x = gate_load(log_w, row, col, length, stride, N, CLAMP)
    if INLINE:
        query, key = decay_pair_factors(x, 0, C, C, GATE_PREC)
        first = wkv7_half_decay(x, row, C, False)[:, None]
        last = wkv7_half_decay(x, row, C, True)[:, None]
    else:
        query = decay_query_state(x, C, GATE_PREC)
        key = decay_key_state(x, C, GATE_PREC)
        first = decay_exp(tl.sum(x.to(tl.float32), 0))[:, None]
        last = first
    kk = (tile_load(k, row, col, length, stride, N) * key).to(DOT)
    bk = (tile_load(b, row, col, length, stride, N) * key).to(DOT)
    rq = (tile_load(r, row, col, length, stride, N) * (query * scale)).to(DOT)
    aq = (tile_load(a, row, col, length, stride, N) * (query * decay_exp(-x.to(tl.float32)))).to(DOT)
    return rq, kk, aq, bk, first, last


@triton.jit(do_not_specialize=["T", "NT"])
def wkv7_scan_kernel(r, log_w, k, v, a, b, solve, a_ak, a_rb, a_rk, state_in, out, u_out, checkpoint, state_out,
                     cu_seqlens, chunk_start, T, NT, H, HV, scale,
                     N: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, CLAMP: tl.constexpr,
                     DOT: tl.constexpr, PREC: tl.constexpr, GATE_PREC: tl.constexpr, INLINE: tl.constexpr,
                     HAS_STATE: tl.constexpr, SAVE: tl.constexpr, VARLEN: tl.constexpr):
    """One value tile of one head of one sequence: outputs, and for training u and the state before each chunk.

    Key channels are held in up to two blocks (0 and 1) of BK: a tile of 128 channels takes too many registers.
    """
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
    col0 = tl.arange(0, BK)
    col1 = BK + tl.arange(0, BK)
    val = tile * BV + tl.arange(0, BV)
    stride = H * N
    stride_v = HV * N
    base = tl.cast(begin, tl.int64) * stride + h * N
    base_v = tl.cast(begin, tl.int64) * stride_v + (h // (H // HV)) * N
    corner = (seq * H + h).to(tl.int64) * N * N
    state0 = tl.zeros((BK, BV), tl.float32)
    state1 = tl.zeros((BK, BV), tl.float32)
    if HAS_STATE:
        state0 = tl.trans(tile_load(state_in + corner, val, col0, N, N, N))
        state1 = tl.trans(tile_load(state_in + corner, val, col1, N, N, N))
    causal = row[:, None] >= row[None, :]
    strict = row[:, None] > row[None, :]
    for _ in range(0, tl.cdiv(length, C)):
        if SAVE:
            saved = checkpoint + (chunk * H + h) * N * N
            tile_store(saved, state0, col0, val, N, N, N)
            if N > BK:
                tile_store(saved, state1, col1, val, N, N, N)
        rq0, kk0, aq0, bk0, first0, last0 = wkv7_factors(
            r + base, log_w + base, k + base, a + base, b + base, row, col0, length, stride, scale, N, C, CLAMP, DOT,
            GATE_PREC, INLINE)
        if N > BK:
            rq1, kk1, aq1, bk1, first1, last1 = wkv7_factors(
                r + base, log_w + base, k + base, a + base, b + base, row, col1, length, stride, scale, N, C, CLAMP, DOT,
                GATE_PREC, INLINE)
        vv = tile_load(v + base_v, row, val, length, stride_v, N).to(DOT)
        cell = (chunk * H + h) * C * C + row[:, None] * C + row[None, :]
        if INLINE:
            state0 *= first0
            if N > BK:
                state1 *= first1
            ak = tl.dot(aq0, tl.trans(kk0), input_precision=PREC)
            rk = tl.dot(rq0, tl.trans(kk0), input_precision=PREC)
            rb = tl.dot(rq0, tl.trans(bk0), input_precision=PREC)
            if N > BK:
                ak = tl.dot(aq1, tl.trans(kk1), ak, input_precision=PREC)
                rk = tl.dot(rq1, tl.trans(kk1), rk, input_precision=PREC)
                rb = tl.dot(rq1, tl.trans(bk1), rb, input_precision=PREC)
            ak = tl.where(strict, ak, 0.0).to(DOT)
            rk = tl.where(causal, rk, 0.0).to(DOT)
            rb = tl.where(causal, rb, 0.0).to(DOT)
        else:
            ak = tl.load(a_ak + cell)
            rk = tl.load(a_rk + cell)
            rb = tl.load(a_rb + cell)
        old0 = state0.to(DOT)
        u = tl.dot(ak, vv, input_precision=PREC)
        u = tl.dot(aq0, old0, u, input_precision=PREC)
        o = tl.dot(rk, vv, input_precision=PREC)
        o = tl.dot(rq0, old0, o, input_precision=PREC)
        if N > BK:
            old1 = state1.to(DOT)
            u = tl.dot(aq1, old1, u, input_precision=PREC)
            o = tl.dot(rq1, old1, o, input_precision=PREC)
        u = tl.dot(tl.load(solve + cell), u.to(DOT), input_precision=PREC).to(DOT)
        o = tl.dot(rb, u, o, input_precision=PREC)
        tile_store(out + base, o, row, val, length, stride, N)
        if SAVE:
            tile_store(u_out + base, u, row, val, length, stride, N)
        if not INLINE:
            state0 *= first0
            if N > BK:
                state1 *= first1
        state0 = tl.dot(tl.trans(kk0), vv, state0, input_precision=PREC)
        state0 = tl.dot(tl.trans(bk0), u, state0, input_precision=PREC)
        if N > BK:
            state1 = tl.dot(tl.trans(kk1), vv, state1, input_precision=PREC)
            state1 = tl.dot(tl.trans(bk1), u, state1, input_precision=PREC)
        if INLINE:
            state0 *= last0
            if N > BK:
                state1 *= last1
        base += C * stride
        base_v += C * stride_v
        length -= C
        chunk += 1
    tile_store(state_out + corner, tl.trans(state0), val, col0, N, N, N)
    if N > BK:
        tile_store(state_out + corner, tl.trans(state1), val, col1, N, N, N)


@triton.jit(do_not_specialize=["T", "NT"])
def wkv7_reverse_kernel(r, log_w, k, a, b, solve, a_ak, a_rb, a_rk, d_out, d_state_out, du_out, dv, d_checkpoint,
                        d_state_in, cu_seqlens, chunk_start, T, NT, H, scale,
                        N: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, CLAMP: tl.constexpr,
                        DOT: tl.constexpr, PREC: tl.constexpr, GATE_PREC: tl.constexpr, INLINE: tl.constexpr,
                        HAS_STATE: tl.constexpr, NEED_STATE: tl.constexpr, VARLEN: tl.constexpr):
    """The scan from the end: d(u) and d(v) of each token and d(state) after each chunk, of one value tile."""
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
    col0 = tl.arange(0, BK)
    col1 = BK + tl.arange(0, BK)
    val = tile * BV + tl.arange(0, BV)
    stride = H * N
    corner = (seq * H + h).to(tl.int64) * N * N
    d_state0 = tl.zeros((BK, BV), tl.float32)
    d_state1 = tl.zeros((BK, BV), tl.float32)
    if HAS_STATE:
        d_state0 = tl.trans(tile_load(d_state_out + corner, val, col0, N, N, N))
        d_state1 = tl.trans(tile_load(d_state_out + corner, val, col1, N, N, N))
    causal = row[:, None] >= row[None, :]
    strict = row[:, None] > row[None, :]
    chunks = tl.cdiv(length, C)
    base = (tl.cast(begin, tl.int64) + (chunks - 1) * C) * stride + h * N
    chunk += chunks - 1
    length -= (chunks - 1) * C
    for _ in range(0, chunks):
        saved = d_checkpoint + (chunk * H + h) * N * N
        tile_store(saved, d_state0, col0, val, N, N, N)
        if N > BK:
            tile_store(saved, d_state1, col1, val, N, N, N)
        rq0, kk0, aq0, bk0, first0, last0 = wkv7_factors(
            r + base, log_w + base, k + base, a + base, b + base, row, col0, length, stride, scale, N, C, CLAMP, DOT,
            GATE_PREC, INLINE)
        if N > BK:
            rq1, kk1, aq1, bk1, first1, last1 = wkv7_factors(
                r + base, log_w + base, k + base, a + base, b + base, row, col1, length, stride, scale, N, C, CLAMP, DOT,
                GATE_PREC, INLINE)
        do = tile_load(d_out + base, row, val, length, stride, N).to(DOT)
        cell = (chunk * H + h) * C * C + row[:, None] * C + row[None, :]
        if INLINE:
            d_state0 *= last0
            if N > BK:
                d_state1 *= last1
            ak = tl.dot(aq0, tl.trans(kk0), input_precision=PREC)
            rk = tl.dot(rq0, tl.trans(kk0), input_precision=PREC)
            rb = tl.dot(rq0, tl.trans(bk0), input_precision=PREC)
            if N > BK:
                ak = tl.dot(aq1, tl.trans(kk1), ak, input_precision=PREC)
                rk = tl.dot(rq1, tl.trans(kk1), rk, input_precision=PREC)
                rb = tl.dot(rq1, tl.trans(bk1), rb, input_precision=PREC)
            ak = tl.where(strict, ak, 0.0).to(DOT)
            rk = tl.where(causal, rk, 0.0).to(DOT)
            rb = tl.where(causal, rb, 0.0).to(DOT)
        else:
            ak = tl.load(a_ak + cell)
            rk = tl.load(a_rk + cell)
            rb = tl.load(a_rb + cell)
        old0 = d_state0.to(DOT)
        du = tl.dot(tl.trans(rb), do, input_precision=PREC)
        du = tl.dot(bk0, old0, du, input_precision=PREC)
        v_grad = tl.dot(tl.trans(rk), do, input_precision=PREC)
        v_grad = tl.dot(kk0, old0, v_grad, input_precision=PREC)
        if N > BK:
            old1 = d_state1.to(DOT)
            du = tl.dot(bk1, old1, du, input_precision=PREC)
            v_grad = tl.dot(kk1, old1, v_grad, input_precision=PREC)
        du = tl.dot(tl.trans(tl.load(solve + cell)), du.to(DOT), input_precision=PREC).to(DOT)
        v_grad = tl.dot(tl.trans(ak), du, v_grad, input_precision=PREC)
        tile_store(du_out + base, du, row, val, length, stride, N)
        tile_store(dv + base, v_grad, row, val, length, stride, N)
        if not INLINE:
            d_state0 *= first0
            if N > BK:
                d_state1 *= first1
        d_state0 = tl.dot(tl.trans(rq0), do, d_state0, input_precision=PREC)
        d_state0 = tl.dot(tl.trans(aq0), du, d_state0, input_precision=PREC)
        if N > BK:
            d_state1 = tl.dot(tl.trans(rq1), do, d_state1, input_precision=PREC)
            d_state1 = tl.dot(tl.trans(aq1), du, d_state1, input_precision=PREC)
        if INLINE:
            d_state0 *= first0
            if N > BK:
                d_state1 *= first1
        base -= C * stride
        length += C
        chunk -= 1
    if NEED_STATE:
        tile_store(d_state_in + corner, tl.trans(d_state0), val, col0, N, N, N)
        if N > BK:
            tile_store(d_state_in + corner, tl.trans(d_state1), val, col1, N, N, N)


@triton.jit
def wkv7_pair_grad(d_read, value, row, val, length, stride, stride_value, N: tl.constexpr, DOT: tl.constexpr,
                   PREC: tl.constexpr, STRICT: tl.constexpr):
    """d(pair matrix): gradient rows (of out, or of u where STRICT) times values (v or u), over the causal pairs."""
    rows = tile_load(d_read, row, val, length, stride, N).to(DOT)
    cols = tile_load(value, row, val, length, stride_value, N).to(DOT)
    if STRICT:
        pairs = row[:, None] > row[None, :]
    else:
        pairs = row[:, None] >= row[None, :]
    return tl.where(pairs, tl.dot(rows, tl.trans(cols), input_precision=PREC), 0.0).to(DOT)


@triton.jit
def wkv7_query_grad(q, log_w, k, b, d_read, state, d_k, d_b, grad, w_grad, row, col, val, length, stride, scale,
                    N: tl.constexpr, C: tl.constexpr, DIAG: tl.constexpr, LEVELS: tl.constexpr, CLAMP: tl.constexpr,
                    DOT: tl.constexpr, PREC: tl.constexpr, GATE_PREC: tl.constexpr, SOLVE_PREC: tl.constexpr,
                    STRICT: tl.constexpr):
    """Stores the gradient of r (or, STRICT, of a, which meets the state one token earlier) and adds to d(log_w).

    z = query * d(query) is what a query gives to the log-decays before it. Inside the chunk it is taken from the rounded
    factors, so that it cancels exactly against the keys' share of the same pairs.
    """
    x = gate_load(log_w, row, col, length, stride, N, CLAMP)
    raw = tile_load(q, row, col, length, stride, N) * scale
    total = tl.zeros(raw.shape, tl.float32)
    z = tl.zeros(raw.shape, tl.float32)
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
    if LEVELS == 1:
        query *= wkv7_half_decay(x, row, C, False)[None, :]
    else:
        query = decay_query_state(x, C, GATE_PREC)
        if STRICT:
            query *= decay_exp(-x.to(tl.float32))
    rows = tile_load(d_read, row, val, length, stride, N).to(DOT)
    read = tl.dot(rows, tl.trans(tile_load(state, col, val, N, N, N)), input_precision=PREC) * query
    tile_store(grad, (total + read) * scale, row, col, length, stride, N)
    if STRICT:
        after = row[:, None] < row[None, :]
    else:
        after = row[:, None] <= row[None, :]
    return tl.dot(after.to(tl.float32), z + raw * read, w_grad, input_precision=SOLVE_PREC)


@triton.jit
def wkv7_key_grad(k, log_w, r, a, value, d_state, d_r, d_a, grad, w_grad, row, col, val, length, stride, stride_value,
                  scale, N: tl.constexpr, C: tl.constexpr, DIAG: tl.constexpr, LEVELS: tl.constexpr, CLAMP: tl.constexpr,
                  DOT: tl.constexpr, PREC: tl.constexpr, GATE_PREC: tl.constexpr, SOLVE_PREC: tl.constexpr):
    """Stores the gradient of k (or b) and adds to d(log_w)."""
    x = gate_load(log_w, row, col, length, stride, N, CLAMP)
    raw = tile_load(k, row, col, length, stride, N).to(tl.float32)
    total = tl.zeros(raw.shape, tl.float32)
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
    w_grad = tl.dot((row[:, None] <= row[None, :]).to(tl.float32), z, w_grad, input_precision=SOLVE_PREC)
    if LEVELS == 1:
        key *= wkv7_half_decay(x, row, C, True)[None, :]
    else:
        key = decay_key_state(x, C, GATE_PREC)
    values = tile_load(value, row, val, length, stride_value, N).to(DOT)
    write = tl.dot(values, tl.trans(tile_load(d_state, col, val, N, N, N)), input_precision=PREC) * key
    tile_store(grad, total + write, row, col, length, stride, N)
    return tl.dot((row[:, None] > row[None, :]).to(tl.float32), raw * write, w_grad, input_precision=SOLVE_PREC)


@triton.jit(do_not_specialize=["T", "NT"])
def wkv7_grad_kernel(r, log_w, k, v, a, b, u, checkpoint, d_out, du, d_checkpoint,
                     dr, d_log_w, dk, da, db, cu_seqlens, chunk_seq, chunk_start, T, NT, H, HV, scale,
                     N: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, DIAG: tl.constexpr,
                     LEVELS: tl.constexpr, CLAMP: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr, GATE_PREC: tl.constexpr,
                     SOLVE_PREC: tl.constexpr, VARLEN: tl.constexpr):
    """Gradients of r, log_w, k, a, b of one block of key channels of one chunk, from the states at the chunk's two ends.

    Chunks are independent. One gradient after the other, each reading its inputs again (from the L2 cache): together they
    do not fit in registers.
    """
    h = tl.program_id(1)
    chunk = tl.program_id(2)
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
    col = tl.program_id(0) * BK + tl.arange(0, BK)
    val = tl.arange(0, BV)
    corner = (chunk * H + h).to(tl.int64) * N * N
    r += base
    log_w += base
    k += base
    a += base
    b += base
    u += base
    v += base_v
    d_out += base
    du += base
    x = gate_load(log_w, row, col, length, stride, N, CLAMP)
    state = tile_load(checkpoint + corner, col, val, N, N, N).to(tl.float32)
    across = tl.sum(state * tile_load(d_checkpoint + corner, col, val, N, N, N), 1)
    w_grad = tl.zeros((C, BK), tl.float32) + (across * decay_exp(tl.sum(x.to(tl.float32), 0)))[None, :]
    # In this order at most three pair matrices live at a time.
    d_rk = wkv7_pair_grad(d_out, v, row, val, length, stride, HV * N, N, DOT, PREC, False)
    d_rb = wkv7_pair_grad(d_out, u, row, val, length, stride, stride, N, DOT, PREC, False)
    w_grad = wkv7_query_grad(r, log_w, k, b, d_out, checkpoint + corner, d_rk, d_rb, dr + base, w_grad, row, col, val,
                             length, stride, scale, N, C, DIAG, LEVELS, CLAMP, DOT, PREC, GATE_PREC, SOLVE_PREC, False)
    d_ak = wkv7_pair_grad(du, v, row, val, length, stride, HV * N, N, DOT, PREC, True)
    w_grad = wkv7_key_grad(k, log_w, r, a, v, d_checkpoint + corner, d_rk, d_ak, dk + base, w_grad, row, col, val,
                           length, stride, HV * N, scale, N, C, DIAG, LEVELS, CLAMP, DOT, PREC, GATE_PREC, SOLVE_PREC)
    d_ab = wkv7_pair_grad(du, u, row, val, length, stride, stride, N, DOT, PREC, True)
    w_grad = wkv7_query_grad(a, log_w, k, b, du, checkpoint + corner, d_ak, d_ab, da + base, w_grad, row, col, val,
                             length, stride, 1.0, N, C, DIAG, LEVELS, CLAMP, DOT, PREC, GATE_PREC, SOLVE_PREC, True)
    w_grad = wkv7_key_grad(b, log_w, r, a, u, d_checkpoint + corner, d_rb, d_ab, db + base, w_grad, row, col, val,
                           length, stride, stride, scale, N, C, DIAG, LEVELS, CLAMP, DOT, PREC, GATE_PREC, SOLVE_PREC)
    tile_store(d_log_w + base, w_grad, row, col, length, stride, N)
