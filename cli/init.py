"""`radlads init`: a teacher's weights in an untrained student, and the distance between the two."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from radlads.cli.options import StudentArch, arg, opt
from radlads.cli.render import Table, note
from radlads.errors import fail, nearest

if TYPE_CHECKING:
    from radlads.folder import ModelFolder

SAMPLE = (
    "The sun had gone down behind the hills when the two brothers came to the river. The bridge was broken, and the water "
    "was high from the rain of the last days. They sat down under an old tree, shared their bread, and talked about the way "
    "that still lay before them. In the morning they would ask the ferryman, who lived in a small house near the mill."
)
MAX_TOKENS = 2048  # of the text on which teacher and student are compared


@dataclass(kw_only=True)
class InitOptions:
    """Which student to make of which teacher."""

    teacher: str = arg("Folder of the teacher.", metavar="TEACHER", flag="--teacher")
    student_arch: StudentArch = opt("rwkv7", "Recurrent mixer of the student.")
    variant: Literal["A", "B", "C"] | None = opt(None, "Era of RAD-RWKV7; C is the newest.")
    keep_softmax: str = opt("", "Layers that keep softmax attention.", metavar="3,7,11")
    set: list[str] = opt([], "Flag of the mixer, such as student.gate=full; may be given several times.", metavar="KEY=VALUE")
    transfer_scale: str = opt(
        "1,1,1,1", "Factors of q, k, v and o in converted layers; the hxa models used 0.5,0.5,0.3,0.5.", metavar="Q,K,V,O"
    )
    output_dir: str = opt("student", "Folder to write.", metavar="DIR")
    seed: int = opt(1337, "Seed of the new tensors' first values.")
    text: str | None = opt(None, "UTF-8 text on which teacher and student are compared.", metavar="FILE")
    overwrite: bool = opt(False, "Replace the output folder if it exists.", "--overwrite")
    json: bool = opt(False, "Print one JSON document.", "--json")


@dataclass
class InitResult:
    """The step-0 student; `step0` holds its distance to the teacher, empty where it could not be measured."""

    model: str
    teacher: str
    architecture: str
    recurrent_layers: list[int]
    softmax_layers: list[int]
    parameters: int
    copied_tensors: int
    new_tensors: int
    seed: int
    step0: dict[str, Any] = field(default_factory=dict)

    def blocks(self) -> list[Table | str]:
        """A summary and the next commands."""
        softmax = ", ".join(map(str, self.softmax_layers)) or "none"
        rows = [
            ("student", self.model),
            ("architecture", f"{self.architecture} in {len(self.recurrent_layers)} layers, softmax in {softmax}"),
            ("parameters", f"{self.parameters:,}"),
            ("tensors", f"{self.copied_tensors} from the teacher, {self.new_tensors} new"),
            *((f"step-0 {name.replace('_', ' ')}", f"{value:.4g}") for name, value in self.step0.items()),
        ]
        given = f"--teacher {self.teacher} --student {self.model} --student-arch {self.architecture}"
        after = f"Next: `radlads train RECIPE {given}` trains it; `radlads recipes ls` lists recipes."
        return [Table(("", ""), rows), after]


def init(options: InitOptions) -> InitResult:
    """Write the step-0 student of a teacher; R101, R103, R2xx or R4xx, and then nothing is written."""
    from radlads.folder import open_folder
    from radlads.tokenizer import Tokenizer
    from radlads.weights_tools.standalone import model_files
    from radlads.weights_tools.surgery import make_student, student_spec

    keep, flags, scale = layers(options.keep_softmax), mixer_flags(options), factors(options.transfer_scale)
    teacher = open_folder(options.teacher)
    # Whatever can be refused is refused before the folder is written.
    known = (teacher.path / "tokenizer.json").exists()
    tokens = sample_ids(options, Tokenizer(teacher.path, vocab_size=teacher.spec.V)) if known else []
    extra_files, config_extra = model_files(student_spec(teacher, options.student_arch, keep, flags))
    student = make_student(
        teacher,
        options.output_dir,
        arch=options.student_arch,
        keep_softmax=keep,
        options=flags,
        seed=options.seed,
        extra_files=extra_files,
        config_extra=config_extra,
        overwrite=options.overwrite,
        transfer_scale=scale,
    )
    copied = sum(row.copied for row in student.spec.tensors().values())
    return InitResult(
        model=str(student.path),
        teacher=str(teacher.path),
        architecture=options.student_arch,
        recurrent_layers=[i for i in range(student.spec.L) if i not in student.spec.kept_layers],
        softmax_layers=list(student.spec.kept_layers),
        parameters=student.spec.parameters(),
        copied_tensors=copied,
        new_tensors=len(student.spec.tensors()) - copied,
        seed=options.seed,
        step0=distance(teacher, student, tokens),
    )


def layers(text: str) -> tuple[int, ...]:
    """Layer numbers of "3,7,11", ranges such as "0-3" included; R101."""
    found: set[int] = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        first, _, last = part.partition("-")
        if not first.isdecimal() or not (last or first).isdecimal() or len(part) > 20 or int(last or first) < int(first):
            fix = "Write for example `--keep-softmax 3,7,11`"
            raise fail("R101", where="--keep-softmax", why=f"{part!r} is no layer number", fix=fix)
        found.update(range(int(first), min(int(last or first), int(first) + 4096) + 1))
    return tuple(sorted(found))


def factors(text: str) -> tuple[float, ...]:
    """The numbers of "1,1,0.3,0.5"; R101."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        fix = "Write for example `--transfer-scale 0.5,0.5,0.3,0.5`"
        raise fail("R101", where="--transfer-scale", why=f"{text!r} is no list of numbers", fix=fix) from None


def mixer_flags(options: InitOptions) -> dict[str, Any]:
    """The mixer's flags from `--set` and `--variant`, each of its type; R101 with the nearest name."""
    from radlads.recipe_yaml import parse_value
    from radlads.spec import MixerOptions

    known = MixerOptions.__annotations__
    flags: dict[str, Any] = {}
    for text in options.set:
        key, sign, raw = text.partition("=")
        name = key.strip().removeprefix("student.").removeprefix("options.")
        if not sign or name not in known:
            near = nearest(name, known)
            fix = f"The nearest is student.{near}" if near else f"Known: {', '.join(f'student.{flag}' for flag in known)}"
            raise fail("R101", where=f"--set {text}", why=f"{name!r} is no flag of a mixer", fix=fix)
        value = parse_value(raw, f"--set {text}")
        value = float(value) if known[name] == float | None and type(value) is int else value
        if not isinstance(value, known[name]):
            wanted = {str: "a word", bool: "true or false"}.get(known[name], "a number or null")
            raise fail("R101", where=f"--set {text}", why=f"{raw!r} is not {wanted}", fix=f"Give student.{name} {wanted}")
        flags[name] = value
    if options.variant is not None:
        if options.student_arch != "rwkv7":
            raise fail("R101", where="--variant", why=f"{options.student_arch} has no variants", fix="Leave it out")
        flags["variant"] = options.variant
    return flags


def sample_ids(options: InitOptions, tokenizer: Any) -> list[int]:
    """Token ids of the text for the comparison; R301 if the file cannot be read or is too short."""
    text = SAMPLE
    if options.text is not None:
        try:
            with open(options.text, encoding="utf-8") as file:
                text = file.read(16 * MAX_TOKENS)
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "it is not UTF-8"
            raise fail("R301", where=options.text, why=why, fix="Give a UTF-8 text file") from None
    ids = tokenizer.encode(text, add_special=True)[:MAX_TOKENS]
    if len(ids) < 2:
        raise fail("R302", where=options.text or "text", why="it has fewer than two tokens", fix="Give a longer text")
    return list(ids)


def distance(teacher: "ModelFolder", student: "ModelFolder", tokens: list[int]) -> dict[str, Any]:
    """KL and agreement of the untrained student with its teacher; empty without PyTorch or a tokenizer, and says so."""
    from radlads.backends import available_backends

    if not tokens or "torch" not in available_backends():
        missing = "PyTorch is not installed" if tokens else "the teacher has no tokenizer"
        note(f"note: {missing}, so teacher and student are not compared")
        return {}
    from radlads.backends.torch.evaluate import step0_kl

    return dict(step0_kl(teacher, student, tokens))
