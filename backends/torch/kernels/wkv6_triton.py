"""Triton kernels of gated linear attention with a vector decay: intra (per chunk), scan, and their backward pair.

States are held as (key, value) and accumulated in float32; checkpoints are taken before each chunk.
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
def wkv6_pairs(q, k, x, C: tl.constexpr, DIAG: tl.constexpr, LEVELS: tl.constexpr, DOT: tl.constexpr,
               PREC: tl.constexpr, GATE_PREC: tl.constexpr):
    """Decayed scores (C, C) of every query with itself and the keys before it."""
    scores = tl.zeros((C, C), tl.float32)
    for level in tl.static_range(LEVELS):
        query, key = decay_pair_factors(x, level, C, DIAG, GATE_PREC)
        mask = decay_pair_mask(level, C, DIAG, False)
        score = tl.dot((q * query).to(DOT), tl.trans((k * key).to(DOT)), input_precision=PREC)
        scores += tl.where(mask, score, 0.0)
    return scores


@triton.jit(do_not_specialize=["T", "NT"])
def wkv6_intra_kernel(q, log_w, k, pairs, cu_seqlens, chunk_seq, chunk_start, T, NT, H, HK, scale,
                      N: tl.constexpr, BN: tl.constexpr, C: tl.constexpr, DIAG: tl.constexpr, LEVELS: tl.constexpr,
                      CLAMP: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr, GATE_PREC: tl.constexpr,
                      VARLEN: tl.constexpr):
    """The scores of one chunk, for scans whose value tiles would each compute them again."""
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
    row = tl.arange(0, C)
    col = tl.arange(0, BN)
    token = (begin + first).to(tl.int64)
    base = token * H * N + h * N
    base_k = token * HK * N + (h // (H // HK)) * N
    x = gate_load(log_w + base, row, col, length, H * N, N, CLAMP)
    qq = tile_load(q + base, row, col, length, H * N, N) * scale
    kk = tile_load(k + base_k, row, col, length, HK * N, N)
    scores = wkv6_pairs(qq, kk, x, C, DIAG, LEVELS, DOT, PREC, GATE_PREC)
    tl.store(pairs + (chunk * H + h).to(tl.int64) * C * C + row[:, None] * C + row[None, :], scores.to(DOT))


@triton.jit(do_not_specialize=["T", "NT"])
def wkv6_scan_kernel(q, log_w, k, v, pairs, state_in, out, checkpoint, state_out, cu_seqlens, chunk_start,
                     T, NT, H, HK, scale,
                     N: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, DIAG: tl.constexpr,
                     LEVELS: tl.constexpr, CLAMP: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
                     GATE_PREC: tl.constexpr, INLINE: tl.constexpr, HAS_STATE: tl.constexpr, SAVE: tl.constexpr,
                     VARLEN: tl.constexpr):
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
    col = tl.arange(0, BN)
    val = tile * BV + tl.arange(0, BV)
    stride = H * N
    stride_k = HK * N
    base = tl.cast(begin, tl.int64) * stride + h * N
    base_k = tl.cast(begin, tl.int64) * stride_k + (h // (H // HK)) * N
    corner = (seq * H + h).to(tl.int64) * N * N + val[None, :] * N + col[:, None]
    inside = (col[:, None] < N) & (val[None, :] < N)
    state = tl.zeros((BN, BV), tl.float32)
    if HAS_STATE:
        state = tl.load(state_in + corner, mask=inside, other=0.0)
    for _ in range(0, tl.cdiv(length, C)):
        x = gate_load(log_w + base, row, col, length, stride, N, CLAMP)
        qq = tile_load(q + base, row, col, length, stride, N) * scale
        kk = tile_load(k + base_k, row, col, length, stride_k, N)
        vv = tile_load(v + base_k, row, val, length, stride_k, N).to(DOT)
        if SAVE:
            saved = checkpoint + (chunk * H + h) * N * N + col[:, None] * N + val[None, :]
            tl.store(saved, state.to(DOT), mask=inside)
        if INLINE:
            scores = wkv6_pairs(qq, kk, x, C, DIAG, LEVELS, DOT, PREC, GATE_PREC).to(DOT)
        else:
            scores = tl.load(pairs + (chunk * H + h) * C * C + row[:, None] * C + row[None, :])
        o = tl.dot(scores, vv, input_precision=PREC)
        query = (qq * decay_query_state(x, C, GATE_PREC)).to(DOT)
        key = (kk * decay_key_state(x, C, GATE_PREC)).to(DOT)
        o = tl.dot(query, state.to(DOT), o, input_precision=PREC)
        tile_store(out + base, o, row, val, length, stride, N)
        state *= decay_exp(tl.sum(x.to(tl.float32), 0))[:, None]
        state = tl.dot(tl.trans(key), vv, state, input_precision=PREC)
        base += C * stride
        base_k += C * stride_k
        length -= C
        chunk += 1
    tl.store(state_out + corner, state, mask=inside)


@triton.jit(do_not_specialize=["T", "NT"])
def wkv6_reverse_kernel(q, log_w, d_out, d_state_out, d_checkpoint, d_state_in, cu_seqlens, chunk_start,
                        T, NT, H, scale,
                        N: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, CLAMP: tl.constexpr,
                        DOT: tl.constexpr, PREC: tl.constexpr, GATE_PREC: tl.constexpr, HAS_STATE: tl.constexpr,
                        NEED_STATE: tl.constexpr, VARLEN: tl.constexpr):
    """The scan from the end: d(state) after each chunk, of one value tile."""
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
    d_state = tl.zeros((BN, BV), tl.float32)
    if HAS_STATE:
        d_state = tl.load(d_state_out + corner, mask=inside, other=0.0)
    chunks = tl.cdiv(length, C)
    base = (tl.cast(begin, tl.int64) + (chunks - 1) * C) * stride + h * N
    chunk += chunks - 1
    length -= (chunks - 1) * C
    for _ in range(0, chunks):
        x = gate_load(log_w + base, row, col, length, stride, N, CLAMP)
        qq = tile_load(q + base, row, col, length, stride, N) * scale
        do = tile_load(d_out + base, row, val, length, stride, N).to(DOT)
        saved = d_checkpoint + (chunk * H + h) * N * N + col[:, None] * N + val[None, :]
        tl.store(saved, d_state.to(DOT), mask=inside)
        query = (qq * decay_query_state(x, C, GATE_PREC)).to(DOT)
        d_state *= decay_exp(tl.sum(x.to(tl.float32), 0))[:, None]
        d_state = tl.dot(tl.trans(query), do, d_state, input_precision=PREC)
        base -= C * stride
        length += C
        chunk -= 1
    if NEED_STATE:
        tl.store(d_state_in + corner, d_state, mask=inside)


@triton.jit(do_not_specialize=["T", "NT"])
def wkv6_grad_kernel(q, log_w, k, v, checkpoint, d_out, d_checkpoint, dq, d_log_w, dk, dv,
                     cu_seqlens, chunk_seq, chunk_start, T, NT, H, HK, scale,
                     N: tl.constexpr, BN: tl.constexpr, C: tl.constexpr, DIAG: tl.constexpr, LEVELS: tl.constexpr,
                     CLAMP: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr, GATE_PREC: tl.constexpr,
                     VARLEN: tl.constexpr):
    """All gradients of one chunk of one head from the states at its two ends; chunks are independent."""
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
    col = tl.arange(0, BN)
    causal = row[:, None] >= row[None, :]
    x = gate_load(log_w + base, row, col, length, stride, N, CLAMP)
    qq = tile_load(q + base, row, col, length, stride, N) * scale
    kk = tile_load(k + base_k, row, col, length, stride_k, N)
    vv = tile_load(v + base_k, row, col, length, stride_k, N).to(DOT)
    do = tile_load(d_out + base, row, col, length, stride, N).to(DOT)
    corner = (chunk * H + h).to(tl.int64) * N * N + col[:, None] * N + col[None, :]
    inside = (col[:, None] < N) & (col[None, :] < N)
    state = tl.load(checkpoint + corner, mask=inside, other=0.0)
    d_state = tl.load(d_checkpoint + corner, mask=inside, other=0.0)
    d_pairs = tl.where(causal, tl.dot(do, tl.trans(vv), input_precision=PREC), 0.0).to(DOT)

    # z = query * d(query) is what a query gives to the log-decays before it; z of a key goes to those after it.
    q_grad = tl.dot(do, tl.trans(state), input_precision=PREC) * decay_query_state(x, C, GATE_PREC)
    z_pair = qq * q_grad
    key = decay_key_state(x, C, GATE_PREC)
    k_grad = tl.dot(vv, tl.trans(d_state), input_precision=PREC) * key
    v_grad = tl.dot((kk * key).to(DOT), d_state, input_precision=PREC)
    w_grad = tl.dot((row[:, None] > row[None, :]).to(tl.float32), kk * k_grad, input_precision=PREC)
    whole = decay_exp(tl.sum(x.to(tl.float32), 0))
    w_grad += (tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 1) * whole)[None, :]
    scores = tl.zeros((C, C), tl.float32)
    for level in tl.static_range(LEVELS):
        query, key = decay_pair_factors(x, level, C, DIAG, GATE_PREC)
        mask = decay_pair_mask(level, C, DIAG, False)
        qf = (qq * query).to(DOT)
        kf = (kk * key).to(DOT)
        scores += tl.where(mask, tl.dot(qf, tl.trans(kf), input_precision=PREC), 0.0)
        d_pair = tl.where(mask, d_pairs, 0.0).to(DOT)
        d_query = tl.dot(d_pair, kf, input_precision=PREC)
        d_key = tl.dot(tl.trans(d_pair), qf, input_precision=PREC)
        q_grad += d_query * query
        k_grad += d_key * key
        # From the rounded factors, so that what a pair gives as query cancels exactly against what it gives as key.
        z_pair += d_query * qf - d_key * kf
    w_grad = tl.dot((row[:, None] <= row[None, :]).to(tl.float32), z_pair, w_grad, input_precision=PREC)
    v_grad = tl.dot(tl.trans(scores.to(DOT)), do, v_grad, input_precision=PREC)
    tile_store(dq + base, q_grad * scale, row, col, length, stride, N)
    tile_store(dk + base, k_grad, row, col, length, stride, N)
    tile_store(dv + base, v_grad, row, col, length, stride, N)
    tile_store(d_log_w + base, w_grad, row, col, length, stride, N)
