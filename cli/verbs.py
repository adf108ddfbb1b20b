"""The table of verbs: what `radlads` can do, in which panel of the help it stands, and which function does it."""

from dataclasses import dataclass

MAKE, USE, CHECK, SHARE, RUNS = "Make a model", "Use a model", "Check a model", "Share a model", "Runs and machine"


@dataclass(frozen=True)
class Verb:
    """One row: `function` of `module` takes an instance of the dataclass `options` and returns a result dataclass.

    A verb with `streams` also takes `write`, which gets the pieces of its text as they come.
    """

    name: str
    panel: str
    module: str
    options: str
    function: str
    summary: str
    examples: tuple[str, ...]
    aliases: tuple[str, ...] = ()
    streams: bool = False


VERBS = (
    Verb(
        "train",
        MAKE,
        "radlads.cli.train",
        "TrainOptions",
        "train",
        "Convert a teacher into a recurrent student: attention alignment, distillation, long context.",
        (
            "radlads train",
            "radlads train tiny --student-arch rwkv6 --output-dir runs/rwkv6",
            "radlads train tiny --measure-difficulty",
        ),
    ),
    Verb(
        "init",
        MAKE,
        "radlads.cli.init",
        "InitOptions",
        "init",
        "Transfer a teacher's weights into an untrained student, and measure how far apart they are.",
        (
            "radlads init Qwen3-0.6B --student-arch rwkv7 --output-dir student",
            "radlads init Qwen3-0.6B --student-arch rwkv6 --keep-softmax 3,7,11 --set student.gate=lowrank --output-dir student",
        ),
    ),
    Verb(
        "prepare",
        MAKE,
        "radlads.cli.prepare",
        "PrepareOptions",
        "prepare",
        "Turn texts and datasets into tokens for training, sample text from a model, or keep what a teacher predicts.",
        (
            "radlads prepare books.txt.xz chats.jsonl --tokenizer Qwen3-0.6B --output-dir data/books",
            "radlads prepare hf:HuggingFaceFW/fineweb --streaming --take 100000 --tokenizer Qwen3-0.6B --output-dir data/web",
            "radlads prepare --sample-from Qwen3-0.6B --tokens 1000000 --output-dir data/sampled",
            "radlads prepare data/books --teacher-cache Qwen3-0.6B --top-k 64 --seq-len 512 --output-dir data/books-targets",
        ),
        aliases=("tokenize", "preprocess"),
    ),
    Verb(
        "convert",
        MAKE,
        "radlads.cli.convert",
        "ConvertOptions",
        "convert",
        "Turn a model into another format: Hugging Face, MLX (quantised too), RWKV .pth, GGUF.",
        (
            "radlads convert student --to mlx -q --q-bits 4 --output-dir student-4bit",
            "radlads convert L28-D3584-qwen2-rwkv7-3.pth --config Qwen2.5-7B-Instruct --to hf --output-dir qrwkv7",
        ),
    ),
    Verb(
        "finetune",
        MAKE,
        "radlads.cli.finetune",
        "FinetuneOptions",
        "finetune",
        "Train an adapter on texts or conversations: LoRA, DoRA, whole weights, or the initial state.",
        (
            "radlads finetune student --data data --iters 600",
            "radlads finetune student-4bit --data data --mask-prompt --num-layers -1 --learning-rate 1e-4 --adapter-path style",
            "radlads finetune student --data data --fine-tune-type state --learning-rate 1e-2 --adapter-path tone",
        ),
        aliases=("lora",),
    ),
    Verb(
        "fuse",
        MAKE,
        "radlads.cli.fuse",
        "FuseOptions",
        "fuse",
        "Write a model with an adapter's change made part of its weights.",
        (
            "radlads fuse student --adapter-path adapters --save-path fused",
            "radlads fuse student-4bit --adapter-path style --save-path fused --dequantize",
        ),
        aliases=("merge",),
    ),
    Verb(
        "plan",
        MAKE,
        "radlads.cli.plan",
        "PlanOptions",
        "plan",
        "Say what a recipe takes before it runs: memory of each GPU, operations, hours, price.",
        (
            "radlads plan mine.yaml --gpus 8 --gpu-type h200 --price-per-gpu-hour 2.5",
            "radlads plan tiny --teacher Qwen2.5-72B --set precision=bfloat16 --gpus 8 --fit",
        ),
    ),
    Verb(
        "launch",
        MAKE,
        "radlads.cli.launch",
        "LaunchOptions",
        "launch",
        "Start a training on several GPUs: here, through Slurm, or as a printed command.",
        (
            "radlads launch mine.yaml --gpus-per-node 8",
            "radlads launch mine.yaml --executor slurm --nodes 2 --partition gpu --time 24:00:00",
            "radlads launch mine.yaml --executor print --nodes 2",
        ),
    ),
    Verb(
        "chat",
        USE,
        "radlads.cli.chat",
        "ChatOptions",
        "chat",
        "Talk with a model.",
        ("radlads chat student", 'radlads chat student --system-prompt "Answer in one sentence." --temp 0.7'),
        aliases=("run",),
    ),
    Verb(
        "generate",
        USE,
        "radlads.cli.generate",
        "GenerateOptions",
        "generate",
        "Write text from a prompt.",
        ('radlads generate student -p "Once upon a time" -m 200', "cat report.txt | radlads generate student -p - --json"),
        streams=True,
    ),
    Verb(
        "serve",
        USE,
        "radlads.cli.serve",
        "ServeOptions",
        "serve",
        "Serve a model to OpenAI clients, with a chat page.",
        ("radlads serve student", "radlads serve student --host 0.0.0.0 --api-key SECRET --allowed-host my.machine"),
        aliases=("server",),
    ),
    Verb(
        "cache",
        USE,
        "radlads.cli.cache",
        "CacheOptions",
        "cache",
        "Read a long prompt once and keep the model's state after it, a file of a fixed size.",
        (
            "cat report.txt | radlads cache student -o report.state",
            "radlads cache student -p 'You are a careful editor.' -o editor.state",
        ),
        aliases=("cache-prompt",),
    ),
    Verb(
        "inspect",
        CHECK,
        "radlads.cli.inspect_",
        "InspectOptions",
        "inspect_model",
        "Say what a model of any format holds: layers, shapes, state, history; or how two differ. Runs none of its code.",
        ("radlads inspect student", "radlads inspect teacher.gguf --json", "radlads inspect student --diff student-4bit"),
        aliases=("show",),
    ),
    Verb(
        "eval",
        CHECK,
        "radlads.cli.evaluate",
        "EvalOptions",
        "evaluate",
        "Measure a model on tasks, held-out text and recall, beside its teacher and with intervals.",
        (
            "radlads eval student --data eval --text books.txt --against Qwen3-0.6B",
            "radlads eval student --tasks arc_easy,hellaswag --limit 500",
        ),
        aliases=("evaluate",),
    ),
    Verb(
        "verify",
        CHECK,
        "radlads.cli.verify",
        "VerifyOptions",
        "verify",
        "Check a folder against its manifest, and what it computes against the float64 oracle and across backends.",
        ("radlads verify student", "radlads verify student --against Qwen3-0.6B --max-kl 0.1 --junit verify.xml --json"),
    ),
    Verb(
        "card",
        SHARE,
        "radlads.cli.card",
        "CardOptions",
        "card",
        "Write the model card from the folder's manifest, its run's record and its last verification.",
        ("radlads card runs/mine/model", "radlads card runs/mine/model --license apache-2.0 --stdout"),
    ),
    Verb(
        "push",
        SHARE,
        "radlads.cli.push",
        "PushOptions",
        "push",
        "Upload a verified folder to the Hugging Face Hub.",
        ("radlads push runs/mine/model me/mine-rwkv7 --dry-run", "radlads push runs/mine/model me/mine-rwkv7 --private"),
        aliases=("upload",),
    ),
    Verb(
        "recipes ls",
        RUNS,
        "radlads.cli.recipes",
        "ListOptions",
        "list_recipes",
        "List the built-in recipes.",
        ("radlads recipes ls",),
    ),
    Verb(
        "recipes show",
        RUNS,
        "radlads.cli.recipes",
        "ShowOptions",
        "show_recipe",
        "Print a recipe with every value filled in.",
        ("radlads recipes show tiny", "radlads recipes show tiny --set stages.0.lr=1e-3"),
    ),
    Verb(
        "recipes cp",
        RUNS,
        "radlads.cli.recipes",
        "CopyOptions",
        "copy_recipe",
        "Copy a built-in recipe, comments and all, to edit it.",
        ("radlads recipes cp tiny mine.yaml",),
    ),
    Verb(
        "recipes validate",
        RUNS,
        "radlads.cli.recipes",
        "ValidateOptions",
        "validate_recipe",
        "Check a recipe without running it.",
        ("radlads recipes validate mine.yaml",),
    ),
    Verb(
        "recipes schema",
        RUNS,
        "radlads.cli.recipes",
        "SchemaOptions",
        "recipe_schema",
        "Print the JSON Schema of recipes, for editors.",
        ("radlads recipes schema > recipe.schema.json",),
    ),
    Verb(
        "doctor",
        RUNS,
        "radlads.cli.doctor",
        "DoctorOptions",
        "doctor",
        "Say what is installed, which backends work, and how to mend what does not.",
        ("radlads doctor", "radlads doctor --kernels", "radlads doctor --json"),
    ),
)

# Panel and summary of the words that hold several verbs.
GROUPS = {"recipes": (RUNS, "List, show, copy and check training recipes.")}
