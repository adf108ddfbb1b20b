"""Recurrent layers of every published system at their real width: bfloat16 on the GPU against the published equations.

    python bench/layers.py                    # all systems on a GPU
    python bench/layers.py QRWKV-72B          # one of them
    python bench/layers.py --small --cpu      # the same at toy size, to try it out

Two recurrent layers each (the second one reads the value and key residual), random weights as large as trained ones, heads,
biases, norms and ranks of the system; vocabulary 512 and feed-forward 1024, whose code is every teacher's. A float64 copy of the
model in plain operations must equal the equations of tests/published.py, which know nothing of radlads; its gradients, and its
logits, are the reference of the bfloat16 model with the kernels. Errors are RMS(difference) / RMS(reference), the worst tensor
of the gradients is named. Beside them the same bfloat16 model with plain recurrences, which tells what rounding costs by itself:
the kernels may not be further off than 1.2 times that.
Prints one JSON line a system; exit status 1 where an error is over its limit.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from radlads.backends.torch.kernels import wkv6 as wkv6_module
from radlads.backends.torch.kernels import wkv7 as wkv7_module
from radlads.backends.torch.model import Model
from radlads.families.published import detect
from tests.published import SYSTEMS, System, reference_logits

EQUATIONS, OVER_PLAIN = 1e-5, 1.2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="SYSTEM", help=f"some of {', '.join(s.name.split()[0] for s in SYSTEMS)}")
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--small", action="store_true", help="toy sizes")
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args()
    device, sound, seen = "cpu" if options.cpu else "cuda", True, set()
    print(
        json.dumps({"device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "torch": torch.__version__}),
        flush=True,
    )
    for system in SYSTEMS:
        if options.names and system.name.split()[0] not in options.names:
            continue
        layers = two_layers(system.small() if options.small else system)
        key = str(replace(layers, name=""))
        if key not in seen:
            seen.add(key)
            sound &= measured(layers, options.tokens, device)
    return 0 if sound else 1


def two_layers(system: System) -> System:
    """The system with two recurrent layers, a small vocabulary and a small feed-forward."""
    D, F, _, H, Hkv, N, _ = system.sizes
    return replace(system, sizes=(D, min(F, 1024), 2, H, Hkv, N, 512), kept=())


def measured(system: System, length: int, device: str) -> bool:
    """Print the errors of one system; False where one is over its limit."""
    weights = random_weights(system, device)
    tokens = np.random.default_rng(1).integers(0, 512, length)
    spec = detect(system.shapes(), system.config()).spec
    arrays = {name: value.float().cpu().numpy() for name, value in weights.items()}
    wanted = reference_logits(system, arrays, tokens)
    ids = torch.from_numpy(tokens)[None].to(device)
    target = torch.randn(1, length, 512, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(device)
    exact = run(spec, weights, torch.float64, ids, target, device)
    ours = run(spec, weights, torch.bfloat16, ids, target, device)
    with plain_recurrences():
        plain = run(spec, weights, torch.bfloat16, ids, target, device)
    own, plainly = (errors(found, exact) for found in (ours, plain))
    result = {
        "system": system.name,
        "kind": system.kind,
        "width": system.sizes[0],
        "heads": [system.sizes[3], system.sizes[4], system.sizes[5]],
        "equations": relative(exact["logits"], torch.from_numpy(wanted)[None]),
        **own,
        "plain": plainly,
    }
    over = [name for name in ("logits", "gradient", "median_gradient") if not own[name] <= OVER_PLAIN * plainly[name]]
    over += [] if result["equations"] <= EQUATIONS else ["equations"]
    print(json.dumps({**rounded(result), "over": over}), flush=True)
    return not over


def rounded(value: Any) -> Any:
    """Numbers with three digits."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    return float(f"{value:.3g}") if isinstance(value, float) else value


def random_weights(system: System, device: str) -> dict[str, torch.Tensor]:
    """bfloat16: matrices that keep the size of what they read, vectors of 0.15 (norms and factors of the key around 1)."""
    rng = torch.Generator(device).manual_seed(0)
    found = {}
    for name, shape in system.shapes().items():
        near_one = name.endswith(("norm.weight", "ln_x.weight", "k_k", "k_a"))
        inputs = shape[-1] if name.endswith(".weight") else shape[-2] if len(shape) > 1 else 1
        scale = inputs**-0.5 if len(shape) > 1 and inputs > 1 and "embed" not in name and not near_one else 0.15
        found[name] = (torch.randn(shape, generator=rng, device=device) * scale + near_one).bfloat16()
    return found


def run(spec: Any, weights: dict[str, torch.Tensor], dtype: torch.dtype, ids: Any, target: Any, device: str) -> dict[str, Any]:
    """Logits, and the gradient of every tensor for a loss that weighs each logit by a number of its own."""
    with torch.device("meta"):
        model = Model(spec)
    model.load_state_dict({name: value.to(device, dtype) for name, value in weights.items()}, assign=True)
    logits = model(ids)[0]
    (logits.double() * target).sum().backward()
    grads = {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach().double().cpu(), "grads": grads}


@contextmanager
def plain_recurrences() -> Iterator[None]:
    """No kernels."""
    with patch.object(wkv6_module, "HAS_TRITON", False), patch.object(wkv7_module, "HAS_TRITON", False):
        yield


def errors(found: dict[str, Any], exact: dict[str, Any]) -> dict[str, Any]:
    """Relative errors of the logits and of the gradient that is furthest off, with its name."""
    assert found["grads"].keys() == exact["grads"].keys() and exact["grads"]
    each = {name: relative(found["grads"][name], value) for name, value in exact["grads"].items() if value.any()}
    worst = max(each, key=each.__getitem__)
    middle = float(np.median(list(each.values())))
    return {"logits": relative(found["logits"], exact["logits"]), "gradient": each[worst], "of": worst, "median_gradient": middle}


def relative(found: torch.Tensor, reference: torch.Tensor) -> float:
    """RMS(found - reference) / RMS(reference)."""
    return float((found - reference).pow(2).mean().sqrt() / reference.pow(2).mean().sqrt())


if __name__ == "__main__":
    sys.exit(main())
