"""`radlads finetune`: an adapter for a model from texts or conversations, with mlx-lm's flags; resumable, with a report."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from radlads.cli.options import arg, opt
from radlads.cli.render import Table
from radlads.cli.train import STOPPED, signals

if TYPE_CHECKING:
    from radlads.adapters import Settings
    from radlads.folder import ModelFolder
    from radlads.runs import Run
    from radlads.tokenizer import Tokenizer
    from radlads.tuning.examples import Batches
    from radlads.tuning.settings import Tuning

LORA = ("rank", "scale", "dropout", "keys")


@dataclass(kw_only=True)
class FinetuneOptions:
    """What to train, on what, and how. A flag that is not given takes the value of the file, or else the default named."""

    model: str | None = arg("Folder of the model.", metavar="MODEL", default=None, flag="--model")
    train: bool = opt(False, "Train; the default unless --test is given alone.", "--train")
    test: bool = opt(False, "Measure the loss of the test examples, after training or of the adapter that is there.", "--test")
    data: str | None = opt(None, "Folder with {train, valid, test}.jsonl, or one file or token store to train on.", metavar="DIR")
    fine_tune_type: Literal["lora", "dora", "full", "state"] | None = opt(
        None, "What to train, lora by default; state is the state before the first token of each recurrent layer."
    )
    optimizer: Literal["adam", "adamw", "sgd"] | None = opt(None, "Optimiser; adam by default.")
    mask_prompt: bool = opt(False, "Learn to predict answers and completions only.", "--mask-prompt")
    num_layers: int | None = opt(None, "The last layers to train, 16 by default; -1 takes all.", metavar="N")
    batch_size: int | None = opt(None, "Examples of a batch; 4 by default.", metavar="N")
    iters: int | None = opt(None, "Batches to train on; 1000 by default.", metavar="N")
    val_batches: int | None = opt(None, "Validation batches, 25 by default; -1 takes all.", metavar="N")
    learning_rate: float | None = opt(None, "Learning rate; 1e-5 by default.", metavar="RATE")
    steps_per_report: int | None = opt(None, "Batches between records of the loss; 10 by default.", metavar="N")
    steps_per_eval: int | None = opt(None, "Batches between validations; 200 by default.", metavar="N")
    grad_accumulation_steps: int | None = opt(None, "Batches of one update; 1 by default.", metavar="N")
    resume_adapter_file: str | None = opt(None, "Begin with the tensors of this adapter file.", metavar="FILE")
    adapter_path: str | None = opt(None, "Folder of the adapter and its run; adapters by default.", metavar="DIR")
    save_every: int | None = opt(None, "Batches between checkpoints; 100 by default.", metavar="N")
    test_batches: int | None = opt(None, "Test batches, 500 by default; -1 takes all.", metavar="N")
    max_seq_length: int | None = opt(None, "Tokens of an example at most; 2048 by default.", metavar="N")
    config: str | None = opt(None, "YAML file with settings, as mlx-lm has it.", "--config", "-c", metavar="FILE")
    grad_checkpoint: bool = opt(False, "Compute layers twice to save memory.", "--grad-checkpoint")
    seed: int | None = opt(None, "Seed of first values, order and dropout; 0 by default.", metavar="N")
    rank: int | None = opt(None, "Rank of lora and dora; 8 by default.", "--rank", panel="LoRA", metavar="N")
    scale: float | None = opt(None, "Factor of their update; 20 by default.", "--scale", panel="LoRA", metavar="X")
    dropout: float | None = opt(None, "Dropout in front of them; 0 by default.", "--dropout", panel="LoRA", metavar="P")
    keys: list[str] = opt([], "Module to adapt, as self_attn.q_proj; all without it.", "--keys", panel="LoRA", metavar="NAME")
    backend: Literal["auto", "torch", "mlx"] = opt("auto", "What computes: auto is mlx on a Mac, torch elsewhere.")
    dtype: Literal["float32", "bfloat16", "float16"] | None = opt(None, "Type of the weights in memory, not the stored one.")
    resume: Literal["auto", "never"] = opt("auto", "Go on with a run begun in the folder, or refuse to.")
    report_to: list[str] = opt([], "Also log to tensorboard, wandb or trackio.", metavar="TRACKER")
    quiet: bool = opt(False, "Show no progress.", "--quiet")
    json: bool = opt(False, "Print one JSON document at the end.", "--json")

    def given(self) -> dict[str, Any]:
        """The settings given as flags, by mlx-lm's names; None and False where they were not."""
        names = {item.name for item in fields(self)} - {"config", "resume", "report_to", "quiet", "json", *LORA}
        values = {name: getattr(self, name) or None for name in names if isinstance(getattr(self, name), bool)}
        values |= {name: getattr(self, name) for name in names - values.keys()}
        lora = {name: getattr(self, name) for name in LORA if getattr(self, name) not in (None, [])}
        backend, train = None if self.backend == "auto" else self.backend, None if not self.test else self.train
        return {**values, "lora_parameters": lora or None, "backend": backend, "train": train}


@dataclass
class FinetuneResult:
    """What came of the run; losses in nats per token, None where they were not measured."""

    adapter: str
    status: str
    fine_tune_type: str
    iterations: int = 0
    trained_parameters: int = 0
    parameters: int = 0
    train_loss: float | None = None
    first_valid_loss: float | None = None
    valid_loss: float | None = None
    test_loss: float | None = None
    files: list[str] = field(default_factory=list)
    model: str = ""
    exit_status: int = 0

    def blocks(self) -> Iterator[Table | str]:
        """Losses, paths and the next commands."""
        if self.status == "stopped":
            yield f"stopped after iteration {self.iterations} and saved; the same command goes on with {self.adapter}"
            return
        losses = {"training": self.train_loss, "validation, before": self.first_valid_loss, "validation": self.valid_loss}
        rows = [[name, f"{loss:.4f}"] for name, loss in {**losses, "test": self.test_loss}.items() if loss is not None]
        yield Table(("", "loss"), rows, right=("loss",))
        if self.trained_parameters:
            share = self.trained_parameters / self.parameters
            yield f"{self.trained_parameters:,} parameters trained, {share:.3%} of the model's {self.parameters:,}"
        if self.status == "tested":
            return
        yield f"\nadapter  {self.adapter}"
        yield from (f"report   {path}" for path in self.files if path.endswith(".html"))
        yield f"\nnext:\n  radlads chat {self.model} --adapter-path {self.adapter}"
        if self.fine_tune_type != "state":
            yield f"  radlads fuse {self.model} --adapter-path {self.adapter} --save-path fused"


def finetune(options: FinetuneOptions) -> FinetuneResult:
    """Train an adapter, or go on with it, and measure it."""
    from radlads.backends import choose_backend
    from radlads.cli.trackers import library_of
    from radlads.folder import open_folder
    from radlads.tokenizer import Tokenizer
    from radlads.tuning.examples import check_data
    from radlads.tuning.settings import load_tuning

    for tracker in options.report_to:
        library_of(tracker)
    tuning = load_tuning(options.config, options.given())
    folder = open_folder(tuning.model)
    check_data(tuning.data)
    tokenizer = Tokenizer(folder.path, vocab_size=folder.spec.vocab_size)
    # What is written down must mean the same on another machine.
    tuning = tuning.model_copy(update={"backend": choose_backend(tuning.backend)})
    if not tuning.train:
        return tested(options, tuning, folder, tokenizer)
    settings = tuning.adapter(folder.spec.L)
    check_kind(settings, folder)
    return train(options, tuning.model_copy(update={"num_layers": settings.layers}), settings, folder, tokenizer)


def check_kind(settings: "Settings", folder: "ModelFolder") -> None:
    """R101 for what cannot be trained in this model, before anything is loaded."""
    from radlads.errors import fail

    if settings.kind == "state" and folder.spec.recurrent is None:
        why = "the model has no recurrent layer, and so no state to train"
        raise fail("R101", where="--fine-tune-type state", why=why, fix="Train a lora, or convert the model first")


def train(
    options: FinetuneOptions, tuning: "Tuning", settings: "Settings", folder: "ModelFolder", tokenizer: "Tokenizer"
) -> FinetuneResult:
    """The run itself."""
    import signal

    from radlads.backends import open_tuner
    from radlads.cli.progress import TrainingScreen
    from radlads.errors import fail
    from radlads.files import write_file
    from radlads.runs import RECIPE, begin_run
    from radlads.states import model_fingerprint
    from radlads.tuning.loop import CHECKPOINT, Course, checkpoint_of, mean_loss
    from radlads.tuning.settings import load_tuning

    path, load = Path(tuning.adapter_path), cast(Any, lambda file: load_tuning(file, {}))
    with TrainingScreen(options.quiet or options.json) as screen, signals() as stop, ExitStack() as opened:
        examples, valid = (load_split(tuning, split, tokenizer, screen) for split in ("train", "valid"))
        if examples is None:
            raise fail("R301", where=tuning.data, why="it has no training examples", fix="Add train.jsonl")
        tuner = open_tuner(folder, tuning, settings)
        begun = begin_run(path, cast(Any, tuning), options.resume, load=load, flag="--adapter-path", fruit=CHECKPOINT)
        run = opened.enter_context(begun)
        write_file(path / RECIPE, tuning.to_yaml())  # a later start may ask for more iterations
        if options.report_to:
            from radlads.cli.trackers import follow

            run.listeners.append(follow(options.report_to, path, tuning.name, tuning.values()))
        if tuning.resume_adapter_file and not (path / CHECKPOINT).exists():
            tuner.load(adapter_file(Path(tuning.resume_adapter_file), tuner.tensors()))
        course = Course(tuner, tuning, settings, folder, model_fingerprint(folder), run, examples, valid, screen.step, screen.say)
        if not course.go(lambda: stop["signal"] != 0):
            run.stop()
            status = 130 if stop["signal"] == signal.SIGINT else STOPPED
            kind, done = settings.kind, checkpoint_of(path)
            return FinetuneResult(str(path), "stopped", kind, done, model=tuning.model, exit_status=status)
        if tuning.test:
            loss = mean_loss(tuner, test_batches(tuning, tokenizer, screen).spread(tuning.test_batches))
            run.log({"kind": "test", "step": tuning.iters, "loss": loss.mean, "tokens": loss.tokens})
        trained = sum(x.size for x in tuner.tensors().values())
        run.conclude(final=final_losses(run), iterations=tuning.iters, backend=tuning.backend, device=tuner.device)
    return result_of(run, tuning, folder, trained)


def final_losses(run: "Run") -> dict[str, float | None]:
    """The losses that a run ended with, and the validation loss that it began with."""
    records = run.metrics()

    def losses(kind: str) -> list[float | None]:
        return [record.get("loss") for record in records if record.get("kind") == kind] or [None]

    valid = losses("valid")
    return {
        "train_loss": losses("train")[-1], "first_valid_loss": valid[0], "valid_loss": valid[-1], "test_loss": losses("test")[-1],
    }  # fmt: skip


def result_of(run: "Run", tuning: "Tuning", folder: "ModelFolder", trained: int) -> FinetuneResult:
    """The end of a finished run, with its report where matplotlib is there to draw it."""
    from importlib.util import find_spec

    files = []
    if find_spec("matplotlib") is not None:
        from radlads.report import write_report

        files = [str(path) for path in write_report(run.path)]
    losses, kind, whole = final_losses(run), tuning.fine_tune_type, folder.spec.parameters()
    return FinetuneResult(
        str(run.path), "done", kind, tuning.iters, trained, whole, **cast(Any, losses), files=files, model=tuning.model
    )


def load_split(tuning: "Tuning", split: str, tokenizer: "Tokenizer", screen: Any) -> "Batches | None":
    """The batches of a split, None where it has no file; what was cut is told."""
    from radlads.tuning.examples import Batches, find_split, load_examples

    path = find_split(Path(tuning.data), split)
    if path is None:
        if split == "valid":
            screen.say(f"{tuning.data} has no valid.jsonl: there will be no validation")
        return None
    limit = tuning.max_seq_length
    examples = load_examples(path, tokenizer, limit, mask_prompt=tuning.mask_prompt, report=screen.reading)
    if examples.cut:
        screen.say(f"{path}: {examples.cut:,} texts are longer than {limit:,} tokens and were cut into pieces")
    if examples.truncated:
        screen.say(f"{path}: {examples.truncated:,} conversations are longer than {limit:,} tokens and lost their end")
    return Batches(examples.items, tuning.batch_size, tuning.seed, path, whole=split != "train")


def test_batches(tuning: "Tuning", tokenizer: "Tokenizer", screen: Any) -> "Batches":
    """The batches of the test examples. Raises R301 when there are none."""
    from radlads.errors import fail

    batches = load_split(tuning, "test", tokenizer, screen)
    if batches is None:
        raise fail("R301", where=tuning.data, why="it has no test examples", fix="Add test.jsonl, or leave out --test")
    return batches


def tested(options: FinetuneOptions, tuning: "Tuning", folder: "ModelFolder", tokenizer: "Tokenizer") -> FinetuneResult:
    """The loss of the test examples under the model with its adapter, or alone where the adapter's path is empty."""
    from radlads.adapted import with_adapter
    from radlads.backends import open_engine
    from radlads.cli.progress import TrainingScreen
    from radlads.tuning.loop import scored_loss

    if tuning.adapter_path:
        folder = with_adapter(folder, tuning.adapter_path)
    with TrainingScreen(options.quiet or options.json) as screen:
        for notice in folder.notices:
            screen.say(f"note: {notice}")
        batches = test_batches(tuning, tokenizer, screen)
        loss = scored_loss(open_engine(folder, tuning.backend, tuning.dtype), batches.spread(tuning.test_batches))
    kind = folder.adapter.kind if folder.adapter else "none"
    return FinetuneResult(tuning.adapter_path, "tested", kind, test_loss=loss.mean, model=tuning.model)


def adapter_file(path: Path, known: dict[str, Any]) -> dict[str, Any]:
    """The tensors of an adapter file, which must be some of those `known`. Raises R201, R202, R203."""
    from radlads.errors import fail
    from radlads.tensors import listed, read_float32, read_header

    entries = read_header(path)
    wrong = [name for name, entry in entries.items() if name not in known or entry.shape != known[name].shape]
    if wrong:
        why = f"{len(wrong)} tensors do not fit what is trained: {listed(wrong, 8)}"
        raise fail("R203", where=path, why=why, fix="Give the settings that the adapter was trained with")
    return {name: read_float32(entry) for name, entry in entries.items()}
