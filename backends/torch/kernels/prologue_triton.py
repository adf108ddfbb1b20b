"""Triton kernels of what lies between a mixer's projections and its recurrence: each tensor is read once and written once.

A program takes a few tokens and the heads that share a key: a shared key is read once and its gradient summed on the chip.
Inputs are (tokens, heads, N) whose tokens may be further apart (`step`), as parts of a joined product are. All is computed in
float32.
"""
from radlads.backends.torch.kernels.lang import tl, triton


@triton.jit
def one_minus_exp(x):
    """1 - e^x of x <= 0 without cancellation near 0."""
    series = -x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6)))))
    return tl.where(x > -0.25, series, 1 - tl.exp(x))


@triton.jit
def heads_load(base, row, head, col, step, tokens, N: tl.constexpr):
    """(rows, channels) of one head in float32, zero beyond the tokens and the head size."""
    return tl.load(base + row[:, None] * step + head * N + col[None, :],
                   mask=(row[:, None] < tokens) & (col[None, :] < N), other=0.0).to(tl.float32)


@triton.jit
def heads_store(base, value, row, head, col, step, tokens, N: tl.constexpr):
    tl.store(base + row[:, None] * step + head * N + col[None, :], value.to(base.dtype.element_ty),
             mask=(row[:, None] < tokens) & (col[None, :] < N))


@triton.jit
def keys6_kernel(d, k, log_w, written, tokens, step_k, clamp, H, GROUP: tl.constexpr, N: tl.constexpr, BN: tl.constexpr,
                 ROWS: tl.constexpr, CLAMPED: tl.constexpr, BALANCE: tl.constexpr):
    """6.4 and, with BALANCE, 6.5."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    shared = tl.program_id(1)
    col = tl.arange(0, BN)
    if BALANCE:
        key = heads_load(k, row, shared, col, step_k, tokens, N)
    for i in range(GROUP):
        head = shared * GROUP + i
        gate = -tl.exp(heads_load(d, row, head, col, H * N, tokens, N))
        if CLAMPED:
            gate = tl.maximum(gate, clamp)
        heads_store(log_w, gate, row, head, col, H * N, tokens, N)
        if BALANCE:
            heads_store(written, key * one_minus_exp(gate), row, head, col, H * N, tokens, N)


@triton.jit
def keys6_grad_kernel(d_log_w, d_written, d, k, dd, dk, tokens, step_k, clamp, H, GROUP: tl.constexpr, N: tl.constexpr,
                      BN: tl.constexpr, ROWS: tl.constexpr, CLAMPED: tl.constexpr, BALANCE: tl.constexpr):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    shared = tl.program_id(1)
    col = tl.arange(0, BN)
    if BALANCE:
        key = heads_load(k, row, shared, col, step_k, tokens, N)
        d_key = tl.zeros((ROWS, BN), tl.float32)
    for i in range(GROUP):
        head = shared * GROUP + i
        free = -tl.exp(heads_load(d, row, head, col, H * N, tokens, N))
        gate = free
        if CLAMPED:
            gate = tl.maximum(gate, clamp)
        d_gate = heads_load(d_log_w, row, head, col, H * N, tokens, N)
        if BALANCE:
            d_write = heads_load(d_written, row, head, col, H * N, tokens, N)
            d_key += d_write * one_minus_exp(gate)
            d_gate -= d_write * key * tl.exp(gate)
        d_free = d_gate * free
        if CLAMPED:
            d_free = tl.where(free >= clamp, d_free, 0.0)
        heads_store(dd, d_free, row, head, col, H * N, tokens, N)
    if BALANCE:
        heads_store(dk, d_key, row, shared, col, H // GROUP * N, tokens, N)


@triton.jit
def softplus(x):
    return tl.maximum(x, 0.0) + tl.log(1 + tl.exp(-tl.abs(x)))


@triton.jit
def channels_load(base, head, col, N: tl.constexpr):
    """(1, channels) of one head of a parameter (H, N), in float32."""
    return tl.load(base + head * N + col, mask=col < N, other=0.0).to(tl.float32)[None, :]


@triton.jit
def unit_rows(x):
    """Rows over their norms, at least 1e-12, and the norms."""
    norm = tl.sqrt(tl.sum(x * x, 1))[:, None]
    return x / tl.maximum(norm, 1e-12), norm


@triton.jit
def keys7_kernel(d, k, a, k_k, k_a, log_w, written, removal, rate, tokens, step_k, low, H, GROUP: tl.constexpr,
                 N: tl.constexpr, BN: tl.constexpr, ROWS: tl.constexpr, FORM: tl.constexpr):
    """7.2 to 7.4, H.2, H.3, H.6 and H.7: removal is -kappa, rate beta, low the bound of the log-decay, FORM one of KEY_FORMS."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    shared = tl.program_id(1)
    col = tl.arange(0, BN)
    key = heads_load(k, row, shared, col, step_k, tokens, N)
    for i in range(GROUP):
        head = shared * GROUP + i
        decay = heads_load(d, row, head, col, H * N, tokens, N)
        share = tl.sigmoid(heads_load(a, row, head, col, H * N, tokens, N))
        gate = low * tl.sigmoid(decay)
        if FORM == "decay" or FORM == "log":
            kappa, _ = unit_rows(key)
            beta = kappa * share
            if FORM == "decay":
                factor = one_minus_exp(gate) + share
            else:
                factor = 1.5 + softplus(-decay) + share
        else:
            kappa, _ = unit_rows(key * channels_load(k_k, head, col, N))
            factor = 1 + (share - 1) * channels_load(k_a, head, col, N)
            beta = kappa * share
            if FORM == "scaled_rate":
                beta = kappa * factor
        heads_store(log_w, gate, row, head, col, H * N, tokens, N)
        heads_store(written, key * factor, row, head, col, H * N, tokens, N)
        heads_store(removal, -kappa, row, head, col, H * N, tokens, N)
        heads_store(rate, beta, row, head, col, H * N, tokens, N)


@triton.jit
def keys7_grad_kernel(d_log_w, d_written, d_removal, d_rate, d, k, a, k_k, k_a, dd, dk, da, d_scales, tokens, step_k, low, H,
                      GROUP: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, ROWS: tl.constexpr, FORM: tl.constexpr):
    """d_scales (programs of tokens, 2, H, N) float32: what these tokens add to the gradients of k_k and k_a."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    shared = tl.program_id(1)
    col = tl.arange(0, BN)
    key = heads_load(k, row, shared, col, step_k, tokens, N)
    d_key = tl.zeros((ROWS, BN), tl.float32)
    for i in range(GROUP):
        head = shared * GROUP + i
        decay = heads_load(d, row, head, col, H * N, tokens, N)
        share = tl.sigmoid(heads_load(a, row, head, col, H * N, tokens, N))
        d_write = heads_load(d_written, row, head, col, H * N, tokens, N)
        d_kappa = -heads_load(d_removal, row, head, col, H * N, tokens, N)
        d_beta = heads_load(d_rate, row, head, col, H * N, tokens, N)
        d_gate = heads_load(d_log_w, row, head, col, H * N, tokens, N)
        open_ = tl.sigmoid(decay)
        d_factor = d_write * key
        if FORM == "decay" or FORM == "log":
            kappa, norm = unit_rows(key)
            d_kappa += d_beta * share
            d_share = d_beta * kappa + d_factor
            if FORM == "decay":
                factor = one_minus_exp(low * open_) + share
                d_decay = (d_gate - d_factor * tl.exp(low * open_)) * low * open_ * (1 - open_)
            else:
                factor = 1.5 + softplus(-decay) + share
                d_decay = (d_gate * low * open_ - d_factor) * (1 - open_)
        else:
            k_scale = channels_load(k_k, head, col, N)
            a_scale = channels_load(k_a, head, col, N)
            kappa, norm = unit_rows(key * k_scale)
            factor = 1 + (share - 1) * a_scale
            if FORM == "scaled_rate":
                d_kappa += d_beta * factor
                d_factor += d_beta * kappa
                d_share = d_factor * a_scale
            else:
                d_kappa += d_beta * share
                d_share = d_beta * kappa + d_factor * a_scale
            d_decay = d_gate * low * open_ * (1 - open_)
        # A norm that was raised to its least value has no gradient.
        along = tl.where(norm > 1e-12, tl.sum(kappa * d_kappa, 1)[:, None], 0.0)
        d_unscaled = (d_kappa - kappa * along) / tl.maximum(norm, 1e-12)
        d_key += d_write * factor
        if FORM == "decay" or FORM == "log":
            d_key += d_unscaled
        else:
            d_key += d_unscaled * k_scale
            here = d_scales + (tl.program_id(0).to(tl.int64) * 2 * H + head) * N + col
            tl.store(here, tl.sum(d_unscaled * key, 0), mask=col < N)
            tl.store(here + H * N, tl.sum(d_factor * (share - 1), 0), mask=col < N)
        heads_store(dd, d_decay, row, head, col, H * N, tokens, N)
        heads_store(da, d_share * share * (1 - share), row, head, col, H * N, tokens, N)
    heads_store(dk, d_key, row, shared, col, H // GROUP * N, tokens, N)


@triton.jit
def blend_kernel(x, y, share, out, tokens, step_x, step_y, step_share, H, GROUP: tl.constexpr, N: tl.constexpr,
                 BN: tl.constexpr, ROWS: tl.constexpr, HAS_X: tl.constexpr):
    """out = x + (y - x) sigmoid(share), every GROUP heads with one of x and y; without x it is 0."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    shared = tl.program_id(1)
    col = tl.arange(0, BN)
    toward = heads_load(y, row, shared, col, step_y, tokens, N)
    if HAS_X:
        start = heads_load(x, row, shared, col, step_x, tokens, N)
        toward -= start
    for i in range(GROUP):
        head = shared * GROUP + i
        value = toward * tl.sigmoid(heads_load(share, row, head, col, step_share, tokens, N))
        if HAS_X:
            value += start
        heads_store(out, value, row, head, col, H * N, tokens, N)


@triton.jit
def blend_grad_kernel(d_out, x, y, share, dx, dy, d_share, tokens, step_x, step_y, step_share, H, GROUP: tl.constexpr,
                      N: tl.constexpr, BN: tl.constexpr, ROWS: tl.constexpr, HAS_X: tl.constexpr):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    shared = tl.program_id(1)
    col = tl.arange(0, BN)
    toward = heads_load(y, row, shared, col, step_y, tokens, N)
    if HAS_X:
        toward -= heads_load(x, row, shared, col, step_x, tokens, N)
    whole = tl.zeros((ROWS, BN), tl.float32)
    taken = tl.zeros((ROWS, BN), tl.float32)
    for i in range(GROUP):
        head = shared * GROUP + i
        grad = heads_load(d_out, row, head, col, H * N, tokens, N)
        part = tl.sigmoid(heads_load(share, row, head, col, step_share, tokens, N))
        whole += grad
        taken += grad * part
        heads_store(d_share, grad * toward * part * (1 - part), row, head, col, H * N, tokens, N)
    heads_store(dy, taken, row, shared, col, H // GROUP * N, tokens, N)
    if HAS_X:
        heads_store(dx, whole - taken, row, shared, col, H // GROUP * N, tokens, N)
