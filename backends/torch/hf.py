"""The model as a transformers model: cache and generation. Entry of the file that converted folders carry."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from radlads.backends.torch.hf_config import RadladsConfig
from radlads.backends.torch.model import Decoder
from radlads.backends.torch.state import ModelState


class RadladsCache(Cache):
    """The state of a batch: of constant size per row, but for softmax layers that were kept."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.state: ModelState | None = None
        self.length = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions fed so far, padding included."""
        return self.length

    @property
    def is_compileable(self) -> bool:
        """It is no static cache."""
        return False

    @property
    def is_croppable(self) -> bool:
        """A recurrent state cannot forget its last tokens."""
        return False

    def reset(self) -> None:
        """Back to the state before the first token."""
        self.state, self.length = None, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Always refused: recompute from the beginning, or keep a copy of the cache."""
        raise ValueError("a recurrent state cannot be cropped; keep a copy of it instead")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in the order of `beam_idx`."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """The rows `indices`, of every array."""
        if self.state is not None:
            rows = indices.to(self.state.seen.device)
            layers = tuple({name: value[rows] for name, value in layer.items()} for layer in self.state.layers)
            real = None if self.state.real is None else self.state.real[rows]
            self.state = replace(self.state, layers=layers, seen=self.state.seen[rows], real=real)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        if self.state is not None:
            rows = torch.arange(len(self.state.seen), device=self.state.seen.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))


class RadladsForCausalLM(PreTrainedModel, GenerationMixin):
    """A converted model in transformers."""

    config_class = RadladsConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = False
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012 - transformers reads a list
    _supports_sdpa = True
    _is_stateful = True

    def __init__(self, config: RadladsConfig) -> None:
        super().__init__(config)
        spec = config.spec()
        self.model = Decoder(spec)
        if not spec.tie_embeddings:
            self.lm_head = nn.Linear(spec.D, spec.V, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: every tensor of a converted model stands in its file."""

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module | None:
        """The head, None where it is the embedding."""
        return getattr(self, "lm_head", None)

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *_: Any) -> None:
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = RadladsCache()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: RadladsCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V) of token ids (B, T); attention_mask (B, past + T) marks padding with 0; labels as in transformers."""
        if past_key_values is None and use_cache:
            past_key_values = RadladsCache()
        mask = None if attention_mask is None else attention_mask[:, -input_ids.shape[1] :].bool()
        if mask is not None and bool(mask.all()):
            mask = None
        hidden, state = self.model(input_ids, None if past_key_values is None else past_key_values.state, mask)
        if past_key_values is not None:
            past_key_values.state = state
            past_key_values.length += input_ids.shape[1]
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        head = self.lm_head if hasattr(self, "lm_head") else self.model.embed_tokens
        logits = F.linear(hidden[:, kept], head.weight)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
