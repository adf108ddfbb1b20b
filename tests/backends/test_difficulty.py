"""Difficulty of layers against the same numbers from whole models with one layer exchanged."""

import pytest
import torch

from radlads.backends.torch.difficulty import layer_difficulty
from radlads.backends.torch.objectives import alignment_errors
from radlads.difficulty import COLUMNS, hardest_first, read_difficulty, suggested, write_difficulty
from radlads.errors import RadladsError
from tests.backends.test_torch_model import model_of, random_weights
from tests.models import tiny_spec


def test_each_layer_alone() -> None:
    teacher_spec = tiny_spec("qwen3", num_layers=3)
    weights = random_weights(teacher_spec)
    teacher = model_of(teacher_spec, weights)
    spec = teacher_spec.as_student("rwkv6")
    values = {**random_weights(spec), **weights}
    student = model_of(spec, values)
    samples = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(1))
    found = layer_difficulty(student, teacher, samples)
    ids = samples[:, :-1]
    errors = alignment_errors(student, teacher, ids)
    assert [row.error for row in found] == pytest.approx(errors.tolist(), rel=1e-5)
    target = teacher(ids)[0].double().log_softmax(-1)
    for row in found:
        kept = tuple(layer for layer in range(3) if layer != row.layer)
        alone = teacher_spec.as_student("rwkv6", kept)
        hybrid = model_of(alone, {name: values[name] for name in alone.tensors()})
        log_p = hybrid(ids)[0].double().log_softmax(-1)
        assert row.kl == pytest.approx((target.exp() * (target - log_p)).sum(-1).mean().item(), rel=1e-4)
    outputs: list[torch.Tensor] = []
    hook = teacher.model.layers[0].self_attn.register_forward_hook(lambda m, i, o: outputs.append(o[0]))
    teacher(ids)
    hook.remove()
    assert 0 < found[0].relative and found[0].error < found[0].relative * outputs[0].norm(dim=-1).max() * spec.D**-0.5 + 1e-6


def test_the_record_and_what_it_suggests(tmp_path) -> None:
    rows = [dict(zip(COLUMNS, values, strict=True)) for values in ((0, 1.0, 0.5, 9.0), (1, 2.0, 0.1, 0.1), (2, 0.1, 0.9, 3.0))]
    write_difficulty(tmp_path, rows)
    assert (tmp_path / "difficulty.csv").read_text().splitlines()[:2] == ["layer,error,relative,kl", "0,1.0,0.5,9.0"]
    assert read_difficulty(tmp_path) == rows
    assert hardest_first(rows) == [2, 1]  # never layer 0
    assert suggested(rows, 2) == [1, 2]
    with pytest.raises(RadladsError, match="R201"):
        read_difficulty(tmp_path / "elsewhere")
