"""config.json of a converted model for transformers, in a file of its own: reading it must not need PyTorch."""

from transformers import PreTrainedConfig

from radlads.spec import ModelSpec


class RadladsConfig(PreTrainedConfig):
    """config.json of a converted model; the spec stands under the key "radlads"."""

    model_type = "radlads"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - transformers reads a list

    def spec(self) -> ModelSpec:
        """Dimensions and mixers. ValueError when the key is missing or damaged."""
        return ModelSpec.from_dict(self.radlads)
