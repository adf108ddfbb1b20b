"""Byte-level BPE tokenizers between tokenizer.json and the metadata of a GGUF file.

A file that we write carries the tokenizer's own files too, so that they come back byte for byte; for a file of others they
are put together from tokens, merges and the name of the rule that splits text.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from radlads.errors import RadladsError, fail
from radlads.files import parse_json
from radlads.folder import CONFIG, MANIFEST, WEIGHT_SUFFIXES
from radlads.tensors import is_plain_name

Files = Mapping[str, Path | bytes]
Meta = dict[str, Any]

TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
TEMPLATE, GENERATION = "chat_template.jinja", "generation_config.json"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5  # 6 is a byte of a SentencePiece vocabulary
GPT2, LLAMA = "gpt2", "llama"
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
MAPPED = {**BYTES, "use_regex": False}
# The name of the rule in GGUF: what splits text into words before merging.
SPLITTERS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [BYTES],
    "smollm": [{"type": "Digits", "individual_digits": True}, BYTES],
    "qwen2": [{"type": "Split", "pattern": {"Regex": WORDS % ""}, "behavior": "Isolated", "invert": False}, MAPPED],
    "llama-bpe": [{"type": "Split", "pattern": {"Regex": WORDS % "{1,3}"}, "behavior": "Isolated", "invert": False}, MAPPED],
}


def files_of(meta: Meta, path: Path) -> dict[str, bytes]:
    """tokenizer.json and its companions from the metadata; R206 where the tokenizer is of an unknown kind."""
    carried = dict(carried_in(meta))
    if "tokenizer.huggingface.json" in meta:
        carried[TOKENIZER] = str(meta["tokenizer.huggingface.json"]).encode()
    if TOKENIZER in carried or meta.get("tokenizer.ggml.model") in (None, "no_vocab", "none"):
        return carried if SETTINGS in carried else {**settings_of(meta), **carried}
    try:
        table = tokenizer_of(meta)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        why = f"the tokenizer in it cannot be put together: {error}"
        raise fail("R206", where=path, why=why, fix="Take tokenizer.json from the original model") from None
    return {TOKENIZER: to_bytes(table), **settings_of(meta)}


def carried_in(meta: Meta) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the files that ride along; never a path, weights, a config or code."""
    for key, content in meta.items():
        name = key.removeprefix("radlads.file.")
        harmless = is_plain_name(name) and not name.startswith(".") and name not in (CONFIG, MANIFEST)
        if name != key and harmless and not name.endswith((*WEIGHT_SUFFIXES, ".py", ".index.json")):
            yield name, str(content).encode()


def tokenizer_of(meta: Meta) -> dict[str, Any]:
    """tokenizer.json as a table; ValueError for a kind that is not known here."""
    model = meta["tokenizer.ggml.model"]
    tokens, types = meta["tokenizer.ggml.tokens"], meta.get("tokenizer.ggml.token_type")
    types = types or [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise ValueError(f"{len(types)} types for {len(tokens)} tokens")
    vocab = {token: number for number, token in enumerate(tokens) if types[number] != UNUSED}
    added = [
        {"id": number, "content": tokens[number], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": kind != USER_DEFINED}
        for number, kind in enumerate(types) if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]  # fmt: skip
    if model == GPT2:
        parts = byte_level(meta, vocab)
    elif model == LLAMA:
        parts = sentence_pieces(meta, tokens, types, vocab)
    else:
        raise ValueError(f"its kind is {model!r}; known: {GPT2}, {LLAMA}")
    begin = meta.get("tokenizer.ggml.bos_token_id")
    default_begin = model == LLAMA or meta.get("tokenizer.ggml.pre") == "llama-bpe"
    if begin is not None and meta.get("tokenizer.ggml.add_bos_token", default_begin):
        parts["post_processor"] = begin_with(tokens[begin], begin)
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, **parts}


def byte_level(meta: Meta, vocab: dict[str, int]) -> dict[str, Any]:
    """The parts of a byte-level BPE."""
    splitter = meta.get("tokenizer.ggml.pre", "gpt-2")
    splitter = "gpt-2" if splitter == "default" else splitter
    if splitter not in SPLITTERS:
        raise ValueError(f"it splits text by the rule {splitter!r}; known: {', '.join(SPLITTERS)}")
    merges = [merge.split(" ") for merge in meta["tokenizer.ggml.merges"]]
    if any(len(merge) != 2 for merge in merges):
        raise ValueError("a merge is no pair")
    steps = SPLITTERS[splitter]
    return {
        "normalizer": {"type": "NFC"} if splitter == "qwen2" else None,
        "pre_tokenizer": steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps},
        "post_processor": {**BYTES, "trim_offsets": False},
        "decoder": BYTES,
        "model": bpe(vocab, merges, ignore_merges=splitter == "llama-bpe"),
    }


def sentence_pieces(meta: Meta, tokens: list[str], types: list[int], vocab: dict[str, int]) -> dict[str, Any]:
    """The parts of a SentencePiece BPE: the merges are all splits of a piece into two others, the best score first."""
    scores = meta["tokenizer.ggml.scores"]
    pieces = sorted((number for number, kind in enumerate(types) if kind == NORMAL), key=lambda n: -scores[n])
    merges = [pair for number in pieces for pair in splits(tokens[number], vocab)]
    prefix = [{"type": "Prepend", "prepend": SPACE}] if meta.get("tokenizer.ggml.add_space_prefix", True) else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    unknown = next((tokens[number] for number, kind in enumerate(types) if kind == UNKNOWN), None)
    return {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [*prefix, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *strip,
            ],
        },
        "model": {**bpe(vocab, merges), "unk_token": unknown, "fuse_unk": True, "byte_fallback": True},
    }


def splits(piece: str, vocab: Mapping[str, int]) -> list[list[str]]:
    """All ways to make a piece of two others, the earlier ones first."""
    pairs = ([piece[:cut], piece[cut:]] for cut in range(1, len(piece)))
    known = [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab]
    return sorted(known, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))


def bpe(vocab: Mapping[str, int], merges: list[list[str]], ignore_merges: bool = False) -> dict[str, Any]:
    """The model part of tokenizer.json."""
    return {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
        "fuse_unk": False, "byte_fallback": False, "ignore_merges": ignore_merges, "vocab": dict(vocab), "merges": merges,
    }  # fmt: skip


def begin_with(token: str, number: int) -> dict[str, Any]:
    """The post-processor that puts the begin-of-text token in front."""
    begin: dict[str, Any] = {"SpecialToken": {"id": token, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    special = {token: {"id": token, "ids": [number], "tokens": [token]}}
    return {"type": "TemplateProcessing", "single": [begin, first], "pair": [begin, first, second], "special_tokens": special}


def settings_of(meta: Meta) -> dict[str, bytes]:
    """tokenizer_config.json, generation_config.json and the chat template."""
    tokens = meta.get("tokenizer.ggml.tokens", [])
    tokens = tokens if isinstance(tokens, list) else []
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        number = meta.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(number, int) and 0 <= number < len(tokens):
            settings[f"{name}_token"] = tokens[number]
    if isinstance(begins := meta.get("tokenizer.ggml.add_bos_token"), bool):
        settings["add_bos_token"] = begins
    files = {SETTINGS: to_bytes(settings)}
    if ids := token_ids(meta):
        files[GENERATION] = to_bytes(ids)
    if template := meta.get("tokenizer.chat_template"):
        files[TEMPLATE] = str(template).encode()
    return files if tokens else {}


def token_ids(meta: Meta) -> dict[str, Any]:
    """Begin, end and padding ids as config.json has them; a second end (of a turn) makes the end a list."""
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    found = {ours: meta.get(f"tokenizer.ggml.{theirs}_token_id") for ours, theirs in names.items()}
    ids: dict[str, Any] = {name: number for name, number in found.items() if type(number) is int}
    turn = meta.get("tokenizer.ggml.eot_token_id")
    if type(turn) is int and turn != ids.get("eos_token_id"):
        ids["eos_token_id"] = [number for number in (ids.get("eos_token_id"), turn) if number is not None]
    return ids


def metadata_of(files: Files, ids: Mapping[str, Any], vocab_size: int, where: Path) -> Meta:
    """The keys by which llama.cpp tokenizes, and the files themselves; R205 unless it is a byte-level BPE."""
    contents = {name: content if isinstance(content, bytes) else content.read_bytes() for name, content in files.items()}
    if TOKENIZER not in contents:
        return {"tokenizer.ggml.model": "no_vocab", **carried(contents)}
    try:
        table = parse_json(contents[TOKENIZER])
        settings = parse_json(contents.get(SETTINGS, b"{}"))
        splitter = splitter_of(table)
        tokens, types = token_list(table, vocab_size)
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in table["model"]["merges"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise unholdable(where, str(error)) from None
    meta: Meta = {
        "tokenizer.ggml.model": GPT2,
        "tokenizer.ggml.pre": splitter,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.add_bos_token": adds_begin(table, settings),
    }
    generation = parse_json(contents[GENERATION]) if GENERATION in contents else {}
    for ours, theirs in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        number = first(settings_id(settings, ours, tokens), ids.get(ours), generation.get(ours))
        if number is not None:
            meta[f"tokenizer.ggml.{theirs}_token_id"] = number
    template = contents.get(TEMPLATE, b"").decode() or settings.get("chat_template")
    if isinstance(template, str):
        meta["tokenizer.chat_template"] = template
    return {**meta, "tokenizer.huggingface.json": contents[TOKENIZER].decode(), **carried(contents)}


def unholdable(where: Path, why: str) -> RadladsError:
    """R205 for a tokenizer that GGUF cannot say."""
    return fail("R205", where=where, why=f"GGUF cannot hold its tokenizer: {why}", fix="Use another format")


def carried(contents: Mapping[str, bytes]) -> Meta:
    """The text files besides tokenizer.json, as they are."""
    meta: Meta = {}
    for name, content in contents.items():
        if name != TOKENIZER and len(content) < 2**24:
            try:
                meta[f"radlads.file.{name}"] = content.decode()
            except UnicodeDecodeError:
                continue
    return meta


def splitter_of(table: dict[str, Any]) -> str:
    """The name of the rule that splits text; ValueError for one that llama.cpp would not follow."""
    if table["model"].get("type", "BPE") != "BPE" or table["model"].get("byte_fallback"):
        raise ValueError("it is no byte-level BPE")
    steps = table.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    for name, known in SPLITTERS.items():
        if [essence(step) for step in steps] == [essence(step) for step in known]:
            return name
    raise ValueError(f"text is split by a rule that has no name in GGUF; known: {', '.join(SPLITTERS)}")


def essence(step: dict[str, Any]) -> dict[str, Any]:
    """A step without what does not change the tokens."""
    return {key: value for key, value in step.items() if key != "trim_offsets" and value is not False}


def token_list(table: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Text and type of every row of the embedding; rows without a token are named [PADn]."""
    tokens = [f"[PAD{number}]" for number in range(vocab_size)]
    types = [UNUSED] * vocab_size
    for number, text, kind in token_rows(table):
        if not 0 <= number < vocab_size:
            raise ValueError(f"token {number} lies beyond the {vocab_size} rows of the embedding")
        tokens[number], types[number] = text, kind
    return tokens, types


def token_rows(table: dict[str, Any]) -> Iterator[tuple[int, str, int]]:
    """(id, text, type) of the vocabulary, then of the added tokens."""
    for text, number in table["model"]["vocab"].items():
        yield number, text, NORMAL
    for added in table.get("added_tokens", []):
        yield added["id"], added["content"], CONTROL if added.get("special") else USER_DEFINED


def adds_begin(table: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Whether text begins with a token of its own."""
    if isinstance(settings.get("add_bos_token"), bool):
        return bool(settings["add_bos_token"])
    return (table.get("post_processor") or {}).get("type") == "TemplateProcessing"


def settings_id(settings: dict[str, Any], name: str, tokens: list[str]) -> int | None:
    """The id of a special token that tokenizer_config.json names by its text."""
    text = settings.get(name.removesuffix("_id"))
    text = text.get("content") if isinstance(text, dict) else text
    return tokens.index(text) if isinstance(text, str) and text in tokens else None


def first(*candidates: Any) -> int | None:
    """The first id among the candidates; of a list its first."""
    for candidate in candidates:
        value = candidate[0] if isinstance(candidate, list) and candidate else candidate
        if isinstance(value, int):
            return value
    return None


def to_bytes(value: object) -> bytes:
    """JSON as the files of a folder have it."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
