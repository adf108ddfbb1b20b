"""Hugging Face folders of safetensors: ours, a teacher's, and the published layouts. Names are ours, so no rules are needed."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from radlads.families import write_config
from radlads.families.layouts import write_layout
from radlads.files import read_json, to_json
from radlads.folder import (
    CONFIG,
    CONFIG_DTYPES,
    MANIFEST,
    ModelFolder,
    inherited,
    open_folder,
    split,
    tensor_bytes,
)
from radlads.tensors import INDEX, SINGLE, Entry, Planned, layout
from radlads.weights_tools.formats.format import Output, Reading, Source, StoredTensor, Writing, manifest_of, pieces_of, refuse
from radlads.weights_tools.lazy import Lazy, stored
from radlads.weights_tools.output import OutputFile, Segment, fixed
from radlads.weights_tools.standalone import CONFIG_KEYS, ENTRIES, model_files

NAME = "hf"


def read(path: Path, reading: Reading) -> Source:
    """A model folder with float weights; R2xx where it is broken."""
    folder = open_folder(path, variant=reading.variant, config_from=reading.config)
    tensors = {name: stored(entry) for name, entry in folder.weights.items()}
    return source_of(folder, NAME, str(folder.config.get("model_type", "")), tensors, list(folder.weights.items()))


def source_of(
    folder: ModelFolder, format: str, layout: str, tensors: dict[str, Lazy], entries: Sequence[tuple[str, Entry]]
) -> Source:
    """An opened folder as a source; `entries` are the tensors that its files hold."""
    return Source(
        path=folder.path,
        format=format,
        layout=layout,
        spec=folder.spec,
        tensors=tensors,
        stored=[StoredTensor(name, entry.dtype, entry.shape, entry.path.name, entry.nbytes) for name, entry in entries],
        inputs=tuple(sorted({entry.path for _, entry in entries})),
        config=folder.config,
        files=companions(folder),
        manifest=folder.manifest,
        notices=folder.notices,
        quantised=bool(folder.quantised),
    )


def companions(folder: ModelFolder) -> dict[str, Path | bytes]:
    """Tokenizer, chat template and whatever else goes along; not our model code, which is written anew."""
    return {path.name: path for path in inherited(folder) if path.name not in ENTRIES}


def plan(source: Source, writing: Writing, key: str) -> Output:
    """A folder of the source's tensors under the same names; R205 where a published layout cannot hold the model."""
    tensors = source.in_dtype(writing.dtype)
    event = {"to": NAME, "dtype": CONFIG_DTYPES[writing.dtype or source.dtype]}
    settings, metadata = {"dtype": event["dtype"]}, {"format": "pt"}
    if writing.layout is None:
        return folder_output(source, tensors, settings, event, key, metadata)
    config, reasons = write_layout(source.spec, writing.layout, source.config)
    if reasons:
        raise refuse(source.path, writing.layout, reasons, "Leave out --layout: our own layout holds every model")
    event["layout"] = writing.layout
    output = folder_output(source, tensors, settings, event, key, metadata, config)
    code = f"configuration_{writing.layout}.py and modeling_{writing.layout}.py"
    notice = f"stock transformers needs {code} of the layout's authors in the folder; radlads needs neither"
    return replace(output, notices=(*output.notices, notice))


def folder_output(
    source: Source,
    tensors: Mapping[str, Lazy],
    settings: Mapping[str, Any],
    event: Mapping[str, Any],
    key: str,
    metadata: Mapping[str, str],
    layout: Mapping[str, Any] | None = None,
) -> Output:
    """The plan of a folder: shards, index, config.json with `settings`, companions, our model code, manifest.

    `layout` is the config of a published layout, which comes without model code, instead of ours.
    """
    planned: dict[str, Planned] = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    shards = list(split(planned))
    files: list[OutputFile] = []
    places: dict[str, str] = {}
    for number, part in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        files.append(shard_file(name, {tensor: tensors[tensor] for tensor in part}, metadata))
        places |= dict.fromkeys(part, name)

    def small_files(hashes: Mapping[str, str]) -> dict[str, bytes | Path]:
        code, code_keys = model_files(source.spec) if layout is None else ({}, {})
        config = {**(layout or base_config(source)), **source.token_ids, **code_keys, **settings}
        small: dict[str, bytes | Path] = {**source.files, **code, CONFIG: to_json(config).encode()}
        if len(shards) > 1:
            total = sum(map(tensor_bytes, planned.values()))
            small[INDEX] = to_json({"metadata": {"total_size": total}, "weight_map": places}).encode()
        small[MANIFEST] = manifest_of(source, event, key, hashes, small)
        return small

    return Output(files, small_files)


def base_config(source: Source) -> dict[str, Any]:
    """config.json from the spec. A folder's own keys stay: other programs may read what we do not."""
    written = write_config(source.spec)
    if source.config.get("model_type") != written["model_type"]:
        return written
    old = {name: value for name, value in source.config.items() if name not in (*CONFIG_KEYS, "torch_dtype")}
    return {**{name: value for name, value in old.items() if not name.startswith("quantization")}, **written}


def shard_file(name: str, tensors: Mapping[str, Lazy], metadata: Mapping[str, str]) -> OutputFile:
    """One safetensors file."""
    header, starts, _ = layout({key: (tensor.dtype, tensor.shape) for key, tensor in tensors.items()}, metadata)
    segments: list[Segment] = [fixed("header", header)]
    for key in sorted(starts, key=starts.__getitem__):
        if tensors[key].nbytes:
            segments.append(Segment(key, tensors[key].nbytes, pieces_of(tensors[key])))
    return OutputFile(name, segments)


def read_config_file(path: Path) -> dict[str, Any]:
    """The table of a config.json, or of the config.json of a folder; R201 or R204."""
    config = read_json(path / CONFIG if path.is_dir() else path)
    return config if isinstance(config, dict) else {}
