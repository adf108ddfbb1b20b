"""One token of a RAD mixer on a GPU in one kernel: decay, keys and values from their projections, the recurrence, norm, gate."""

import mlx.core as mx

from radlads.backends.mlx.kernels.gpu import LANES, ROWS, GpuKernel, constant
from radlads.spec import MixerOptions

STEP_HEADER = """
#define SIGMOID(x) (1.0f / (1.0f + EXP(-(x))))
#define SOFTPLUS(x) ((x > 0.0f ? x : 0.0f) + LOG(1.0f + EXP(x > 0.0f ? -(x) : x)))
// 1 - exp(x) for x <= 0 without cancellation: its series, to float32's resolution, where x is small
#define SERIES(x) (1.0f + x / 2.0f * (1.0f + x / 3.0f * (1.0f + x / 4.0f * (1.0f + x / 5.0f * (1.0f + x / 6.0f)))))
#define ONE_MINUS_EXP(x) (x < -0.25f ? 1.0f - EXP(x) : -x * SERIES(x))
"""
# One threadgroup: ROWS value rows of a head, or all of them in turn where the norm needs them. Channel `me` of the token's
# vectors is made by thread `me`; the removal key is normalised by the lanes of every row for themselves.
STEP = """
    constexpr int QUADS = N / 4 / LANES;
    constexpr int PASSES = NORM ? N / ROWS : 1;
    const int heads = r_shape[2], key_heads = k_shape[2], value_heads = v_shape[2];
    const int part = me % LANES, first_row = group.x * ROWS + me / LANES;
    const size_t head = size_t(group.z) * heads + group.y;
    const size_t key_head = size_t(group.z) * key_heads + group.y / (heads / key_heads);
    const size_t value_head = size_t(group.z) * value_heads + group.y / (heads / value_heads);
    SHARED float4 shared_r[N / 4];
    SHARED float4 shared_w[N / 4];
    SHARED float4 shared_k[N / 4];
#if DELTA
    SHARED float4 shared_a[N / 4];
    SHARED float4 shared_b[N / 4];
#endif
#if BONUS
    SHARED float4 shared_again[N / 4];
#endif
    SHARED float shared_p[N];
    const bool counts = !MASKED || float(real[group.z]) != 0.0f;  // padding leaves the state as it is

    float4 S[QUADS];
    EACH(q, QUADS) S[q] = get4(state + (head * N + first_row) * N + 4 * (q * LANES + part));
    if (me < N) {
        const size_t x = head * N + me;
        float key = float(k[key_head * N + me]);
#if DELTA
        const float log_of_w = limits[1] * SIGMOID(float(d[x]));
        const float of_rate = SIGMOID(float(rate[x]));
        float kappa = key, of_b = of_rate;
#if HXA
        key *= of_rate + (TRUE_DECAY ? ONE_MINUS_EXP(log_of_w) : 1.5f + SOFTPLUS(-float(d[x])));
#else
        if (VARIANT == 2) {
            key *= of_rate + ONE_MINUS_EXP(log_of_w);
        } else {
            const float factor = 1.0f + (of_rate - 1.0f) * float(k_a[group.y * N + me]);
            kappa *= float(k_k[group.y * N + me]);
            key *= factor;
            if (VARIANT == 0) of_b = factor;
        }
#endif
        ((SHARED_FLOATS)shared_a)[me] = counts ? kappa : 0.0f;
        ((SHARED_FLOATS)shared_b)[me] = kappa * of_b;
#else
        float log_of_w = -EXP(float(d[x]));
        if (log_of_w < limits[1]) log_of_w = limits[1];
        if (BALANCE) key *= ONE_MINUS_EXP(log_of_w);
#endif
        ((SHARED_FLOATS)shared_r)[me] = float(r[x]);
        ((SHARED_FLOATS)shared_w)[me] = counts ? EXP(log_of_w) : 1.0f;
        ((SHARED_FLOATS)shared_k)[me] = counts ? key : 0.0f;
#if BONUS
        ((SHARED_FLOATS)shared_again)[me] = float(r_k[group.y * N + me]) * key;
#endif
    }
    BARRIER();
#if DELTA
    float square = 0.0f;
    EACH(q, QUADS) square = dot4(shared_a[q * LANES + part], shared_a[q * LANES + part], square);
    square = sum_lanes<LANES>(square);
    const float inverse = 1.0f / (square > 1e-24f ? square : 1e-24f);
#endif
#if BONUS
    float bonus = 0.0f;
    EACH(q, QUADS) bonus = dot4(shared_r[q * LANES + part], shared_again[q * LANES + part], bonus);
    bonus = sum_lanes<LANES>(bonus);
#endif
    for (int pass = 0; pass < PASSES; ++pass) {
        const int row = first_row + pass * ROWS;
        const size_t x = head * N + row;
        float value = float(v[value_head * N + row]);
#if DELTA
#if !HXA
        if (RESIDUAL) value += (float(carry[x]) - value) * SIGMOID(float(mix[x]));
#endif
        float removed = 0.0f;
        EACH(q, QUADS) removed = dot4(S[q], shared_a[q * LANES + part], removed);
        removed = -inverse * sum_lanes<LANES>(removed);
#endif
        float sum = 0.0f;
        EACH(q, QUADS) {
            const int at = q * LANES + part;
            S[q] = plus4(times4(S[q], shared_w[at]), value, shared_k[at]);
#if DELTA
            S[q] = plus4(S[q], removed, shared_b[at]);
#endif
            sum = dot4(S[q], shared_r[at], sum);
            put4(last + (head * N + row) * N + 4 * at, S[q]);
            if (pass + 1 < PASSES) S[q] = get4(state + (head * N + row + ROWS) * N + 4 * at);
        }
        sum = limits[0] * sum_lanes<LANES>(sum);
#if BONUS
        sum += bonus * value;
#endif
        if (part == 0 && NORM) shared_p[row] = sum;
        if (part == 0 && !NORM) put(p + x, sum * (GATE == 0 ? 1.0f : GATE == 1 ? float(gate[x]) : SIGMOID(float(gate[x]))));
    }
    if (NORM) {
        BARRIER();
        if (me < N) {
            float mean = 0.0f, variance = 0.0f;
            for (int i = 0; i < N; ++i) mean += shared_p[i] / N;
            for (int i = 0; i < N; ++i) variance += (shared_p[i] - mean) * (shared_p[i] - mean) / N;
            const size_t x = head * N + me;
            const float normed = (shared_p[me] - mean) * RSQRT(variance + N * 1e-5f);
            const float out = normed * float(norm_weight[group.y * N + me]) + float(norm_bias[group.y * N + me]);
            put(p + x, out * (GATE == 0 ? 1.0f : GATE == 1 ? float(gate[x]) : SIGMOID(float(gate[x]))));
        }
    }
"""
def defined(**flags: int) -> str:
    """A #define line for each flag."""
    return "".join(f"#define {name} {value}\n" for name, value in flags.items())


GATES = {"none": 0, "lowrank": 1, "full": 2}
VARIANTS = {"A": 0, "B": 1, "C": 2}
STEP_INPUTS = ("r", "k", "v", "d", "gate", "norm_weight", "norm_bias", "real", "state", "limits")
STEP_OUTPUTS = ("p", "last")
STEP6 = GpuKernel("rwkv6_step", STEP_INPUTS, STEP_OUTPUTS, STEP, defined(DELTA=0, HXA=0, BONUS=0) + STEP_HEADER)
STEP7 = GpuKernel(
    "rwkv7_step",
    (*STEP_INPUTS, "rate", "k_k", "k_a", "carry", "mix"),
    STEP_OUTPUTS,
    STEP,
    defined(DELTA=1, HXA=0, BONUS=0) + STEP_HEADER,
)
HXA_STEP = GpuKernel(
    "hxa_step", (*STEP_INPUTS, "rate"), STEP_OUTPUTS, STEP, defined(DELTA=1, HXA=1, BONUS=0) + STEP_HEADER
)
HXA_BONUS_STEP = GpuKernel(
    "hxa_bonus_step", (*STEP_INPUTS, "rate", "r_k"), STEP_OUTPUTS, STEP, defined(DELTA=1, HXA=1, BONUS=1) + STEP_HEADER
)
NO_LIMIT = -1e30


def fused_step6(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    d: mx.array,
    gate: mx.array | None,
    norm: tuple[mx.array, mx.array] | None,
    mask: mx.array | None,
    state: mx.array,
    options: MixerOptions,
) -> tuple[mx.array, mx.array]:
    """6.4-6.8 of one token: the gated p (B, 1, C) in q's type and the next state.

    q (B, 1, H, N), k and v (B, 1, Hkv, N), d and `gate` (the full gate before its sigmoid) (B, 1, C), mask (B, 1).
    """
    N = q.shape[-1]
    limits = constant(N**-0.5, NO_LIMIT if options.clamp is None else options.clamp)
    arrays = [q, k, v, d, *padded(q, gate, norm, mask), state, limits]
    return run_step(STEP6, arrays, norm, mask, GATE=GATES[options.gate], BALANCE=options.balance)


def fused_step7(
    r: mx.array,
    k: mx.array,
    v: mx.array,
    d: mx.array,
    rate: mx.array,
    keys: tuple[mx.array, mx.array],
    residual: tuple[mx.array, mx.array] | None,
    gate: mx.array | None,
    norm: tuple[mx.array, mx.array] | None,
    mask: mx.array | None,
    state: mx.array,
    options: MixerOptions,
    min_log_w: float,
) -> tuple[mx.array, mx.array]:
    """7.2-7.9 of one token: the gated p (B, 1, C) in r's type and the next state.

    r (B, 1, H, N), k and v (B, 1, Hkv, N); d, `rate` (before its sigmoid) and `gate` (B, 1, C); `keys` are k_k and k_a;
    `residual` holds 7.5's first values (B, 1, H, N) and their mix before its sigmoid, None in the first recurrent layer.
    """
    N = r.shape[-1]
    limits = constant(1.0 if options.groupnorm else N**-0.5, min_log_w)
    arrays = [r, k, v, d, *padded(r, gate, norm, mask), state, limits, rate, *keys, *(residual or (r, r))]
    variant = VARIANTS[options.variant]
    return run_step(STEP7, arrays, norm, mask, GATE=GATES[options.gate], VARIANT=variant, RESIDUAL=residual is not None)


def fused_step_hxa(
    r: mx.array,
    k: mx.array,
    v: mx.array,
    d: mx.array,
    rate: mx.array,
    gate: mx.array,
    r_k: mx.array | None,
    mask: mx.array | None,
    state: mx.array,
    true_decay: bool,
    min_log_w: float,
) -> tuple[mx.array, mx.array]:
    """H.2, H.3 and H.6-H.10 of one token: the gated p (B, 1, C) in r's type and the next state.

    r (B, 1, H, N), k (B, 1, Hkv, N), v of H or Hkv heads, both mixed (H.4, H.5); d, `rate` (before its sigmoid) and `gate`
    (B, 1, C); r_k (H, N) with the bonus.
    """
    limits = constant(r.shape[-1] ** -0.5, min_log_w)
    arrays = [r, k, v, d, *padded(r, gate, None, mask), state, limits, rate, *([] if r_k is None else [r_k])]
    kernel = HXA_STEP if r_k is None else HXA_BONUS_STEP
    return run_step(kernel, arrays, None, mask, GATE=GATES["lowrank"], TRUE_DECAY=true_decay)


def padded(
    unread: mx.array, gate: mx.array | None, norm: tuple[mx.array, mx.array] | None, mask: mx.array | None
) -> list[mx.array]:
    """Gate, the norm's weight and bias, and mask, with an array that is not read in place of what is missing."""
    return [x if x is not None else unread for x in (gate, *(norm or (None, None)), mask)]


def run_step(
    kernel: GpuKernel,
    arrays: list[mx.array],
    norm: tuple[mx.array, mx.array] | None,
    mask: mx.array | None,
    **variant: int | bool,
) -> tuple[mx.array, mx.array]:
    """Launch: one threadgroup per ROWS rows, or per head where a norm joins its rows."""
    r, state = arrays[0], arrays[STEP_INPUTS.index("state")]
    B, _, H, N = r.shape
    out, last = kernel(
        arrays,
        [(B, 1, H * N), state.shape],
        [r.dtype, mx.float32],
        groups=(N // ROWS if norm is None else 1, H, B),
        N=N,
        LANES=LANES[N],
        NORM=norm is not None,
        MASKED=mask is not None,
        **variant,
    )
    return out, last
