"""Every number format of GGUF against gguf-py, on random bytes: each pattern of scales and bits can occur in a file."""

import gguf
import numpy as np
import pytest

from radlads.weights_tools.formats.ggml import DECODERS


@pytest.mark.parametrize("name", DECODERS)
def test_blocks_equal_gguf_py_bit_for_bit(name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    values, nbytes = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(kind).integers(0, 256, (600, nbytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        ours = DECODERS[name](data)
        theirs = gguf.quants.dequantize(data, kind)
    nan = np.isnan(theirs)
    assert ours.shape == (600, values) and 0 < (~nan).mean() and (np.isnan(ours) == nan).all()
    assert (ours.view(np.uint32)[~nan] == theirs.reshape(ours.shape).view(np.uint32)[~nan]).all()
