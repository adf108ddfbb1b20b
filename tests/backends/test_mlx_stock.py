"""Stock mlx-lm's own commands on a converted folder, each through its main function in this process."""

import json
import sys
import threading
import urllib.request
from http.server import ThreadingHTTPServer
from importlib import import_module

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.callbacks import TrainingCallback

from radlads.folder import open_folder, save_folder
from radlads.tensors import encode
from radlads.weights_tools.standalone import model_files
from radlads.weights_tools.surgery import make_student
from tests.backends.test_mlx_model import random_tensor
from tests.models import tiny_teacher

PROMPT = "Once upon a time there was"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A hybrid student with the shipped MLX file, every tensor moved away from its first value."""
    path = tmp_path_factory.mktemp("stock")
    teacher = open_folder(tiny_teacher(path / "teacher", intermediate_size=64))
    first = make_student(teacher, path / "first", arch="rwkv7", keep_softmax=(1,), options={})
    rng = np.random.default_rng(4)
    moved = ((name, "F32", encode(random_tensor(name, row.shape, rng), "F32")) for name, row in first.spec.tensors().items())
    files, extra = model_files(first.spec)
    save_folder(
        path / "student", spec=first.spec, tensors=moved, source=first, dtype="F32", manifest={"stage": 0},
        extra_files=files, config_extra=extra,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(path / "modules"))
        patch.setattr("sys.path", list(sys.path))
        yield path / "student"


@pytest.fixture
def uncompiled():
    """On a CPU, mlx.compile runs a C++ compiler for each piece of a training step, which takes minutes."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs a command of mlx-lm as its script would, and returns what it printed."""

    def main(command, *arguments):
        monkeypatch.setattr("sys.argv", [f"mlx_lm.{command}", *map(str, arguments), "--trust-remote-code"])
        import_module(f"mlx_lm.{command}").main()
        return capsys.readouterr().out

    return main


def load(path):
    return mlx_lm.load(str(path), trust_remote_code=True, tokenizer_config={"trust_remote_code": True})


def greedy(path, count=8):
    """What the folder writes after PROMPT."""
    model, tokenizer = load(path)
    return mlx_lm.generate(model, tokenizer, tokenizer.encode(PROMPT), max_tokens=count)


def test_generate_with_and_without_a_cached_prompt(folder, run, tmp_path):
    plain = ("--model", folder, "-m", 8, "--temp", 0, "--ignore-chat-template")
    written = run("generate", *plain, "--prompt", PROMPT)
    assert greedy(folder) in written
    cache = tmp_path / "cache.safetensors"
    run("cache_prompt", "--model", folder, "--prompt", PROMPT, "--prompt-cache-file", cache)
    again = [run("generate", *plain, "--prompt", "x", "--prompt-cache-file", cache, "--verbose", "False") for _ in range(2)]
    assert again[0] == again[1] != ""


def test_chat_answers_and_leaves(folder, run, monkeypatch):
    said = iter(["Hello", "r", "And then?", "q"])
    monkeypatch.setattr("builtins.input", lambda *_: next(said))
    assert run("chat", "--model", folder, "-m", 6)
    assert next(said, None) is None


def test_benchmark_and_perplexity(folder, run, tmp_path):
    assert "generation_tps" in run("benchmark", "--model", folder, "-p", 16, "-g", 4, "-b", 2, "-n", 1)
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({"text": f"{PROMPT} a cat, number {n}. " * 4}) for n in range(4)))
    printed = run("perplexity", "--model", folder, "--data-path", tmp_path, "--sequence-length", 24, "--num-samples", 2)
    assert "Perplexity" in printed and "Total tokens: 48" in printed


def test_convert_quantises_and_the_result_generates(folder, run, tmp_path):
    printed = run("convert", "--hf-path", folder, "--mlx-path", tmp_path / "q", "-q", "--q-group-size", 32)
    assert "bits per weight" in printed
    model, _ = load(tmp_path / "q")
    quantised = {name.removesuffix(".scales") for name, _ in tree_flatten(model.parameters()) if name.endswith(".scales")}
    parts = {name.rpartition(".")[2] for name in quantised}
    assert {"q_proj", "up_proj", "embed_tokens"} <= parts and not parts & {"w1", "w2", "g1", "g2", "a1", "a2"}
    assert isinstance(greedy(tmp_path / "q"), str)


def test_lora_learns_and_fuse_gives_the_same_model(folder, run, tmp_path, monkeypatch, uncompiled):
    lines = [json.dumps({"text": "the cat and the house by the sea " * 2})] * 4
    for name in ("train", "valid"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    adapters = tmp_path / "adapters"
    losses = []

    class Recorder(TrainingCallback):
        def on_train_loss_report(self, train_info):
            losses.append(train_info["train_loss"])

    monkeypatch.setattr("mlx_lm.lora.get_reporting_callbacks", lambda *_, **__: Recorder())
    run(
        "lora", "--model", folder, "--train", "--data", tmp_path, "--iters", 4, "--batch-size", 1, "--num-layers", 2,
        "--steps-per-report", 1, "--steps-per-eval", 100, "--learning-rate", 1e-3, "--adapter-path", adapters,
    )  # fmt: skip
    assert len(losses) == 4 and losses[-1] < losses[0]
    run("fuse", "--model", folder, "--adapter-path", adapters, "--save-path", tmp_path / "fused")
    tokens = mx.array([[5, 6, 7, 8]])
    adapted, _ = mlx_lm.load(
        str(folder), adapter_path=str(adapters), trust_remote_code=True, tokenizer_config={"trust_remote_code": True}
    )
    fused, plain = load(tmp_path / "fused")[0](tokens), load(folder)[0](tokens)
    assert mx.allclose(fused, adapted(tokens), rtol=0, atol=1e-4) and not mx.allclose(fused, plain, rtol=0, atol=1e-2)


def test_server_answers_two_chats_at_once(folder, run, monkeypatch):
    answers, serve = {}, ThreadingHTTPServer.serve_forever

    def ask(server, text):
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 6, "temperature": 0}
        address = f"http://127.0.0.1:{server.server_address[1]}/v1/chat/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as reply:
            answers[text] = json.loads(reply.read())["choices"][0]["message"]["content"]

    def asked(server):
        def clients():
            threads = [threading.Thread(target=ask, args=(server, text)) for text in ("Hello", "A longer question, by far")]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            server.shutdown()

        threading.Thread(target=clients).start()
        serve(server)
        raise KeyboardInterrupt

    monkeypatch.setattr(ThreadingHTTPServer, "serve_forever", asked)
    run("server", "--model", folder, "--port", 0)
    model, tokenizer = load(folder)
    for text, answer in answers.items():
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
        assert mlx_lm.generate(model, tokenizer, prompt, max_tokens=6).startswith(answer)
    assert len(answers) == 2


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_folder_opens_here_as_in_stock_mlx_lm(folder, tmp_path, bits):
    from radlads.backends import open_engine
    from radlads.errors import RadladsError
    from radlads.folder import open_folder
    from radlads.states import model_fingerprint

    mlx_lm.convert(str(folder), str(tmp_path / "q"), quantize=True, q_bits=bits, q_group_size=32, trust_remote_code=True)
    opened = open_folder(tmp_path / "q")
    assert opened.quantised and opened.dtype in ("F32", "BF16") and opened.check_finite() == []
    engine, (stock, _) = open_engine(opened, "mlx", dtype="float32"), load(tmp_path / "q")
    stock.update(tree_map(lambda x: x.astype(mx.float32) if mx.issubdtype(x.dtype, mx.floating) else x, stock.parameters()))
    ids = list(range(5, 30))
    found, _ = engine.feed(engine.start(), ids)
    wanted = np.array(stock(mx.array([ids]))[0, -1])
    assert np.abs(found - wanted).max() <= 1e-5
    assert model_fingerprint(opened) != model_fingerprint(open_folder(folder))
    with pytest.raises(RadladsError, match="radlads convert --to hf"):
        open_engine(opened, "torch")
