"""Softmax attention with grouped key/value heads: the teacher's mixer, and that of kept layers."""

from radlads.mixers.table import Mixer, projection_rows

SOFTMAX = Mixer(
    "softmax", rows=lambda spec, layer: projection_rows(spec, recurrent=False), state=lambda spec: {}, recurrent=False
)
