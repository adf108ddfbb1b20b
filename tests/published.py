"""The published systems, small and at full size: names, shapes, configs and equations written from their description.

Nothing here uses radlads, so that spec, detection and models are judged by something of its own.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

Array = np.ndarray
Shape = tuple[int, ...]


@dataclass(frozen=True)
class System:
    """One published model: `kind` rwkv6, rwkv7, hxa079 or hxa07a; `facts` are keys, parameters and MiB of state."""

    name: str
    kind: str
    family: str
    sizes: tuple[int, int, int, int, int, int, int]  # D, F, L, H, Hkv, N, V
    ranks: dict[str, int]
    kept: tuple[int, ...] = ()
    bias: bool = True
    qk_norm: bool = False
    ln_x: bool = False
    theta: float = 1e6
    eps: float = 1e-6
    facts: tuple[int, int, float] = (0, 0, 0.0)

    @property
    def hxa(self) -> bool:
        return self.kind.startswith("hxa")

    def small(self) -> "System":
        """The same kind, flags and ratio of heads, with few and narrow layers; kept layers in the same rhythm."""
        _, _, _, H, Hkv, N, _ = self.sizes
        heads, N = H // Hkv * 2, 24 if N == 96 else 16
        # Published Qwen2 configs have no head_dim: N is D / H there. Elsewhere D is another number than H N, as in Seed-OSS.
        width = heads * N if self.family == "qwen2" else 40
        kept = (1, 3) if self.kept else ()
        ranks = {name: 4 + 2 * place for place, name in enumerate(self.ranks)}
        return replace(self, sizes=(width, 56, 5 if kept else 3, heads, 2, N, 512), ranks=ranks, kept=kept, theta=54321.0)

    def shapes(self) -> dict[str, Shape]:
        """Every tensor of the file."""
        D, F, L, _, _, _, V = self.sizes
        found: dict[str, Shape] = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)}
        for i in range(L):
            place = f"model.layers.{i}."
            for norm in ("input_layernorm", "post_attention_layernorm"):
                found[f"{place}{norm}.weight"] = (D,)
            for name, shape in (("gate_proj", (F, D)), ("up_proj", (F, D)), ("down_proj", (D, F))):
                found[f"{place}mlp.{name}.weight"] = shape
            for name, shape in self.attention(i):
                found[f"{place}self_attn.{name}"] = shape
        return found

    def attention(self, layer: int) -> Iterator[tuple[str, Shape]]:
        """Tensors below self_attn of one layer."""
        D, _, _, H, Hkv, N, _ = self.sizes
        C, Ckv = H * N, Hkv * N
        own = self.hxa and layer not in self.kept
        q, k, v, o = ("receptance", "key", "value", "output") if own else ("q_proj", "k_proj", "v_proj", "o_proj")
        for name, width in ((q, C), (k, Ckv), (v, Ckv)):
            yield f"{name}.weight", (width, D)
            if self.bias:
                yield f"{name}.bias", (width,)
        yield f"{o}.weight", (D, C)
        if self.qk_norm:
            yield ("r_norm.weight" if own else "q_norm.weight"), (N,)
            yield "k_norm.weight", (N,)
        if layer in self.kept:
            return
        if self.kind == "rwkv6":
            rank = self.ranks["tokenshift"]
            for slot in "xrkvwg":
                yield f"time_maa_{slot}", (1, 1, D)
            yield "time_maa_w1", (D, 5 * rank)
            yield "time_maa_w2", (5, rank, D)
            yield "time_decay", (1, 1, C)
            yield "time_decay_w1", (D, self.ranks["decay"])
            yield "time_decay_w2", (self.ranks["decay"], C)
            yield "gate.weight", (C, D)
            return
        widths = {"w": ("decay", C), "a": ("iclr", C), "v": ("value_residual_mix", C), "g": ("gate", C)}
        if self.kind == "hxa079":
            widths |= {"v": ("value_residual_mix", Ckv), "k": ("key_residual_mix", Ckv)}
        if self.kind == "hxa07a":
            del widths["v"]
        for letter, (rank_name, width) in widths.items():
            if letter != "g":
                yield f"{letter}0", (1, 1, width)
            yield f"{letter}1", (D, self.ranks[rank_name])
            yield f"{letter}2", (self.ranks[rank_name], width)
        if self.kind == "rwkv7":
            yield "k_k", (1, 1, C)
            yield "k_a", (1, 1, C)
        if self.kind in ("rwkv7", "hxa079"):
            yield "r_k", (H, N)
        if self.ln_x:
            yield "ln_x.weight", (C,)
            yield "ln_x.bias", (C,)

    def config(self) -> dict[str, Any]:
        """config.json as published: only keys that were seen, or that the published classes have."""
        D, F, L, H, Hkv, N, V = self.sizes
        kind = "rwkv079qwen3" if self.hxa else f"{self.kind}{self.family}"
        name = {"rwkv6qwen2": "RWKV6Qwen2", "rwkv7qwen2": "RWKV7Qwen2", "rwkv7qwen3": "RWKV7Qwen3"}.get(kind, "RWKV079Qwen3")
        config: dict[str, Any] = {
            "architectures": [f"{name}ForCausalLM"],
            "auto_map": {"AutoConfig": f"configuration_{kind}.{name}Config"},
            "model_type": kind,
            **{"hidden_size": D, "intermediate_size": F, "num_hidden_layers": L, "num_attention_heads": H},
            **{"num_key_value_heads": Hkv, "head_dim": N, "vocab_size": V, "hidden_act": "silu", "rms_norm_eps": self.eps},
            **{"rope_theta": self.theta, "rope_scaling": None, "max_position_embeddings": 32768, "tie_word_embeddings": False},
            **{"torch_dtype": "bfloat16", "use_cache": True, "attention_bias": self.bias, "eos_token_id": 2, "bos_token_id": 0},
            **{f"lora_rank_{rank}": width for rank, width in self.ranks.items()},
        }
        if self.hxa:
            rwkv = [i for i in range(L) if i not in self.kept]
            config |= {"transformer_layers": list(self.kept), "rwkv_layers": rwkv, "rwkv_architecture": self.kind}
            config |= {"enable_qk_norm": self.qk_norm, "nope_in_transformer": True, "nope_in_rwkv": False, "use_rope": True}
            config |= {"attention_out_bias": False, "mlp_bias": False, "rope_scaling": {"rope_type": "default"}}
            if self.family == "seed_oss":
                config["base_model"] = "ByteDance-Seed/Seed-OSS-36B-Instruct"
            config |= {"residual_dropout": 0.1, "attention_dropout": 0.1, "initializer_range": 0.02}
        else:
            config |= {"use_sliding_window": False, "sliding_window": 131072, "max_window_layers": L}
            if self.family == "qwen2":
                del config["head_dim"]
        return config

    def weights(self, seed: int = 0) -> dict[str, Array]:
        """Random float32 numbers, none at its first value."""
        rng, found = np.random.default_rng(seed), {}
        for name, shape in self.shapes().items():
            near_one = name.endswith(("norm.weight", "ln_x.weight", "k_k", "k_a"))
            found[name] = (rng.standard_normal(shape) * 0.15 + near_one).astype(np.float32)
        return found


QRWKV6_7B = System(
    "QRWKV6-7B-Instruct", "rwkv6", "qwen2", (3584, 18944, 28, 28, 4, 128, 152064), {"tokenshift": 96, "decay": 96},
    facts=(675, 8_091_586_048, 49.4),
)  # fmt: skip
QRWKV7_7B = System(
    "QRWKV7-7B-Instruct", "rwkv7", "qwen2", QRWKV6_7B.sizes,
    {"decay": 96, "iclr": 96, "value_residual_mix": 64, "gate": 416}, ln_x=True, facts=(787, 7_751_292_416, 49.0),
)  # fmt: skip
HXA_RANKS = {"decay": 256, "iclr": 128, "value_residual_mix": 96, "key_residual_mix": 96, "gate": 256}
REKA = System(
    "HRWKV7-Reka-Flash3-Preview", "hxa079", "llama", (6144, 19648, 44, 64, 8, 96, 100352),
    {**HXA_RANKS, "decay": 320, "gate": 384}, (8, 15, 22, 29, 36, 43), bias=False, theta=8e6, eps=1e-5,
    facts=(969, 21_345_168_384, 85.5),
)  # fmt: skip
# Not one of the ten: the layout of Qwen3 students, whose class the authors published. Its facts are counted by hand: per layer
# q, k, v, o 41943040, low-rank pairs 2 (128 + 128 + 96 + 480) 4096, 5 vectors of 4096, r_k 4096, q/k norms 256, norms and MLP.
RWKV7_QWEN3 = System(
    "RWKV7Qwen3-8B", "rwkv7", "qwen3", (4096, 12288, 36, 32, 8, 128, 151936),
    {"decay": 128, "iclr": 128, "value_residual_mix": 96, "gate": 480}, bias=False, qk_norm=True,
    facts=(903, 2 * 151936 * 4096 + 4096 + 36 * (41943040 + 2 * 832 * 4096 + 6 * 4096 + 256 + 2 * 4096 + 3 * 4096 * 12288), 72.0),
)  # fmt: skip
SYSTEMS = [
    QRWKV6_7B,
    replace(QRWKV6_7B, name="QRWKV6-7B-Base", ranks={"tokenshift": 32, "decay": 64}, facts=(675, 8_020_938_240, 49.4)),
    replace(
        QRWKV6_7B, name="QRWKV-QwQ-32B", sizes=(5120, 27648, 64, 40, 8, 128, 152064), ranks={"tokenshift": 128, "decay": 128},
        eps=1e-5, facts=(1539, 34_947_208_192, 161.2),
    ),
    replace(
        QRWKV6_7B, name="QRWKV-72B", sizes=(8192, 29568, 80, 64, 8, 128, 152064), ranks={"tokenshift": 160, "decay": 128},
        facts=(1923, 79_295_848_448, 322.5),
    ),
    QRWKV7_7B,
    replace(QRWKV7_7B, name="QRWKV7-7B-Instruct (balanced)", ln_x=False, facts=(731, 7_751_091_712, 49.0)),
    RWKV7_QWEN3,
    REKA,
    replace(REKA, name="HRWKV7-Reka-Flash3.1-Preview"),
    System(
        "HRWKV7-hxa079-Qwen3-8B", "hxa079", "qwen3", (4096, 12288, 36, 32, 8, 128, 151936), HXA_RANKS, (32, 33, 34, 35),
        bias=False, qk_norm=True, facts=(879, 8_390_423_552, 64.0),
    ),
    System(
        "RWKV-Seed-OSS-36B-hxa07A", "hxa07a", "seed_oss", (5120, 27648, 64, 80, 8, 128, 155136),
        {"decay": 32, "iclr": 16, "gate": 64}, (6, 13, 20, 27, 33, 39, 45, 51, 57, 63), theta=1e7,
        facts=(1203, 36_245_107_712, 270.0),
    ),
]  # fmt: skip


def reference_logits(
    s: System, weights: dict[str, Array], tokens: Array, *, variant: str = "", clamp: float | None = -5.0
) -> Array:
    """Logits (T, V) in float64 by the published equations, token by token; `variant` of rwkv7, by ln_x if empty."""
    W = {name: value.astype(np.float64) for name, value in weights.items()}
    variant = variant or ("B" if s.ln_x else "C")
    x, first = W["model.embed_tokens.weight"][tokens], {}
    for i in range(s.sizes[2]):
        place = f"model.layers.{i}."
        A = {name.removeprefix(f"{place}self_attn."): value for name, value in W.items() if name.startswith(f"{place}self_attn.")}
        h = normed(x, W[f"{place}input_layernorm.weight"], s.eps)
        if i in s.kept:
            x = x + attend(s, A, h)
        elif s.kind == "rwkv6":
            x = x + mix6(s, A, h, clamp)
        else:
            x = x + mix7(s, A, h, first, variant)
        h = normed(x, W[f"{place}post_attention_layernorm.weight"], s.eps)
        gate = h @ W[f"{place}mlp.gate_proj.weight"].T
        up = h @ W[f"{place}mlp.up_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ W[f"{place}mlp.down_proj.weight"].T
    return normed(x, W["model.norm.weight"], s.eps) @ W["lm_head.weight"].T


def normed(x: Array, weight: Array, eps: float) -> Array:
    return x * weight / np.sqrt((x * x).mean(-1, keepdims=True) + eps)


def sig(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def projected(s: System, A: dict[str, Array], name: str, x: Array, norm: str = "") -> Array:
    """(T, D) to (T, heads, N)."""
    y = x @ A[f"{name}.weight"].T + A.get(f"{name}.bias", 0.0)
    y = y.reshape(len(x), -1, s.sizes[5])
    return normed(y, A[norm], s.eps) if norm in A else y


def turned(s: System, x: Array) -> Array:
    """Rotary positions 0, 1, … as complex numbers of the two halves."""
    half = x.shape[-1] // 2
    speed = s.theta ** (-np.arange(half) / half)
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * np.arange(len(x))[:, None, None] * speed)
    return np.concatenate([z.real, z.imag], -1)


def spread(s: System, x: Array) -> Array:
    """Key/value heads to query heads: each one serves its neighbours."""
    return x[:, np.arange(s.sizes[3]) // (s.sizes[3] // s.sizes[4])]


def attend(s: System, A: dict[str, Array], x: Array) -> Array:
    """Softmax attention without positions, as the hybrids have it."""
    q, k = projected(s, A, "q_proj", x, "q_norm.weight"), projected(s, A, "k_proj", x, "k_norm.weight")
    k, v = spread(s, k), spread(s, projected(s, A, "v_proj", x))
    out = np.zeros_like(q)
    for t in range(len(x)):
        scores = np.exp(np.einsum("hn,shn->hs", q[t], k[: t + 1]) / np.sqrt(s.sizes[5]))
        out[t] = np.einsum("hs,shn->hn", scores / scores.sum(-1, keepdims=True), v[: t + 1])
    return out.reshape(len(x), -1) @ A["o_proj.weight"].T


def mix6(s: System, A: dict[str, Array], x: Array, clamp: float | None) -> Array:
    """RAD-RWKV6 with token shift, full gate, balanced keys, no positions."""
    _, _, _, H, _, N, _ = s.sizes
    S, last, rows = np.zeros((H, N, N)), np.zeros(len(x[0])), []
    for now in x:
        delta = last - now
        low = np.tanh((now + delta * A["time_maa_x"][0, 0]) @ A["time_maa_w1"]).reshape(5, -1)
        r, k, v, w, g = (
            now + delta * (A[f"time_maa_{slot}"][0, 0] + low[j] @ A["time_maa_w2"][j]) for j, slot in enumerate("rkvwg")
        )
        q = projected(s, A, "q_proj", r[None])[0]
        key, value = (spread(s, projected(s, A, name, y[None]))[0] for name, y in (("k_proj", k), ("v_proj", v)))
        log_w = -np.exp(A["time_decay"][0, 0] + np.tanh(w @ A["time_decay_w1"]) @ A["time_decay_w2"])
        decay = np.exp(log_w if clamp is None else np.maximum(log_w, clamp)).reshape(H, N)
        S = decay[:, :, None] * S + (key * (1 - decay))[:, :, None] * value[:, None, :]  # key x value
        p = np.einsum("hk,hkv->hv", q, S) / np.sqrt(N)
        rows.append(A["o_proj.weight"] @ (p.reshape(-1) * sig(A["gate.weight"] @ g)))
        last = now
    return np.array(rows)


def mix7(s: System, A: dict[str, Array], x: Array, first: dict[str, Array], variant: str) -> Array:
    """RAD-RWKV7 in its three eras, hxa079 and hxa07A."""
    _, _, _, H, _, N, _ = s.sizes
    names = ("receptance", "key", "value", "output") if s.hxa else ("q_proj", "k_proj", "v_proj", "o_proj")
    r = turned(s, projected(s, A, names[0], x, "r_norm.weight" if s.hxa else "q_norm.weight"))
    k = turned(s, projected(s, A, names[1], x, "k_norm.weight"))
    v = projected(s, A, names[2], x)
    if s.kind == "hxa079" and first:
        for letter, y in (("v", v), ("k", k)):
            share = sig(A[f"{letter}0"][0, 0] + x @ A[f"{letter}1"] @ A[f"{letter}2"]).reshape(y.shape)
            y += (first[letter] - y) * share
    elif s.kind == "hxa079":
        first.update(k=k, v=v)
    k, v = spread(s, k), spread(s, v)
    split = (len(x), H, N)
    d = (A["w0"][0, 0] * (2 if s.kind == "rwkv7" and variant == "A" else 1) + np.tanh(x @ A["w1"]) @ A["w2"]).reshape(split)
    L = -np.log1p(np.exp(-d)) - 0.5
    w = np.exp(-np.exp(L))
    a = sig(A["a0"][0, 0] + x @ A["a1"] @ A["a2"]).reshape(split)
    removal, strength = k, a
    if s.kind == "rwkv7" and variant == "C":
        written = k * (1 - w + a)
    elif s.kind == "rwkv7":
        mixed = 1 + (a - 1) * A["k_a"].reshape(H, N)
        removal, written = k * A["k_k"].reshape(H, N), k * mixed
        strength = mixed if variant == "A" else a
    else:
        written = k * (1 - L + a)
    removal = removal / np.sqrt((removal**2).sum(-1, keepdims=True))
    if s.kind == "rwkv7" and first:
        v = v + (first["v"] - v) * sig(A["v0"][0, 0] + x @ A["v1"] @ A["v2"]).reshape(split)
    elif s.kind == "rwkv7":
        first["v"] = v
    S, p = np.zeros((H, N, N)), np.zeros(split)
    for t in range(len(x)):
        for h in range(H):  # value x key
            S[h] = S[h] @ (np.diag(w[t, h]) - np.outer(removal[t, h], strength[t, h] * removal[t, h]))
            S[h] += np.outer(v[t, h], written[t, h])
            p[t, h] = S[h] @ r[t, h]
    if s.ln_x:
        p = (p - p.mean(-1, keepdims=True)) / np.sqrt(p.var(-1, keepdims=True) + N * 1e-5)
        p = p * A["ln_x.weight"].reshape(H, N) + A["ln_x.bias"].reshape(H, N)
    else:
        p = p / np.sqrt(N)
    if s.kind == "hxa079":
        p = p + (r * written * A["r_k"]).sum(-1, keepdims=True) * v
    return (p.reshape(len(x), -1) * (sig(x @ A["g1"]) @ A["g2"])) @ A[f"{names[3]}.weight"].T
