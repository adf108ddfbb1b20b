"""Both recurrences on a GPU, forwards and backwards, with a state that stays in registers from the first token to the last.

S_t = S_{t-1} diag(w_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T, p_t = scale S_t r_t; without a and b it is that of RAD-RWKV6.
Nothing divides by the decay and no two threads add to one number: gradients are exact for any decay, and repeatable.
"""

from functools import lru_cache
from typing import Any

import mlx.core as mx

from radlads.backends.mlx.kernels.gpu import LANES, ROWS, GpuKernel, constant

# The gradient restarts from states kept this many tokens apart.
CHECKPOINT = 16
SHARED_BYTES = 32768  # what Metal allows a threadgroup

# One threadgroup: ROWS value rows of a head. Blocks of BLOCK tokens are staged for all rows, and no thread waits for another
# inside a block but for the sums over the lanes of its row.
BLOCKS = """
    constexpr int QUADS = N / 4 / LANES;  // float4 per lane
    constexpr int THREADS = ROWS * LANES;
    constexpr int LOADS = (BLOCK * N + THREADS - 1) / THREADS;
    constexpr int VALUES = (BLOCK * ROWS + THREADS - 1) / THREADS;
    const int tokens = r_shape[1], heads = r_shape[2];
    const int part = me % LANES, first_row = group.x * ROWS, row = first_row + me / LANES;
    const size_t head = size_t(group.z) * heads + group.y, stride = size_t(heads) * N;
    const size_t start = size_t(group.z) * tokens * stride + group.y * N;
    SHARED float4 shared_r[BLOCK * N / 4];
    SHARED float4 shared_w[BLOCK * N / 4];
    SHARED float4 shared_k[BLOCK * N / 4];
#if DELTA
    SHARED float4 shared_a[BLOCK * N / 4];
    SHARED float4 shared_b[BLOCK * N / 4];
#endif
"""

# The next block is on its way while one is used.
FORWARD = BLOCKS + """
    SHARED float shared_v[BLOCK * ROWS];

    float4 S[QUADS];
    EACH(q, QUADS) S[q] = get4(state + (head * N + row) * N + 4 * (q * LANES + part));
    float ahead[LOADS][2 * DELTA + 3], ahead_v[VALUES];
    for (int from = -BLOCK; from < tokens; from += BLOCK) {
        if (from >= 0) {
            BARRIER();
            EACH(i, LOADS) {
                const int at = me + i * THREADS;
                if (at < BLOCK * N) {
                    ((SHARED_FLOATS)shared_r)[at] = ahead[i][0];
                    ((SHARED_FLOATS)shared_w)[at] = EXP(ahead[i][1]);
                    ((SHARED_FLOATS)shared_k)[at] = ahead[i][2];
#if DELTA
                    ((SHARED_FLOATS)shared_a)[at] = ahead[i][3];
                    ((SHARED_FLOATS)shared_b)[at] = ahead[i][4];
#endif
                }
            }
            EACH(i, VALUES) {
                if (me + i * THREADS < BLOCK * ROWS) shared_v[me + i * THREADS] = ahead_v[i];
            }
            BARRIER();
        }
        const int next = from + BLOCK;
        EACH(i, LOADS) {
            const int at = me + i * THREADS, token = next + at / N;
            if (at < BLOCK * N && token < tokens) {
                const size_t x = start + token * stride + at % N;
                ahead[i][0] = float(r[x]);
                ahead[i][1] = float(log_w[x]);
                ahead[i][2] = float(k[x]);
#if DELTA
                ahead[i][3] = float(a[x]);
                ahead[i][4] = float(b[x]);
#endif
            }
        }
        EACH(i, VALUES) {
            const int at = me + i * THREADS, token = next + at / ROWS;
            if (at < BLOCK * ROWS && token < tokens) ahead_v[i] = float(v[start + token * stride + first_row + at % ROWS]);
        }
        if (from < 0) continue;
#if SAVE
        if (from % CHECKPOINT == 0) {
            const size_t kept = head * ((tokens + CHECKPOINT - 1) / CHECKPOINT) + from / CHECKPOINT;
            EACH(q, QUADS) put4(checkpoints + (kept * N + row) * N + 4 * (q * LANES + part), S[q]);
        }
#endif
        const int length = tokens - from < BLOCK ? tokens - from : BLOCK;
        for (int t = 0; t < length; ++t) {
            const int at = t * (N / 4) + part;
            const float value = shared_v[t * ROWS + me / LANES];
#if DELTA
            float removed = 0.0f;
            EACH(q, QUADS) removed = dot4(S[q], shared_a[at + q * LANES], removed);
            removed = sum_lanes<LANES>(removed);
#endif
            float sum = 0.0f;
            EACH(q, QUADS) {
                S[q] = plus4(times4(S[q], shared_w[at + q * LANES]), value, shared_k[at + q * LANES]);
#if DELTA
                S[q] = plus4(S[q], removed, shared_b[at + q * LANES]);
#endif
                sum = dot4(S[q], shared_r[at + q * LANES], sum);
            }
            sum = sum_lanes<LANES>(sum);
            if (part == 0) {
                const size_t x = start + (from + t) * stride + row;
                put(p + x, scale[0] * sum);
#if SAVE && DELTA
                put(u + x, removed);
#endif
            }
        }
    }
    EACH(q, QUADS) put4(last + (head * N + row) * N + 4 * (q * LANES + part), S[q]);
"""

# The gradient G of the state, by rows and from the last token to the first: with dp and the inputs it needs no state.
# Its products with k and b are the gradients of v and of u = S a.
BACKWARD_ROWS = BLOCKS + """
    SHARED float shared_dp[BLOCK * ROWS];

    float4 G[QUADS];
    EACH(q, QUADS) G[q] = get4(dlast + (head * N + row) * N + 4 * (q * LANES + part));
    for (int from = (tokens - 1) / BLOCK * BLOCK; from >= 0; from -= BLOCK) {
        BARRIER();
        EACH(i, LOADS) {
            const int at = me + i * THREADS, token = from + at / N;
            if (at < BLOCK * N && token < tokens) {
                const size_t x = start + token * stride + at % N;
                ((SHARED_FLOATS)shared_r)[at] = float(r[x]);
                ((SHARED_FLOATS)shared_w)[at] = EXP(float(log_w[x]));
                ((SHARED_FLOATS)shared_k)[at] = float(k[x]);
#if DELTA
                ((SHARED_FLOATS)shared_a)[at] = float(a[x]);
                ((SHARED_FLOATS)shared_b)[at] = float(b[x]);
#endif
            }
        }
        EACH(i, VALUES) {
            const int at = me + i * THREADS, token = from + at / ROWS;
            if (at < BLOCK * ROWS && token < tokens) {
                shared_dp[at] = scale[0] * float(dp[start + token * stride + first_row + at % ROWS]);
            }
        }
        BARRIER();
        for (int t = (tokens - from < BLOCK ? tokens - from : BLOCK) - 1; t >= 0; --t) {
            const int at = t * (N / 4) + part;
            const float slope = shared_dp[t * ROWS + me / LANES];
            float of_v = 0.0f, of_u = 0.0f;
            EACH(q, QUADS) {
                G[q] = plus4(G[q], slope, shared_r[at + q * LANES]);
                of_v = dot4(G[q], shared_k[at + q * LANES], of_v);
#if DELTA
                of_u = dot4(G[q], shared_b[at + q * LANES], of_u);
#endif
            }
            of_v = sum_lanes<LANES>(of_v);
#if DELTA
            of_u = sum_lanes<LANES>(of_u);
#endif
            EACH(q, QUADS) {
                G[q] = times4(G[q], shared_w[at + q * LANES]);
#if DELTA
                G[q] = plus4(G[q], of_u, shared_a[at + q * LANES]);
#endif
            }
            if (part == 0) {
                const size_t x = start + (from + t) * stride + row;
                put(dv + x, of_v);
#if DELTA
                put(du + x, of_u);
#endif
            }
        }
    }
    EACH(q, QUADS) put4(dstate + (head * N + row) * N + 4 * (q * LANES + part), G[q]);
"""

# The same by columns: with u and du known, each column of S and of G goes its own way, and the gradients of r, log_w, k, a
# and b are sums over a column. Four tokens' states at a time are made again from the last checkpoint.
BACKWARD_COLUMNS = """
    constexpr int QUADS = N / 4 / LANES;
    constexpr int THREADS = ROWS * LANES;
    constexpr int STEPS = 4;
    const int tokens = r_shape[1], heads = r_shape[2];
    const int part = me % LANES, first_column = group.x * ROWS, mine = me / LANES, column = first_column + mine;
    const size_t head = size_t(group.z) * heads + group.y, stride = size_t(heads) * N;
    const size_t start = size_t(group.z) * tokens * stride + group.y * N;
    SHARED float4 shared_v[CHECKPOINT * N / 4];
    SHARED float4 shared_dp[STEPS * N / 4];
    SHARED float shared_r[CHECKPOINT * ROWS];
    SHARED float shared_w[CHECKPOINT * ROWS];
    SHARED float shared_k[CHECKPOINT * ROWS];
#if DELTA
    SHARED float4 shared_u[CHECKPOINT * N / 4];
    SHARED float4 shared_du[STEPS * N / 4];
    SHARED float shared_a[CHECKPOINT * ROWS];
    SHARED float shared_b[CHECKPOINT * ROWS];
#endif

    float4 G[QUADS];
    EACH(q, QUADS) G[q] = get_column4(dlast + (head * N + 4 * (q * LANES + part)) * N + column, N);
    for (int from = (tokens - 1) / CHECKPOINT * CHECKPOINT; from >= 0; from -= CHECKPOINT) {
        BARRIER();
        for (int at = me; at < CHECKPOINT * N; at += THREADS) {  // beyond the last token: nothing written, nothing decayed
            const int token = from + at / N;
            const size_t x = start + token * stride + at % N;
            ((SHARED_FLOATS)shared_v)[at] = token < tokens ? float(v[x]) : 0.0f;
#if DELTA
            ((SHARED_FLOATS)shared_u)[at] = token < tokens ? float(u[x]) : 0.0f;
#endif
        }
        for (int at = me; at < CHECKPOINT * ROWS; at += THREADS) {
            const int token = from + at / ROWS;
            const size_t x = start + token * stride + first_column + at % ROWS;
            shared_r[at] = token < tokens ? float(r[x]) : 0.0f;
            shared_w[at] = token < tokens ? EXP(float(log_w[x])) : 1.0f;
            shared_k[at] = token < tokens ? float(k[x]) : 0.0f;
#if DELTA
            shared_a[at] = token < tokens ? float(a[x]) : 0.0f;
            shared_b[at] = token < tokens ? float(b[x]) : 0.0f;
#endif
        }
        const size_t kept = head * ((tokens + CHECKPOINT - 1) / CHECKPOINT) + from / CHECKPOINT;
        for (int first = CHECKPOINT - STEPS; first >= 0; first -= STEPS) {
            if (from + first >= tokens) continue;
            BARRIER();
            for (int at = me; at < STEPS * N; at += THREADS) {
                const int token = from + first + at / N;
                const size_t x = start + token * stride + at % N;
                ((SHARED_FLOATS)shared_dp)[at] = token < tokens ? scale[0] * float(dp[x]) : 0.0f;
#if DELTA
                ((SHARED_FLOATS)shared_du)[at] = token < tokens ? float(du[x]) : 0.0f;
#endif
            }
            BARRIER();
            float4 S[STEPS + 1][QUADS];
            EACH(q, QUADS) {
                S[0][q] = get_column4(checkpoints + (kept * N + 4 * (q * LANES + part)) * N + column, N);
            }
            for (int t = 0; t < first; ++t) {
                const float w = shared_w[t * ROWS + mine], key = shared_k[t * ROWS + mine];
                EACH(q, QUADS) {
                    S[0][q] = plus4(scaled4(w, S[0][q]), key, shared_v[t * (N / 4) + q * LANES + part]);
#if DELTA
                    S[0][q] = plus4(S[0][q], shared_b[t * ROWS + mine], shared_u[t * (N / 4) + q * LANES + part]);
#endif
                }
            }
            EACH(i, STEPS) {
                const int t = first + i;
                const float w = shared_w[t * ROWS + mine], key = shared_k[t * ROWS + mine];
                EACH(q, QUADS) {
                    S[i + 1][q] = plus4(scaled4(w, S[i][q]), key, shared_v[t * (N / 4) + q * LANES + part]);
#if DELTA
                    S[i + 1][q] = plus4(S[i + 1][q], shared_b[t * ROWS + mine], shared_u[t * (N / 4) + q * LANES + part]);
#endif
                }
            }
            EACH(back, STEPS) {
                const int i = STEPS - 1 - back, t = first + i;
                const float w = shared_w[t * ROWS + mine], query = shared_r[t * ROWS + mine];
                float of_r = 0.0f, of_w = 0.0f, of_k = 0.0f, of_a = 0.0f, of_b = 0.0f;
                EACH(q, QUADS) {
                    const int at = i * (N / 4) + q * LANES + part, rows = t * (N / 4) + q * LANES + part;
                    G[q] = plus4(G[q], query, shared_dp[at]);
                    of_r = dot4(S[i + 1][q], shared_dp[at], of_r);
                    of_w = dot4(S[i][q], G[q], of_w);
                    of_k = dot4(G[q], shared_v[rows], of_k);
#if DELTA
                    of_a = dot4(S[i][q], shared_du[at], of_a);
                    of_b = dot4(G[q], shared_u[rows], of_b);
#endif
                    G[q] = scaled4(w, G[q]);
#if DELTA
                    G[q] = plus4(G[q], shared_a[t * ROWS + mine], shared_du[at]);
#endif
                }
                of_r = sum_lanes<LANES>(of_r);
                of_w = sum_lanes<LANES>(of_w);
                of_k = sum_lanes<LANES>(of_k);
#if DELTA
                of_a = sum_lanes<LANES>(of_a);
                of_b = sum_lanes<LANES>(of_b);
#endif
                if (part == 0 && from + t < tokens) {
                    const size_t x = start + (from + t) * stride + column;
                    put(dr + x, of_r);
                    put(dlog_w + x, w * of_w);
                    put(dk + x, of_k);
#if DELTA
                    put(da + x, of_a);
                    put(db + x, of_b);
#endif
                }
            }
        }
    }
"""

INPUTS = ("r", "log_w", "k", "v", "a", "b")  # in the order of the arguments below; a and b only with DELTA


def scan_kernels(delta: bool) -> dict[str, GpuKernel]:
    """The kernels of one recurrence by task: forward, saving (forward that keeps what the gradient needs), rows, columns."""
    inputs, name = (INPUTS, "wkv7") if delta else (INPUTS[:4], "wkv6")
    u, du, of_ab = (("u",), ("du",), ("da", "db")) if delta else ((), (), ())
    given = "#define DELTA 1\n" if delta else "#define DELTA 0\n"
    first, back = (*inputs, "state", "scale"), (*inputs, "dp", "dlast", "scale")
    return {
        "forward": GpuKernel(f"{name}_forward", first, ("p", "last"), FORWARD, given + "#define SAVE 0\n"),
        "saving": GpuKernel(f"{name}_saving", first, ("p", "last", "checkpoints", *u), FORWARD, given + "#define SAVE 1\n"),
        "rows": GpuKernel(f"{name}_rows", back, ("dv", *du, "dstate"), BACKWARD_ROWS, given),
        "columns": GpuKernel(
            f"{name}_columns", (*back, "checkpoints", *u, *du), ("dr", "dlog_w", "dk", *of_ab), BACKWARD_COLUMNS, given
        ),
    }


SCAN = {delta: scan_kernels(delta) for delta in (False, True)}


@lru_cache
def scan(delta: bool, scale: float) -> Any:
    """The recurrence as a function of MLX with a gradient: (r, log_w, k, v[, a, b], state) to (p, last state).

    All (B, T, H, N) but the states, float32 (B, H, N value, N key); p has r's type. The gradient runs the recurrence again, so
    that training keeps the inputs alone.
    """
    kernels = SCAN[delta]

    @mx.custom_function
    def recurrence(*arrays: mx.array) -> list[mx.array]:
        return run_forward(kernels["forward"], arrays, scale)

    @recurrence.vjp
    def gradient(arrays: Any, cotangents: Any, _: Any) -> tuple[mx.array, ...]:
        *inputs, state = arrays
        dp, dlast = cotangents
        _, _, checkpoints, *of_u = run_forward(kernels["saving"], arrays, scale)
        B, T, H, N = inputs[0].shape
        common = (*inputs, dp, dlast, constant(scale))
        shape = [(B, T, H, N)]
        launch: dict[str, Any] = {"groups": (N // ROWS, H, B), "N": N, "LANES": LANES[N]}
        dv, *of_du, dstate = kernels["rows"](
            common,
            shape * (1 + delta) + [state.shape],
            [inputs[3].dtype] + [mx.float32] * (1 + delta),
            BLOCK=block_size(T, N, len(inputs)),
            **launch,
        )
        dr, dlog_w, dk, *rest = kernels["columns"](
            (*common, checkpoints, *of_u, *of_du),
            shape * (len(inputs) - 1),
            [x.dtype for i, x in enumerate(inputs) if i != 3],
            CHECKPOINT=CHECKPOINT,
            **launch,
        )
        return dr, dlog_w, dk, dv, *rest, dstate

    return recurrence


def run_forward(kernel: GpuKernel, arrays: Any, scale: float) -> list[mx.array]:
    """Output, last state and, from the saving kernel, the states every CHECKPOINT tokens and u."""
    *inputs, state = arrays
    B, T, H, N = inputs[0].shape
    kept = [(B, H, -(-T // CHECKPOINT), N, N), (B, T, H, N)]
    saved = len(kernel.outputs) - 2
    return kernel(
        (*inputs, state, constant(scale)),
        [(B, T, H, N), state.shape, *kept[:saved]],
        [inputs[0].dtype] + [mx.float32] * (1 + saved),
        groups=(N // ROWS, H, B),
        N=N,
        LANES=LANES[N],
        BLOCK=block_size(T, N, len(inputs)),
        CHECKPOINT=CHECKPOINT,
    )


def block_size(length: int, head_size: int, inputs: int) -> int:
    """Tokens staged at once: 16, or 8 where 16 of them do not fit into a threadgroup's memory; 1 for a single token."""
    if length == 1:
        return 1
    token = 4 * ((inputs - 1) * head_size + ROWS)  # all but v by whole vectors
    return 16 if 16 * token <= SHARED_BYTES else 8
