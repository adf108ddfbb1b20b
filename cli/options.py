"""How a verb declares its arguments and flags, and the groups of flags that several verbs share.

Standard library only, so that help is quick; what a group opens is imported when it is opened.
"""

import secrets
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from radlads.engine import Engine
    from radlads.folder import ModelFolder
    from radlads.recipe import Recipe
    from radlads.sampling import Sampling
    from radlads.states import SavedState
    from radlads.tokenizer import Tokenizer

StudentArch = Literal["rwkv6", "rwkv7", "hxa079", "hxa07a", "hxa07b", "hxa07c"]


def arg(help: str, *, metavar: str, default: Any = MISSING, flag: str | None = None) -> Any:
    """A positional argument; `flag` is a second, hidden spelling of it."""
    return _field(default, {"argument": True, "help": help, "metavar": metavar, "flags": (flag,) if flag else ()})


def opt(default: Any, help: str, *flags: str, panel: str | None = None, metavar: str | None = None) -> Any:
    """A flag; `flags` are its spellings where `--field-name` is not enough. A default of MISSING makes it required."""
    return _field(default, {"argument": False, "help": help, "metavar": metavar, "flags": flags, "panel": panel})


def _field(default: Any, metadata: dict[str, Any]) -> Any:
    if isinstance(default, list):
        factory: Callable[[], Any] = default.copy
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


class OpenModel(NamedTuple):
    """A model ready to be used."""

    folder: "ModelFolder"
    tokenizer: "Tokenizer"
    engine: "Engine"


@dataclass(kw_only=True)
class ModelOptions:
    """Which model, and on which backend."""

    model: str = arg("Folder of the model.", metavar="MODEL", flag="--model")
    backend: Literal["auto", "torch", "mlx"] = opt("auto", "What computes: auto is mlx on a Mac, torch elsewhere.", panel="Model")
    dtype: Literal["float32", "bfloat16", "float16"] | None = opt(
        None, "Type of the weights in memory, instead of the stored one.", panel="Model"
    )
    variant: Literal["A", "B", "C"] | None = opt(
        None, "Era of a published RAD-RWKV7 model, which files do not say.", panel="Model"
    )
    config: str | None = opt(
        None, "Folder or config.json of the model's teacher, to read instead of the model's.", panel="Model", metavar="PATH"
    )

    adapter_path: str | None = opt(
        None, "Folder of an adapter to use with the model.", "--adapter-path", "--adapter", panel="Model", metavar="DIR"
    )

    def open(self) -> OpenModel:
        """Open folder, tokenizer and engine; every error is raised before anything is computed."""
        from radlads.adapted import with_adapter
        from radlads.backends import open_engine
        from radlads.cli.render import note
        from radlads.folder import open_folder
        from radlads.tokenizer import Tokenizer

        folder = open_folder(self.model, variant=self.variant, config_from=self.config)
        if self.adapter_path is not None:
            folder = with_adapter(folder, self.adapter_path)
        for notice in folder.notices:
            note(f"note: {notice}")
        tokenizer = Tokenizer(folder.path, vocab_size=folder.spec.vocab_size)
        return OpenModel(folder, tokenizer, open_engine(folder, backend=self.backend, dtype=self.dtype))


@dataclass(kw_only=True)
class StateOptions:
    """Where a model's state comes from and goes to."""

    load_state: str | None = opt(None, "Go on from the state in this file.", panel="State", metavar="FILE")
    save_state: str | None = opt(None, "Write the state after the last token to this file.", panel="State", metavar="FILE")

    def loaded(self, opened: OpenModel) -> "SavedState | None":
        """The state to go on from, None without one. R201 or R304 when the file cannot be used."""
        if self.load_state is None:
            return None
        from radlads.states import load_state, model_fingerprint

        return load_state(self.load_state, model_fingerprint(opened.folder))


@dataclass(kw_only=True)
class SamplingOptions:
    """How tokens are chosen, named as in mlx-lm."""

    temp: float = opt(0.0, "Temperature; 0 takes the most likely token.", panel="Sampling")
    top_p: float = opt(1.0, "Keep the most likely tokens that sum to this probability; 1 is off.", panel="Sampling")
    top_k: int = opt(0, "Keep this many of the most likely tokens; 0 is off.", panel="Sampling")
    min_p: float = opt(0.0, "Drop tokens less likely than this share of the likeliest; 0 is off.", panel="Sampling")
    repetition_penalty: float = opt(1.0, "Make recent tokens less likely by this factor; 1 is off.", panel="Sampling")
    seed: int | None = opt(None, "Seed of the random numbers; without it each run differs.", panel="Sampling")

    def sampling(self) -> "Sampling":
        """The settings, checked; a seed is drawn where none is given and chance matters."""
        from radlads.sampling import Sampling

        seed = self.seed if self.seed is not None else secrets.randbits(31) if self.temp else 0
        return Sampling(self.temp, self.top_p, self.top_k, self.min_p, self.repetition_penalty, seed)


def overridden_recipe(recipe: str | None, teacher: str | None, student_arch: str | None, changes: list[str]) -> "Recipe":
    """The recipe of that name or file with --set, --student-arch and --teacher applied. Raises as `load_recipe`."""
    from radlads.recipe import load_recipe

    flags = {"student.arch": student_arch, "teacher": teacher}
    return load_recipe(recipe, [*changes, *(f"{key}={value}" for key, value in flags.items() if value)])
