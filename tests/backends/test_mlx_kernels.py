"""The chunk-parallel recurrences on MLX against a token loop in float64: outputs, states and every gradient."""

import mlx.core as mx
import numpy as np
import pytest
import torch

from radlads.backends.mlx.kernels import FLOOR, LARGEST_EXPONENT, chunk_size
from radlads.backends.mlx.kernels.wkv6 import wkv6
from radlads.backends.mlx.kernels.wkv7 import unit_lower_inverse, wkv7
from radlads.backends.mlx.measure import draw, forms, gradient_forms, peak_bytes

OPS = {"wkv6": wkv6, "wkv7": wkv7}
# (batch, tokens, heads, head size, decay, bound promised to the op)
CASES = [
    (2, 1, 2, 8, "mixed", None),
    (1, 2, 1, 32, "mixed", None),
    (1, 9, 2, 96, "mixed", None),
    (2, 77, 2, 8, "strongest", None),
    (1, 65, 1, 64, "mixed", -20.0),
    (1, 100, 2, 32, "five", -5.0),
    (1, 64, 1, 128, "weak", -0.6065),
    (2, 95, 2, 16, "weak", None),
    (1, 130, 1, 64, "none", -0.6065),
    (1, 4097, 1, 8, "weak", -0.6065),
    (1, 1024, 1, 8, "mixed", None),
]


def decays(kind, shape, rng):
    """Log-decays between -20 and 0 of one kind."""
    if kind == "mixed":
        return -np.exp(rng.uniform(np.log(1e-4), np.log(20), shape))
    if kind == "weak":
        return -0.6065 * rng.random(shape)
    return np.full(shape, {"strongest": -20.0, "five": -5.0, "none": 0.0}[kind])


def make_inputs(name, B, T, H, N, decay, seed=0, repeat_keys=False):
    """Arguments of the op in its order, state last."""
    rng = np.random.default_rng(seed)
    shape = (B, T, H, N)
    q, k, v = rng.standard_normal((3, *shape))
    log_w, state = decays(decay, shape, rng), rng.standard_normal((B, H, N, N))
    if name == "wkv6":
        return [x.astype(np.float32) for x in (q, k, v, log_w, state)]
    kappa = rng.standard_normal(shape)
    rate = rng.random(shape)
    if repeat_keys:
        kappa, rate = np.broadcast_to(kappa[:, :1], shape), np.ones(shape)
    kappa = kappa / np.linalg.norm(kappa, axis=-1, keepdims=True)
    return [x.astype(np.float32) for x in (q, log_w, k, v, -kappa, kappa * rate, state)]


def loop(name, inputs, scale):
    """The recurrence token by token on torch tensors, straight from the equations."""
    if name == "wkv6":
        q, k, v, log_w, state = inputs
        a = b = torch.zeros_like(q)
    else:
        q, log_w, k, v, a, b, state = inputs
    out = []
    for t in range(q.shape[1]):
        removed = (state @ a[:, t, :, :, None]) * b[:, t, :, None]
        state = state * log_w[:, t, :, None].exp() + removed + v[:, t, :, :, None] * k[:, t, :, None]
        out.append(scale * (state @ q[:, t, :, :, None])[..., 0])
    return torch.stack(out, 1), state


def relative(found, expected):
    """Root mean square of the error over that of the expected values."""
    expected = expected.detach().numpy()
    return float(np.sqrt(np.mean((np.array(found, np.float64) - expected) ** 2) / np.mean(expected**2)))


def errors(name, arrays, bound, scale=0.5):
    """Relative errors of output, state and all gradients by name."""
    rng = np.random.default_rng(1)
    weights = [rng.standard_normal(arrays[0].shape), rng.standard_normal(arrays[-1].shape)]
    inputs = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in arrays]
    expected = loop(name, inputs, scale)
    sum((x * torch.tensor(w)).sum() for x, w in zip(expected, weights, strict=True)).backward()

    def loss(*x):
        found = OPS[name](*x, scale=scale, min_log_w=bound)
        return sum((y * mx.array(w.astype(np.float32))).sum() for y, w in zip(found, weights, strict=True)), found

    (_, found), gradients = mx.value_and_grad(loss, argnums=list(range(len(arrays))))(*map(mx.array, arrays))
    report = {"out": relative(found[0], expected[0]), "state": relative(found[1], expected[1])}
    return report | {f"gradient {i}": relative(g, x.grad) for i, (g, x) in enumerate(zip(gradients, inputs, strict=True))}


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_state_and_gradients_equal_the_token_loop(name, case):
    B, T, H, N, decay, bound = case
    report = errors(name, make_inputs(name, B, T, H, N, decay), bound)
    assert max(report.values()) <= 5e-6, report


def test_repeated_keys_stay_exact():
    # iclr 1, no decay, one key throughout: each token replaces the last one's value. Powers of the pair matrix reach
    # binomial size here, the inverse does not.
    report = errors("wkv7", make_inputs("wkv7", 1, 200, 1, 64, "none", repeat_keys=True), -0.6065)
    assert max(report.values()) <= 5e-6, report


def test_inverse_of_all_ones_is_exact():
    ones = np.tril(np.ones((64, 64), np.float32), -1)
    found = np.array(unit_lower_inverse(mx.array(-ones)))
    assert np.array_equal(found, np.eye(64) - np.eye(64, k=-1))


@pytest.mark.parametrize("name", OPS)
def test_split_points_change_nothing(name):
    *arrays, state = map(mx.array, make_inputs(name, 2, 83, 2, 16, "mixed"))
    whole, last = OPS[name](*arrays, state, scale=1.0)
    parts = []
    for first, end in ((0, 1), (1, 2), (2, 33), (33, 83)):
        part, state = OPS[name](*(x[:, first:end] for x in arrays), state, scale=1.0)
        parts.append(part)
    assert mx.allclose(mx.concatenate(parts, axis=1), whole, rtol=0, atol=2e-5)
    assert mx.allclose(state, last, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", OPS)
def test_no_state_is_the_zero_state(name):
    *arrays, state = map(mx.array, make_inputs(name, 1, 20, 1, 8, "weak"))
    for given, zero in zip(OPS[name](*arrays, scale=1.0), OPS[name](*arrays, mx.zeros_like(state), scale=1.0), strict=True):
        assert mx.array_equal(given, zero)


@pytest.mark.parametrize("name", OPS)
def test_bfloat16_comes_back_with_a_float32_state(name):
    arrays = make_inputs(name, 1, 40, 1, 16, "weak")
    exact, _ = loop(name, [torch.tensor(x, dtype=torch.float64) for x in arrays], 1.0)
    *rounded, state = map(mx.array, arrays)
    out, last = OPS[name](*(x.astype(mx.bfloat16) for x in rounded), state, scale=1.0)
    assert (out.dtype, last.dtype) == (mx.bfloat16, mx.float32)
    assert relative(out.astype(mx.float32), exact) < 2e-2


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("tokens", [1, 30])
def test_decay_below_the_floor_is_finite(name, tokens):
    arrays = make_inputs(name, 1, tokens, 1, 8, "mixed")
    place = 3 if name == "wkv6" else 1
    arrays[place][:, ::2] = -1e4
    expected, _ = loop(name, [torch.tensor(x, dtype=torch.float64) for x in arrays], 1.0)

    def loss(*x):
        out, _ = OPS[name](*x, scale=1.0)
        return out.sum(), out

    (_, out), gradients = mx.value_and_grad(loss, argnums=list(range(len(arrays))))(*map(mx.array, arrays))
    assert relative(out, expected) <= 1e-5
    assert all(mx.isfinite(g).all() for g in gradients)


def test_memory_is_a_fifth_of_the_token_loop_and_does_not_follow_the_length():
    """Counted by MLX, so that the machine's load plays no part. The loop's gradient keeps every state."""

    def peak(make, T, name="radlads"):
        return peak_bytes(make(draw(1, T, 2, 64, mx.float32))[name])

    assert 5 * peak(forms, 2048) <= peak(forms, 2048, "token loop")
    assert 10 * peak(gradient_forms, 512) <= peak(gradient_forms, 512, "token loop")
    results = 4 * (2048 - 1024) * 2 * 64  # bytes of the longer results; both lengths take several segments
    for make, bound in ((forms, 4), (gradient_forms, 20)):
        assert peak(make, 2048) - peak(make, 1024) <= bound * results


def test_chunk_size_keeps_half_a_chunk_within_float32():
    assert [chunk_size(4096, bound) for bound in (None, FLOOR, -5.0, -0.6065)] == [8, 8, 16, 16]
    assert [chunk_size(length, -0.6065) for length in (2, 3, 7, 9)] == [2, 4, 8, 16]
    assert all(chunk_size(4096, bound) / 2 * -bound <= LARGEST_EXPONENT for bound in np.linspace(-20, -0.1, 50))
