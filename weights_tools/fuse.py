"""An adapter made part of a model's weights, row by row; what it does not touch is copied as it stands, quantised or not."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from radlads.adapted import with_adapter
from radlads.adapters import Adapter
from radlads.errors import fail
from radlads.folder import ModelFolder, open_folder
from radlads.quantised import KEYS
from radlads.tensors import Raw, decode
from radlads.weights_tools.convert import Conversion, write
from radlads.weights_tools.formats import hf, mlx, open_source
from radlads.weights_tools.formats.format import FINISHED, Output, Source, Writing
from radlads.weights_tools.formats.hf import folder_output
from radlads.weights_tools.lazy import Lazy, narrowed, stored
from radlads.weights_tools.output import Report


def fuse(
    model: Path | str,
    adapter_path: Path | str,
    output: Path | str,
    *,
    dequantize: bool = False,
    overwrite: bool = False,
    report: Report | None = None,
    say: Callable[[str], None],
) -> Conversion:
    """Write the model with the adapter in its weights; a quantised one stays so unless `dequantize` is set.

    R101 for a state, which is no part of the weights, R2xx for bad inputs, R304 for another model's adapter, R401, R402.
    """
    folder = with_adapter(open_folder(model), adapter_path)
    adapter = folder.adapter
    assert adapter is not None
    for notice in folder.notices:
        say(f"note: {notice}")
    if adapter.kind == "state":
        fix = f"Use it beside the model: --adapter-path {adapter_path}"
        raise fail("R101", where=adapter_path, why="a state is no part of the weights", fix=fix)
    if dequantize and not folder.quantised:
        raise fail("R101", where="--dequantize", why="the model is not quantised", fix="Leave it out")
    source = fused(open_source(model), adapter)
    if folder.quantised and not dequantize:
        plan = partial(requantised, folder=folder, adapter=adapter)
        return write(source, Path(output), mlx.NAME, plan, Writing(), overwrite=overwrite, report=report, say=say)
    return write(source, Path(output), hf.NAME, hf.plan, Writing(), overwrite=overwrite, report=report, say=say)


def fused(source: Source, adapter: Adapter) -> Source:
    """The source with the adapter in its tensors, and in its history."""
    changed = {name: with_change(tensor, name, adapter) for name, tensor in source.tensors.items()}
    about = {"kind": "fuse", "adapter": adapter.kind, "name": adapter.path.resolve().name, "sha256": adapter.content_hash()}
    old = source.manifest or {"stage": None if source.spec.recurrent is None else FINISHED}
    return replace(source, tensors=changed, manifest={**old, "history": [*old.get("history", []), about]})


def with_change(tensor: Lazy, name: str, adapter: Adapter) -> Lazy:
    """A tensor as the adapter makes it; the same one where the adapter leaves it alone."""
    if adapter.kind == "full":
        if name not in adapter.entries:
            return tensor
        new = stored(adapter.entries[name])
        return Lazy(tensor.dtype, tensor.shape, lambda a, b: narrowed(decode(new.read(a, b), new.dtype), tensor.dtype))
    module = name.removesuffix(".weight")
    if f"{module}.lora_a" not in adapter.entries:
        return tensor
    a, b = adapter.array(f"{module}.lora_a"), adapter.array(f"{module}.lora_b")
    m = adapter.array(f"{module}.m") if adapter.kind == "dora" else None
    return Lazy(tensor.dtype, tensor.shape, partial(changed_rows, tensor, a, b, m, adapter.scale), 4 * tensor.shape[1])


def changed_rows(tensor: Lazy, a: Raw, b: Raw, m: Raw | None, scale: float, start: int, stop: int) -> Raw:
    """Rows of W + scale (A B)^T, each scaled to the norm m where there is one; computed in float32, rounded once."""
    rows = decode(tensor.read(start, stop), tensor.dtype) + np.float32(scale) * (b.T[start:stop] @ a.T)
    if m is not None:
        rows *= (m[start:stop] / np.linalg.norm(rows, axis=1))[:, None]
    return narrowed(rows, tensor.dtype)


def requantised(source: Source, writing: Writing, key: str, *, folder: ModelFolder, adapter: Adapter) -> Output:
    """A quantised folder in which the adapted matrices are quantised anew, with their own bits, and all else is copied."""
    entries = dict(mlx.entries_of(folder))
    touched = {f"{module}.weight" for module in adapter.modules()}
    tensors: dict[str, Lazy] = {}
    for name, tensor in source.tensors.items():
        few = folder.quantised.get(name)
        if few is not None and name in touched:
            again = {"bits": few.bits, "group_size": few.group_size}
            tensors |= dict(mlx.quantised({name: tensor}, {name: again}))
        elif few is not None:
            stem = name.removesuffix(".weight")
            tensors |= {f"{stem}{part}": stored(entries[f"{stem}{part}"]) for part in (".weight", *mlx.PARTS)}
        else:
            tensors[name] = tensor
    kept = {name: source.config[name] for name in KEYS if name in source.config}
    return folder_output(source, tensors, {"dtype": source.config.get("dtype"), **kept}, {"to": mlx.NAME}, key, {"format": "mlx"})
