"""Teacher folder to step-0 student folder: the teacher's tensors bit for bit, first values for the new ones.

numpy only, tensor by tensor. Training starts from the folder; protocol section 1.2 is the method.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from radlads.errors import fail
from radlads.folder import ModelFolder, save_folder
from radlads.inits import first_values, layer_of
from radlads.mixers import MIXERS
from radlads.provenance import teacher_record
from radlads.spec import ModelSpec
from radlads.tensors import Named, decode, encode, read_raw

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
UNSCALED = (1.0, 1.0, 1.0, 1.0)


def make_student(
    teacher: ModelFolder,
    output_dir: Path | str,
    *,
    arch: str,
    keep_softmax: Sequence[int] = (),
    options: Mapping[str, Any],
    seed: int = 1337,
    extra_files: Mapping[str, bytes] | None = None,
    config_extra: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    untie: bool = False,
    ranks: Mapping[str, int] | None = None,
    transfer_scale: Sequence[float] = UNSCALED,
    reinit: bool = False,
) -> ModelFolder:
    """Write the untrained student of a teacher: `arch` in every layer but `keep_softmax`.

    `options` are fields of MixerOptions; `untie` gives a tied teacher's student a head of its own, equal to the embedding.
    `ranks` override the widths of low-rank pairs, `transfer_scale` multiplies q, k, v, o (biases too) of the converted
    layers (protocol section 3.5), with `reinit` they begin at random (an ablation, section 1.2). R101 bad choice, R103 not
    a teacher, R207 non-finite teacher, R401 or R402 output.
    """
    spec = student_spec(teacher, arch, keep_softmax, options, ranks)
    scales = tensor_scales(spec, transfer_scale)
    if untie:
        spec = replace(spec, tie_embeddings=False)
    teacher.check_finite()
    copied = copies(teacher, spec)
    choice = {"arch": arch, "keep_softmax": list(spec.kept_layers), "options": dict(options), "seed": seed}
    if scales:
        choice["transfer_scale"] = list(transfer_scale)
    fresh = projections(spec) if reinit else {}
    if fresh:
        choice["reinit"] = True
        copied = {name: origin for name, origin in copied.items() if name not in fresh}
    record = {
        "stage": 0,
        "teacher": teacher_record(teacher),
        "student": choice,
        "history": [{"stage": 0, "kind": "init", "seed": seed}],
    }
    return save_folder(
        output_dir,
        spec=spec,
        tensors=student_tensors(teacher, spec, copied, seed, scales, fresh),
        source=teacher,
        dtype=teacher.dtype,
        dtypes={name: teacher.weights[origin].dtype for name, origin in copied.items()},
        manifest=record,
        extra_files=extra_files,
        config_extra=config_extra,
        overwrite=overwrite,
    )


def student_spec(
    teacher: ModelFolder,
    arch: str,
    keep_softmax: Sequence[int],
    options: Mapping[str, Any],
    ranks: Mapping[str, int] | None = None,
) -> ModelSpec:
    """The student's spec; R103 if the folder holds a student already, R101 for a choice that is not possible."""
    if teacher.spec.recurrent is not None:
        why = f"it is a student already ({teacher.spec.recurrent})"
        raise fail("R103", where=teacher.path, why=why, fix="Give the softmax-attention teacher")
    if teacher.quantised:
        fix = "Give the unquantised teacher, or dequantise it with `radlads convert --to hf`"
        raise fail("R205", where=teacher.path, why="its weights are quantised and a student is made of floats", fix=fix)
    try:
        return teacher.spec.as_student(arch, tuple(sorted(set(keep_softmax))), ranks=dict(ranks or {}), **options)
    except ValueError as error:
        fix = "Correct --student-arch, --keep-softmax or --set student.*"
        raise fail("R101", where="student", why=str(error), fix=fix) from None


def copies(teacher: ModelFolder, spec: ModelSpec) -> dict[str, str]:
    """Student tensor -> teacher tensor for all that are taken over; an untied head comes from the embedding."""
    rows = spec.tensors()
    names = {name: row.origin(name) for name, row in rows.items() if row.copied}
    if HEAD in names and HEAD not in teacher.weights:
        names[HEAD] = EMBEDDING
    return names


def projections(spec: ModelSpec) -> dict[str, str]:
    """q, k, v and o of the converted layers (biases too), by name: the letter of each."""
    found = {}
    for name, row in spec.tensors().items():
        place, _, own = name.rpartition(".self_attn.")
        if place and row.copied and MIXERS[spec.mixers[layer_of(name)]].recurrent and "norm" not in row.origin(own):
            found[name] = row.origin(own)[0]
    return found


def tensor_scales(spec: ModelSpec, factors: Sequence[float]) -> dict[str, float]:
    """Factor of each tensor that is not taken over as it is; R101 unless there are four finite factors, for q, k, v, o."""
    if len(factors) != 4 or not all(math.isfinite(factor) for factor in factors):
        why, fix = "it needs four numbers, for q, k, v and o", "Write for example 1,1,0.3,0.5"
        raise fail("R101", where="transfer_scale", why=why, fix=fix)
    by_letter = dict(zip("qkvo", map(float, factors), strict=True))
    return {name: by_letter[letter] for name, letter in projections(spec).items() if by_letter[letter] != 1.0}


def student_tensors(
    teacher: ModelFolder,
    spec: ModelSpec,
    copied: Mapping[str, str],
    seed: int,
    scales: Mapping[str, float],
    fresh: Mapping[str, str],
) -> Iterator[Named]:
    """(name, dtype, raw bits) of every student tensor in the spec's order; new ones in the teacher's main dtype."""
    dtype = teacher.dtype
    for name, row in spec.tensors().items():
        if name in fresh:
            # What nn.Linear begins with: uniform within 1 / sqrt(inputs).
            bound = 0.0 if name.endswith("bias") else row.shape[1] ** -0.5
            yield name, dtype, encode(first_values(name, replace(row, init=f"uniform:{bound}"), spec, seed), dtype)
        elif name in scales:
            entry = teacher.weights[copied[name]]
            yield name, entry.dtype, encode(decode(read_raw(entry), entry.dtype) * np.float32(scales[name]), entry.dtype)
        elif name in copied:
            entry = teacher.weights[copied[name]]
            yield name, entry.dtype, read_raw(entry)
        else:
            yield name, dtype, encode(first_values(name, row, spec, seed), dtype)
