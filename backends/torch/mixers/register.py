"""The register of mixer modules."""

from torch import nn

from radlads.backends.torch.mixers.hxa import HxaMixer
from radlads.backends.torch.mixers.rwkv6 import Rwkv6Mixer
from radlads.backends.torch.mixers.rwkv7 import Rwkv7Mixer
from radlads.backends.torch.mixers.softmax import SoftmaxMixer

TORCH_MIXERS: dict[str, type[nn.Module]] = {
    "softmax": SoftmaxMixer,
    "rwkv6": Rwkv6Mixer,
    "rwkv7": Rwkv7Mixer,
    "hxa079": HxaMixer,
    "hxa07a": HxaMixer,
    "hxa07b": HxaMixer,
    "hxa07c": HxaMixer,
}
