"""A model with an adapter: whether the two fit, the folder with the adapter on it, and the adapter in the other format."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from radlads.adapters import (
    CONFIG,
    Adapter,
    Settings,
    linear_modules,
    read_config,
    state_shapes,
    stored_adapter,
    write_adapter,
    write_peft,
)
from radlads.errors import fail
from radlads.files import new_folder
from radlads.folder import ModelFolder, check_ours, is_finite
from radlads.spec import ModelSpec
from radlads.states import model_fingerprint
from radlads.tensors import FLOATS, listed


def with_adapter(folder: ModelFolder, path: str | Path) -> ModelFolder:
    """The folder together with an adapter, which engines then apply. See `open_adapter`."""
    adapter = open_adapter(path, folder)
    notices = folder.notices
    if adapter.model is not None and adapter.model != model_fingerprint(folder):
        if adapter.kind in ("full", "state"):
            why = f"this {adapter.kind} adapter was made with another model"
            raise fail("R304", where=path, why=why, fix="Use it with the model that it was trained on")
        notices = (*notices, f"{path} was trained on other weights than those of {folder.path}")
    return replace(folder, adapter=adapter, notices=notices)


def open_adapter(path: str | Path, folder: ModelFolder) -> Adapter:
    """Read and check an adapter, mlx-lm's or peft's, for a model.

    Raises R201 or R202 for files that cannot be read, R204 for a bad config, R203 for tensors that do not fit the model,
    R205 for what it cannot express, R207 for values that are not finite, R304 where its content is not what it was.
    """
    path = Path(path)
    config = read_config(path)
    adapter = stored_adapter(path, config)
    check_fit(adapter, folder)
    bad = [name for name, entry in adapter.entries.items() if not is_finite(entry)]
    if bad:
        why = f"{len(bad)} tensors hold NaN or infinity: {listed(bad)}"
        raise fail("R207", where=path, why=why, fix="Train the adapter again with a lower learning rate")
    about = config.get("radlads")
    if isinstance(about, dict) and "sha256" in about and about["sha256"] != adapter.content_hash():
        why = "it is damaged: its tensors do not match the hash in its config"
        raise fail("R304", where=path, why=why, fix="Restore it from a copy, or train it again")
    return adapter


def check_fit(adapter: Adapter, folder: ModelFolder) -> None:
    """R203 unless every tensor has its place in the model, the right shape, and what belongs to it."""
    expected = dict(expected_shapes(adapter, folder.spec))
    faults = [f"{name} is unknown to the model" for name in adapter.entries if name not in expected]
    faults += [f"{name} is missing" for name in expected if name not in adapter.entries]
    for name, entry in adapter.entries.items():
        shape = entry.shape[::-1] if adapter.from_peft else entry.shape
        if entry.dtype not in FLOATS:
            faults.append(f"{name} is {entry.dtype}, not one of {', '.join(FLOATS)}")
        elif shape != expected.get(name, shape):
            faults.append(f"{name} is {list(shape)}, the model needs {list(expected[name])}")
    if adapter.kind == "full" and folder.quantised:
        faults.append("it holds whole weights, and the model is quantised")
    if faults or not adapter.entries:
        why = f"{len(faults)} faults: {listed(faults, 8)}" if faults else "it holds no tensors"
        raise fail("R203", where=adapter.path, why=why, fix="Use it with the model that it was trained on")


def expected_shapes(adapter: Adapter, spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every tensor that the adapter must hold, judged by the modules that it names."""
    rows = spec.tensors()
    if adapter.kind == "state":
        yield from state_shapes(spec).items()
        return
    if adapter.kind == "full":
        yield from ((name, rows[name].shape) for name in adapter.entries if name in rows)
        return
    for module in dict.fromkeys(name.rpartition(".")[0] for name in adapter.entries):
        layer = re.match(r"model\.layers\.(\d+)\.(.+)", module)
        if layer is None or int(layer[1]) >= spec.L or layer[2] not in linear_modules(spec, int(layer[1])):
            continue
        out, inner = rows[f"{module}.weight"].shape
        yield f"{module}.lora_a", (inner, adapter.rank)
        yield f"{module}.lora_b", (adapter.rank, out)
        if adapter.kind == "dora":
            yield f"{module}.m", (out,)


def rewrite_adapter(
    path: str | Path, output: str | Path, target: str, folder: ModelFolder, *, overwrite: bool = False
) -> Adapter:
    """Write an adapter of either format as mlx-lm's ("mlx") or peft's ("hf"), complete or not at all; the tensors stay.

    Raises as `open_adapter`, R101 for what peft has not, R401, R402.
    """
    adapter = open_adapter(path, folder)
    if overwrite:
        check_ours(Path(output), CONFIG)
    tensors, settings = adapter.tensors(), Settings(adapter.kind, folder.spec.L, adapter.rank, adapter.scale, adapter.dropout)
    with new_folder(output, overwrite=overwrite) as new:
        if target == "hf":
            write_peft(new, tensors, settings, str(folder.path))
        else:
            dtype = next(iter(adapter.entries.values())).dtype
            told = {"model": str(folder.path), "num_layers": folder.spec.L}
            write_adapter(new, tensors, settings, folder.spec, fingerprint=adapter.model, dtype=dtype, **told)
    return adapter
