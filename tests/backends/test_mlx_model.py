"""The MLX model against the float64 oracle, its caches and padding, its folder, its engine, and stock mlx-lm."""

import shutil
import sys
from dataclasses import replace
from functools import lru_cache
from io import StringIO

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.models.cache import ArraysCache, BatchKVCache, KVCache, load_prompt_cache, save_prompt_cache
from mlx_lm.utils import quantize_model

from radlads.backends.mlx.engine import MlxEngine, load_engine
from radlads.backends.mlx.load import load_model
from radlads.backends.mlx.model import Model, ModelArgs
from radlads.errors import RadladsError
from radlads.folder import open_folder, save_folder
from radlads.oracle import OracleState, oracle_logits
from radlads.spec import ModelSpec
from radlads.tensors import encode
from radlads.weights_tools.standalone import model_files
from radlads.weights_tools.surgery import make_student
from tests.models import tiny_teacher

# 6 query heads on 2 key/value heads of 8: neither C nor Ckv is the hidden size. A rope base that is nobody's default.
QWEN3 = ModelSpec("qwen3", 40, 56, 3, 6, 2, 8, 61, rope_theta=12345.0, rms_norm_eps=1e-5, qk_norm=True)
LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
SPECS = {
    "qwen3": QWEN3,
    "qwen2": replace(QWEN3, family="qwen2", qk_norm=False, qkv_bias=True, tie_embeddings=True),
    "llama": replace(
        QWEN3, family="llama", qk_norm=False, qkv_bias=True, output_bias=True, mlp_bias=True, rope_scaling=LLAMA3_ROPE
    ),
    "rwkv6": QWEN3.as_student("rwkv6"),
    "rwkv6 lowrank": QWEN3.as_student("rwkv6", gate="lowrank", rope=True, token_shift=False, clamp=None, groupnorm=True),
    "rwkv6 hybrid": QWEN3.as_student("rwkv6", (0,), gate="none", balance=False),
    "rwkv7 A": QWEN3.as_student("rwkv7", variant="A"),
    "rwkv7 B": QWEN3.as_student("rwkv7", variant="B", gate="none"),
    "rwkv7 C": QWEN3.as_student("rwkv7"),
    "rwkv7 hybrid": QWEN3.as_student("rwkv7", (0, 2), gate="full", rope=False),
    "hxa079": replace(QWEN3, head_dim=96).as_student("hxa079"),
    "hxa079 hybrid": QWEN3.as_student("hxa079", (1,)),
    "hxa07a": QWEN3.as_student("hxa07a", (2,), kept_rope=True),
    "hxa07b": QWEN3.as_student("hxa07b", rope=False),
    "hxa07c": replace(QWEN3, head_dim=128).as_student("hxa07c"),
}
HYBRIDS = ["qwen3", "rwkv6", "rwkv6 hybrid", "rwkv7 C", "rwkv7 hybrid", "hxa079 hybrid"]


@lru_cache
def build(name):
    """The model of SPECS[name] with every tensor random, and the same weights in float64."""
    spec = SPECS[name]
    rng = np.random.default_rng(0)
    weights = {key: random_tensor(key, row.shape, rng) for key, row in spec.tensors().items()}
    model = Model(ModelArgs(radlads=spec.to_dict()))
    model.load_weights([(key, mx.array(x)) for key, x in weights.items()], strict=True)
    model.eval()
    return model, {key: x.astype(np.float64) for key, x in weights.items()}


def random_tensor(name, shape, rng):
    """Norm weights around 1, matrices that keep the scale of their input, all else around 0."""
    inner = shape[-1] if name.endswith("proj.weight") or name.endswith("gate.weight") else shape[0]
    scale = inner**-0.5 if len(shape) == 2 and "embed" not in name else 0.3
    return (scale * rng.standard_normal(shape) + name.endswith(("norm.weight", "ln_x.weight"))).astype(np.float32)


def tokens_of(*shape, seed=1):
    return np.random.default_rng(seed).integers(0, 61, shape)


def alone(model, *parts):
    """Logits (T, V) of one sequence of token ids, without a cache."""
    return model(mx.array(np.concatenate(parts))[None])[0]


def relative(found, expected):
    found, expected = np.array(found, np.float64), np.array(expected, np.float64)
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))


@pytest.mark.parametrize("name", SPECS)
def test_logits_equal_the_oracle_at_once_and_in_any_parts(name):
    model, weights = build(name)
    tokens = tokens_of(70)
    expected = oracle_logits(SPECS[name], weights, tokens)
    assert relative(model(mx.array(tokens)[None])[0], expected) <= 1e-5
    cache, parts = model.make_cache(), []
    for first, end in ((0, 1), (1, 2), (2, 40), (40, 41), (41, 70)):
        parts.append(model(mx.array(tokens[first:end])[None], cache)[0])
    assert relative(mx.concatenate(parts), expected) <= 1e-5


LONG = {
    "rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 32,
    "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0],
}  # fmt: skip
SCALINGS = {
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "longrope": LONG,
    "linear": {"rope_type": "linear", "factor": 3.0},
}


@pytest.mark.parametrize("name", SCALINGS)
def test_rope_scalings_equal_the_oracle_below_and_beyond_the_context(name):
    spec = replace(SPECS["rwkv7 hybrid"], rope_scaling=SCALINGS[name], max_positions=32)
    spec = replace(spec, mixer=replace(spec.mixer, rope=True))
    _, weights = build("rwkv7 hybrid")
    model = Model(ModelArgs(radlads=spec.to_dict()))
    model.load_weights([(key, mx.array(x.astype(np.float32))) for key, x in weights.items()], strict=True)
    tokens, state, cache = tokens_of(50), OracleState(spec), model.make_cache()
    for part in (tokens[:20], tokens[20:30], tokens[30:31], tokens[31:]):
        expected = oracle_logits(spec, weights, part, state)
        assert relative(model(mx.array(part)[None], cache)[0], expected) <= 1e-5


@pytest.mark.parametrize("name", SPECS)
def test_parameters_are_the_rows_of_the_spec(name):
    model, _ = build(name)
    assert {key: x.shape for key, x in tree_flatten(model.parameters())} == {
        key: row.shape for key, row in SPECS[name].tensors().items()
    }


@pytest.mark.parametrize("name", SPECS)
def test_left_padding_changes_nothing(name):
    model, _ = build(name)
    rows, padding = [tokens_of(n, seed=n) for n in (23, 9, 1)], [0, 14, 22]
    batch = mx.array(np.stack([np.concatenate([np.full(p, 7), row]) for p, row in zip(padding, rows, strict=True)]))
    caches = [
        ArraysCache(len(c.cache), left_padding=padding) if isinstance(c, ArraysCache) else BatchKVCache(padding)
        for c in model.make_cache()
    ]
    # The cut lies within the padding of two rows; two more tokens follow as decoding steps.
    parts = [model(batch[:, :12], caches), model(batch[:, 12:], caches)]
    parts += [model(mx.array([[token]] * 3), caches) for token in (5, 6)]
    logits = mx.concatenate(parts, axis=1)
    for i, row in enumerate(rows):
        assert relative(logits[i, padding[i] :], alone(model, row, [5, 6])) <= 1e-5


@pytest.mark.parametrize("name", HYBRIDS)
def test_right_padding_extract_and_extend_change_nothing(name):
    # What mlx-lm's batch generator does with prompts of different lengths, in two prefill steps, and then with the caches.
    model, _ = build(name)
    rows = [tokens_of(n, seed=n) for n in (21, 4, 12)]
    singles = [model.make_cache() for _ in rows]
    caches = [single.merge([s[i] for s in singles]) for i, single in enumerate(singles[0])]
    batch = mx.array(np.stack([np.pad(row, (0, 21 - len(row)), constant_values=3) for row in rows]))
    for cache in caches:
        cache.prepare(lengths=[len(row) for row in rows], right_padding=[21 - len(row) for row in rows])
    model(batch[:, :8], caches)
    model(batch[:, 8:], caches)
    for cache in caches:
        cache.finalize()
    step = model(mx.array([[5]] * 3), caches)
    for i, row in enumerate(rows):
        assert relative(step[i], alone(model, row, [5])[-1:]) <= 1e-5
    taken = [cache.extract(1) for cache in caches]
    assert relative(model(mx.array([[8]]), taken)[0], alone(model, rows[1], [5, 8])[-1:]) <= 1e-5
    for cache in caches:
        cache.filter([2, 0])
    other = model.make_cache()
    model(mx.array(tokens_of(6, seed=9))[None], other)
    for cache, single in zip(caches, other, strict=True):
        cache.extend(single.merge([single]))
    step = model(mx.array([[8]] * 3), caches)
    for i, parts in enumerate(((rows[2], [5, 8]), (rows[0], [5, 8]), (tokens_of(6, seed=9), [8]))):
        assert relative(step[i], alone(model, *parts)[-1:]) <= 1e-5


@pytest.mark.parametrize("name", SPECS)
def test_gradient_equals_the_oracle_slope(name):
    model, weights = build(name)
    tokens, rng = tokens_of(12), np.random.default_rng(2)
    weight = rng.standard_normal((12, 61))
    direction = {key: 0.1 * rng.standard_normal(x.shape) for key, x in weights.items()}

    def slope(step=1e-5):
        moved = ({key: x + sign * step * direction[key] for key, x in weights.items()} for sign in (1, -1))
        up, down = ((oracle_logits(SPECS[name], w, tokens) * weight).sum() for w in moved)
        return (up - down) / (2 * step)

    def loss(parameters):
        model.update(parameters)
        return (model(mx.array(tokens)[None])[0] * mx.array(weight.astype(np.float32))).sum()

    parameters = tree_map(lambda x: x, model.parameters())
    gradient = dict(tree_flatten(mx.grad(loss)(parameters)))
    model.update(parameters)
    assert all(mx.isfinite(g).all() for g in gradient.values())
    found = sum((np.array(g, np.float64) * direction[key]).sum() for key, g in gradient.items())
    assert found == pytest.approx(slope(), rel=1e-4)


@pytest.mark.parametrize("name", SPECS)
def test_packed_equals_separate_with_gradients(name):
    model, _ = build(name)
    pieces = [mx.array(tokens_of(n, seed=n))[None] for n in (23, 9, 1)]
    weight = mx.random.normal((33, 61), key=mx.random.key(0))

    def packed(parameters):
        model.update(parameters)
        return (model.packed(mx.concatenate(pieces, axis=1), [23, 9, 1])[0] * weight).sum()

    def separate(parameters):
        model.update(parameters)
        return (mx.concatenate([model(piece)[0] for piece in pieces]) * weight).sum()

    parameters = tree_map(lambda x: x, model.parameters())
    (found, gradient), (expected, slope) = (mx.value_and_grad(f)(parameters) for f in (packed, separate))
    model.update(parameters)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for (key, x), (_, y) in zip(tree_flatten(gradient), tree_flatten(slope), strict=True):
        assert not mx.abs(y).max() > 1e-3 or relative(x, y) <= 1e-5, key


@pytest.mark.parametrize("name", ["rwkv7 C", "hxa079"])
def test_state_keeps_its_size_and_float32(name):
    model, _ = build(name)
    half = Model(model.args)
    half.update(tree_unflatten([(key, x.astype(mx.bfloat16)) for key, x in tree_flatten(model.parameters())]))
    cache = half.make_cache()
    sizes = []
    for _ in range(3):
        logits = half(mx.array(tokens_of(1, 30)), cache)
        sizes.append(sum(c.nbytes for c in cache))
    assert logits.dtype == mx.bfloat16
    assert {c[0].dtype for c in cache} == {mx.float32}
    assert len(set(sizes)) == 1


def test_decoding_leaves_no_graph_behind():
    # Counters that no step reads must not pile up as unevaluated work.
    model, _ = build("rwkv6")
    cache, graphs = model.make_cache(), []
    for token in range(12):
        mx.eval(model(mx.array([[token]]), cache))
        graph = StringIO()
        mx.export_to_dot(graph, *(x for c in cache for x in c.cache))
        graphs.append(graph.getvalue().count("\n"))
    assert graphs[1] == graphs[-1]
    assert cache[0][1].tolist() == [12]


def test_caches_are_mlx_lms_own():
    model, _ = build("rwkv7 hybrid")
    assert [type(c) for c in model.make_cache()] == [KVCache, ArraysCache, KVCache]


def test_sanitize_drops_what_is_not_read():
    model, _ = build("qwen2")
    weights = {"lm_head.weight": 0, "model.layers.0.self_attn.rotary_emb.inv_freq": 0, "model.norm.weight": 1}
    assert model.sanitize(weights) == {"model.norm.weight": 1}
    untied, _ = build("qwen3")
    assert untied.sanitize({"lm_head.weight": 1}) == {"lm_head.weight": 1}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return open_folder(tiny_teacher(tmp_path_factory.mktemp("teacher") / "t", dtype="BF16"))


@pytest.fixture(scope="module", params=["rwkv6", "rwkv7"])
def student(request, teacher, tmp_path_factory):
    """A hybrid student's folder with the shipped MLX file, every tensor moved away from its first value."""
    path = tmp_path_factory.mktemp(request.param)
    first = make_student(teacher, path / "first", arch=request.param, keep_softmax=(1,), options={})
    rng = np.random.default_rng(4)
    moved = ((name, "F32", encode(random_tensor(name, row.shape, rng), "F32")) for name, row in first.spec.tensors().items())
    files, extra = model_files(first.spec)
    return save_folder(
        path / "moved", spec=first.spec, tensors=moved, source=first, dtype="F32", manifest={"stage": 0},
        extra_files=files, config_extra=extra,
    )  # fmt: skip


@pytest.fixture(scope="module")
def stock(student, tmp_path_factory):
    """Model and tokenizer as stock mlx-lm loads them; transformers copies the folder's code to a place of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
        patch.setattr("sys.path", list(sys.path))
        return mlx_lm.load(str(student.path), trust_remote_code=True, tokenizer_config={"trust_remote_code": True})


def test_shipped_file_is_bit_equal_to_the_package(student, stock):
    tokens = mx.array(np.random.default_rng(0).integers(0, 300, (2, 45)))
    assert type(stock[0]).__module__ == "custom_model"
    assert mx.array_equal(stock[0](tokens), load_model(student)(tokens))


def test_stock_generation_equals_the_engine(student, stock):
    model, tokenizer = stock
    prompt = tokenizer.encode("Once upon a time")
    found = [r.token for r in mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=12, prefill_step_size=3)]
    engine = load_engine(student)
    expected, feed, state = [], prompt, engine.start()
    for _ in found:
        logits, state = engine.feed(state, feed)
        feed = [int(logits.argmax())]
        expected += feed
    assert found == expected


def test_stock_batch_generation_equals_single(stock):
    model, tokenizer = stock
    prompts = [tokenizer.encode(text) for text in ("Once upon a time there was", "The cat", "s")]
    batch = mlx_lm.batch_generate(model, tokenizer, prompts, max_tokens=10)
    for text, prompt in zip(batch.texts, prompts, strict=True):
        single = [r.token for r in mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=10) if r.finish_reason != "stop"]
        assert text == tokenizer.decode(single)


def test_stock_prompt_cache_goes_through_a_file(stock, tmp_path):
    model, _ = stock
    tokens = mx.array(np.random.default_rng(0).integers(0, 300, (1, 30)))
    cache = model.make_cache()
    model(tokens[:, :20], cache)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    restored = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    assert mx.array_equal(model(tokens[:, 20:], restored), model(tokens[:, 20:], cache))


def test_quantisation_leaves_marked_rows_alone(student):
    model = load_model(student)
    quantize_model(model, student.config, group_size=32, bits=8)
    quantised = {name.removesuffix(".scales") for name, _ in tree_flatten(model.parameters()) if name.endswith(".scales")}
    kept = {name for name, row in student.spec.tensors().items() if row.keep}
    parameters = dict(tree_flatten(model.parameters()))
    assert "model.layers.0.self_attn.q_proj" in quantised
    assert kept and all(parameters[name].shape == student.spec.tensors()[name].shape for name in kept)
    assert mx.isfinite(model(mx.array([[1, 2, 3]]))).all()


def test_load_keeps_or_casts_the_dtype(teacher):
    assert {x.dtype for _, x in tree_flatten(load_model(teacher).parameters())} == {mx.bfloat16}
    model = load_model(teacher, "float32")
    assert model.model.norm.weight.dtype == mx.float32
    assert relative(load_model(teacher)(mx.array([[5, 6]])).astype(mx.float32), model(mx.array([[5, 6]]))) < 2e-2
    with pytest.raises(RadladsError, match="R101"):
        load_model(teacher, "int8")


@pytest.mark.parametrize("name", ["qwen3", "rwkv6 hybrid", "rwkv7 C"])
def test_engine_states_are_values(name, monkeypatch):
    model, weights = build(name)
    monkeypatch.setattr("radlads.backends.mlx.engine.PREFILL_STEP", 16)
    engine = MlxEngine(model)
    tokens = tokens_of(50).tolist()
    first, state = engine.feed(engine.start(), tokens)
    expected = oracle_logits(SPECS[name], weights, np.array([*tokens, 9]))
    assert first.dtype == np.float32 and relative(first, expected[-2]) <= 1e-5
    second, later = engine.feed(state, [9])
    assert relative(second, expected[-1]) <= 1e-5
    engine.feed(later, [3, 4, 5])
    again, _ = engine.feed(state, [9])
    assert np.array_equal(again, second)
    assert (state.position, later.position) == (50, 51)


@pytest.mark.parametrize("name", ["rwkv6 hybrid", "rwkv7 C"])
def test_state_arrays_go_there_and_back(name):
    engine = MlxEngine(build(name)[0])
    _, state = engine.feed(engine.start(), tokens_of(20).tolist())
    arrays = engine.state_arrays(state)
    shapes = {f"layers.{i}.{key}": (1, *shape) for i, held in enumerate(engine.spec.state()) for key, shape in held.items()}
    assert shapes.items() <= {key: x.shape for key, x in arrays.items()}.items()
    restored = engine.from_arrays(arrays)
    assert np.array_equal(engine.feed(restored, [9])[0], engine.feed(state, [9])[0])
    empty = engine.from_arrays(engine.state_arrays(engine.start()))
    assert (empty.position, empty.layers) == (0, engine.start().layers)
    for wrong in (
        {**arrays, "layers.1.wkv": arrays["layers.1.wkv"][:, :1]},
        {key: x for key, x in arrays.items() if key != "layers.1.wkv"},
        {**arrays, "layers.9.wkv": arrays["layers.1.wkv"]},
        {**arrays, "position": np.array(0)},
        {key: x for key, x in arrays.items() if key != "position"},
    ):
        with pytest.raises(RadladsError, match="R304"):
            engine.from_arrays(wrong)


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_compiled_step_equals_the_plain_one():
    """A GPU fuses the decode step; on a CPU MLX runs a C++ compiler for each piece, so one layer has to do."""
    spec, rng = replace(QWEN3, num_layers=1, mixers=()).as_student("rwkv7"), np.random.default_rng(2)
    model = Model(ModelArgs(radlads=spec.to_dict()))
    model.load_weights([(key, mx.array(random_tensor(key, row.shape, rng))) for key, row in spec.tensors().items()])
    plain, fused = (MlxEngine(model.eval(), compiled=compiled) for compiled in (False, True))
    assert plain._decode == plain._decoded != fused._decode
    states = [plain.feed(plain.start(), tokens_of(length).tolist())[1] for length in (20, 9)]
    for rows in ([0, 1], [1, 0]):
        ids = [3 + row for row in rows]
        found, after = fused.feed_many([states[row] for row in rows], ids)
        wanted, expected = plain.feed_many([states[row] for row in rows], ids)
        assert relative(found, wanted) <= 1e-6
        for row, mine, theirs in zip(rows, after, expected, strict=True):
            assert mine.position == theirs.position
            assert all(relative(x["wkv"], y["wkv"]) <= 1e-6 for x, y in zip(mine.layers, theirs.layers, strict=True))
            states[row] = mine


def test_a_kept_state_does_not_keep_the_others_of_its_step():
    """Memory counted by MLX: of eight sequences one is kept, as a server keeps it for the next turn, and two go on."""
    engine = MlxEngine(build("rwkv7 C")[0], compiled=False)
    states = [engine.feed(engine.start(), [row + 1, 5])[1] for row in range(8)]
    for token in (9, 7):
        _, states = engine.feed_many(states, [token] * 8)
    kept, going = states[3], [states[5], states[1]]
    del states
    engine.feed_many(going, [2, 2])
    del going
    alone = engine.start()
    for tokens in ([4, 5], [9], [7]):
        alone = engine.feed(alone, tokens)[1]
    assert all(relative(x["wkv"], y["wkv"]) <= 1e-6 for x, y in zip(kept.layers, alone.layers, strict=True))
    own = sum(x.nbytes for layer in kept.layers for x in layer.values())
    before = mx.get_active_memory()
    del kept
    assert own <= before - mx.get_active_memory() < 2 * own


def test_sequences_that_go_on_together_are_neither_split_nor_joined():
    engine = MlxEngine(build("rwkv7 C")[0], compiled=False)
    states = [engine.feed(engine.start(), [row + 1, 5])[1] for row in range(3)]
    _, states = engine.feed_many(states, [1, 2, 3])
    assert engine._joined(states) is states[0].held
    for others in (states[::-1], states[:2]):
        assert engine._joined(others) is not states[0].held
