"""What a fine-tuning run is asked to do: mlx-lm's settings under mlx-lm's names, from a YAML file and from flags."""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml  # type: ignore[import-untyped]
from pydantic import Field, ValidationError, model_validator

from radlads.adapters import Settings
from radlads.errors import fail
from radlads.recipe import Beta, Count, Number, Part, Rate, Whole, explain, unknown_key
from radlads.recipe_yaml import Document, read_document

# Settings that may change between the starts of one run: none of them changes what is learnt up to a given iteration.
FREE = (
    "iters", "steps_per_report", "steps_per_eval", "save_every", "val_batches", "test", "test_batches", "adapter_path",
    "grad_checkpoint", "train",
)  # fmt: skip


class LoraParameters(Part):
    """Of lora and dora: the update is scale A B; `keys` names the modules of a layer, None takes every linear one."""

    rank: Annotated[Whole, Field(gt=0, lt=2**16)] = 8
    scale: Annotated[Number, Field(gt=-1e9, lt=1e9)] = 20.0
    dropout: Beta = 0.0
    keys: tuple[str, ...] | None = None


class LrSchedule(Part):
    """A schedule of mlx.optimizers by name with its arguments, after a linear warm-up of so many updates."""

    name: Literal["cosine_decay", "linear_schedule", "exponential_decay", "step_decay"]
    arguments: tuple[Number, ...]
    warmup: Annotated[Whole, Field(ge=0)] = 0
    warmup_init: Rate = 0.0

    @model_validator(mode="after")
    def _callable(self) -> "LrSchedule":
        needed = {"cosine_decay": (2, 3), "linear_schedule": (3, 3), "exponential_decay": (2, 2), "step_decay": (3, 3)}
        low, high = needed[self.name]
        if not low <= len(self.arguments) <= high or not all(math.isfinite(x) for x in self.arguments):
            raise ValueError(f"{self.name} takes {low} to {high} numbers, not {len(self.arguments)}")
        if self.name in ("cosine_decay", "linear_schedule", "step_decay") and self.steps <= 0:
            raise ValueError(f"the steps of {self.name} must be above 0")
        return self

    @property
    def steps(self) -> float:
        """Updates that the schedule is stretched over."""
        return self.arguments[1 if self.name == "cosine_decay" else -1]

    def rate(self, update: int) -> float:
        """Learning rate of an update, counted from 0, as mlx-lm's `build_schedule` gives it."""
        first = self.arguments[0]
        if self.warmup and update <= self.warmup:
            return self.warmup_init + (first - self.warmup_init) * update / self.warmup
        step = update - (self.warmup + 1 if self.warmup else 0)
        if self.name == "cosine_decay":
            end = self.arguments[2] if len(self.arguments) > 2 else 0.0
            return end + 0.5 * (1 + math.cos(math.pi * min(step, self.steps) / self.steps)) * (first - end)
        if self.name == "linear_schedule":
            return first + (self.arguments[1] - first) * min(step, self.steps) / self.steps
        power = step if self.name == "exponential_decay" else step // int(self.steps)
        return first * self.arguments[1] ** power


class OptimizerConfig(Part):
    """Constants of an optimiser, where they are not to be the usual ones."""

    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: Annotated[Number, Field(gt=0)] = 1e-8
    weight_decay: Rate | None = None  # 0.01 of adamw, else none
    momentum: Beta = 0.0
    bias_correction: bool = True  # of Adam; MLX can leave it out


class Tuning(Part):
    """All settings of a run. Those of mlx-lm have its names and defaults; "state" is a fine-tune type of ours."""

    model: str
    data: str
    fine_tune_type: Literal["lora", "dora", "full", "state"] = "lora"
    train: bool = True
    test: bool = False
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    optimizer_config: dict[Literal["adam", "adamw", "sgd"], OptimizerConfig] = Field(default_factory=dict)
    seed: Annotated[Whole, Field(ge=0, lt=2**31)] = 0
    num_layers: Annotated[Whole, Field(ge=-1)] = 16
    batch_size: Count = 4
    iters: Count = 1000
    val_batches: Annotated[Whole, Field(ge=-1)] = 25
    learning_rate: Annotated[Number, Field(gt=0, lt=1e6)] = 1e-5
    steps_per_report: Count = 10
    steps_per_eval: Count = 200
    save_every: Count = 100
    grad_accumulation_steps: Count = 1
    resume_adapter_file: str | None = None
    adapter_path: str = "adapters"
    test_batches: Annotated[Whole, Field(ge=-1)] = 500
    max_seq_length: Annotated[Whole, Field(ge=2, lt=2**31)] = 2048
    grad_checkpoint: bool = False
    lr_schedule: LrSchedule | None = None
    lora_parameters: LoraParameters = Field(default_factory=LoraParameters)
    mask_prompt: bool = False
    backend: Literal["auto", "torch", "mlx"] = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None

    @model_validator(mode="after")
    def _whole_updates(self) -> "Tuning":
        if self.num_layers == 0:
            raise ValueError("num_layers is 0, so that nothing would be trained; -1 stands for all layers")
        if self.iters % self.grad_accumulation_steps:
            why = f"iters {self.iters} is no multiple of grad_accumulation_steps {self.grad_accumulation_steps}"
            raise ValueError(f"{why}, and the last gradients would be lost")
        return self

    @property
    def name(self) -> str:
        """What the record of the run calls it."""
        return Path(self.adapter_path).resolve().name

    def adapter(self, layers: int) -> Settings:
        """The adapter to train, in a model of so many layers. Raises R101 when there are fewer than asked for."""
        wanted = self.num_layers
        if wanted > layers and "num_layers" in self.model_fields_set:
            why = f"{wanted} layers are to be trained, and the model has {layers}"
            raise fail("R101", where="--num-layers", why=why, fix="Give at most that many, or -1 for all")
        lora = self.lora_parameters
        count = layers if wanted == -1 else min(wanted, layers)
        return Settings(self.fine_tune_type, count, lora.rank, lora.scale, lora.dropout, lora.keys)

    def rate(self, update: int) -> float:
        """Learning rate of an update, counted from 0."""
        return self.learning_rate if self.lr_schedule is None else self.lr_schedule.rate(update)

    def constants(self) -> OptimizerConfig:
        """Constants of the optimiser in use."""
        found = self.optimizer_config.get(self.optimizer, OptimizerConfig())
        decay = 0.01 if self.optimizer == "adamw" else 0.0
        return found if found.weight_decay is not None else found.model_copy(update={"weight_decay": decay})

    def values(self) -> dict[str, Any]:
        """All settings as plain JSON values."""
        return self.model_dump(mode="json")

    def identity(self) -> dict[str, Any]:
        """The settings that say which run it is."""
        return {key: value for key, value in self.values().items() if key not in FREE}

    def fingerprint(self) -> str:
        """sha256 of `identity`."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        """The settings as YAML that `load_tuning` reads back."""
        return str(yaml.safe_dump(self.values(), sort_keys=False, allow_unicode=True))


def without_null(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values without those that say null, which stands for the default in mlx-lm's files."""
    return {key: without_null(value) if isinstance(value, dict) else value for key, value in values.items() if value is not None}


def load_tuning(path: str | Path | None, flags: Mapping[str, Any]) -> Tuning:
    """Settings from a YAML file, if any, and from flags, which win; a flag of None was not given.

    Raises R101 for a bad flag or a missing one, R102 for a file that is not valid, R201 for one that cannot be read.
    """
    document = Document(Path(), {}, {}) if path is None else read_document(Path(path))
    given = {key: value for key, value in flags.items() if value is not None}
    values = without_null(document.values)
    for key, value in given.items():
        nested = isinstance(value, dict) and isinstance(values.get(key), dict)
        values[key] = {**values[key], **value} if nested else value
    try:
        return Tuning.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = tuple(first["loc"])
        key = str(place[0]) if place else ""
        flag = "--" + str(place[-1] if place[:1] == ("lora_parameters",) else key).replace("_", "-")
        if first["type"] == "missing":
            fix = "For example: `radlads finetune student --data data --iters 600`"
            raise fail("R101", where="radlads finetune", why=f"{flag} is missing", fix=fix) from None
        why = explain(first)
        if first["type"] == "extra_forbidden":
            why = unknown_key(str(place[-1]), list(Tuning.model_fields))
        if path is None or key in given or not place:
            raise fail("R101", where=flag if place else "radlads finetune", why=why, fix="Correct the value") from None
        raise fail("R102", where=document.place(*place), why=why, fix="Correct the file") from None
