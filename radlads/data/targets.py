"""What a teacher predicts after every token of a store: its K likeliest tokens and the mass of all others, in files.

A row belongs to a token of the store, in the context that samples of one length and packing give it. A folder holds shards
`targets-NNNNN.arrow` (Arrow IPC, uncompressed, memory-mapped) and `targets.json`, written last. The columns are `ids` (lists of
K uint16 or uint32), `log_p` (lists of K uint16) and `log_tail` (uint16); logarithms are kept as -1024 times their value.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from radlads.data.journal import Journal, link_or_copy, work_folder
from radlads.data.samples import Samples
from radlads.data.store import OPEN_SHARDS, TokenStore, is_shard
from radlads.errors import RadladsError, fail
from radlads.files import as_output_error, check_free, make_parent, new_file, new_folder, read_json, sha256, write_file
from radlads.recipe import Stage

HEADER = "targets.json"
SCHEMA = 1
SCALE = 1024
LEAST = 2**16 - 1
# Rows of a shard, about; a shard holds whole windows of the stream.
SHARD_ROWS = 1 << 16
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


class Rows(NamedTuple):
    """Targets of n tokens: ids (n, K), log-probabilities (n, K) and log of the rest's probability (n,)."""

    ids: Ints
    log_p: Floats
    log_tail: Floats


def nothing(count: int, k: int) -> Rows:
    """Rows of tokens that no sample asks about: all mass is elsewhere."""
    log_p: Floats = np.full((count, k), -np.inf, np.float32)
    return Rows(np.zeros((count, k), np.int64), log_p, np.zeros(count, np.float32))


def code_of(logs: Floats) -> npt.NDArray[np.uint16]:
    """Logarithms of probabilities as they are kept, within 1/2048 of their value down to exp(-64)."""
    found: npt.NDArray[np.uint16] = np.minimum(np.rint(-SCALE * logs.astype(np.float64)), LEAST).astype(np.uint16)
    return found


class TargetCache:
    """The targets of one store by one teacher; nothing is in memory but what is read."""

    def __init__(self, path: str | Path) -> None:
        """Open the folder `path`. Raises R301 when it holds no whole cache."""
        self.path = Path(path)
        self.header = read_header(self.path)
        self.k, self.rows = self.header["k"], self.header["rows"]
        for shard in self.header["shards"]:
            file = self.path / shard["file"]
            if not file.is_file() or file.stat().st_size != shard["bytes"]:
                raise damaged(file, f"it is missing or has another size than {HEADER} says")

    def read(self, start: int, end: int) -> Rows:
        """Targets of tokens start .. end - 1 of the store; the masses of a token sum to one. Raises R301."""
        ids, logs = [], []
        size = self.header["shard_rows"]
        for number in range(start // size, -(-end // size)):
            shard = self.header["shards"][number]
            columns = open_shard(self.path / shard["file"], self.k, shard["rows"], shard["sha256"])
            part = slice(max(start - number * size, 0), min(end - number * size, shard["rows"]))
            ids.append(columns[0][part].astype(np.int64))
            logs.append(np.concatenate([columns[1][part], columns[2][part, None]], 1).astype(np.float32) / -SCALE)
        found, known = np.concatenate(ids), np.concatenate(logs).astype(np.float64)
        if len(found) and found.max() >= self.header["vocab_size"]:
            raise damaged(self.path, f"it holds token {found.max()}, the vocabulary has {self.header['vocab_size']}")
        known -= np.log(np.exp(known).sum(1, keepdims=True))
        rounded: Floats = known.astype(np.float32)
        return Rows(found, rounded[:, :-1], rounded[:, -1])


@lru_cache(maxsize=OPEN_SHARDS)
def open_shard(path: Path, k: int, rows: int, sha256: str) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """The columns of a shard as arrays over the mapped file; `sha256` tells it from an older one there. Raises R301."""
    try:
        file = pa.ipc.open_file(pa.memory_map(str(path)))
        width = file.schema.field("ids").type.value_type
        if width not in (pa.uint16(), pa.uint32()) or file.schema != schema(width, k) or file.num_record_batches != 1:
            raise ValueError(f"its columns are {', '.join(file.schema.names)}")
        batch = file.get_batch(0)
        batch.validate(full=True)
        if batch.num_rows != rows or any(column.null_count for column in batch.columns):
            raise ValueError(f"it holds another number of rows than {HEADER} says")
        ids, log_p = (batch.column(name).flatten().to_numpy().reshape(rows, k) for name in ("ids", "log_p"))
        return ids, log_p, batch.column("log_tail").to_numpy()
    except (OSError, ValueError, KeyError, AttributeError, pa.ArrowException) as error:
        raise damaged(path, str(error).splitlines()[0]) from None


def schema(width: "pa.DataType", k: int) -> "pa.Schema":
    """The columns of a shard."""
    lists = [pa.field("ids", pa.list_(width, k)), pa.field("log_p", pa.list_(pa.uint16(), k))]
    return pa.schema([*lists, pa.field("log_tail", pa.uint16())])


def write_targets(
    out: str | Path,
    store: TokenStore,
    about: dict[str, Any],
    compute: Callable[[int, int], Rows],
    progress: Callable[[int, int | None], None] | None = None,
) -> TargetCache:
    """The cache `out` of `store`: `compute` gives the targets of tokens start .. end - 1, a shard at a time.

    `about` holds k, seq_len, packing, temperature and teacher. Finished shards lie in a hidden folder beside `out`, so that
    the same call goes on after a kill. A cache made earlier from the same is used as it is. Raises R401, R402.
    """
    out, k, seq_len = Path(out), int(about["k"]), int(about["seq_len"])
    origin = {**about, "store": store.header["sha256"], "tokenizer": str(store.header.get("tokenizer")), "rows": len(store)}
    origin |= {"vocab_size": store.header["vocab_size"], "shard_rows": max(1, SHARD_ROWS // seq_len) * seq_len}
    if (out / HEADER).is_file() and origin.items() <= read_header(out).items():
        return TargetCache(out)
    with as_output_error(out, 0):
        check_free(out, (out / HEADER).is_file())
        make_parent(out)
        with work_folder(out) as folder, Journal(folder, origin) as journal:
            records = []
            for start in range(0, len(store), origin["shard_rows"]):
                end = min(start + origin["shard_rows"], len(store))
                key = f"targets-{start // origin['shard_rows']:05d}"
                if key not in journal.records:
                    journal.add(write_shard(folder / f"{key}.arrow", compute(start, end), k, origin["vocab_size"]))
                records.append(journal.records[key])
                if progress is not None:
                    progress(end, len(store))
            asked = sum(record["asked"] for record in records)
            header = {"schema": SCHEMA, **origin, "asked": asked}
            header |= {"mean_tail": sum(record["tail"] for record in records) / max(1, asked)}
            header |= {"most_tail": max(record["most_tail"] for record in records)}
            header["shards"] = [{name: record[name] for name in ("file", "rows", "bytes", "sha256")} for record in records]
            with new_folder(out, overwrite=(out / HEADER).is_file()) as final:
                for record in records:
                    link_or_copy(folder / record["file"], final / record["file"])
                write_file(final / HEADER, json.dumps(header, indent=1) + "\n")
            shutil.rmtree(folder, ignore_errors=True)
    return TargetCache(out)


def write_shard(path: Path, rows: Rows, k: int, vocab_size: int) -> dict[str, Any]:
    """Write one shard; its record tells how much mass is in the tails of the tokens that samples ask about."""
    width = pa.uint16() if vocab_size <= 65536 else pa.uint32()
    values = pa.array(rows.ids.reshape(-1).astype(width.to_pandas_dtype())), pa.array(code_of(rows.log_p).reshape(-1))
    columns = [*(pa.FixedSizeListArray.from_arrays(v, k) for v in values), pa.array(code_of(rows.log_tail))]
    with new_file(path) as file, pa.ipc.new_file(file, schema(width, k)) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema(width, k)))
    tails = np.exp(rows.log_tail[np.isfinite(rows.log_p[:, 0])].astype(np.float64))
    record = {"key": path.stem, "file": path.name, "rows": len(rows.ids), "asked": len(tails), "tail": float(tails.sum())}
    record |= {"most_tail": float(tails.max()) if len(tails) else 0.0}
    return {**record, "bytes": path.stat().st_size, "sha256": sha256(path)}


def read_header(folder: Path) -> dict[str, Any]:
    """Checked `targets.json` of a cache. Raises R301."""
    path = folder / HEADER
    try:
        header: dict[str, Any] = read_json(path, code="R301", limit=64 << 20)
        counts = ("k", "rows", "vocab_size", "seq_len", "shard_rows")
        numbers = all(type(header[key]) is int and header[key] > 0 for key in counts)
        words = all(isinstance(header[key], str) for key in ("store", "tokenizer", "teacher", "packing"))
        usable = header["schema"] == SCHEMA and numbers and words and type(header["temperature"]) is float
        whole = sum(shard["rows"] for shard in header["shards"]) == header["rows"]
        full = all(shard["rows"] == header["shard_rows"] for shard in header["shards"][:-1])
        usable = usable and whole and full and all(is_shard(shard, "rows") for shard in header["shards"])
    except (RadladsError, KeyError, TypeError):
        usable = False
    if not usable:
        raise damaged(path, "it is no record of a teacher's targets")
    return header


def damaged(where: object, why: str) -> RadladsError:
    """R301 at a part of a cache."""
    return fail("R301", where=where, why=why, fix="Make it again with `radlads prepare --teacher-cache`")


def check_targets(cache: TargetCache, stage: Stage, teacher: str | None = None) -> None:
    """R102 unless `cache` holds what `stage` asks, by the teacher with that fingerprint (None: by any)."""
    header = cache.header
    wanted = {"seq_len": stage.seq_len, "packing": stage.packing, "temperature": stage.temperature}
    for key, value in wanted.items():
        if header[key] != value:
            why = f"it was made with {key} {header[key]}, and stage {stage.number} has {value}"
            raise fail("R102", where=cache.path, why=why, fix="Make the cache for this stage, or change the stage")
    if teacher is not None and header["teacher"] != teacher:
        fix = "Make it again with `radlads prepare --teacher-cache`, or name the teacher it was made with"
        raise fail("R102", where=cache.path, why="another teacher made it", fix=fix)


class Targets:
    """The targets of every sample of a stage, from one cache for each store. Raises R102, R301."""

    def __init__(self, samples: Samples, paths: Sequence[str | Path], stage: Stage) -> None:
        caches = {cache.header["store"]: cache for cache in map(TargetCache, paths)}
        self.samples = samples
        self.caches = []
        for store in samples.parts:
            cache = caches.get(store.header["sha256"])
            if cache is None:
                fix = f"Make one: `radlads prepare {store.path} --teacher-cache TEACHER --output-dir DIR`"
                raise fail("R102", where=store.path, why="data.teacher_cache names no cache of this store", fix=fix)
            check_targets(cache, stage)
            self.caches.append(cache)
        if len({cache.k for cache in self.caches}) > 1:
            why = "the caches keep different numbers of tokens"
            raise fail("R102", where="data.teacher_cache", why=why, fix="Make them with the same --top-k")

    def batch(self, first: int, count: int) -> Rows:
        """Targets of the samples at positions first .. first + count - 1 of the run: (count, seq_len, K) and (count, seq_len)."""
        found = [self.of(index) for index in range(first, first + count)]
        return Rows(*(np.stack(values) for values in zip(*found, strict=True)))

    def of(self, index: int) -> Rows:
        """Targets of the sample at one position of the run."""
        part, start, end = self.samples.span(index)
        rows = self.caches[part].read(start, end - 1)
        padding = nothing(self.samples.seq_len - len(rows.ids), self.caches[part].k)
        ids, log_p = np.concatenate([rows.ids, padding.ids]), np.concatenate([rows.log_p, padding.log_p])
        return Rows(ids, log_p, np.concatenate([rows.log_tail, padding.log_tail]))
