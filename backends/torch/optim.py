"""AdamW as the protocol sets it: parameter groups, clipping, float32 masters, and learning rates by token count."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from radlads.backends.torch.kernels.adamw import Table, adamw_has_kernel, adamw_plain
from radlads.backends.torch.model import Model
from radlads.backends.torch.moments import Packed, new_moments, read, write
from radlads.recipe import Stage
from radlads.schedule import learning_rate
from radlads.trained import trained_names

MOMENTS = ("exp_avg", "exp_avg_sq")


def trainable(model: Model, train: str) -> dict[str, nn.Parameter]:
    """The parameters that a stage's `train` names (see `trained_names`); the others stop requiring gradients."""
    wanted = trained_names(model.spec, train)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)
    return {name: parameter for name, parameter in model.named_parameters() if name in wanted}


class Update(NamedTuple):
    """What one update was: learning rate of the mixers (or, without any, of the rest), gradient norm before clipping, and how
    many weights stayed as they were though their update was not zero (None where that is not counted).

    The tensors are on the device, and nobody has waited for them.
    """

    rate: float
    norm: Tensor
    lost: Tensor | None


class Optimizer:
    """AdamW in two groups, mixers and the rest, with float32 masters of lower-precision parameters."""

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        stage: Stage,
        moments: str = "float32",
        masters: str = "float32",
        gather: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """`moments` is what they are kept in. `masters` "none": weights are rounded by chance, and have no master.

        `gather` sums a number over the processes of which each holds shards of the parameters.
        """
        self.stage, self.parameters, self.gather = stage, parameters, gather
        self.rounded = masters == "none" and all(p.dtype == torch.bfloat16 for p in parameters.values())
        # The same tensor where it is float32 already.
        own = torch.float32 if not self.rounded else None
        self.masters = {name: p if own in (p.dtype, None) else p.detach().float() for name, p in parameters.items()}
        # Updates made so far: steps that were not skipped. On the device, where that is decided.
        device = next(iter(parameters.values())).device
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.group = {name: "mixer" if ".self_attn." in name else "base" for name in parameters}
        settings: dict[str, Any] = {"betas": stage.betas, "eps": stage.eps, "weight_decay": stage.weight_decay}
        kernel = all(adamw_has_kernel(p) for p in parameters.values())
        self.adam: torch.optim.Optimizer | OnePass
        if kernel or self.rounded or moments != "float32":
            groups = [int(self.group[name] == "mixer") for name in parameters]
            tensors = list(parameters.values()), list(self.masters.values())
            self.adam = OnePass(*tensors, groups, kernel, self.rounded, moments, settings)
            return
        names = [name for name in ("base", "mixer") if name in self.group.values()]
        tables = [{"params": [m for n, m in self.masters.items() if self.group[n] == g], "name": g} for g in names]
        self.adam = torch.optim.AdamW(tables, lr=stage.lr, fused=True, **settings)

    @property
    def updates(self) -> int:
        """Updates made so far; waits for the device."""
        return int(self.count)

    @torch.no_grad()
    def step(self, number: int) -> Update:
        """Update for optimiser step `number` from the gradients in the parameters, which are cleared.

        A gradient norm that is not finite leaves every weight and moment as it was.
        """
        rates = self.rates(number)
        grads = [p.grad for p in self.parameters.values()]
        lost = None
        if isinstance(self.adam, OnePass):
            norm = self.total(self.adam.square(grads).sqrt()).float()
            self.count += torch.isfinite(norm)
            lost = self.adam.step(grads, norm, self.count, self.stage.clip, (rates["base"], rates["mixer"]), number)
        else:
            norm = self.total(torch.nn.utils.get_total_norm([g for g in grads if g is not None]).float())
            if bool(torch.isfinite(norm)):
                self.count += 1
                self.update(self.adam, norm, rates)
        for parameter in self.parameters.values():
            parameter.grad = None
        return Update(rates["mixer" if "mixer" in self.group.values() else "base"], norm, lost)

    def total(self, norm: Tensor) -> Tensor:
        """The norm over all processes, from that of this one."""
        return norm if self.gather is None else self.gather(norm.square()).sqrt()

    def update(self, adam: torch.optim.Optimizer, norm: Tensor, rates: dict[str, float]) -> None:
        """One update by one of torch's optimisers, from gradients to be clipped by their norm."""
        moving = {name: p for name, p in self.parameters.items() if p.grad is not None}
        for group in adam.param_groups:
            group["lr"] = rates[group["name"]]
        if self.stage.clip:
            torch.nn.utils.clip_grads_with_norm_(list(moving.values()), self.stage.clip, norm)
        copied = [name for name, p in moving.items() if self.masters[name] is not p]
        for name in copied:
            self.masters[name].grad = moving[name].grad.float()  # type: ignore[union-attr]
        adam.step()
        for name in copied:
            moving[name].copy_(self.masters[name])
            self.masters[name].grad = None

    def rates(self, number: int) -> dict[str, float]:
        """Learning rate of each group at optimiser step `number`."""
        stage, per_step = self.stage, self.stage.tokens_per_step
        peaks = {"base": (stage.lr, stage.lr_final), "mixer": (stage.mixer_lr, stage.mixer_lr_final)}
        return {name: learning_rate(stage, number, number * per_step, per_step, *ends) for name, ends in peaks.items()}

    def tensors(self) -> dict[str, Tensor | Packed]:
        """Masters and both moments by name, as they are kept, for a checkpoint; no moments before the first step."""
        found: dict[str, Tensor | Packed] = {}
        for name, master in self.masters.items():
            found[f"master.{name}"] = master.detach().float()
            for moment in MOMENTS:
                if moment in self.adam.state.get(master, {}):
                    found[f"{moment}.{name}"] = self.adam.state[master][moment]
        return found

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], updates: int) -> None:
        """Take masters and moments from a checkpoint made after `updates` updates."""
        self.count.fill_(updates)
        for name, master in self.masters.items():
            master.copy_(tensors[f"master.{name}"])
            self.parameters[name].copy_(master)
            moments = {m: tensors[f"{m}.{name}"].to(master.device) for m in MOMENTS if f"{m}.{name}" in tensors}
            if not moments:
                continue
            if isinstance(self.adam, OnePass):
                for moment, values in moments.items():
                    write(self.adam.state[master][moment], values)
            else:
                self.adam.state[master] = {"step": torch.tensor(float(updates), device=master.device), **moments}


class OnePass:
    """AdamW of all weights in one pass over them, by kernel where there is one; `state` is as that of torch's optimisers."""

    def __init__(
        self,
        weights: list[nn.Parameter],
        masters: list[Tensor],
        groups: list[int],
        kernel: bool,
        rounded: bool,
        moments: str,
        settings: dict[str, Any],
    ) -> None:
        """`groups`: 1 for the weights of mixers. With `rounded` the masters are the weights. `moments`: what they are kept in."""
        self.weights, self.masters, self.groups, self.rounded, self.settings = weights, masters, groups, rounded, settings
        self.state = {master: new_moments(master.detach(), moments) for master in masters}
        self.device = weights[0].device
        self.betas = torch.tensor(settings["betas"], dtype=torch.float64, device=self.device)
        # One table for each dtype, and one for the few tensors that cannot be read 16 bytes at a time.
        kinds = [(w.dtype, w.numel() % 16 == 0 and w.data_ptr() % 16 == 0) for w in weights] if kernel else []
        self.tables = [(Table(*self.members(places)), places) for places in ([i for i, k in enumerate(kinds) if k == kind]
                       for kind in dict.fromkeys(kinds))]  # fmt: skip

    def members(self, places: list[int]) -> tuple[list[Tensor], list[Tensor], list[list[Tensor | Packed]], list[int]]:
        """Weights, masters, moments and groups at some places of the lists."""
        masters = [self.masters[i].detach() for i in places]
        moments = [[self.state[self.masters[i]][moment] for moment in MOMENTS] for i in places]
        return [self.weights[i].detach() for i in places], masters, moments, [self.groups[i] for i in places]

    def square(self, grads: list[Tensor | None]) -> Tensor:
        """Sum of the squares of all gradients, float64 on the device."""
        if not self.tables:
            return torch.stack([g.double().square().sum() for g in grads if g is not None]).sum()
        for table, places in self.tables:
            table.point([grads[i] for i in places])
        return torch.stack([table.square(dtype_of(grads, places)) for table, places in self.tables]).sum()

    def step(
        self, grads: list[Tensor | None], norm: Tensor, number: Tensor, clip: float, rates: tuple[float, float], seed: int
    ) -> Tensor:
        """Update `number` (from 1) with gradients of this `norm`; clip 0 is no clipping. How many updates were lost."""
        corrections = (1 - self.betas**number).float()
        lost = torch.zeros((), dtype=torch.int64, device=self.device)
        for table, places in self.tables:
            table.update(
                dtype_of(grads, places), norm, corrections, lost, clip=clip or float("inf"), rates=rates, seed=seed,
                rounded=self.rounded, **self.settings,
            )  # fmt: skip
        if self.tables or not bool(torch.isfinite(norm)):
            return lost
        factor = (clip / (norm + 1e-6)).clamp(max=1.0) if clip else torch.ones_like(norm)
        chance = torch.Generator(self.device).manual_seed(seed)
        for weight, grad, master, group in zip(self.weights, grads, self.masters, self.groups, strict=True):
            if grad is not None:
                noise = torch.randint(0, 1 << 16, grad.shape, generator=chance, dtype=torch.int32, device=self.device)
                kept = self.state[master].values()
                moments = [read(moment) for moment in kept]
                lost += adamw_plain(
                    weight, grad, master, *moments, factor=factor, corrections=corrections, lr=rates[group],
                    noise=noise if self.rounded else None, **self.settings,
                )  # fmt: skip
                for moment, values in zip(kept, moments, strict=True):
                    write(moment, values)
        return lost


def dtype_of(grads: list[Tensor | None], places: list[int]) -> torch.dtype:
    """The dtype of some gradients, which all have."""
    return next((g.dtype for g in (grads[i] for i in places) if g is not None), torch.float32)
