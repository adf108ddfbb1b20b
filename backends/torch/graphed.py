"""Micro-batches as CUDA graphs: forward and backward are recorded once, and from then on cost the host one call.

It serves where nothing of them but values depends on the samples, and no other process has a part in them: all weights on one
GPU, no documents that begin inside.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

# Times that the work is done before it is recorded: layers are compiled, kernels built and workspaces found by then.
WARM_UP = 2


class Graphed:
    """`work(sample, share)` with the gradients that it leaves in `parameters`, replayed from graphs.

    The first micro-batch of a step writes the gradients, later ones add to them.
    """

    def __init__(self, work: Callable[[Tensor, Tensor], Tensor], parameters: Sequence[nn.Parameter]) -> None:
        """`work` must do the same operations at every call and wait for nothing."""
        self.work, self.parameters = work, parameters
        self.device = parameters[0].device
        self.graphs: dict[bool, torch.cuda.CUDAGraph] = {}
        self.results: dict[bool, Tensor] = {}
        self.grads: list[Tensor | None] = []
        self.sample, self.share = torch.empty(0), torch.ones((), device=self.device)

    def __call__(self, sample: Tensor, share: float, first: bool) -> Tensor:
        """What `work` returns for `sample` (B, T + 1), which must always be of one shape; a copy.

        Raises RuntimeError where the work cannot be recorded.
        """
        if not self.graphs:
            self.sample = sample.to(self.device, copy=True)
        if first not in self.graphs:
            self.record(first)
        self.sample.copy_(sample, non_blocking=True)
        self.share.fill_(share)
        self.graphs[first].replay()
        self.attach(self.grads)
        return self.results[first].clone()

    def record(self, first: bool) -> None:
        """Make one of the two graphs; nothing that is recorded runs."""
        if first:
            side = torch.cuda.Stream(self.device)
            side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    self.attach([None] * len(self.parameters))
                    self.work(self.sample, self.share)
            torch.cuda.current_stream(self.device).wait_stream(side)
            self.attach([None] * len(self.parameters))
        graph = torch.cuda.CUDAGraph()
        pool = self.graphs[True].pool() if self.graphs else None
        # Threads of NCCL and of checkpoints may call CUDA meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            self.results[first] = self.work(self.sample, self.share)
        self.graphs[first] = graph
        if first:
            self.grads = [p.grad for p in self.parameters]

    def attach(self, grads: Sequence[Tensor | None]) -> None:
        """Make these the gradients of the parameters."""
        for parameter, grad in zip(self.parameters, grads, strict=True):
            parameter.grad = grad
