"""A few long sequences in segments, so that they fill a GPU whose kernels walk a sequence chunk by chunk.

Each segment but the last is walked once for what it alone adds to the state and for how it passes on the state before it; a
short scan over segments joins these to the state each begins with; then the segments are walked as if they were sequences.
"""
import torch

from radlads.backends.torch.kernels.lang import tl, triton

# A switch for measurements and tests.
SEGMENTS = True
# What the first walk and the join of a segment cost, in chunks of the second walk.
LOCAL_COST, JOIN_COST = 0.4, 0.3
SHORTEST_SEGMENT = 8


def walk_span(programs: int, chunks: int, slots: int, local_cost: float = LOCAL_COST) -> int:
    """Chunks of a segment that make `programs` sequences and heads of `chunks` chunks shortest; `chunks` where one walk is.

    slots: how many programs run at the same time.
    """
    if not SEGMENTS or chunks < 2 * SHORTEST_SEGMENT:
        return chunks

    def cost(span: int) -> float:
        walks = -(-chunks // span)
        steps = -(-programs * walks // slots) * span
        return steps if walks == 1 else steps * (1 + local_cost) + walks * JOIN_COST

    spans = {-(-chunks // walks) for walks in range(2, chunks // SHORTEST_SEGMENT + 1)}
    return min([chunks, *sorted(spans, reverse=True)], key=cost)


def walk_slots(device: torch.device, N: int) -> int:
    """Programs of the Gluon walks that a GPU runs at the same time."""
    return torch.cuda.get_device_properties(device).multi_processor_count * (1 if N > 64 else 2)


@triton.jit(do_not_specialize=["walks"])
def segment_join_kernel(state, states, decays, walks, H, N: tl.constexpr, BN: tl.constexpr, ROWS: tl.constexpr,
                        MATRIX: tl.constexpr, PREC: tl.constexpr, REVERSE: tl.constexpr, HAS_STATE: tl.constexpr):
    """In place: from what the segments before each one add (at its place) to the state it begins with.

    states: (sequences, walks, H, N, N) float32, rows are value channels; decays: (sequences, walks, H, N), the decay over the
    segment before; MATRIX: (sequences, walks, H, N, N), each segment's matrix (key before, key after) at its own place. REVERSE
    goes from the last segment to the first, where a matrix acts as its transpose.
    """
    h = tl.program_id(1)
    seq = tl.program_id(2)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    key = tl.arange(0, BN)
    inside = (row[:, None] < N) & (key[None, :] < N)
    cell = row[:, None] * N + key[None, :]
    carried = tl.zeros((ROWS, BN), tl.float32)
    if HAS_STATE:
        carried = tl.load(state + (seq * H + h).to(tl.int64) * N * N + cell, mask=inside, other=0.0)
    place = (seq * walks).to(tl.int64)
    if REVERSE:
        place += walks - 1
    tl.store(states + (place * H + h) * N * N + cell, carried, mask=inside)
    for _ in range(1, walks):
        passed = place
        place += -1 if REVERSE else 1
        there = states + (place * H + h) * N * N + cell
        if MATRIX:
            square = key[:, None] + key[None, :] * N if REVERSE else key[:, None] * N + key[None, :]
            matrix = tl.load(decays + (passed * H + h) * N * N + square, mask=(key[:, None] < N) & (key[None, :] < N), other=0.0)
            carried = tl.dot(carried, matrix, tl.load(there, mask=inside, other=0.0), input_precision=PREC)
        else:
            decay = tl.load(decays + (place * H + h) * N + key, mask=key < N, other=0.0)
            carried = carried * decay[None, :] + tl.load(there, mask=inside, other=0.0)
        tl.store(there, carried, mask=inside)
