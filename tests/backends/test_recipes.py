"""Every built-in recipe: teacher and student at full size, on the meta device, against the published totals."""

from functools import lru_cache

import pytest
import torch

from radlads.backends.torch.model import Model
from radlads.recipe import load_recipe, recipe_names
from radlads.spec import ModelSpec
from tests.teachers import TEACHERS

MIB = 2**20
# peers section 5: parameters, tensors, MiB of float32 state.
PUBLISHED = {
    "qrwkv6-7b-base": (8_091_586_048, 675, 49.4),
    "qrwkv6-7b-instruct": (8_091_586_048, 675, 49.4),
    "qrwkv-qwq-32b": (34_947_208_192, 1539, 161.2),
    "qrwkv6-32b-instruct": (34_947_208_192, 1539, 161.2),
    "qrwkv-72b": (79_295_848_448, 1923, 322.5),
    "qrwkv7-7b-instruct": (7_751_292_416, 787, 49.0),
    "qrwkv7-7b-instruct-2a": (7_751_091_712, 731, 49.0),
    "hrwkv7-reka-flash3": (21_345_168_384, 969, 85.5),
    "hrwkv7-reka-flash3.1": (21_345_168_384, 969, 85.5),
    "hrwkv7-hxa079-qwen3-8b": (8_390_423_552, 879, 64.0),
    "rwkv-seed-oss-36b-hxa07a": (36_245_107_712, 1203, 270.0),
}
# The teachers' own totals, as their cards and weight indices give them.
TEACHER_TOTALS = {
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/QwQ-32B": 32_763_876_352,
    "Qwen/Qwen2.5-72B-Instruct": 72_706_203_648,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "meta-llama/Meta-Llama-3-8B-Instruct": 8_030_261_248,
    "SmolLM2-135M-Instruct.Q4_1.gguf": 134_515_008,
}


@lru_cache
def on_meta(spec_name: str) -> Model:
    with torch.device("meta"):
        return Model(TEACHERS[spec_name])


def student_of(name: str) -> ModelSpec:
    recipe = load_recipe(name)
    assert recipe.teacher is not None and recipe.student is not None
    wanted = recipe.student
    return TEACHERS[recipe.teacher].as_student(wanted.arch, wanted.keep_softmax, ranks=wanted.ranks, **wanted.options)


CONVERSIONS = [name for name in recipe_names() if load_recipe(name).teacher in TEACHERS]


def test_every_recipe_is_covered() -> None:
    assert set(recipe_names()) - set(CONVERSIONS) == {"tiny", "tiny-teacher"}
    assert set(PUBLISHED) <= set(CONVERSIONS)


@pytest.mark.parametrize("name", CONVERSIONS)
def test_teacher_and_student_at_full_size(name: str) -> None:
    recipe, spec = load_recipe(name), student_of(name)
    teacher = on_meta(str(recipe.teacher))
    with torch.device("meta"):
        student = Model(spec)
    for model in (teacher, student):
        found = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        assert found == {key: row.shape for key, row in model.spec.tensors().items()}
    total = sum(tensor.numel() for tensor in student.state_dict().values())
    assert total == spec.parameters()
    if name in PUBLISHED:
        parameters, tensors, state = PUBLISHED[name]
        assert (total, len(student.state_dict())) == (parameters, tensors)
        assert spec.state_bytes() / MIB == pytest.approx(state, abs=0.051)
    if recipe.teacher in TEACHER_TOTALS:
        assert sum(tensor.numel() for tensor in teacher.state_dict().values()) == TEACHER_TOTALS[str(recipe.teacher)]


def test_the_older_ranks_of_the_published_7b_and_32b() -> None:
    teacher = TEACHERS["Qwen/Qwen2.5-7B"]
    assert teacher.as_student("rwkv6", ranks={"tokenshift": 32, "decay": 64}).parameters() == 8_020_938_240
    with pytest.raises(ValueError, match="rwkv6 has no rank 'iclr'"):
        teacher.as_student("rwkv6", ranks={"iclr": 3})
    with pytest.raises(ValueError, match="rwkv6 has no rank 'gate' with these options; it has tokenshift, decay"):
        teacher.as_student("rwkv6", ranks={"gate": 64})
