"""The register of mixers."""

from radlads.mixers.hxa import HXA07A, HXA07B, HXA07C, HXA079
from radlads.mixers.rwkv6 import RWKV6
from radlads.mixers.rwkv7 import RWKV7
from radlads.mixers.softmax import SOFTMAX
from radlads.mixers.table import Mixer

MIXERS: dict[str, Mixer] = {mixer.name: mixer for mixer in (SOFTMAX, RWKV6, RWKV7, HXA079, HXA07A, HXA07B, HXA07C)}
