"""Reading and writing with one model at one length of context, one JSON line: python bench/use.py MODEL BACKEND TOKENS [WRITTEN]

The same is done twice in one process: first_token_s is of the first time, in which kernels are built and libraries plan;
speeds are of the second. Memory is the GPU's where there is one, else the process's.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.pop(1)  # this folder, whose mlx.py is not the package of that name
from radlads.backends import open_engine, peak_memory
from radlads.folder import open_folder
from radlads.sampling import Sampling
from radlads.session import stream
from radlads.tokenizer import Tokenizer


def main() -> None:
    model, backend, tokens, *more = sys.argv[1:]
    written = int(more[0]) if more else 64
    folder = open_folder(model)
    engine, tokenizer = open_engine(folder, backend), Tokenizer(folder.path)
    ids = (tokenizer.encode("the old man and the sea ") * int(tokens))[: int(tokens)]
    cold, warm = (stream(engine, tokenizer, ids, Sampling(), written) for _ in range(2))
    for generation in (cold, warm):
        for _ in generation:
            pass
    found = {"prompt_tokens": len(ids), "first_token_s": cold.prompt_seconds, "prompt_tps": warm.prompt_tps}
    found |= {"generation_tps": warm.generation_tps, "written": len(warm.token_ids), "peak_memory": peak_memory(engine)}
    print(json.dumps({**found, "device": engine.device}))


if __name__ == "__main__":
    main()
