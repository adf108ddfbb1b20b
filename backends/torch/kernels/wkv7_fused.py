"""The generalised delta rule for bounded decays in Gluon, for Hopper: one program walks one head of one sequence.

The equations are those of wkv7_centred. Nothing but inputs, outputs and what the backward needs goes through memory; the
state (key, value) stays in registers as float32. Eight warps at head sizes up to 128, four up to 64.
"""
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from radlads.backends.torch.kernels.wkv7_hopper import barrier, box_copy, decay_exp, in_place, rows_store, split_store


@gluon.jit
def sync_boxes():
    """What was stored to shared memory is visible to every thread and to the tensor cores."""
    fence_async_shared()
    barrier()


@gluon.jit
def decay_signs(t, s):
    """Of which tokens s the log-decays sum to that from the chunk's middle to token t."""
    return (gl.where((s >= 32) & (s <= t), 1.0, 0.0) - gl.where((s < 32) & (s > t), 1.0, 0.0)).to(gl.bfloat16)


@gluon.jit
def chunk_inverse(A, lower16, inverse16, other16, step16, PAIR: gl.constexpr):
    """(I - A)^-1 of a strictly lower (64, 64) matrix by doubling blocks, in float16 boxes."""
    t = in_place(gl.arange(0, 64, gl.SliceLayout(1, PAIR)))[:, None]
    s = gl.arange(0, 64, gl.SliceLayout(0, PAIR))[None, :]
    lower16.store(A.to(gl.float16))
    inverse = gl.where((t // 2) == (s // 2), A, 0.0) + gl.where(t == s, 1.0, 0.0)
    inverse16.store(inverse.to(gl.float16))
    sync_boxes()
    for level in gl.static_range(1, 6):
        # Two boxes in turn: one is written while other warps may still read the one before.
        known = inverse16 if level % 2 else other16
        # The inverse is block-diagonal as yet, so the rest of A may be masked after the product.
        step = warpgroup_mma(lower16, known, gl.zeros([64, 64], gl.float32, PAIR), use_acc=False)
        inside = ((t >> (level + 1)) == (s >> (level + 1))) & ((t >> level) > (s >> level))
        step16.store(gl.where(inside, step, 0.0).to(gl.float16))
        sync_boxes()
        inverse = warpgroup_mma(known, step16, inverse)
        if level < 5:
            (other16 if level % 2 else inverse16).store(inverse.to(gl.float16))
            sync_boxes()
    return inverse


@gluon.jit
def decay_halves(ww, early, late, CLAMP: gl.constexpr, SUMS: gl.constexpr):
    """Clamps the log-decays of a chunk and takes the decays of its halves; a warp holds all tokens of its channels."""
    row = gl.arange(0, 64, gl.SliceLayout(1, SUMS))[:, None]
    x = gl.maximum(ww.load(SUMS).to(gl.float32), -CLAMP)
    first = gl.sum(gl.where(row < 32, x, 0.0), 0)
    early.store(decay_exp(first))
    late.store(decay_exp(gl.sum(x, 0) - first))
    ww.store(x.to(gl.bfloat16))


@gluon.jit
def decay_inputs(rr, ww, kk, aa, bb, signs, scale, zero, ACC: gl.constexpr):
    """The inputs decayed to the chunk's middle, each in its own box."""
    span = warpgroup_mma(signs, ww, zero, use_acc=False)
    w_raw = ww.load(ACC).to(gl.float32)
    r_raw, a_raw, k_raw, b_raw = rr.load(ACC), aa.load(ACC), kk.load(ACC), bb.load(ACC)
    rr.store((r_raw.to(gl.float32) * (decay_exp(span) * scale)).to(gl.bfloat16))
    aa.store((a_raw.to(gl.float32) * decay_exp(span - w_raw)).to(gl.bfloat16))
    back = decay_exp(-span)
    kk.store((k_raw.to(gl.float32) * back).to(gl.bfloat16))
    bb.store((b_raw.to(gl.float32) * back).to(gl.bfloat16))


@gluon.jit
def box_save(base, box, row, col, length, width, stride, FLAT: gl.constexpr):
    """Stores a box, rows as whole as they lie in memory."""
    row = in_place(row)[:, None]
    gl.store(base + row * stride + col[None, :], box.load(FLAT), mask=(row < length) & (col[None, :] < width))


@gluon.jit
def walk_place(cu_seqlens, chunk_start, walk, T, NT, walk_chunks, VARLEN: gl.constexpr):
    """First token, number of tokens and first chunk of a sequence, or of one of its segments of `walk_chunks` chunks."""
    if VARLEN:
        begin = gl.load(cu_seqlens + walk)
        length = gl.load(cu_seqlens + walk + 1) - begin
        chunk = gl.load(chunk_start + walk)
    else:
        walks = (NT + walk_chunks - 1) // walk_chunks
        seq = walk // walks
        first = (walk % walks) * walk_chunks
        begin = seq * T + first * 64
        length = gl.minimum(T - first * 64, walk_chunks * 64)
        chunk = seq * NT + first
    return begin.to(gl.int64), length, chunk.to(gl.int64)


@gluon.jit(do_not_specialize=["T", "NT", "walk_chunks"])
def wkv7_fused_forward_kernel(r, log_w, k, v, a, b, state_in, out, u_out, checkpoint, solve, a_rb, state_out,
                              cu_seqlens, chunk_start, T, NT, walk_chunks, H, HV, scale,
                              N: gl.constexpr, BN: gl.constexpr, CLAMP: gl.constexpr, HAS_STATE: gl.constexpr,
                              SAVE: gl.constexpr, VARLEN: gl.constexpr):
    """Outputs and the last state; for training also u, the state before each chunk, solution matrices and A_rb."""
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
    stride_v = HV * N
    base = begin * stride + h * N
    base_v = begin * stride_v + (h // (H // HV)) * N
    corner = (walk * H + h).to(gl.int64) * (N * N)
    row = gl.arange(0, 64, gl.SliceLayout(1, FLAT))
    col = gl.arange(0, BN, gl.SliceLayout(0, FLAT))
    keys = gl.arange(0, BN, gl.SliceLayout(1, FLAT))
    key = gl.arange(0, BN, gl.SliceLayout(1, ACC))[:, None]
    val = gl.arange(0, BN, gl.SliceLayout(0, ACC))[None, :]
    inside = (key < N) & (val < N)
    t = gl.arange(0, 64, gl.SliceLayout(1, PAIR))[:, None]
    s = gl.arange(0, 64, gl.SliceLayout(0, PAIR))[None, :]

    rs = gl.allocate_shared_memory(gl.bfloat16, [1, 64, BN], BOX)
    ws = gl.allocate_shared_memory(gl.bfloat16, [1, 64, BN], BOX)
    as_ = gl.allocate_shared_memory(gl.bfloat16, [1, 64, BN], BOX)
    vs = gl.allocate_shared_memory(gl.bfloat16, [1, 64, BN], BOX)
    # Keys are needed to the end of a chunk: at 128 channels there is room to fetch the next beside them.
    ks = gl.allocate_shared_memory(gl.bfloat16, [PARTS, 64, BN], BOX)
    bs = gl.allocate_shared_memory(gl.bfloat16, [PARTS, 64, BN], BOX)
    # The rounded state; once it has been read, the right-hand sides and u.
    states = gl.allocate_shared_memory(gl.bfloat16, [2, 64, BN], BOX)
    sign_boxes = gl.allocate_shared_memory(gl.bfloat16, [1, 64, 64], BOX)
    rb_boxes = gl.allocate_shared_memory(gl.bfloat16, [1, 64, 64], BOX)
    ak_boxes = gl.allocate_shared_memory(gl.bfloat16, [1, 64, 64], BOX)
    rk_boxes = gl.allocate_shared_memory(gl.bfloat16, [1, 64, 64], BOX)
    solve_boxes = gl.allocate_shared_memory(gl.bfloat16, [1, 64, 64], BOX)
    early = gl.allocate_shared_memory(gl.float32, [BN], LINE)
    late = gl.allocate_shared_memory(gl.float32, [BN], LINE)

    state = gl.zeros([BN, BN], gl.float32, ACC)
    if HAS_STATE:
        state = gl.load(state_in + corner + val * N + key, mask=inside, other=0.0)
    # Sums of the log-decays from the chunk's middle are products with these.
    sign_boxes.index(0).store(decay_signs(t, s))
    chunks = ((length + 63) // 64).to(gl.int32)
    box_copy(ws.index(0), log_w + base, row, col, length, N, stride)
    box_copy(ks.index(0), k + base, row, col, length, N, stride)
    box_copy(bs.index(0), b + base, row, col, length, N, stride)
    box_copy(rs.index(0), r + base, row, col, length, N, stride)
    box_copy(as_.index(0), a + base, row, col, length, N, stride)
    async_copy.commit_group()
    box_copy(vs.index(0), v + base_v, row, col, length, N, stride_v)
    async_copy.commit_group()
    for i in range(0, chunks):
        place = chunk * H + h
        # Where a box lies is computed in each turn: kept from turn to turn the places would take half of the registers.
        nil = in_place(i) - i
        kk, bb = ks.index(i % PARTS), bs.index(i % PARTS)
        rr, ww, aa, vv = rs.index(nil), ws.index(nil), as_.index(nil), vs.index(nil)
        rhs_box, uu = states.index(nil), states.index(nil + 1)
        if BN == 128:
            state_box = states._reinterpret(gl.bfloat16, [1, 128, 128], BOX).index(nil)
        else:
            state_box = states.index(nil)
        signs, rb_box, ak_box, rk_box = sign_boxes.index(nil), rb_boxes.index(nil), ak_boxes.index(nil), rk_boxes.index(nil)
        solve_box = solve_boxes.index(nil)
        # The pair matrices of k are used up before the inversion.
        step16 = ak_boxes._reinterpret(gl.float16, [1, 64, 64], BOX).index(nil)
        inverse16 = rk_boxes._reinterpret(gl.float16, [1, 64, 64], BOX).index(nil)
        lower16 = solve_boxes._reinterpret(gl.float16, [1, 64, 64], BOX).index(nil)
        other16 = states._reinterpret(gl.float16, [2 * PARTS, 64, 64], BOX).index(nil + PARTS)
        t = in_place(gl.arange(0, 64, gl.SliceLayout(1, PAIR)))[:, None]
        s = gl.arange(0, 64, gl.SliceLayout(0, PAIR))[None, :]
        async_copy.wait_group(1)
        barrier()
        decay_halves(ww, early, late, CLAMP, SUMS)
        sync_boxes()
        # From here on the state is that of the chunk's middle, had the chunk added nothing.
        state = state * early.load(gl.SliceLayout(1, ACC))[:, None]
        state_box.store(state.to(gl.bfloat16))
        zero = gl.zeros([64, BN], gl.float32, ACC)
        decay_inputs(rr, ww, kk, aa, bb, signs, scale, zero, ACC)
        sync_boxes()
        none = gl.zeros([64, 64], gl.float32, PAIR)
        ab = warpgroup_mma(aa, bb.permute((1, 0)), none, use_acc=False, is_async=True)
        ak = warpgroup_mma(aa, kk.permute((1, 0)), none, use_acc=False, is_async=True)
        rk = warpgroup_mma(rr, kk.permute((1, 0)), none, use_acc=False, is_async=True)
        rb = warpgroup_mma(rr, bb.permute((1, 0)), none, use_acc=False, is_async=True)
        o = warpgroup_mma(rr, state_box, zero, use_acc=False, is_async=True)
        rhs = warpgroup_mma(aa, state_box, zero, use_acc=False, is_async=True)
        ab, ak, rk, rb, o, rhs = warpgroup_mma_wait(0, [ab, ak, rk, rb, o, rhs])
        ak_box.store(gl.where(t > s, ak, 0.0).to(gl.bfloat16))
        rk_box.store(gl.where(t >= s, rk, 0.0).to(gl.bfloat16))
        rb = gl.where(t >= s, rb, 0.0).to(gl.bfloat16)
        rb_box.store(rb)
        if SAVE:
            gl.store(a_rb + place * 4096 + t * 64 + s, rb)
            box_save(checkpoint + place * (N * N), state_box, keys, col, N, N, N, FLAT)
        async_copy.wait_group(0)
        sync_boxes()
        # Most boxes of this chunk are free: those of the next arrive while the matrix is inverted.
        length -= 64
        base += 64 * stride
        box_copy(ww, log_w + base, row, col, length, N, stride)
        if PARTS == 2:
            box_copy(ks.index((i + 1) % 2), k + base, row, col, length, N, stride)
            box_copy(bs.index((i + 1) % 2), b + base, row, col, length, N, stride)
        box_copy(rr, r + base, row, col, length, N, stride)
        box_copy(aa, a + base, row, col, length, N, stride)
        async_copy.commit_group()
        o = warpgroup_mma(rk_box, vv, o, is_async=True)
        rhs = warpgroup_mma(ak_box, vv, rhs, is_async=True)
        state = warpgroup_mma(kk.permute((1, 0)), vv, state, is_async=True)
        o, rhs, state = warpgroup_mma_wait(0, [o, rhs, state])
        barrier()
        inverse = chunk_inverse(gl.where(t > s, ab, 0.0), lower16, inverse16, other16, step16, PAIR).to(gl.bfloat16)
        solve_box.store(inverse)
        # In two parts: the solution may be small beside what it is made from.
        split_store(rhs_box, uu, rhs)
        if SAVE:
            gl.store(solve + place * 4096 + t * 64 + s, inverse)
        sync_boxes()
        u = warpgroup_mma(solve_box, uu, zero, use_acc=False, is_async=True)
        u = warpgroup_mma(solve_box, rhs_box, u, is_async=True)
        u = warpgroup_mma_wait(0, [u])
        barrier()
        uu.store(u.to(gl.bfloat16))
        sync_boxes()
        o = warpgroup_mma(rb_box, uu, o, is_async=True)
        state = warpgroup_mma(bb.permute((1, 0)), uu, state, is_async=True)
        decay = late.load(gl.SliceLayout(1, ACC))[:, None]
        o, state = warpgroup_mma_wait(0, [o, state])
        if SAVE:
            box_save(u_out + (base - 64 * stride), uu, row, col, length + 64, N, stride, FLAT)
        rows_store(out + (base - 64 * stride), o, length + 64, N, stride, ACC, BN)
        state = state * decay
        barrier()
        base_v += 64 * stride_v
        if PARTS == 1:
            box_copy(kk, k + base, row, col, length, N, stride)
            box_copy(bb, b + base, row, col, length, N, stride)
            async_copy.commit_group()
        box_copy(vv, v + base_v, row, col, length, N, stride_v)
        async_copy.commit_group()
        chunk += 1
    async_copy.wait_group(0)
    gl.store(state_out + corner + val * N + key, state, mask=inside)


@gluon.jit
def first_copies(ww, bb, pairs, log_w, b, solve, a_rb, at, place, row, col, length, N: gl.constexpr, stride,
                         PARTS: gl.constexpr):
    """Starts the copies of what is needed first and free again first."""
    for part in gl.static_range(PARTS):
        box_copy(ww.index(part), log_w + at + part * 64, row, col, length, N - part * 64, stride)
        box_copy(bb.index(part), b + at + part * 64, row, col, length, N - part * 64, stride)
    box_copy(pairs.index(1), a_rb + place * 4096, row, col, gl.minimum(length, 1) * 64, 64, 64)


@gluon.jit
def other_copies(rr, kk, aa, do, r, k, a, d_out, at, row, col, wide, length, N: gl.constexpr, stride,
                       PARTS: gl.constexpr):
    for part in gl.static_range(PARTS):
        box_copy(kk.index(part), k + at + part * 64, row, col, length, N - part * 64, stride)
        box_copy(rr.index(part), r + at + part * 64, row, col, length, N - part * 64, stride)
        box_copy(aa.index(part), a + at + part * 64, row, col, length, N - part * 64, stride)
    box_copy(do, d_out + at, row, wide, length, N, stride)


@gluon.jit(do_not_specialize=["T", "NT", "walk_chunks"])
def wkv7_fused_reverse_kernel(r, log_w, k, a, b, solve, a_rb, d_out, d_state_out, dv, du, d_checkpoint, d_state_in,
                              cu_seqlens, chunk_start, T, NT, walk_chunks, H, scale,
                              N: gl.constexpr, BN: gl.constexpr, CLAMP: gl.constexpr, HAS_STATE: gl.constexpr,
                              NEED_STATE: gl.constexpr, LOCAL: gl.constexpr, VARLEN: gl.constexpr):
    """From the end: d(u), d(v) and, of each chunk, the gradient of its middle's state, had the chunk added nothing.

    LOCAL: only what each segment but the first adds to d(state) before it, at the place of the segment before.
    """
    WARPS: gl.constexpr = BN // 16
    PARTS: gl.constexpr = BN // 64
    FLAT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, WARPS // 4], [16, 64, 16])
    PAIR: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, WARPS // 4], [16, 256 // WARPS, 16])
    BOX: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    SUMS: gl.constexpr = gl.BlockedLayout([16, 1 if WARPS == 8 else 2], [4, 8], [1, WARPS], [0, 1])
    h = gl.program_id(0)
    walk = gl.program_id(1)
    if LOCAL:
        walks = (NT + walk_chunks - 1) // walk_chunks
        walk += walk // (walks - 1) + 1
    begin, length, chunk = walk_place(cu_seqlens, chunk_start, walk, T, NT, walk_chunks, VARLEN)
    stride = H * N
    chunks = ((length + 63) // 64).to(gl.int32)
    base = (begin + (chunks - 1) * 64) * stride + h * N
    chunk += chunks - 1
    # Nothing is fetched for a sequence of no tokens: it would lie before the tensors.
    length = gl.where(chunks > 0, length - (chunks - 1) * 64, 0)
    corner = (walk * H + h).to(gl.int64) * (N * N)
    row = gl.arange(0, 64, gl.SliceLayout(1, FLAT))
    col = gl.arange(0, 64, gl.SliceLayout(0, FLAT))
    wide = gl.arange(0, BN, gl.SliceLayout(0, FLAT))
    key = gl.arange(0, 64, gl.SliceLayout(1, ACC))[:, None]
    val = gl.arange(0, BN, gl.SliceLayout(0, ACC))[None, :]

    rr = gl.allocate_shared_memory(gl.bfloat16, [PARTS, 64, 64], BOX)
    ww = gl.allocate_shared_memory(gl.bfloat16, [PARTS, 64, 64], BOX)
    kk = gl.allocate_shared_memory(gl.bfloat16, [PARTS, 64, 64], BOX)
    aa = gl.allocate_shared_memory(gl.bfloat16, [PARTS, 64, 64], BOX)
    bb = gl.allocate_shared_memory(gl.bfloat16, [PARTS, 64, 64], BOX)
    do = gl.allocate_shared_memory(gl.bfloat16, [64, BN], BOX)
    dw = gl.allocate_shared_memory(gl.bfloat16, [64, BN], BOX)
    xx = gl.allocate_shared_memory(gl.bfloat16, [64, BN], BOX)
    new = gl.allocate_shared_memory(gl.bfloat16, [PARTS, 64, BN], BOX)
    pairs = gl.allocate_shared_memory(gl.bfloat16, [4, 64, 64], BOX)
    signs = gl.allocate_shared_memory(gl.bfloat16, [64, 64], BOX)
    early = gl.allocate_shared_memory(gl.float32, [PARTS, 64], LINE)
    late = gl.allocate_shared_memory(gl.float32, [PARTS, 64], LINE)
    solve_box, rb_box, ak_box, rk_box = pairs.index(0), pairs.index(1), pairs.index(2), pairs.index(3)

    grad0 = gl.zeros([64, BN], gl.float32, ACC)
    grad1 = gl.zeros([64, BN], gl.float32, ACC)
    if HAS_STATE:
        grad0 = gl.load(d_state_out + corner + val * N + key, mask=(key < N) & (val < N), other=0.0)
        if BN == 128:
            grad1 = gl.load(d_state_out + corner + val * N + key + 64, mask=(key < N - 64) & (val < N), other=0.0)
    t = gl.arange(0, 64, gl.SliceLayout(1, PAIR))[:, None]
    s = gl.arange(0, 64, gl.SliceLayout(0, PAIR))[None, :]
    signs.store(decay_signs(t, s))
    place = chunk * H + h
    first_copies(ww, bb, pairs, log_w, b, solve, a_rb, base, place, row, col, length, N, stride, PARTS)
    box_copy(solve_box, solve + place * 4096, row, col, gl.minimum(length, 1) * 64, 64, 64)
    other_copies(rr, kk, aa, do, r, k, a, d_out, base, row, col, wide, length, N, stride, PARTS)
    async_copy.commit_group()
    for i in range(0, chunks):
        place = chunk * H + h
        ahead = base - 64 * stride
        last = i + 1 == chunks
        t = in_place(gl.arange(0, 64, gl.SliceLayout(1, PAIR)))[:, None]
        s = gl.arange(0, 64, gl.SliceLayout(0, PAIR))[None, :]
        zero = gl.zeros([64, 64], gl.float32, PAIR)
        none = gl.zeros([64, BN], gl.float32, ACC)
        async_copy.wait_group(0)
        barrier()
        for part in gl.static_range(PARTS):
            decay_halves(ww.index(part), early.index(part), late.index(part), CLAMP, SUMS)
        sync_boxes()
        grad0 = grad0 * late.index(0).load(gl.SliceLayout(1, ACC))[:, None]
        new.index(0).store(grad0.to(gl.bfloat16))
        if BN == 128:
            grad1 = grad1 * late.index(1).load(gl.SliceLayout(1, ACC))[:, None]
            new.index(1).store(grad1.to(gl.bfloat16))
        for part in gl.static_range(PARTS):
            decay_inputs(rr.index(part), ww.index(part), kk.index(part), aa.index(part), bb.index(part), signs, scale, zero,
                         PAIR)
        sync_boxes()
        du_sum = warpgroup_mma(rb_box.permute((1, 0)), do, none, use_acc=False, is_async=True)
        if not LOCAL:
            v_grad = warpgroup_mma(kk.index(0), new.index(0), none, use_acc=False, is_async=True)
            ak = warpgroup_mma(aa.index(0), kk.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
            rk = warpgroup_mma(rr.index(0), kk.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
        du_sum = warpgroup_mma(bb.index(0), new.index(0), du_sum, is_async=True)
        if BN == 128:
            du_sum = warpgroup_mma(bb.index(1), new.index(1), du_sum, is_async=True)
            if not LOCAL:
                v_grad = warpgroup_mma(kk.index(1), new.index(1), v_grad, is_async=True)
                ak = warpgroup_mma(aa.index(1), kk.index(1).permute((1, 0)), ak, is_async=True)
                rk = warpgroup_mma(rr.index(1), kk.index(1).permute((1, 0)), rk, is_async=True)
        if LOCAL:
            du_sum = warpgroup_mma_wait(0, [du_sum])
        else:
            du_sum, v_grad, ak, rk = warpgroup_mma_wait(0, [du_sum, v_grad, ak, rk])
            ak_box.store(gl.where(t > s, ak, 0.0).to(gl.bfloat16))
            rk_box.store(gl.where(t >= s, rk, 0.0).to(gl.bfloat16))
        split_store(xx, dw, du_sum)
        for part in gl.static_range(0 if LOCAL else PARTS):
            box_save(d_checkpoint + place * (N * N) + part * 64 * N, new.index(part), row, wide, N - part * 64, N, N, FLAT)
        sync_boxes()
        first_copies(ww, bb, pairs, log_w, b, solve, a_rb, ahead, place - H, row, col, gl.where(last, 0, 64), N,
                             stride, PARTS)
        du_sum = warpgroup_mma(solve_box.permute((1, 0)), dw, none, use_acc=False, is_async=True)
        du_sum = warpgroup_mma(solve_box.permute((1, 0)), xx, du_sum, is_async=True)
        du_sum = warpgroup_mma_wait(0, [du_sum])
        barrier()
        dw.store(du_sum.to(gl.bfloat16))
        sync_boxes()
        box_copy(solve_box, solve + (place - H) * 4096, row, col, gl.where(last, 0, 64), 64, 64)
        if not LOCAL:
            v_grad = warpgroup_mma(rk_box.permute((1, 0)), do, v_grad, is_async=True)
            v_grad = warpgroup_mma(ak_box.permute((1, 0)), dw, v_grad, is_async=True)
        grad0 = warpgroup_mma(rr.index(0).permute((1, 0)), do, grad0, is_async=True)
        grad0 = warpgroup_mma(aa.index(0).permute((1, 0)), dw, grad0, is_async=True)
        if BN == 128:
            grad1 = warpgroup_mma(rr.index(1).permute((1, 0)), do, grad1, is_async=True)
            grad1 = warpgroup_mma(aa.index(1).permute((1, 0)), dw, grad1, is_async=True)
            grad1 = warpgroup_mma_wait(0, [grad1])
        if LOCAL:
            grad0 = warpgroup_mma_wait(0, [grad0])
        else:
            v_grad, grad0 = warpgroup_mma_wait(0, [v_grad, grad0])
        barrier()
        other_copies(rr, kk, aa, do, r, k, a, d_out, ahead, row, col, wide, gl.where(last, 0, 64), N, stride, PARTS)
        async_copy.commit_group()
        if not LOCAL:
            box_save(du + base, dw, row, wide, length, N, stride, FLAT)
            rows_store(dv + base, v_grad, length, N, stride, ACC, BN)
        grad0 = grad0 * early.index(0).load(gl.SliceLayout(1, ACC))[:, None]
        if BN == 128:
            grad1 = grad1 * early.index(1).load(gl.SliceLayout(1, ACC))[:, None]
        base = ahead
        length += 64
        chunk -= 1
    async_copy.wait_group(0)
    if NEED_STATE:
        if LOCAL:
            corner -= H * N * N
        gl.store(d_state_in + corner + val * N + key, grad0, mask=(key < N) & (val < N))
        if BN == 128:
            gl.store(d_state_in + corner + val * N + key + 64, grad1, mask=(key < N - 64) & (val < N))
