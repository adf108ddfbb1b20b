"""A converted folder in stock transformers, with nothing of radlads but its shipped files."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from radlads.backends.torch.load import load_model
from radlads.folder import ModelFolder, open_folder
from radlads.tensors import Raw
from radlads.weights_tools.standalone import model_files
from radlads.weights_tools.surgery import make_student
from tests.models import rewrite, tiny_teacher

FLAGS = {
    "rwkv7": ("rwkv7", (), {}),
    "rwkv7-B": ("rwkv7", (), {"variant": "B"}),
    "rwkv6": ("rwkv6", (), {}),
    "rwkv7-hybrid": ("rwkv7", (1,), {}),
    "rwkv6-hybrid": ("rwkv6", (0,), {}),
    "hxa079-hybrid": ("hxa079", (1,), {}),
}


@pytest.fixture(scope="module", params=FLAGS, ids=list(FLAGS))
def student(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    arch, kept, options = FLAGS[request.param]
    path = tmp_path_factory.mktemp("hf")
    teacher = open_folder(tiny_teacher(path / "teacher", "qwen3", tie_embeddings=request.param == "rwkv7"))
    files, keys = model_files(teacher.spec.as_student(arch, kept, **options))
    made = make_student(
        teacher, path / "student", arch=arch, keep_softmax=kept, options=options, extra_files=files, config_extra=keys
    )
    perturb(made)
    return open_folder(made.path)


def perturb(folder: ModelFolder) -> None:
    """Move every tensor off its first value, so that each one counts."""
    rng = np.random.default_rng(3)

    def move(stored: dict[str, tuple[str, Raw]]) -> None:
        for name, (dtype, raw) in stored.items():
            stored[name] = (dtype, (raw + 0.02 * rng.standard_normal(raw.shape)).astype(raw.dtype))

    rewrite(folder.path, move)


@pytest.fixture(scope="module")
def stock(student: ModelFolder) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(student.path, trust_remote_code=True, dtype=torch.float32).eval()


@torch.no_grad()
def test_logits_are_bit_equal(student: ModelFolder, stock: torch.nn.Module) -> None:
    tokens = torch.randint(0, 300, (2, 33), generator=torch.Generator().manual_seed(0))
    assert torch.equal(stock(tokens).logits, load_model(student)(tokens)[0])
    assert not type(stock).__module__.startswith("radlads.")


@torch.no_grad()
def test_generate_with_cache_equals_without(stock: torch.nn.Module) -> None:
    tokens = torch.randint(3, 300, (1, 9), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(stock.generate(tokens, **options), stock.generate(tokens, use_cache=False, **options))


@torch.no_grad()
def test_left_padded_batch_equals_alone(stock: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    long, short = torch.randint(3, 300, (1, 15), generator=generator), torch.randint(3, 300, (1, 6), generator=generator)
    batch = torch.cat([long, torch.cat([torch.zeros(1, 9, dtype=torch.long), short], 1)])
    mask = torch.ones_like(batch)
    mask[1, :9] = 0
    options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    together = stock.generate(batch, attention_mask=mask, **options)
    assert torch.equal(together[0], stock.generate(long, **options)[0])
    assert torch.equal(together[1, 9:], stock.generate(short, **options)[0])


@torch.no_grad()
def test_beams_move_every_array(stock: torch.nn.Module) -> None:
    tokens = torch.randint(3, 300, (2, 8), generator=torch.Generator().manual_seed(4))
    options = {"max_new_tokens": 10, "do_sample": False, "num_beams": 3, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(stock.generate(tokens, **options), stock.generate(tokens, use_cache=False, **options))


def test_loss_has_a_gradient(stock: torch.nn.Module) -> None:
    tokens = torch.randint(3, 300, (1, 8))
    loss = stock(tokens, labels=tokens).loss
    (gradient,) = torch.autograd.grad(loss, [stock.model.embed_tokens.weight])
    assert torch.isfinite(loss) and gradient.abs().sum() > 0


@pytest.mark.parametrize("student", ["rwkv7", "hxa079-hybrid"], indirect=True)
def test_needs_no_radlads(student: ModelFolder, tmp_path: Path) -> None:
    """In a process where radlads cannot be imported."""
    code = f"""
import sys
sys.modules["radlads"] = None
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
path = {str(student.path)!r}
AutoConfig.from_pretrained(path, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(path)
out = model.generate(**tokenizer("Once upon", return_tensors="pt"), max_new_tokens=4, do_sample=False, pad_token_id=0)
print("WROTE", out.shape[1] > 4)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert "WROTE True" in done.stdout, done.stderr


def test_loading_a_folder_leaves_the_package_its_operators(stock: torch.nn.Module) -> None:
    from radlads.backends.torch.kernels import wkv6, wkv7

    shipped = sys.modules[type(stock).__module__]
    for module, name in ((wkv6, "wkv6_forward"), (wkv7, "wkv7_forward")):
        ours, theirs = getattr(module, f"{name}_op"), getattr(shipped, f"{name}_op")
        assert ours._opoverload.name() == f"radlads::{name}"
        assert theirs._opoverload.name().startswith("radlads_") and theirs._opoverload is not ours._opoverload
