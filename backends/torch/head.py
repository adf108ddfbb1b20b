"""A head of its own for a model whose head is its embedding, and back (protocol section 1.9)."""

from dataclasses import replace

import torch

from radlads.backends.torch.model import Model

HEAD = "lm_head.weight"


def untied(model: Model) -> Model:
    """The same model with a head of its own that begins as a copy of the embedding."""
    return rebuilt(model, tied=False, head={HEAD: model.head.detach().clone()})


def retied(model: Model) -> Model:
    """The same model with the embedding as its head; the head of its own is dropped."""
    return rebuilt(model, tied=True, head={})


def rebuilt(model: Model, tied: bool, head: dict[str, torch.Tensor]) -> Model:
    """A model over the same tensors, but for the head."""
    with torch.device("meta"):
        made = Model(replace(model.spec, tie_embeddings=tied))
    body = {name: tensor for name, tensor in model.state_dict().items() if name != HEAD}
    made.load_state_dict({**body, **head}, assign=True)
    return made.train(model.training)
