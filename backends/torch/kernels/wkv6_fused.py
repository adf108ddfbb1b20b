"""Gated linear attention with a vector decay in Gluon, for Hopper: one program walks one head of one sequence.

The way back over a sequence has the same form as the way forward, with queries and keys in each other's place, so one kernel
is both. The state (key, value) stays in registers as float32. Eight warps at head sizes up to 128, four up to 64.
"""
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, warpgroup_mma, warpgroup_mma_wait

from radlads.backends.torch.kernels.wkv7_fused import box_save, decay_halves, sync_boxes, walk_place
from radlads.backends.torch.kernels.wkv7_hopper import barrier, box_copy, decay_exp, in_place, rows_store


@gluon.jit(do_not_specialize=["T", "NT", "walk_chunks"])
def wkv6_fused_kernel(q, log_w, k, v, state_in, out, checkpoint, state_out, cu_seqlens, chunk_start, T, NT, walk_chunks, H, HK,
                      HV, scale, N: gl.constexpr, BN: gl.constexpr, DIAG: gl.constexpr, LEVELS: gl.constexpr, CLAMP: gl.constexpr,
                      REVERSE: gl.constexpr, HAS_STATE: gl.constexpr, SAVE: gl.constexpr, LAST: gl.constexpr,
                      VARLEN: gl.constexpr):
    """Forward: out from v, the state before each chunk, the last state.

    REVERSE: v is d(out), out is d(v), the states are gradients: after each chunk, and of the first state.
    """
    WARPS: gl.constexpr = BN // 16
    PARTS: gl.constexpr = BN // 64
    FLAT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, WARPS // 4], [16, 64, 16])
    PAIR: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, WARPS // 4], [16, 256 // WARPS, 16])
    BOX: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    SUMS: gl.constexpr = gl.BlockedLayout([16, 2], [4, 8], [1, WARPS], [0, 1])
    h = gl.program_id(0)
    walk = gl.program_id(1)
    begin, length, chunk = walk_place(cu_seqlens, chunk_start, walk, T, NT, walk_chunks, VARLEN)
    stride = H * N
    stride_k = HK * N
    stride_v = HV * N
    chunks = ((length + 63) // 64).to(gl.int32)
    token = begin
    step = 64
    if REVERSE:
        token += (chunks - 1) * 64
        chunk += chunks - 1
        # Nothing is fetched for a sequence of no tokens: it would lie before the tensors.
        length = gl.where(chunks > 0, length - (chunks - 1) * 64, 0)
        step = -64
    base = token * stride + h * N
    base_k = token * stride_k + (h // (H // HK)) * N
    base_v = token * stride_v + (h // (H // HV)) * N
    corner = (walk * H + h).to(gl.int64) * (N * N)
    row = gl.arange(0, 64, gl.SliceLayout(1, FLAT))
    col = gl.arange(0, BN, gl.SliceLayout(0, FLAT))
    keys = gl.arange(0, BN, gl.SliceLayout(1, FLAT))
    key = gl.arange(0, BN, gl.SliceLayout(1, ACC))[:, None]
    val = gl.arange(0, BN, gl.SliceLayout(0, ACC))[None, :]

    qs = gl.allocate_shared_memory(gl.bfloat16, [1, 64, BN], BOX)
    ws = gl.allocate_shared_memory(gl.bfloat16, [1, 64, BN], BOX)
    ks = gl.allocate_shared_memory(gl.bfloat16, [1, 64, BN], BOX)
    vs = gl.allocate_shared_memory(gl.bfloat16, [1, 64, BN], BOX)
    states = gl.allocate_shared_memory(gl.bfloat16, [1, BN, BN], BOX)
    q_boxes = gl.allocate_shared_memory(gl.bfloat16, [PARTS, 64, BN], BOX)
    k_boxes = gl.allocate_shared_memory(gl.bfloat16, [PARTS, 64, BN], BOX)
    score_boxes = gl.allocate_shared_memory(gl.bfloat16, [1, 64, 64], BOX)
    # Of which tokens the log-decays sum to the exponents: from the chunk's start, to its end, and of each level.
    sums = gl.allocate_shared_memory(gl.bfloat16, [LEVELS + 2, 64, 64], BOX)
    early = gl.allocate_shared_memory(gl.float32, [BN], LINE)
    late = gl.allocate_shared_memory(gl.float32, [BN], LINE)

    state = gl.zeros([BN, BN], gl.float32, ACC)
    if HAS_STATE:
        state = gl.load(state_in + corner + val * N + key, mask=(key < N) & (val < N), other=0.0)
    t = gl.arange(0, 64, gl.SliceLayout(1, PAIR))[:, None]
    s = gl.arange(0, 64, gl.SliceLayout(0, PAIR))[None, :]
    sums.index(LEVELS).store(gl.where(s <= t, 1.0, 0.0).to(gl.bfloat16))
    sums.index(LEVELS + 1).store(gl.where(s > t, 1.0, 0.0).to(gl.bfloat16))
    for level in gl.static_range(LEVELS):
        behind = (t >> (5 - level)) % 2 == 1
        between = ((t >> (5 - level)) == (s >> (5 - level))) & ((behind & (s <= t)) | ((behind | (s <= t)) == 0))
        sums.index(level).store(gl.where(between, 1.0, 0.0).to(gl.bfloat16))
    box_copy(qs.index(0), q + base, row, col, length, N, stride)
    box_copy(ks.index(0), k + base_k, row, col, length, N, stride_k)
    box_copy(ws.index(0), log_w + base, row, col, length, N, stride)
    box_copy(vs.index(0), v + base_v, row, col, length, N, stride_v)
    async_copy.commit_group()
    for i in range(0, chunks):
        # Where a box lies is computed in each turn: kept from turn to turn the places would take half of the registers.
        nil = in_place(i) - i
        ww, vv, state_box, score_box = ws.index(nil), vs.index(nil), states.index(nil), score_boxes.index(nil)
        t = in_place(gl.arange(0, 64, gl.SliceLayout(1, PAIR)))[:, None]
        s = gl.arange(0, 64, gl.SliceLayout(0, PAIR))[None, :]
        half_row = in_place(gl.arange(0, 64, gl.SliceLayout(1, ACC)))[:, None]
        left = length - step
        if REVERSE:
            left = gl.where(i + 1 == chunks, 0, 64)
        none = gl.zeros([64, BN], gl.float32, ACC)
        zero = gl.zeros([64, 64], gl.float32, PAIR)
        async_copy.wait_group(0)
        barrier()
        decay_halves(ww, early, late, CLAMP, SUMS)
        q_raw = qs.index(nil).load(ACC)
        k_raw = ks.index(nil).load(ACC)
        state_box.store(state.to(gl.bfloat16))
        sync_boxes()
        box_copy(qs.index(nil), q + (base + step * stride), row, col, left, N, stride)
        box_copy(ks.index(nil), k + (base_k + step * stride_k), row, col, left, N, stride_k)
        async_copy.commit_group()
        if SAVE:
            box_save(checkpoint + (chunk * H + h) * (N * N), state_box, keys, col, N, N, N, FLAT)
        whole = early.load(gl.SliceLayout(1, ACC)) * late.load(gl.SliceLayout(1, ACC))
        upto = warpgroup_mma(sums.index(nil + LEVELS), ww, none, use_acc=False, is_async=True)
        after = warpgroup_mma(sums.index(nil + (LEVELS + 1)), ww, none, use_acc=False, is_async=True)
        upto, after = warpgroup_mma_wait(0, [upto, after])
        qf, kf = q_boxes.index(nil), k_boxes.index(nil)
        qf.store((q_raw.to(gl.float32) * (decay_exp(upto) * scale)).to(gl.bfloat16))
        kf.store((k_raw.to(gl.float32) * decay_exp(after)).to(gl.bfloat16))
        state = state * whole[:, None]
        sync_boxes()
        if REVERSE:
            o = warpgroup_mma(kf, state_box, none, use_acc=False, is_async=True)
            state = warpgroup_mma(qf.permute((1, 0)), vv, state, is_async=True)
        else:
            o = warpgroup_mma(qf, state_box, none, use_acc=False, is_async=True)
            state = warpgroup_mma(kf.permute((1, 0)), vv, state, is_async=True)
        span = warpgroup_mma(sums.index(nil), ww, none, use_acc=False, is_async=True)
        o, state, span = warpgroup_mma_wait(0, [o, state, span])
        # Level by level, the pairs of queries and keys in different halves of a block; the last level takes whole blocks.
        scores = zero
        for level in gl.static_range(LEVELS):
            later = (half_row >> (5 - level)) % 2 == 1
            if level == LEVELS - 1:
                signed = gl.where(later, span, -span)
                q_factor = decay_exp(signed)
                k_factor = decay_exp(-signed)
                inside = ((t >> (6 - level)) == (s >> (6 - level))) & (t >= s)
            else:
                factor = decay_exp(span)
                q_factor = gl.where(later, factor, 0.0)
                k_factor = gl.where(later, 0.0, factor)
                inside = ((t >> (6 - level)) == (s >> (6 - level))) & ((t >> (5 - level)) > (s >> (5 - level)))
            if PARTS == 1:
                barrier()
            qf, kf = q_boxes.index(nil + (level + 1) % PARTS), k_boxes.index(nil + (level + 1) % PARTS)
            qf.store((q_raw.to(gl.float32) * (q_factor * scale)).to(gl.bfloat16))
            kf.store((k_raw.to(gl.float32) * k_factor).to(gl.bfloat16))
            sync_boxes()
            score = warpgroup_mma(qf, kf.permute((1, 0)), zero, use_acc=False, is_async=True)
            if level < LEVELS - 1:
                span = warpgroup_mma(sums.index(nil + (level + 1)), ww, none, use_acc=False, is_async=True)
                score, span = warpgroup_mma_wait(0, [score, span])
            else:
                score = warpgroup_mma_wait(0, [score])
            scores += gl.where(inside, score, 0.0)
        score_box.store(scores.to(gl.bfloat16))
        sync_boxes()
        box_copy(ww, log_w + (base + step * stride), row, col, left, N, stride)
        if REVERSE:
            o = warpgroup_mma(score_box.permute((1, 0)), vv, o)
        else:
            o = warpgroup_mma(score_box, vv, o)
        barrier()
        box_copy(vv, v + (base_v + step * stride_v), row, col, left, N, stride_v)
        async_copy.commit_group()
        rows_store(out + base, o, length, N, stride, ACC, BN)
        base += step * stride
        base_k += step * stride_k
        base_v += step * stride_v
        length -= step
        chunk += step // 64
    async_copy.wait_group(0)
    if LAST:
        gl.store(state_out + corner + val * N + key, state, mask=(key < N) & (val < N))
