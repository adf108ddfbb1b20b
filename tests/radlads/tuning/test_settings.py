import pytest

from radlads.errors import RadladsError
from radlads.tuning.settings import LrSchedule, load_tuning


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        "model: m\ndata: d\niters: 60\nlearning_rate: 1e-4\nlora_parameters: {rank: 4, scale: 2.0}\n"
        "lr_schedule: {name: cosine_decay, warmup: 10, arguments: [1e-4, 50, 1e-6]}\n"
        "resume_adapter_file: null\nval_batches: null\n"
        "optimizer_config:\n  adam:\n  adamw: {betas: [0.9, 0.98], weight_decay: null}\n"
    )
    found = load_tuning(file, {"iters": 80, "seed": None, "lora_parameters": {"rank": 16}})
    assert (found.iters, found.learning_rate, found.seed, found.batch_size) == (80, 1e-4, 0, 4)
    assert (found.lora_parameters.rank, found.lora_parameters.scale) == (16, 2.0)
    again = tmp_path / "again.yaml"
    again.write_text(found.to_yaml())
    assert load_tuning(again, {}).values() == found.values()


@pytest.mark.parametrize(
    ("text", "flags", "words"),
    [
        ("model: m\ndata: d\nitters: 60\n", {}, r"R102.*c\.yaml:3: itters.*nearest is 'iters'"),
        ("model: m\ndata: d\niters: 0\n", {}, r"R102.*c\.yaml:3: iters.*greater than 0"),
        ("model: m\n", {}, "R101.*--data is missing"),
        ("model: m\ndata: d\n", {"batch_size": -1}, "R101.*--batch-size.*greater than 0"),
        ("model: m\ndata: d\n", {"lora_parameters": {"dropout": 1.5}}, "R101.*--dropout.*less than 1"),
        ("model: m\ndata: d\nnum_layers: 0\n", {}, "R10[12].*nothing would be trained"),
        ("model: m\ndata: d\niters: 10\ngrad_accumulation_steps: 3\n", {}, "R10[12].*no multiple"),
        ("model: m\ndata: d\nlr_schedule: {name: cosine_decay, arguments: [1]}\n", {}, r"R102.*takes 2 to 3 numbers"),
        ("model: m\ndata: d\noptimizer: lion\n", {}, r"R102.*unknown value 'lion'.*adam, adamw, sgd"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path, text, flags, words):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(RadladsError, match=words):
        load_tuning(file, flags)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("cosine_decay", (1e-3, 30, 1e-5)), ("linear_schedule", (1e-3, 1e-5, 30)), ("exponential_decay", (1e-3, 0.9)),
     ("step_decay", (1e-3, 0.5, 7))],
)  # fmt: skip
@pytest.mark.parametrize("warmup", [0, 5])
def test_schedules_are_those_of_mlx_lm(name, arguments, warmup):
    from mlx_lm.tuner.utils import build_schedule

    stock = build_schedule({"name": name, "arguments": list(arguments), "warmup": warmup, "warmup_init": 1e-6})
    ours = LrSchedule(name=name, arguments=arguments, warmup=warmup, warmup_init=1e-6)
    for update in range(50):
        assert ours.rate(update) == pytest.approx(float(stock(update)), rel=1e-4), update
