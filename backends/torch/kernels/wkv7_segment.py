"""The first walk over the segments of a long sequence of the generalised delta rule, in Gluon, for Hopper.

The state after a segment is what the segment adds plus the state before it times the segment's matrix: the recurrence on the
identity, walked beside that on zero. The solution matrix of a chunk serves both. Equations as in wkv7_centred.
"""
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, warpgroup_mma, warpgroup_mma_wait

from radlads.backends.torch.kernels.wkv7_fused import chunk_inverse, decay_halves, decay_signs, sync_boxes, walk_place
from radlads.backends.torch.kernels.wkv7_hopper import barrier, box_copy, decay_exp, in_place, split_store


@gluon.jit(do_not_specialize=["T", "NT", "walk_chunks"])
def wkv7_segment_kernel(log_w, k, v, a, b, states, passes, T, NT, walk_chunks, H, HV,
                        N: gl.constexpr, BN: gl.constexpr, CLAMP: gl.constexpr):
    """states: what a segment adds, at the next one's place; passes: its matrix (key before, key after), at its own."""
    WARPS: gl.constexpr = BN // 16
    FLAT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, WARPS // 4], [16, 64, 16])
    PAIR: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, WARPS // 4], [16, 256 // WARPS, 16])
    BOX: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    SUMS: gl.constexpr = gl.BlockedLayout([16, 2], [4, 8], [1, WARPS], [0, 1])
    h = gl.program_id(0)
    walk = gl.program_id(1)
    begin, length, _ = walk_place(None, None, walk, T, NT, walk_chunks, False)
    walks = (NT + walk_chunks - 1) // walk_chunks
    stride = H * N
    stride_v = HV * N
    base = begin * stride + h * N
    base_v = begin * stride_v + (h // (H // HV)) * N
    corner = (walk * H + h).to(gl.int64) * (N * N)
    row = gl.arange(0, 64, gl.SliceLayout(1, FLAT))
    col = gl.arange(0, BN, gl.SliceLayout(0, FLAT))
    key = gl.arange(0, BN, gl.SliceLayout(1, ACC))[:, None]
    val = gl.arange(0, BN, gl.SliceLayout(0, ACC))[None, :]
    inside = (key < N) & (val < N)
    t = gl.arange(0, 64, gl.SliceLayout(1, PAIR))[:, None]
    s = gl.arange(0, 64, gl.SliceLayout(0, PAIR))[None, :]

    ws = gl.allocate_shared_memory(gl.bfloat16, [1, 64, BN], BOX)
    as_ = gl.allocate_shared_memory(gl.bfloat16, [1, 64, BN], BOX)
    vs = gl.allocate_shared_memory(gl.bfloat16, [1, 64, BN], BOX)
    ks = gl.allocate_shared_memory(gl.bfloat16, [1, 64, BN], BOX)
    bs = gl.allocate_shared_memory(gl.bfloat16, [1, 64, BN], BOX)
    # Rounded states; once they have been read, the right-hand sides and u.
    add_boxes = gl.allocate_shared_memory(gl.bfloat16, [2, 64, BN], BOX)
    pass_boxes = gl.allocate_shared_memory(gl.bfloat16, [2, 64, BN], BOX)
    sign_boxes = gl.allocate_shared_memory(gl.bfloat16, [1, 64, 64], BOX)
    ak_boxes = gl.allocate_shared_memory(gl.bfloat16, [1, 64, 64], BOX)
    solve_boxes = gl.allocate_shared_memory(gl.bfloat16, [1, 64, 64], BOX)
    inverse_boxes = gl.allocate_shared_memory(gl.float16, [1, 64, 64], BOX)
    other_boxes = gl.allocate_shared_memory(gl.float16, [1, 64, 64], BOX)
    early = gl.allocate_shared_memory(gl.float32, [BN], LINE)
    late = gl.allocate_shared_memory(gl.float32, [BN], LINE)

    added = gl.zeros([BN, BN], gl.float32, ACC)
    passed = gl.where((key == val) & inside, 1.0, 0.0)
    sign_boxes.index(0).store(decay_signs(t, s))
    chunks = ((length + 63) // 64).to(gl.int32)
    box_copy(ws.index(0), log_w + base, row, col, length, N, stride)
    box_copy(as_.index(0), a + base, row, col, length, N, stride)
    box_copy(ks.index(0), k + base, row, col, length, N, stride)
    box_copy(bs.index(0), b + base, row, col, length, N, stride)
    box_copy(vs.index(0), v + base_v, row, col, length, N, stride_v)
    async_copy.commit_group()
    for i in range(0, chunks):
        # Where a box lies is computed in each turn: kept from turn to turn the places would take half of the registers.
        nil = in_place(i) - i
        ww, aa, kk, bb, vv = ws.index(nil), as_.index(nil), ks.index(nil), bs.index(nil), vs.index(nil)
        signs, ak_box, solve_box = sign_boxes.index(nil), ak_boxes.index(nil), solve_boxes.index(nil)
        # The pair matrix of k is used up before the inversion.
        step16 = ak_boxes._reinterpret(gl.float16, [1, 64, 64], BOX).index(nil)
        lower16 = solve_boxes._reinterpret(gl.float16, [1, 64, 64], BOX).index(nil)
        if BN == 128:
            add_box = add_boxes._reinterpret(gl.bfloat16, [1, 128, 128], BOX).index(nil)
            pass_box = pass_boxes._reinterpret(gl.bfloat16, [1, 128, 128], BOX).index(nil)
        else:
            add_box = add_boxes.index(nil)
            pass_box = pass_boxes.index(nil)
        t = in_place(gl.arange(0, 64, gl.SliceLayout(1, PAIR)))[:, None]
        s = gl.arange(0, 64, gl.SliceLayout(0, PAIR))[None, :]
        zero = gl.zeros([64, BN], gl.float32, ACC)
        none = gl.zeros([64, 64], gl.float32, PAIR)
        async_copy.wait_group(0)
        barrier()
        decay_halves(ww, early, late, CLAMP, SUMS)
        sync_boxes()
        half = early.load(gl.SliceLayout(1, ACC))[:, None]
        added = added * half
        passed = passed * half
        add_box.store(added.to(gl.bfloat16))
        pass_box.store(passed.to(gl.bfloat16))
        span = warpgroup_mma(signs, ww, zero, use_acc=False)
        a_raw, k_raw, b_raw = aa.load(ACC), kk.load(ACC), bb.load(ACC)
        aa.store((a_raw.to(gl.float32) * decay_exp(span - ww.load(ACC).to(gl.float32))).to(gl.bfloat16))
        back = decay_exp(-span)
        kk.store((k_raw.to(gl.float32) * back).to(gl.bfloat16))
        bb.store((b_raw.to(gl.float32) * back).to(gl.bfloat16))
        sync_boxes()
        ab = warpgroup_mma(aa, bb.permute((1, 0)), none, use_acc=False, is_async=True)
        ak = warpgroup_mma(aa, kk.permute((1, 0)), none, use_acc=False, is_async=True)
        rhs = warpgroup_mma(aa, add_box, zero, use_acc=False, is_async=True)
        rest = warpgroup_mma(aa, pass_box, zero, use_acc=False, is_async=True)
        ab, ak, rhs, rest = warpgroup_mma_wait(0, [ab, ak, rhs, rest])
        ak_box.store(gl.where(t > s, ak, 0.0).to(gl.bfloat16))
        sync_boxes()
        length -= 64
        base += 64 * stride
        base_v += 64 * stride_v
        box_copy(ww, log_w + base, row, col, length, N, stride)
        box_copy(aa, a + base, row, col, length, N, stride)
        async_copy.commit_group()
        # In two parts: the solution may be small beside what it is made from.
        split_store(pass_boxes.index(nil), pass_boxes.index(nil + 1), rest)
        rhs = warpgroup_mma(ak_box, vv, rhs, is_async=True)
        added = warpgroup_mma(kk.permute((1, 0)), vv, added, is_async=True)
        rhs, added = warpgroup_mma_wait(0, [rhs, added])
        split_store(add_boxes.index(nil), add_boxes.index(nil + 1), rhs)
        barrier()
        box_copy(kk, k + base, row, col, length, N, stride)
        box_copy(vv, v + base_v, row, col, length, N, stride_v)
        async_copy.commit_group()
        inverse = chunk_inverse(gl.where(t > s, ab, 0.0), lower16, inverse_boxes.index(nil), other_boxes.index(nil), step16, PAIR)
        solve_box.store(inverse.to(gl.bfloat16))
        sync_boxes()
        u = warpgroup_mma(solve_box, add_boxes.index(nil + 1), zero, use_acc=False, is_async=True)
        u = warpgroup_mma(solve_box, add_boxes.index(nil), u, is_async=True)
        x = warpgroup_mma(solve_box, pass_boxes.index(nil + 1), zero, use_acc=False, is_async=True)
        x = warpgroup_mma(solve_box, pass_boxes.index(nil), x, is_async=True)
        u, x = warpgroup_mma_wait(0, [u, x])
        barrier()
        add_boxes.index(nil).store(u.to(gl.bfloat16))
        pass_boxes.index(nil).store(x.to(gl.bfloat16))
        sync_boxes()
        added = warpgroup_mma(bb.permute((1, 0)), add_boxes.index(nil), added, is_async=True)
        passed = warpgroup_mma(bb.permute((1, 0)), pass_boxes.index(nil), passed, is_async=True)
        half = late.load(gl.SliceLayout(1, ACC))[:, None]
        added, passed = warpgroup_mma_wait(0, [added, passed])
        added = added * half
        passed = passed * half
        barrier()
        box_copy(bb, b + base, row, col, length, N, stride)
        async_copy.commit_group()
    async_copy.wait_group(0)
    gl.store(states + (corner + H * N * N) + val * N + key, added, mask=inside & (walk % walks < walks - 1))
    gl.store(passes + corner + val * N + key, passed, mask=inside)
