"""Matrices of few bits in a folder, as MLX stores them: words with a scale and a bias for each group of a row."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from radlads.errors import fail
from radlads.tensors import FLOATS, Entry

KEYS = ("quantization", "quantization_config")  # of config.json; mlx-lm writes both, with the same table
BITS, GROUP_SIZES = (2, 3, 4, 5, 6, 8), (32, 64, 128)
AGAIN = "Quantise the model again"


@dataclass(frozen=True)
class Quantised:
    """How a matrix (n, m) is stored: beside its words (n, m bits / 32) the scales and biases (n, m / group_size)."""

    scales: Entry
    biases: Entry
    bits: int
    group_size: int


def settings_of(where: Path, config: object) -> dict[str, Any]:
    """The table of the quantisation in a config, empty where there is none; R205 for another kind than MLX's affine one."""
    given = [config[key] for key in KEYS if config.get(key) is not None] if isinstance(config, dict) else []
    if not given:
        return {}
    settings = given[0]
    if not isinstance(settings, dict) or settings.get("mode", "affine") != "affine" or "quant_method" in settings:
        raise fail("R205", where=where, why="the quantisation is not MLX's affine one", fix="Use the unquantised model")
    check_widths(where, "the quantisation", settings)
    return settings


def check_widths(where: Path, what: str, settings: Mapping[str, Any]) -> None:
    """R205 unless the bits and the group size are among those that MLX has."""
    bits, group = settings.get("bits"), settings.get("group_size")
    if type(bits) is not int or type(group) is not int or bits not in BITS or group not in GROUP_SIZES:
        why = f"{what} has {bits!r} bits in groups of {group!r}; bits are {BITS}, groups {GROUP_SIZES}"
        raise fail("R205", where=where, why=why, fix="Use the unquantised model")


def take_quantised(path: Path, settings: Mapping[str, Any], stored: dict[str, Entry]) -> dict[str, Quantised]:
    """The quantised matrices of a folder by name; their scales and biases are taken out of `stored`. R203, R205."""
    found = {}
    for name in [name for name, entry in stored.items() if entry.dtype == "U32" and settings]:
        stem = name.removesuffix(".weight")
        own = {**settings, **settings[stem]} if isinstance(settings.get(stem), dict) else settings
        check_widths(path, stem, own)
        bits, group = own["bits"], own["group_size"]
        scales, biases, words = stored.pop(f"{stem}.scales", None), stored.pop(f"{stem}.biases", None), stored[name]
        shape = (words.shape[0], words.shape[1] * 32 // bits // group) if len(words.shape) == 2 else None
        whole = shape is not None and shape[1] * group * bits == words.shape[1] * 32
        if not whole or scales is None or biases is None or scales.shape != shape or biases.shape != shape:
            why = f"the words, scales and biases of {stem} do not fit together at {bits} bits in groups of {group}"
            raise fail("R203", where=path, why=why, fix=AGAIN)
        if scales.dtype not in FLOATS or biases.dtype != scales.dtype:
            raise fail("R203", where=path, why=f"the scales or biases of {stem} are no floats of one type", fix=AGAIN)
        found[name] = Quantised(scales, biases, bits, group)
    return found
