"""The gradient kernel of wkv6_triton in Gluon, for Hopper: every tile has its place in shared memory, so nothing spills."""
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from radlads.backends.torch.kernels.wkv7_hopper import (
    arrive_copies,
    barrier,
    box_copy,
    decay_exp,
    rows_product,
    rows_store,
    split_store,
)


@gluon.jit(do_not_specialize=["T", "NT"])
def wkv6_hopper_grad_kernel(q, log_w, k, v, checkpoint, d_out, d_checkpoint, dq, d_log_w, dk,
                            cu_seqlens, chunk_seq, chunk_start, T, NT, H, HK, scale,
                            N: gl.constexpr, DIAG: gl.constexpr, LEVELS: gl.constexpr, CLAMP: gl.constexpr,
                            VARLEN: gl.constexpr):
    """Gradients of q, k and log_w for 64 key channels of one chunk of one head, by four warps."""
    FLAT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    BOX: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
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
    stride_k = HK * N
    token = (begin + first).to(gl.int64)
    base = token * stride + h * N
    base_k = token * stride_k + (h // (H // HK)) * N
    corner = (chunk * H + h).to(gl.int64) * (N * N) + part * N
    row = gl.arange(0, 64, gl.SliceLayout(1, FLAT))
    col = gl.arange(0, 64, gl.SliceLayout(0, FLAT))
    # Known ahead where it may be: masks cost registers.
    width = 64 if N % 64 == 0 else N - part

    do0 = gl.allocate_shared_memory(gl.bfloat16, [64, 64], BOX)
    do1 = gl.allocate_shared_memory(gl.bfloat16, [64, 64], BOX)
    v0 = gl.allocate_shared_memory(gl.bfloat16, [64, 64], BOX)
    v1 = gl.allocate_shared_memory(gl.bfloat16, [64, 64], BOX)
    old0 = gl.allocate_shared_memory(gl.bfloat16, [64, 64], BOX)
    old1 = gl.allocate_shared_memory(gl.bfloat16, [64, 64], BOX)
    new0 = gl.allocate_shared_memory(gl.bfloat16, [64, 64], BOX)
    new1 = gl.allocate_shared_memory(gl.bfloat16, [64, 64], BOX)
    ww = gl.allocate_shared_memory(gl.bfloat16, [64, 64], BOX)
    qq = gl.allocate_shared_memory(gl.bfloat16, [64, 64], BOX)
    kk = gl.allocate_shared_memory(gl.bfloat16, [64, 64], BOX)
    totals = gl.allocate_shared_memory(gl.float32, [64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    box_copy(do0, d_out + base, row, col, length, N, stride)
    box_copy(v0, v + base_k, row, col, length, N, stride_k)
    box_copy(old0, checkpoint + corner, row, col, width, N, N)
    box_copy(new0, d_checkpoint + corner, row, col, width, N, N)
    if N > 64:
        box_copy(do1, d_out + base + 64, row, col, length, N - 64, stride)
        box_copy(v1, v + base_k + 64, row, col, length, N - 64, stride_k)
        box_copy(old1, checkpoint + corner + 64, row, col, width, N - 64, N)
        box_copy(new1, d_checkpoint + corner + 64, row, col, width, N - 64, N)
    box_copy(ww, log_w + base + part, row, col, length, width, stride)
    box_copy(qq, q + base + part, row, col, length, width, stride)
    box_copy(kk, k + base_k + part, row, col, length, width, stride_k)
    async_copy.commit_group()
    t = gl.arange(0, 64, gl.SliceLayout(1, ACC))[:, None]
    s = gl.arange(0, 64, gl.SliceLayout(0, ACC))[None, :]
    ti = gl.arange(0, 64, gl.SliceLayout(1, LEFT))[:, None]
    si = gl.arange(0, 64, gl.SliceLayout(0, LEFT))[None, :]
    zero = gl.zeros([64, 64], gl.float32, ACC)
    arrive_copies(0)
    ww.store(gl.maximum(ww.load(FLAT).to(gl.float32), -CLAMP).to(gl.bfloat16))
    across = gl.sum(old0.load(FLAT).to(gl.float32) * new0.load(FLAT).to(gl.float32), 1)
    if N > 64:
        across += gl.sum(old1.load(FLAT).to(gl.float32) * new1.load(FLAT).to(gl.float32), 1)
    totals.store(across)
    fence_async_shared()
    barrier()

    # The state's share: a query gives to the log-decays up to its token, a key to those after its own.
    d_pairs = rows_product(do0, do1, v0, v1, N, ACC)
    q_grad = rows_product(do0, do1, old0, old1, N, ACC)
    k_grad = rows_product(v0, v1, new0, new1, N, ACC)
    d_pairs, q_grad, k_grad = warpgroup_mma_wait(0, [d_pairs, q_grad, k_grad])
    upto = gl.where(si <= ti, 1.0, 0.0).to(gl.bfloat16)
    q_grad *= decay_exp(warpgroup_mma(upto, ww, zero, use_acc=False))
    after = gl.where(si > ti, 1.0, 0.0).to(gl.bfloat16)
    k_grad *= decay_exp(warpgroup_mma(after, ww, zero, use_acc=False))
    z = qq.load(ACC).to(gl.float32) * q_grad * scale
    barrier()
    split_store(new0, new1, kk.load(ACC).to(gl.float32) * k_grad)

    # Level by level, the pairs of queries and keys in different halves of a block; the last level takes all of its blocks.
    d_box, q_box, k_box, d_kept, sums = do0, v0, old0, old1, do1
    d_kept.store(d_pairs.to(gl.bfloat16))
    half = 32
    for _ in range(LEVELS):
        block = 2 * half
        last = block == DIAG
        late = (row[:, None] // half) % 2 == 1
        before = col[None, :] <= row[:, None]
        between = ((row[:, None] // half) == (col[None, :] // half)) & ((late & before) | ((late | before) == 0))
        sums.store(gl.where(between, 1.0, 0.0).to(gl.bfloat16))
        fence_async_shared()
        barrier()
        span = warpgroup_mma(sums, ww, zero, use_acc=False)
        behind = (t // half) % 2 == 1
        inside = ((t // block) == (s // block)) & (((t // half) > (s // half)) | (last & (t >= s)))
        k_factor = decay_exp(gl.where(behind, gl.where(last, -span, -1e5), span))
        q_factor = decay_exp(gl.where(behind, span, gl.where(last, -span, -1e5)))
        k_box.store((kk.load(ACC).to(gl.float32) * k_factor).to(gl.bfloat16))
        q_box.store((qq.load(ACC).to(gl.float32) * (q_factor * scale)).to(gl.bfloat16))
        d_box.store(gl.where(inside, d_kept.load(ACC).to(gl.float32), 0.0).to(gl.bfloat16))
        fence_async_shared()
        barrier()
        d_query = warpgroup_mma(d_box, k_box, zero, use_acc=False, is_async=True)
        d_key = warpgroup_mma(d_box.permute((1, 0)), q_box, zero, use_acc=False, is_async=True)
        d_query, d_key = warpgroup_mma_wait(0, [d_query, d_key])
        q_grad += d_query * q_factor
        k_grad += d_key * k_factor
        z += d_query * q_box.load(ACC).to(gl.float32) - d_key * k_box.load(ACC).to(gl.float32)
        half = half // 2
    rows_store(dq + base + part, q_grad * scale, length, width, stride, ACC)
    rows_store(dk + base + part, k_grad, length, width, stride, ACC)
    barrier()
    split_store(v0, v1, z)
    since, before_box = do0, old0
    since.store(gl.where(row[:, None] <= col[None, :], 1.0, 0.0).to(gl.bfloat16))
    before_box.store(gl.where(row[:, None] > col[None, :], 1.0, 0.0).to(gl.bfloat16))
    fence_async_shared()
    barrier()
    whole = decay_exp(warpgroup_mma(gl.where((si >= 0) & (ti >= 0), 1.0, 0.0).to(gl.bfloat16), ww, zero, use_acc=False))
    w_grad = totals.load(gl.SliceLayout(0, ACC))[None, :] * whole
    w_grad = warpgroup_mma(since, v1, w_grad, is_async=True)
    w_grad = warpgroup_mma(since, v0, w_grad, is_async=True)
    w_grad = warpgroup_mma(before_box, new1, w_grad, is_async=True)
    w_grad = warpgroup_mma(before_box, new0, w_grad, is_async=True)
    w_grad = warpgroup_mma_wait(0, [w_grad])
    rows_store(d_log_w + base + part, w_grad, length, width, stride, ACC)
