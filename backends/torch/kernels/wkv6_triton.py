"""Triton kernels of gated linear attention with a vector decay: intra (per chunk), scan, and their backward pair.

States are held as (key, value) and accumulated in float32; checkpoints are taken before each chunk. Key channels go in
blocks of BK: elementwise work on a tile of 128 channels takes too many registers.
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
def wkv6_scores(q, log_w, k, row, length, stride, stride_k, scale, N: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
                DIAG: tl.constexpr, LEVELS: tl.constexpr, CLAMP: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
                GATE_PREC: tl.constexpr):
    """Decayed scores (C, C) of every query of a chunk with itself and the keys before it."""
    scores = tl.zeros((C, C), tl.float32)
    for block in range(0, N, BK):
        col = block + tl.arange(0, BK)
        x = gate_load(log_w, row, col, length, stride, N, CLAMP)
        for level in tl.static_range(LEVELS):
            query, key = decay_pair_factors(x, level, C, DIAG, GATE_PREC)
            qf = (tile_load(q, row, col, length, stride, N) * (query * scale)).to(DOT)
            kf = (tile_load(k, row, col, length, stride_k, N) * key).to(DOT)
            score = tl.dot(qf, tl.trans(kf), input_precision=PREC)
            scores += tl.where(decay_pair_mask(level, C, DIAG, False), score, 0.0)
    return scores


@triton.jit(do_not_specialize=["T", "NT"])
def wkv6_intra_kernel(q, log_w, k, pairs, cu_seqlens, chunk_seq, chunk_start, T, NT, H, HK, scale,
                      N: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, DIAG: tl.constexpr, LEVELS: tl.constexpr,
                      CLAMP: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr, GATE_PREC: tl.constexpr,
                      VARLEN: tl.constexpr):
    """The scores of every chunk, which each value tile of the scan reads."""
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
    stride_k = HK * N
    token = (begin + first).to(tl.int64)
    base = token * stride + h * N
    base_k = token * stride_k + (h // (H // HK)) * N
    row = tl.arange(0, C)
    scores = wkv6_scores(q + base, log_w + base, k + base_k, row, length, stride, stride_k, scale, N, BK, C, DIAG, LEVELS,
                         CLAMP, DOT, PREC, GATE_PREC)
    tl.store(pairs + (chunk * H + h).to(tl.int64) * C * C + row[:, None] * C + row[None, :], scores.to(DOT))


@triton.jit
def wkv6_query_state(q, log_w, row, col, length, stride, scale, N: tl.constexpr, C: tl.constexpr, CLAMP: tl.constexpr,
                     DOT: tl.constexpr, GATE_PREC: tl.constexpr):
    """Queries decayed from the chunk's start, the chunk's whole decay, and the log-decays, of one block of channels."""
    x = gate_load(log_w, row, col, length, stride, N, CLAMP)
    query = decay_query_state(x, C, GATE_PREC) * scale
    whole = decay_exp(tl.sum(x.to(tl.float32), 0))[:, None]
    return (tile_load(q, row, col, length, stride, N) * query).to(DOT), whole, x


@triton.jit(do_not_specialize=["T", "NT"])
def wkv6_scan_kernel(q, log_w, k, v, pairs, state_in, out, checkpoint, state_out, cu_seqlens, chunk_start,
                     T, NT, H, HK, scale,
                     N: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, CLAMP: tl.constexpr,
                     DOT: tl.constexpr, PREC: tl.constexpr, GATE_PREC: tl.constexpr, HAS_STATE: tl.constexpr,
                     SAVE: tl.constexpr, VARLEN: tl.constexpr):
    """One value tile of one head of one sequence: outputs, and for training the state before each chunk."""
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
    stride_k = HK * N
    base = tl.cast(begin, tl.int64) * stride + h * N
    base_k = tl.cast(begin, tl.int64) * stride_k + (h // (H // HK)) * N
    state0 = tl.zeros((BK, BV), tl.float32)
    state1 = tl.zeros((BK, BV), tl.float32)
    if HAS_STATE:
        state0 = tl.trans(tile_load(state_in + corner, val, col0, N, N, N))
        state1 = tl.trans(tile_load(state_in + corner, val, col1, N, N, N))
    for _ in range(0, tl.cdiv(length, C)):
        if SAVE:
            saved = checkpoint + (chunk * H + h) * N * N
            tile_store(saved, state0, col0, val, N, N, N)
            if N > BK:
                tile_store(saved, state1, col1, val, N, N, N)
        vv = tile_load(v + base_k, row, val, length, stride_k, N).to(DOT)
        scores = tl.load(pairs + (chunk * H + h) * C * C + row[:, None] * C + row[None, :])
        o = tl.dot(scores, vv, input_precision=PREC)
        query, whole, x = wkv6_query_state(q + base, log_w + base, row, col0, length, stride, scale, N, C, CLAMP, DOT,
                                           GATE_PREC)
        o = tl.dot(query, state0.to(DOT), o, input_precision=PREC)
        key = decay_key_state(x, C, GATE_PREC)
        key = (tile_load(k + base_k, row, col0, length, stride_k, N) * key).to(DOT)
        state0 = tl.dot(tl.trans(key), vv, state0 * whole, input_precision=PREC)
        if N > BK:
            query, whole, x = wkv6_query_state(q + base, log_w + base, row, col1, length, stride, scale, N, C, CLAMP, DOT,
                                               GATE_PREC)
            o = tl.dot(query, state1.to(DOT), o, input_precision=PREC)
            key = decay_key_state(x, C, GATE_PREC)
            key = (tile_load(k + base_k, row, col1, length, stride_k, N) * key).to(DOT)
            state1 = tl.dot(tl.trans(key), vv, state1 * whole, input_precision=PREC)
        tile_store(out + base, o, row, val, length, stride, N)
        base += C * stride
        base_k += C * stride_k
        length -= C
        chunk += 1
    tile_store(state_out + corner, tl.trans(state0), val, col0, N, N, N)
    if N > BK:
        tile_store(state_out + corner, tl.trans(state1), val, col1, N, N, N)


@triton.jit(do_not_specialize=["T", "NT"])
def wkv6_reverse_kernel(q, log_w, k, pairs, d_out, d_state_out, dv, d_checkpoint, d_state_in, cu_seqlens, chunk_start,
                        T, NT, H, HK, scale,
                        N: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, CLAMP: tl.constexpr,
                        DOT: tl.constexpr, PREC: tl.constexpr, GATE_PREC: tl.constexpr, HAS_STATE: tl.constexpr,
                        NEED_STATE: tl.constexpr, VARLEN: tl.constexpr):
    """The scan from the end: d(v) of each token and d(state) after each chunk, of one value tile."""
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
    chunks = tl.cdiv(length, C)
    stride_k = HK * N
    token = tl.cast(begin, tl.int64) + (chunks - 1) * C
    base = token * stride + h * N
    base_k = token * stride_k + (h // (H // HK)) * N
    chunk += chunks - 1
    length -= (chunks - 1) * C
    for _ in range(0, chunks):
        saved = d_checkpoint + (chunk * H + h) * N * N
        tile_store(saved, d_state0, col0, val, N, N, N)
        if N > BK:
            tile_store(saved, d_state1, col1, val, N, N, N)
        do = tile_load(d_out + base, row, val, length, stride, N).to(DOT)
        scores = tl.load(pairs + (chunk * H + h) * C * C + row[:, None] * C + row[None, :])
        v_grad = tl.dot(tl.trans(scores), do, input_precision=PREC)
        query, whole, x = wkv6_query_state(q + base, log_w + base, row, col0, length, stride, scale, N, C, CLAMP, DOT,
                                           GATE_PREC)
        key = decay_key_state(x, C, GATE_PREC)
        key = (tile_load(k + base_k, row, col0, length, stride_k, N) * key).to(DOT)
        v_grad = tl.dot(key, d_state0.to(DOT), v_grad, input_precision=PREC)
        d_state0 = tl.dot(tl.trans(query), do, d_state0 * whole, input_precision=PREC)
        if N > BK:
            query, whole, x = wkv6_query_state(q + base, log_w + base, row, col1, length, stride, scale, N, C, CLAMP, DOT,
                                               GATE_PREC)
            key = decay_key_state(x, C, GATE_PREC)
            key = (tile_load(k + base_k, row, col1, length, stride_k, N) * key).to(DOT)
            v_grad = tl.dot(key, d_state1.to(DOT), v_grad, input_precision=PREC)
            d_state1 = tl.dot(tl.trans(query), do, d_state1 * whole, input_precision=PREC)
        tile_store(dv + base, v_grad, row, val, length, stride, N)
        base -= C * stride
        base_k -= C * stride_k
        length += C
        chunk -= 1
    if NEED_STATE:
        tile_store(d_state_in + corner, tl.trans(d_state0), val, col0, N, N, N)
        if N > BK:
            tile_store(d_state_in + corner, tl.trans(d_state1), val, col1, N, N, N)


@triton.jit(do_not_specialize=["T", "NT", "walk_chunks"])
def wkv6_segment_kernel(k, log_w, v, states, decays, T, NT, walk_chunks, H, HK, HV, scale,
                        N: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, CLAMP: tl.constexpr,
                        DOT: tl.constexpr, PREC: tl.constexpr, GATE_PREC: tl.constexpr, REVERSE: tl.constexpr):
    """What one segment adds to some key channels of the state after it, and their whole decay, both at the next one's place.

    REVERSE: k is q, v is d(out); what the segment adds to d(state) before it, at the place of the segment before.
    """
    col = tl.program_id(0) * BK + tl.arange(0, BK)
    h = tl.program_id(1)
    walks = tl.cdiv(NT, walk_chunks)
    seq = tl.program_id(2) // (walks - 1)
    walk = tl.program_id(2) % (walks - 1)
    place = walk + 1
    if REVERSE:
        place = walk
        walk += 1
    first = walk * walk_chunks
    count = tl.minimum(NT - first, walk_chunks)
    step = 1
    if REVERSE:
        first += count - 1
        step = -1
    row = tl.arange(0, C)
    val = tl.arange(0, BV)
    stride = H * N
    stride_k = HK * N
    stride_v = HV * N
    token = (seq * T + first * C).to(tl.int64)
    base = token * stride + h * N
    base_k = token * stride_k + (h // (H // HK)) * N
    base_v = token * stride_v + (h // (H // HV)) * N
    length = T - first * C
    state = tl.zeros((BK, BV), tl.float32)
    total = tl.zeros((BK,), tl.float32)
    for _ in range(0, count):
        x = gate_load(log_w + base, row, col, length, stride, N, CLAMP)
        if REVERSE:
            factor = decay_query_state(x, C, GATE_PREC) * scale
        else:
            factor = decay_key_state(x, C, GATE_PREC)
        key = (tile_load(k + base_k, row, col, length, stride_k, N) * factor).to(DOT)
        value = tile_load(v + base_v, row, val, length, stride_v, N).to(DOT)
        whole = tl.sum(x.to(tl.float32), 0)
        total += whole
        state = tl.dot(tl.trans(key), value, state * decay_exp(whole)[:, None], input_precision=PREC)
        base += step * C * stride
        base_k += step * C * stride_k
        base_v += step * C * stride_v
        length -= step * C
    place = ((seq * walks + place) * H + h).to(tl.int64)
    tile_store(states + place * N * N, tl.trans(state), val, col, N, N, N)
    tl.store(decays + place * N + col, decay_exp(total), mask=col < N)


@triton.jit
def wkv6_key_channels(q, log_w, k, v, d_out, state, d_state, dq, d_log_w, dk, row, col, val, length, stride, stride_k,
                      scale, N: tl.constexpr, C: tl.constexpr, DIAG: tl.constexpr, LEVELS: tl.constexpr,
                      CLAMP: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr, GATE_PREC: tl.constexpr):
    """Gradients of q, k and log_w of one block of key channels."""
    rows = tile_load(d_out, row, val, length, stride, N).to(DOT)
    values = tile_load(v, row, val, length, stride_k, N).to(DOT)
    d_pairs = tl.dot(rows, tl.trans(values), input_precision=PREC).to(DOT)
    x = gate_load(log_w, row, col, length, stride, N, CLAMP)
    q_grad = tl.zeros((C, x.shape[1]), tl.float32)
    k_grad = tl.zeros((C, x.shape[1]), tl.float32)
    z = tl.zeros((C, x.shape[1]), tl.float32)
    for level in tl.static_range(LEVELS):
        query, key = decay_pair_factors(x, level, C, DIAG, GATE_PREC)
        d_pair = tl.where(decay_pair_mask(level, C, DIAG, False), d_pairs, 0.0).to(DOT)
        kf = (tile_load(k, row, col, length, stride_k, N) * key).to(DOT)
        d_query = tl.dot(d_pair, kf, input_precision=PREC)
        q_grad += d_query * query
        qf = (tile_load(q, row, col, length, stride, N) * (query * scale)).to(DOT)
        d_key = tl.dot(tl.trans(d_pair), qf, input_precision=PREC)
        k_grad += d_key * key
        # z: what a pair gives to the log-decays before its query, less what it gives to those before its key; from the
        # rounded factors, so that the two cancel exactly where both come after.
        z += d_query * qf - d_key * kf
    # The state's share: a query gives to the log-decays up to its token, a key to those after its own.
    read = tl.dot(rows, tl.trans(tile_load(state, col, val, N, N, N)), input_precision=PREC)
    read *= decay_query_state(x, C, GATE_PREC)
    tile_store(dq, (q_grad + read) * scale, row, col, length, stride, N)
    z += tile_load(q, row, col, length, stride, N) * (read * scale)
    w_grad = split_dot(row[:, None] <= row[None, :], z, tl.zeros(z.shape, tl.float32), DOT, PREC, True)
    write = tl.dot(values, tl.trans(tile_load(d_state, col, val, N, N, N)), input_precision=PREC)
    write *= decay_key_state(x, C, GATE_PREC)
    tile_store(dk, k_grad + write, row, col, length, stride, N)
    write *= tile_load(k, row, col, length, stride_k, N)
    w_grad = split_dot(row[:, None] > row[None, :], write, w_grad, DOT, PREC, True)
    across = tl.sum(tile_load(state, col, val, N, N, N).to(tl.float32) * tile_load(d_state, col, val, N, N, N), 1)
    across *= decay_exp(tl.sum(x.to(tl.float32), 0))
    tile_store(d_log_w, w_grad + across[None, :], row, col, length, stride, N)


@triton.jit(do_not_specialize=["T", "NT"])
def wkv6_grad_kernel(q, log_w, k, v, checkpoint, d_out, d_checkpoint, dq, d_log_w, dk,
                     cu_seqlens, chunk_seq, chunk_start, T, NT, H, HK, scale,
                     N: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, DIAG: tl.constexpr,
                     LEVELS: tl.constexpr, CLAMP: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
                     GATE_PREC: tl.constexpr, VARLEN: tl.constexpr):
    """Gradients of q, k and log_w of one block of key channels of one chunk, from the states at the chunk's two ends."""
    part = tl.program_id(0)
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
    stride_k = HK * N
    token = (begin + first).to(tl.int64)
    base = token * stride + h * N
    base_k = token * stride_k + (h // (H // HK)) * N
    row = tl.arange(0, C)
    val = tl.arange(0, BV)
    corner = (chunk * H + h).to(tl.int64) * N * N
    col = part * BK + tl.arange(0, BK)
    wkv6_key_channels(q + base, log_w + base, k + base_k, v + base_k, d_out + base, checkpoint + corner,
                      d_checkpoint + corner, dq + base, d_log_w + base, dk + base, row, col, val, length, stride,
                      stride_k, scale, N, C, DIAG, LEVELS, CLAMP, DOT, PREC, GATE_PREC)
