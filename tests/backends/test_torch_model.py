"""The torch model against the float64 oracle and against stock transformers."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from radlads.backends.torch import layers
from radlads.backends.torch.model import Model
from radlads.oracle import OracleState, oracle_logits
from radlads.spec import ModelSpec
from tests.models import tiny_spec

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32.0,
}
QWEN3, QWEN2 = tiny_spec("qwen3", tie_embeddings=True), tiny_spec("qwen2")
LLAMA = tiny_spec("llama", qkv_bias=True, output_bias=True, mlp_bias=True, rope_scaling=LLAMA3)
SPECS = {
    "qwen3": QWEN3,
    "qwen2": QWEN2,
    "llama": LLAMA,
    "rwkv7-A": QWEN3.as_student("rwkv7", variant="A"),
    "rwkv7-B": QWEN3.as_student("rwkv7", variant="B"),
    "rwkv7-C": QWEN3.as_student("rwkv7"),
    "rwkv7-hybrid-full-gate": QWEN2.as_student("rwkv7", (1,), rope=False, gate="full"),
    "rwkv7-first-kept": QWEN2.as_student("rwkv7", (0,), gate="none"),
    "rwkv6": QWEN2.as_student("rwkv6"),
    "rwkv6-lowrank-rope": QWEN3.as_student("rwkv6", gate="lowrank", rope=True),
    "rwkv6-groupnorm-hybrid": QWEN3.as_student("rwkv6", (1,), token_shift=False, groupnorm=True, clamp=None),
    "rwkv6-no-gate": LLAMA.as_student("rwkv6", gate="none"),
    "hxa079": replace(QWEN3, num_layers=3, head_dim=96, mixers=()).as_student("hxa079", (1,)),
    "hxa079-first-kept": LLAMA.as_student("hxa079", (0,), kept_rope=True),
    "hxa07a": QWEN2.as_student("hxa07a", (1,)),
    "hxa07b": QWEN3.as_student("hxa07b", rope=False),
    "hxa07c": replace(QWEN3, head_dim=128).as_student("hxa07c"),
}


def random_weights(spec: ModelSpec) -> dict[str, np.ndarray]:
    """Float32 numbers in float64, none of them at its first value, so that every tensor counts."""
    rng = np.random.default_rng(0)
    weights = {}
    for name, row in spec.tensors().items():
        values = rng.standard_normal(row.shape) * 0.1
        if name.endswith(("norm.weight", "ln_x.weight", "k_k", "k_a")):
            values += 1
        weights[name] = values.astype(np.float32).astype(np.float64)
    return weights


def model_of(spec: ModelSpec, weights: dict[str, np.ndarray]) -> Model:
    model = Model(spec)
    model.load_state_dict({name: torch.tensor(value, dtype=torch.float32) for name, value in weights.items()})
    return model.eval()


@pytest.fixture(params=SPECS, ids=list(SPECS))
def case(request: pytest.FixtureRequest) -> tuple[ModelSpec, dict[str, np.ndarray], Model, torch.Tensor]:
    spec = SPECS[request.param]
    weights = random_weights(spec)
    tokens = torch.from_numpy(np.random.default_rng(1).integers(0, spec.V, (1, 37)))
    return spec, weights, model_of(spec, weights), tokens


Case = tuple[ModelSpec, dict[str, np.ndarray], Model, torch.Tensor]


def test_names_and_shapes_are_the_specs(case: Case) -> None:
    spec, _, model, _ = case
    assert {name: tuple(p.shape) for name, p in model.state_dict().items()} == {n: r.shape for n, r in spec.tensors().items()}


@torch.no_grad()
def test_equals_oracle(case: Case) -> None:
    spec, weights, model, tokens = case
    wanted = oracle_logits(spec, weights, tokens[0].numpy())
    assert np.abs(model(tokens)[0][0].numpy() - wanted).max() <= 1e-5


def test_oracle_state_goes_on(case: Case) -> None:
    spec, weights, _, tokens = case
    ids, state = tokens[0].numpy(), OracleState(spec)
    parts = [oracle_logits(spec, weights, ids[a:b], state) for a, b in ((0, 5), (5, 6), (6, 37))]
    assert np.abs(np.concatenate(parts) - oracle_logits(spec, weights, ids)).max() <= 1e-10


@torch.no_grad()
def test_cached_equals_uncached(case: Case) -> None:
    _, _, model, tokens = case
    whole, state, parts = model(tokens)[0], None, []
    for a, b in ((0, 1), (1, 6), (6, 7), (7, 20), (20, 21), (21, 37)):
        logits, state = model(tokens[:, a:b], state)
        parts.append(logits)
    assert (torch.cat(parts, 1) - whole).abs().max() <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("pads", [1, 9, 33])
def test_left_padding_changes_nothing(case: Case, pads: int) -> None:
    _, _, model, tokens = case
    alone, alone_state = model(tokens)
    padded = torch.cat([torch.full((1, pads), 7), tokens], 1)
    mask = torch.ones_like(padded, dtype=torch.bool)
    mask[:, :pads] = False
    other = torch.cat([tokens, tokens[:, :pads]], 1)
    logits, state = model(torch.cat([padded, other]), None, torch.cat([mask, torch.ones_like(mask)]))
    assert (logits[0, pads:] - alone[0]).abs().max() <= 1e-5
    step = torch.tensor([[3], [3]])
    after, _ = model(step, state, torch.ones(2, 1, dtype=torch.bool))
    assert (after[0] - model(step[:1], alone_state)[0][0]).abs().max() <= 1e-5


def test_packed_equals_separate_with_gradients(case: Case) -> None:
    """State, token shift and the first layer's values begin anew in each sequence: nothing leaks, forward or backward."""
    _, _, model, tokens = case
    pieces = (tokens, tokens[:, :9], tokens[:, 20:21])
    packed, _ = model(torch.cat(pieces, 1), cu_seqlens=torch.tensor([0, 37, 46, 47]))
    separate = torch.cat([model(piece)[0] for piece in pieces], 1)
    assert difference(packed, separate) <= 1e-6
    weight = torch.randn(packed.shape, generator=torch.Generator().manual_seed(2))
    used = [p for name, p in model.named_parameters() if model.spec.tensors()[name].read]
    grads = [torch.autograd.grad((out * weight).sum(), used) for out in (packed, separate)]
    # A key's bias without rotary positions has no gradient, only rounding: tensors are judged by 1e-3 of the largest at least.
    floor = 1e-3 * max(float(wanted.norm()) for wanted in grads[1])
    for found, wanted in zip(*grads, strict=True):
        assert difference(found, wanted, floor) <= 1e-5


def difference(found: torch.Tensor, wanted: torch.Tensor, floor: float = 0.0) -> float:
    """Norm of the difference over that of `wanted`."""
    return float((found - wanted).detach().norm()) / max(float(wanted.detach().norm()), floor)


@pytest.mark.parametrize("mixer", ["rwkv6", "rwkv7", "hxa079", "hxa07b"])
def test_bfloat16_keeps_the_state_in_float32(mixer: str) -> None:
    spec = replace(QWEN3, mixers=()).as_student(mixer)
    model = model_of(spec, random_weights(spec)).to(torch.bfloat16)
    logits, state = model(torch.tensor([[1, 2, 3]]))
    assert logits.dtype == torch.bfloat16 and state.layers[0]["wkv"].dtype == torch.float32


@pytest.mark.parametrize("name", ["llama", "rwkv7-C", "rwkv7-hybrid-full-gate", "rwkv6-groupnorm-hybrid", "hxa07b"])
def test_joined_products_change_nothing_but_rounding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SPECS[name]
    tokens = torch.from_numpy(np.random.default_rng(2).integers(0, spec.V, (4, 50)))
    found = []
    for rows in (10**9, 1):
        monkeypatch.setattr(layers, "ROWS_OF_JOINED", rows)
        model = model_of(spec, random_weights(spec))
        logits = model(tokens)[0]
        logits.square().mean().backward()
        found.append((logits, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (alone, grads), (joined, others) = found
    torch.testing.assert_close(joined, alone, atol=1e-5, rtol=1e-4)
    assert others.keys() == grads.keys()
    for key, grad in grads.items():
        assert (others[key] - grad).norm() <= 1e-5 * grad.norm(), key


def test_what_is_joined() -> None:
    x, plain, adapted = torch.randn(3, 100, 8), torch.nn.Linear(8, 16), torch.nn.Sequential(torch.nn.Linear(8, 4))
    narrow, wide = torch.randn(8, 30), torch.randn(8, 31)  # of 300 rows a tenth is 30
    parts = layers.products(x, (wide, plain, adapted, narrow))
    for part, wanted in zip(parts, (x @ wide, plain(x), adapted(x), x @ narrow), strict=True):
        torch.testing.assert_close(part, wanted)
    memory = [part.untyped_storage().data_ptr() for part in parts]
    assert memory[1] == memory[3] and len(set(memory)) == 3


@pytest.mark.parametrize("shape", [(7, 5), (8, 5), (3, 2, 4)], ids=str)
def test_base_as_a_row_of_the_matrix(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    *many, rank, width = shape
    h, matrix, base = (
        torch.randn(*many, n, m, dtype=torch.float64, generator=generator, requires_grad=True)
        for n, m in ((6, rank), (rank, width), (1, width))
    )
    outs = layers.with_base(h, matrix, base), base + h @ matrix
    with torch.no_grad():
        assert torch.equal(layers.with_base(h, matrix, base), outs[1])
    torch.testing.assert_close(*outs)
    probe = torch.randn(outs[0].shape, dtype=torch.float64, generator=generator)
    for mine, wanted in zip(*(torch.autograd.grad((out * probe).sum(), (h, matrix, base)) for out in outs), strict=True):
        torch.testing.assert_close(mine, wanted)
