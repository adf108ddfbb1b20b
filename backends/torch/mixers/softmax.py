"""Softmax attention, equations S.1-S.5 of docs/mixers.md."""

import torch
import torch.nn.functional as F
from torch import Tensor

from radlads.backends.torch.layers import Projections
from radlads.backends.torch.state import LayerState, MixContext
from radlads.spec import ModelSpec


class SoftmaxMixer(Projections):
    """The teacher's attention; its state is the keys and values of all tokens so far."""

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__(spec)

    def forward(self, x: Tensor, context: MixContext, state: LayerState) -> tuple[Tensor, LayerState]:
        """x (B, T, D) to the output (B, T, D) and the state with the new keys and values (B, S, Hkv, N)."""
        q, k, v = self.project(x, x, x, context.cos_sin if self.spec.mixer.kept_rope else None)
        if state:
            k, v = torch.cat([state["k"], k], 1), torch.cat([state["v"], v], 1)
        visible = context.visible
        p = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=visible,
            is_causal=visible is None and q.shape[1] > 1,
            enable_gqa=self.spec.H != self.spec.Hkv,
        )
        return self.output_of(p.transpose(1, 2).flatten(2)), {"k": k, "v": v}
