"""The register of mixer modules, one file each, with the names of radlads.mixers."""

import mlx.nn as nn

from radlads.backends.mlx.mixers.hxa import HxaMixer
from radlads.backends.mlx.mixers.rwkv6 import Rwkv6Mixer
from radlads.backends.mlx.mixers.rwkv7 import Rwkv7Mixer
from radlads.backends.mlx.mixers.softmax import SoftmaxMixer

MLX_MIXERS: dict[str, type[nn.Module]] = {
    "softmax": SoftmaxMixer,
    "rwkv6": Rwkv6Mixer,
    "rwkv7": Rwkv7Mixer,
    "hxa079": HxaMixer,
    "hxa07a": HxaMixer,
    "hxa07b": HxaMixer,
    "hxa07c": HxaMixer,
}
