"""What quantising a part of a recurrent student costs, over a long text: the policy of `Model.quant_predicate` rests on it.

Run: python bench/mlx_drift.py MODEL_FOLDER [--text FILE] [--tokens 10000] [--bits 4] [--group-size 64]
Each row quantises the named tensors and gives them back in their own type, then feeds the text in one state from start to end:
KL divergence from the model as it is (mean over the first and the last tenth, nats per token) and the relative error of all
recurrent states at the end. The low-rank and decay tensors are no layers that MLX would quantise; they are rows to compare with.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.pop(0)  # this folder, whose mlx.py would hide the package
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from radlads.backends.mlx.layers import WKV
from radlads.backends.mlx.load import load_model
from radlads.backends.mlx.model import Model
from radlads.data.documents import read_documents
from radlads.demo import resolve
from radlads.folder import open_folder
from radlads.spec import ModelSpec
from radlads.tokenizer import Tokenizer

STEP = 500
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head")


def part(*names: str) -> Callable[[str], bool]:
    """Chooses tensors by the last part of their module's name."""
    return lambda name: name.removesuffix(".weight").rpartition(".")[2] in names


def by_rows(spec: ModelSpec, bits: int) -> Callable[[str], int]:
    """The bits that `radlads convert -q` gives each tensor."""
    rows = spec.tensors()

    def width(name: str) -> int:
        how = rows[name].quantisation() if part(*MATRICES)(name) else False
        return how["bits"] if isinstance(how, dict) else bits * how

    return width


POLICIES: dict[str, Callable[[str], bool]] = {
    "all matrices": part(*MATRICES),
    **{f"only {name}": part(name) for name in MATRICES if name not in ("up_proj", "down_proj")},
    "only feed-forward": part("gate_proj", "up_proj", "down_proj"),
    "only low-rank pairs": lambda name: name[-2:] in ("w1", "w2", "a1", "a2", "v1", "v2", "g1", "g2"),
    "all but k_proj": part(*(name for name in MATRICES if name != "k_proj")),
    "all but o_proj": part(*(name for name in MATRICES if name != "o_proj")),
    "all but gate": part(*(name for name in MATRICES if name != "gate")),
    "all but embedding": part(*MATRICES[:-2]),
}


def quantised(model: Model, chosen: Callable[[str], int], bits: int, group: int, bits_of_rest: int) -> tuple[Model, float]:
    """A copy with the chosen matrices rounded to `bits` (or to the number chosen), the other matrices to `bits_of_rest`
    (0: not), and bits per weight.
    """
    stored, total, weights = 0.0, 0, []
    for name, x in tree_flatten(model.parameters()):
        choice = chosen(name)
        wanted = (bits if choice is True else choice) if choice else bits_of_rest if part(*MATRICES)(name) else 0
        if x.ndim == 2 and x.shape[-1] % group == 0 and wanted:
            x = mx.dequantize(*mx.quantize(x, group, wanted), group_size=group, bits=wanted).astype(x.dtype)
            stored += x.size * (wanted + 32 / group)
        else:
            stored += 16 * x.size
        total += x.size
        weights.append((name, x))
    copy = Model(model.args)
    copy.update(tree_unflatten(weights))
    copy.eval()
    return copy, stored / total


def log_probabilities(model: Model, tokens: mx.array) -> tuple[mx.array, list[mx.array]]:
    """Log-probabilities (T, V) of the whole text, and the recurrent states after it."""
    caches, parts = model.make_cache(), []
    for first in range(0, tokens.size, STEP):
        logits = model(tokens[None, first : first + STEP], caches)[0].astype(mx.float32)
        parts.append(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        mx.eval(parts[-1])
    states = [cache[WKV] for cache, mixer in zip(caches, model.spec.mixers, strict=True) if mixer != "softmax"]
    return mx.concatenate(parts), states


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", default="tiny-valid.txt.xz", help="a text file; the default is the demo's held-out text")
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--rest", type=int, default=0, help="bits of the matrices that a row does not name; 0 leaves them")
    parser.add_argument("--rows", default=",".join(["the policy", *POLICIES]), help="rows to measure, comma-separated")
    options = parser.parse_args()
    folder = open_folder(options.model)
    model, tokenizer = load_model(folder, "float32"), Tokenizer(options.model)
    ids: list[int] = []
    for piece in read_documents(resolve(options.text), None, lambda _: None):
        ids += tokenizer.encode(piece.content) if isinstance(piece.content, str) else []
        if len(ids) >= options.tokens:
            break
    tokens = mx.array(ids[: options.tokens])
    exact, states = log_probabilities(model, tokens)
    tenth = tokens.size // 10
    print(f"{options.model.name}, {tokens.size} tokens, {options.bits} bits, groups of {options.group_size}, rest {options.rest}")
    print(f"{'quantised':26s} {'bits/weight':>11s} {'KL first':>9s} {'KL last':>9s} {'state error':>11s}")
    for name in options.rows.split(","):
        chosen = POLICIES[name] if name in POLICIES else by_rows(model.spec, options.bits)
        copy, width = quantised(model, chosen, options.bits, options.group_size, options.rest)
        found, ends = log_probabilities(copy, tokens)
        kl = np.array((mx.exp(exact) * (exact - found)).sum(-1))
        off = sum(((x - y) ** 2).sum() for x, y in zip(states, ends, strict=True))
        error = float(mx.sqrt(off / sum((y**2).sum() for y in states)))
        print(f"{name:26s} {width:11.2f} {kl[:tenth].mean():9.4f} {kl[-tenth:].mean():9.4f} {error:11.4f}", flush=True)


if __name__ == "__main__":
    main()
