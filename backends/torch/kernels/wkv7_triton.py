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
    split_dot,
    tile_load,
    tile_store,
)
from radlads.backends.torch.kernels.lang import tl, triton


@triton.jit
def wkv7_merge_blocks(A, inverse, HALF: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr):
    """From the inverses of diagonal blocks of HALF tokens to those of twice as many."""
    row = tl.arange(0, C)
    lower = ((row[:, None] // (2 * HALF)) == (row[None, :] // (2 * HALF))) \
        & ((row[:, None] // HALF) > (row[None, :] // HALF))
    if DOT == tl.float16:
        step = tl.dot(tl.where(lower, A, 0.0).to(DOT), inverse.to(DOT))
        merged = tl.dot(inverse.to(DOT), step.to(DOT), inverse)
    else:
        step = split_dot(tl.where(lower, A, 0.0), inverse, tl.zeros((C, C), tl.float32), DOT, PREC, False)
        merged = split_dot(inverse, step, inverse, DOT, PREC, False)
    return merged


@triton.jit
def wkv7_inverse(A, C: tl.constexpr, LEVELS: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr):
    """(I - A)^-1 of a strictly lower (C, C) matrix, C = 2^LEVELS, by doubling blocks: as stable as substitution."""
    row = tl.arange(0, C)
    pair = ((row[:, None] // 2) == (row[None, :] // 2)) & (row[:, None] > row[None, :])
    inverse = tl.where(pair, A, 0.0) + tl.where(row[:, None] == row[None, :], 1.0, 0.0)
    for level in tl.static_range(1, LEVELS):
        inverse = wkv7_merge_blocks(A, inverse, 1 << level, C, DOT, PREC)
    return inverse


@triton.jit
def wkv7_half_decay(x, row, C: tl.constexpr, LATE: tl.constexpr):
    """exp of the decay over one half of the chunk, per key channel."""
    mine = (row >= C // 2) if LATE else (row < C // 2)
    return decay_exp(tl.sum(tl.where(mine[:, None], x.to(tl.float32), 0.0), 0))


@triton.jit(do_not_specialize=["T", "NT"])
def wkv7_solve_kernel(r, log_w, k, a, b, solve, a_rb, from_v, out_v, from_state, out_state, keys, betas, whole,
                      cu_seqlens, chunk_seq, chunk_start, T, NT, H, scale,
                      N: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, DIAG: tl.constexpr, LEVELS: tl.constexpr,
                      CLAMP: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr, GATE_PREC: tl.constexpr,
                      SOLVE_LEVELS: tl.constexpr, VARLEN: tl.constexpr):
    """All of one chunk that does not depend on the state or the values, so that the scans only multiply.

    u = from_v v + from_state S_0 ;  out = out_v v + out_state S_0 ;  S_C = whole S_0 + keys^T v + betas^T u.
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
    base = (begin + first).to(tl.int64) * H * N + h * N
    stride = H * N
    row = tl.arange(0, C)
    A = tl.zeros((C, C), tl.float32)
    ak = tl.zeros((C, C), tl.float32)
    rb = tl.zeros((C, C), tl.float32)
    rk = tl.zeros((C, C), tl.float32)
    for block in range(0, N, BK):
        col = block + tl.arange(0, BK)
        x = gate_load(log_w + base, row, col, length, stride, N, CLAMP)
        past = decay_exp(-x.to(tl.float32))
        for level in tl.static_range(LEVELS):
            query, key = decay_pair_factors(x, level, C, DIAG, GATE_PREC)
            strict = decay_pair_mask(level, C, DIAG, True)
            causal = decay_pair_mask(level, C, DIAG, False)
            aq = (tile_load(a + base, row, col, length, stride, N) * (query * past)).to(DOT)
            bk = (tile_load(b + base, row, col, length, stride, N) * key).to(DOT)
            A += tl.where(strict, tl.dot(aq, tl.trans(bk), input_precision=PREC), 0.0)
            rq = (tile_load(r + base, row, col, length, stride, N) * (query * scale)).to(DOT)
            kk = (tile_load(k + base, row, col, length, stride, N) * key).to(DOT)
            ak += tl.where(strict, tl.dot(aq, tl.trans(kk), input_precision=PREC), 0.0)
            rb += tl.where(causal, tl.dot(rq, tl.trans(bk), input_precision=PREC), 0.0)
            rk += tl.where(causal, tl.dot(rq, tl.trans(kk), input_precision=PREC), 0.0)
    cell = (chunk * H + h).to(tl.int64) * C * C + row[:, None] * C + row[None, :]
    inverse = wkv7_inverse(A, C, SOLVE_LEVELS, DOT, PREC).to(DOT)
    rb = rb.to(DOT)
    tl.store(solve + cell, inverse)
    tl.store(a_rb + cell, rb)
    uv = tl.dot(inverse, ak.to(DOT), input_precision=PREC).to(DOT)
    tl.store(from_v + cell, uv)
    tl.store(out_v + cell, tl.dot(rb, uv, rk, input_precision=PREC).to(DOT))
    tile = (chunk * H + h).to(tl.int64) * C * N
    for block in range(0, N, BK):
        col = block + tl.arange(0, BK)
        x = gate_load(log_w + base, row, col, length, stride, N, CLAMP)
        tl.store(whole + (chunk * H + h) * N + col, decay_exp(tl.sum(x.to(tl.float32), 0)), mask=col < N)
        query = decay_query_state(x, C, GATE_PREC)
        aq = (tile_load(a + base, row, col, length, stride, N) * (query * decay_exp(-x.to(tl.float32)))).to(DOT)
        us = tl.dot(inverse, aq, input_precision=PREC).to(DOT)
        tile_store(from_state + tile, us, row, col, C, N, N)
        rq = tile_load(r + base, row, col, length, stride, N) * (query * scale)
        tile_store(out_state + tile, tl.dot(rb, us, rq, input_precision=PREC), row, col, C, N, N)
        key = decay_key_state(x, C, GATE_PREC)
        tile_store(keys + tile, tile_load(k + base, row, col, length, stride, N) * key, row, col, C, N, N)
        tile_store(betas + tile, tile_load(b + base, row, col, length, stride, N) * key, row, col, C, N, N)


@triton.jit
def wkv7_block(base, row, col, N: tl.constexpr, BK: tl.constexpr):
    """Loads one block of key channels of a chunk's factors."""
    if N % BK == 0:
        tile = tl.load(base + row[:, None] * N + col[None, :])
    else:
        tile = tl.load(base + row[:, None] * N + col[None, :], mask=(col < N)[None, :], other=0.0)
    return tile


@triton.jit(do_not_specialize=["T", "NT"])
def wkv7_scan_kernel(v, from_v, out_v, from_state, out_state, keys, betas, whole, state_in, out, u_out, checkpoint, state_out,
                     cu_seqlens, chunk_start, T, NT, H, HV,
                     N: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr,
                     PREC: tl.constexpr, HAS_STATE: tl.constexpr, SAVE: tl.constexpr, VARLEN: tl.constexpr):
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
    cell = row[:, None] * C + row[None, :]
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
    for _ in range(0, tl.cdiv(length, C)):
        place = chunk * H + h
        saved = checkpoint + place * N * N
        factors = place * C * N
        vv = tile_load(v + base_v, row, val, length, stride_v, N).to(DOT)
        old0 = state0.to(DOT)
        if SAVE:
            tile_store(saved, old0, col0, val, N, N, N)
        u = tl.dot(tl.load(from_v + place * C * C + cell), vv, input_precision=PREC)
        o = tl.dot(tl.load(out_v + place * C * C + cell), vv, input_precision=PREC)
        u = tl.dot(wkv7_block(from_state + factors, row, col0, N, BK), old0, u, input_precision=PREC)
        o = tl.dot(wkv7_block(out_state + factors, row, col0, N, BK), old0, o, input_precision=PREC)
        if N > BK:
            old1 = state1.to(DOT)
            if SAVE:
                tile_store(saved, old1, col1, val, N, N, N)
            u = tl.dot(wkv7_block(from_state + factors, row, col1, N, BK), old1, u, input_precision=PREC)
            o = tl.dot(wkv7_block(out_state + factors, row, col1, N, BK), old1, o, input_precision=PREC)
        u = u.to(DOT)
        tile_store(out + base, o, row, val, length, stride, N)
        if SAVE:
            tile_store(u_out + base, u, row, val, length, stride, N)
        state0 *= tl.load(whole + place * N + col0, mask=col0 < N, other=0.0)[:, None]
        state0 = tl.dot(tl.trans(wkv7_block(keys + factors, row, col0, N, BK)), vv, state0, input_precision=PREC)
        state0 = tl.dot(tl.trans(wkv7_block(betas + factors, row, col0, N, BK)), u, state0, input_precision=PREC)
        if N > BK:
            state1 *= tl.load(whole + place * N + col1, mask=col1 < N, other=0.0)[:, None]
            state1 = tl.dot(tl.trans(wkv7_block(keys + factors, row, col1, N, BK)), vv, state1, input_precision=PREC)
            state1 = tl.dot(tl.trans(wkv7_block(betas + factors, row, col1, N, BK)), u, state1, input_precision=PREC)
        base += C * stride
        base_v += C * stride_v
        length -= C
        chunk += 1
    tile_store(state_out + corner, tl.trans(state0), val, col0, N, N, N)
    if N > BK:
        tile_store(state_out + corner, tl.trans(state1), val, col1, N, N, N)


@triton.jit(do_not_specialize=["T", "NT"])
def wkv7_reverse_kernel(solve, a_rb, from_v, out_v, from_state, out_state, keys, betas, whole, d_out, d_state_out, du_out, dv,
                        d_checkpoint, d_state_in, cu_seqlens, chunk_start, T, NT, H,
                        N: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr,
                        PREC: tl.constexpr, HAS_STATE: tl.constexpr, NEED_STATE: tl.constexpr, VARLEN: tl.constexpr):
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
    cell = row[:, None] * C + row[None, :]
    stride = H * N
    corner = (seq * H + h).to(tl.int64) * N * N
    d_state0 = tl.zeros((BK, BV), tl.float32)
    d_state1 = tl.zeros((BK, BV), tl.float32)
    if HAS_STATE:
        d_state0 = tl.trans(tile_load(d_state_out + corner, val, col0, N, N, N))
        d_state1 = tl.trans(tile_load(d_state_out + corner, val, col1, N, N, N))
    chunks = tl.cdiv(length, C)
    base = (tl.cast(begin, tl.int64) + (chunks - 1) * C) * stride + h * N
    chunk += chunks - 1
    length -= (chunks - 1) * C
    for _ in range(0, chunks):
        place = chunk * H + h
        saved = d_checkpoint + place * N * N
        factors = place * C * N
        do = tile_load(d_out + base, row, val, length, stride, N).to(DOT)
        old0 = d_state0.to(DOT)
        tile_store(saved, old0, col0, val, N, N, N)
        # d(u) before the outputs' share of it, which out_v and out_state already carry.
        after = tl.dot(wkv7_block(betas + factors, row, col0, N, BK), old0, input_precision=PREC)
        v_grad = tl.dot(wkv7_block(keys + factors, row, col0, N, BK), old0, input_precision=PREC)
        if N > BK:
            old1 = d_state1.to(DOT)
            tile_store(saved, old1, col1, val, N, N, N)
            after = tl.dot(wkv7_block(betas + factors, row, col1, N, BK), old1, after, input_precision=PREC)
            v_grad = tl.dot(wkv7_block(keys + factors, row, col1, N, BK), old1, v_grad, input_precision=PREC)
        v_grad = tl.dot(tl.trans(tl.load(out_v + place * C * C + cell)), do, v_grad, input_precision=PREC)
        du = tl.dot(tl.trans(tl.load(a_rb + place * C * C + cell)), do, after, input_precision=PREC)
        after = after.to(DOT)
        v_grad = tl.dot(tl.trans(tl.load(from_v + place * C * C + cell)), after, v_grad, input_precision=PREC)
        tile_store(dv + base, v_grad, row, val, length, stride, N)
        solved = tl.trans(tl.load(solve + place * C * C + cell))
        if N > BK:
            du = tl.dot(solved, du.to(DOT), input_precision=PREC)
        else:
            # In two parts: the solution may be small beside what it is made from. Two blocks leave no shared memory for it.
            du = split_dot(solved, du, tl.zeros(du.shape, tl.float32), DOT, PREC, True)
        tile_store(du_out + base, du, row, val, length, stride, N)
        d_state0 *= tl.load(whole + place * N + col0, mask=col0 < N, other=0.0)[:, None]
        d_state0 = tl.dot(tl.trans(wkv7_block(out_state + factors, row, col0, N, BK)), do, d_state0, input_precision=PREC)
        d_state0 = tl.dot(tl.trans(wkv7_block(from_state + factors, row, col0, N, BK)), after, d_state0, input_precision=PREC)
        if N > BK:
            d_state1 *= tl.load(whole + place * N + col1, mask=col1 < N, other=0.0)[:, None]
            d_state1 = tl.dot(tl.trans(wkv7_block(out_state + factors, row, col1, N, BK)), do, d_state1, input_precision=PREC)
            d_state1 = tl.dot(tl.trans(wkv7_block(from_state + factors, row, col1, N, BK)), after, d_state1,
                              input_precision=PREC)
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
                    DOT: tl.constexpr, PREC: tl.constexpr, GATE_PREC: tl.constexpr,
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
        # With one level the pair gradients are masked already.
        d_query = tl.dot(d_k if LEVELS == 1 else tl.where(mask, d_k, 0.0).to(DOT), kk, input_precision=PREC)
        bk = (tile_load(b, row, col, length, stride, N) * key).to(DOT)
        d_query = tl.dot(d_b if LEVELS == 1 else tl.where(mask, d_b, 0.0).to(DOT), bk, d_query, input_precision=PREC)
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
    return split_dot(after, z + raw * read, w_grad, DOT, PREC, True)


@triton.jit
def wkv7_key_grad(k, log_w, r, a, value, d_state, d_r, d_a, grad, w_grad, row, col, val, length, stride, stride_value,
                  scale, N: tl.constexpr, C: tl.constexpr, DIAG: tl.constexpr, LEVELS: tl.constexpr, CLAMP: tl.constexpr,
                  DOT: tl.constexpr, PREC: tl.constexpr, GATE_PREC: tl.constexpr):
    """Stores the gradient of k (or b) and adds to d(log_w)."""
    x = gate_load(log_w, row, col, length, stride, N, CLAMP)
    raw = tile_load(k, row, col, length, stride, N).to(tl.float32)
    total = tl.zeros(raw.shape, tl.float32)
    z = tl.zeros(raw.shape, tl.float32)
    for level in tl.static_range(LEVELS):
        query, key = decay_pair_factors(x, level, C, DIAG, GATE_PREC)
        mask = decay_pair_mask(level, C, DIAG, False)
        rq = (tile_load(r, row, col, length, stride, N) * (query * scale)).to(DOT)
        d_key = tl.dot(tl.trans(d_r if LEVELS == 1 else tl.where(mask, d_r, 0.0).to(DOT)), rq, input_precision=PREC)
        aq = (tile_load(a, row, col, length, stride, N) * (query * decay_exp(-x.to(tl.float32)))).to(DOT)
        d_key = tl.dot(tl.trans(d_a if LEVELS == 1 else tl.where(mask, d_a, 0.0).to(DOT)), aq, d_key, input_precision=PREC)
        total += d_key * key
        z -= d_key * (raw * key).to(DOT)
    w_grad = split_dot(row[:, None] <= row[None, :], z, w_grad, DOT, PREC, True)
    if LEVELS == 1:
        key *= wkv7_half_decay(x, row, C, True)[None, :]
    else:
        key = decay_key_state(x, C, GATE_PREC)
    values = tile_load(value, row, val, length, stride_value, N).to(DOT)
    write = tl.dot(values, tl.trans(tile_load(d_state, col, val, N, N, N)), input_precision=PREC) * key
    tile_store(grad, total + write, row, col, length, stride, N)
    return split_dot(row[:, None] > row[None, :], raw * write, w_grad, DOT, PREC, True)


@triton.jit(do_not_specialize=["T", "NT"])
def wkv7_grad_kernel(r, log_w, k, v, a, b, u, checkpoint, d_out, du, d_checkpoint,
                     dr, d_log_w, dk, da, db, cu_seqlens, chunk_seq, chunk_start, T, NT, H, HV, scale,
                     N: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, DIAG: tl.constexpr,
                     LEVELS: tl.constexpr, CLAMP: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr, GATE_PREC: tl.constexpr,
                     VARLEN: tl.constexpr):
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
                             length, stride, scale, N, C, DIAG, LEVELS, CLAMP, DOT, PREC, GATE_PREC, False)
    d_ak = wkv7_pair_grad(du, v, row, val, length, stride, HV * N, N, DOT, PREC, True)
    w_grad = wkv7_key_grad(k, log_w, r, a, v, d_checkpoint + corner, d_rk, d_ak, dk + base, w_grad, row, col, val,
                           length, stride, HV * N, scale, N, C, DIAG, LEVELS, CLAMP, DOT, PREC, GATE_PREC)
    d_ab = wkv7_pair_grad(du, u, row, val, length, stride, stride, N, DOT, PREC, True)
    w_grad = wkv7_query_grad(a, log_w, k, b, du, checkpoint + corner, d_ak, d_ab, da + base, w_grad, row, col, val,
                             length, stride, 1.0, N, C, DIAG, LEVELS, CLAMP, DOT, PREC, GATE_PREC, True)
    w_grad = wkv7_key_grad(b, log_w, r, a, u, d_checkpoint + corner, d_rb, d_ab, db + base, w_grad, row, col, val,
                           length, stride, stride, scale, N, C, DIAG, LEVELS, CLAMP, DOT, PREC, GATE_PREC)
    tile_store(d_log_w + base, w_grad, row, col, length, stride, N)
