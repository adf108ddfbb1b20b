"""The gradient kernel of wkv7_centred in Gluon, for Hopper: every tile has its place in shared memory, so nothing spills."""
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Renamed between releases of Triton.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.jit
def in_place(x):
    """x, so that what follows from it is computed where it stands: moved out of a loop it would take registers."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def box_copy(box, base, row, col, length, width, stride):
    """Starts the copy of a (64, 64) box, zero outside (length, width)."""
    row = in_place(row)[:, None]
    inside = (row < length) & (col[None, :] < width)
    async_copy.async_copy_global_to_shared(box, base + row * stride + col[None, :], inside)


@gluon.jit
def rows_store(base, value, length, width, stride, ACC: gl.constexpr, COLS: gl.constexpr = 64):
    """Stores a product's rows without a detour through shared memory."""
    row = in_place(gl.arange(0, 64, gl.SliceLayout(1, ACC)))[:, None]
    col = gl.arange(0, COLS, gl.SliceLayout(0, ACC))[None, :]
    gl.store(base + row * stride + col, value.to(base.dtype.element_ty), mask=(row < length) & (col < width))


@gluon.jit
def arrive_copies(PENDING: gl.constexpr):
    """All but the last PENDING groups of copies are visible to every thread and to the tensor cores."""
    async_copy.wait_group(PENDING)
    fence_async_shared()
    barrier()


@gluon.jit
def decay_exp(x):
    return gl.exp2(x * 1.4426950408889634)


@gluon.jit
def rows_product(x0, x1, y0, y1, N: gl.constexpr, ACC: gl.constexpr):
    """Starts x y^T over the value channels, in one or two boxes of 64."""
    out = gl.zeros([64, 64], gl.float32, ACC)
    out = warpgroup_mma(x0, y0.permute((1, 0)), out, use_acc=False, is_async=True)
    if N > 64:
        out = warpgroup_mma(x1, y1.permute((1, 0)), out, is_async=True)
    return out


@gluon.jit
def split_store(high, low, x):
    """x as the sum of two bfloat16 boxes."""
    top = x.to(gl.bfloat16)
    high.store(top)
    low.store((x - top.to(gl.float32)).to(gl.bfloat16))


@gluon.jit(do_not_specialize=["T", "NT"])
def wkv7_hopper_grad_kernel(r, log_w, k, v, a, b, u, checkpoint, d_out, du, d_checkpoint, dr, d_log_w, dk, da, db,
                            cu_seqlens, chunk_seq, chunk_start, T, NT, H, HV, scale,
                            N: gl.constexpr, CLAMP: gl.constexpr, CENTRED: gl.constexpr, VARLEN: gl.constexpr):
    """wkv7_centred_grad_kernel for 64 key channels of one chunk of one head, by four warps.

    CENTRED: the states are those of wkv7_fused, decayed to the chunk's middle, instead of those at its ends.
    """
    FLAT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    BOX: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    KEPT: gl.constexpr = gl.SwizzledSharedLayout(2, 1, 16, [1, 0])
    part = gl.program_id(0) * 64
    h = gl.program_id(1)
    chunk = gl.program_id(2)
    if VARLEN:
        seq = gl.load(chunk_seq + chunk)
        if seq < 0:
            return
        begin = gl.load(cu_seqlens + seq)
        first = (chunk - gl.load(chunk_start + seq)) * 64
        length = gl.load(cu_seqlens + seq + 1) - begin - first
    else:
        begin = (chunk // NT) * T
        first = (chunk % NT) * 64
        length = T - first
    stride = H * N
    stride_v = HV * N
    token = (begin + first).to(gl.int64)
    base = token * stride + h * N
    keys = base + part
    base_v = token * stride_v + (h // (H // HV)) * N
    corner = (chunk * H + h).to(gl.int64) * (N * N) + part * N
    row = gl.arange(0, 64, gl.SliceLayout(1, FLAT))
    col = gl.arange(0, 64, gl.SliceLayout(0, FLAT))
    # Known ahead where it may be: masks cost registers.
    width = 64 if N % 64 == 0 else N - part

    do0 = gl.allocate_shared_memory(gl.bfloat16, [64, 64], BOX)
    do1 = gl.allocate_shared_memory(gl.bfloat16, [64, 64], BOX)
    du0 = gl.allocate_shared_memory(gl.bfloat16, [64, 64], BOX)
    du1 = gl.allocate_shared_memory(gl.bfloat16, [64, 64], BOX)
    vv = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], BOX)
    uu = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], BOX)
    v0, v1, u0, u1 = vv.index(0), vv.index(1), uu.index(0), uu.index(1)
    old0 = gl.allocate_shared_memory(gl.bfloat16, [64, 64], BOX)
    old1 = gl.allocate_shared_memory(gl.bfloat16, [64, 64], BOX)
    new0 = gl.allocate_shared_memory(gl.bfloat16, [64, 64], BOX)
    new1 = gl.allocate_shared_memory(gl.bfloat16, [64, 64], BOX)
    ww = gl.allocate_shared_memory(gl.bfloat16, [64, 64], BOX)
    signs = gl.allocate_shared_memory(gl.bfloat16, [64, 64], BOX)
    totals = gl.allocate_shared_memory(gl.float32, [64], gl.SwizzledSharedLayout(1, 1, 1, [0]))

    box_copy(do0, d_out + base, row, col, length, N, stride)
    box_copy(du0, du + base, row, col, length, N, stride)
    box_copy(old0, checkpoint + corner, row, col, width, N, N)
    if N > 64:
        box_copy(do1, d_out + base + 64, row, col, length, N - 64, stride)
        box_copy(du1, du + base + 64, row, col, length, N - 64, stride)
        box_copy(old1, checkpoint + corner + 64, row, col, width, N - 64, N)
    async_copy.commit_group()
    box_copy(v0, v + base_v, row, col, length, N, stride_v)
    box_copy(u0, u + base, row, col, length, N, stride)
    box_copy(new0, d_checkpoint + corner, row, col, width, N, N)
    if N > 64:
        box_copy(v1, v + base_v + 64, row, col, length, N - 64, stride_v)
        box_copy(u1, u + base + 64, row, col, length, N - 64, stride)
        box_copy(new1, d_checkpoint + corner + 64, row, col, width, N - 64, N)
    box_copy(ww, log_w + keys, row, col, length, width, stride)
    async_copy.commit_group()

    # Sums of the log-decays from the middle, of the two halves, are products with these; decays are formed again where they
    # are used, which costs less than the registers to keep them.
    ti = gl.arange(0, 64, gl.SliceLayout(1, FLAT))[:, None]
    si = gl.arange(0, 64, gl.SliceLayout(0, FLAT))[None, :]
    signs.store((gl.where((si >= 32) & (si <= ti), 1.0, 0.0) - gl.where((si < 32) & (si > ti), 1.0, 0.0)).to(gl.bfloat16))
    zero = gl.zeros([64, 64], gl.float32, ACC)
    ti = gl.arange(0, 64, gl.SliceLayout(1, LEFT))[:, None]
    si = gl.arange(0, 64, gl.SliceLayout(0, LEFT))[None, :]

    # The state's share of every gradient.
    arrive_copies(0)
    ww.store(gl.maximum(ww.load(FLAT).to(gl.float32), -CLAMP).to(gl.bfloat16))
    products = gl.sum(old0.load(FLAT).to(gl.float32) * new0.load(FLAT).to(gl.float32), 1)
    if N > 64:
        products += gl.sum(old1.load(FLAT).to(gl.float32) * new1.load(FLAT).to(gl.float32), 1)
    totals.store(products)
    fence_async_shared()
    barrier()
    r_grad = rows_product(do0, do1, old0, old1, N, ACC)
    a_grad = rows_product(du0, du1, old0, old1, N, ACC)
    k_grad = rows_product(v0, v1, new0, new1, N, ACC)
    b_grad = rows_product(u0, u1, new0, new1, N, ACC)
    r_grad, a_grad, k_grad, b_grad = warpgroup_mma_wait(0, [r_grad, a_grad, k_grad, b_grad])
    if not CENTRED:
        half = decay_exp(warpgroup_mma(gl.where((si < 32) & (ti >= 0), 1.0, 0.0).to(gl.bfloat16), ww, zero, use_acc=False))
        r_grad *= half
        a_grad *= half
        half = decay_exp(warpgroup_mma(gl.where((si >= 32) & (ti >= 0), 1.0, 0.0).to(gl.bfloat16), ww, zero, use_acc=False))
        k_grad *= half
        b_grad *= half
    barrier()
    # The states' boxes take the inputs of the second half.
    rq, aq, kk, bb = old0, old1, new0, new1
    box_copy(rq, r + keys, row, col, length, width, stride)
    box_copy(aq, a + keys, row, col, length, width, stride)
    box_copy(kk, k + keys, row, col, length, width, stride)
    box_copy(bb, b + keys, row, col, length, width, stride)
    async_copy.commit_group()
    # Gradients of the pair matrices, in the boxes of what they are made from.
    t = gl.arange(0, 64, gl.SliceLayout(1, ACC))[:, None]
    s = gl.arange(0, 64, gl.SliceLayout(0, ACC))[None, :]
    g_rk, g_rb, g_ak, g_ab = do0, do1, du0, du1
    d_rk = rows_product(do0, do1, v0, v1, N, ACC)
    d_rb = rows_product(do0, do1, u0, u1, N, ACC)
    d_rk, d_rb = warpgroup_mma_wait(0, [d_rk, d_rb])
    barrier()
    g_rk.store(gl.where(t >= s, d_rk, 0.0).to(gl.bfloat16))
    g_rb.store(gl.where(t >= s, d_rb, 0.0).to(gl.bfloat16))
    d_ak = rows_product(du0, du1, v0, v1, N, ACC)
    d_ab = rows_product(du0, du1, u0, u1, N, ACC)
    d_ak, d_ab = warpgroup_mma_wait(0, [d_ak, d_ab])
    barrier()
    g_ak.store(gl.where(t > s, d_ak, 0.0).to(gl.bfloat16))
    g_ab.store(gl.where(t > s, d_ab, 0.0).to(gl.bfloat16))
    k_kept = vv._reinterpret(gl.float32, [64, 64], KEPT)
    b_kept = uu._reinterpret(gl.float32, [64, 64], KEPT)
    k_kept.store(k_grad)
    b_kept.store(b_grad)
    arrive_copies(0)

    span = warpgroup_mma(signs, ww, zero, use_acc=False)
    r_raw, a_raw, k_raw, b_raw = rq.load(ACC), aq.load(ACC), kk.load(ACC), bb.load(ACC)
    w_raw = ww.load(ACC).to(gl.float32)
    rq.store((r_raw.to(gl.float32) * (decay_exp(span) * scale)).to(gl.bfloat16))
    aq.store((a_raw.to(gl.float32) * decay_exp(span - w_raw)).to(gl.bfloat16))
    factor = decay_exp(-span)
    kk.store((k_raw.to(gl.float32) * factor).to(gl.bfloat16))
    bb.store((b_raw.to(gl.float32) * factor).to(gl.bfloat16))
    fence_async_shared()
    barrier()

    r_grad = warpgroup_mma(g_rk, kk, r_grad, is_async=True)
    r_grad = warpgroup_mma(g_rb, bb, r_grad, is_async=True)
    a_grad = warpgroup_mma(g_ak, kk, a_grad, is_async=True)
    a_grad = warpgroup_mma(g_ab, bb, a_grad, is_async=True)
    r_grad, a_grad = warpgroup_mma_wait(0, [r_grad, a_grad])
    rows_store(dr + keys, r_grad * (decay_exp(span) * scale), length, width, stride, ACC)
    upto = rq.load(ACC) * r_grad
    rows_store(da + keys, a_grad * decay_exp(span - ww.load(ACC).to(gl.float32)), length, width, stride, ACC)
    here = aq.load(ACC) * a_grad
    upto += here
    pairs = warpgroup_mma(g_rk.permute((1, 0)), rq, zero, use_acc=False, is_async=True)
    pairs = warpgroup_mma(g_ak.permute((1, 0)), aq, pairs, is_async=True)
    others = warpgroup_mma(g_rb.permute((1, 0)), rq, zero, use_acc=False, is_async=True)
    others = warpgroup_mma(g_ab.permute((1, 0)), aq, others, is_async=True)
    pairs, others = warpgroup_mma_wait(0, [pairs, others])
    factor = decay_exp(-span)
    state = k_kept.load(ACC)
    rows_store(dk + keys, (pairs + state) * factor, length, width, stride, ACC)
    raw = kk.load(ACC).to(gl.float32)
    upto -= raw * pairs
    after = raw * state
    state = b_kept.load(ACC)
    rows_store(db + keys, (others + state) * factor, length, width, stride, ACC)
    raw = bb.load(ACC).to(gl.float32)
    upto -= raw * others
    after += raw * state
    barrier()
    split_store(do0, do1, upto)
    split_store(du0, du1, after)
    since, before = rq, aq
    row = gl.arange(0, 64, gl.SliceLayout(1, FLAT))[:, None]
    col = gl.arange(0, 64, gl.SliceLayout(0, FLAT))[None, :]
    since.store(gl.where(row <= col, 1.0, 0.0).to(gl.bfloat16))
    before.store(gl.where(row > col, 1.0, 0.0).to(gl.bfloat16))
    fence_async_shared()
    barrier()
    across = gl.zeros([64, 64], gl.float32, ACC) + totals.load(gl.SliceLayout(0, ACC))[None, :]
    if not CENTRED:
        across *= decay_exp(warpgroup_mma(gl.where((si >= 0) & (ti >= 0), 1.0, 0.0).to(gl.bfloat16), ww, zero, use_acc=False))
    w_grad = across - here
    w_grad = warpgroup_mma(since, do1, w_grad, is_async=True)
    w_grad = warpgroup_mma(since, do0, w_grad, is_async=True)
    w_grad = warpgroup_mma(before, du1, w_grad, is_async=True)
    w_grad = warpgroup_mma(before, du0, w_grad, is_async=True)
    w_grad = warpgroup_mma_wait(0, [w_grad])
    rows_store(d_log_w + keys, w_grad, length, width, stride, ACC)
