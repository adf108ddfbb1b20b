"""AdamW as the protocol sets it: parameter groups, clipping, float32 masters, and learning rates by token count."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from radlads.backends.torch.kernels.adamw import adamw_, adamw_has_kernel
from radlads.backends.torch.model import Model
from radlads.backends.torch.moments import Packed, SmallAdamW
from radlads.recipe import Stage
from radlads.schedule import learning_rate

# Step 3a trains the decay and what leads to it; everything else stays.
DECAY_NAMES = ("time_decay", "time_maa_w", "time_maa_x", ".w0", ".w1", ".w2")


def trainable(model: Model, train: str) -> dict[str, nn.Parameter]:
    """The parameters that `train` ("mixer", "all", "layers" or "decay") names; the others stop requiring gradients.

    A tensor that no forward pass reads is never trained.
    """
    rows = model.spec.tensors()
    chosen = {}
    for name, parameter in model.named_parameters():
        recurrent = name.startswith("model.layers.") and model.spec.mixers[int(name.split(".")[2])] != "softmax"
        wanted = {
            "all": True,
            "layers": name.startswith("model.layers."),
            "mixer": ".self_attn." in name and recurrent,
            "decay": ".self_attn." in name and recurrent and any(part in name for part in DECAY_NAMES),
        }[train]
        parameter.requires_grad_(wanted and rows[name].read)
        if parameter.requires_grad:
            chosen[name] = parameter
    return chosen


def local(x: Any) -> Any:
    """What this process holds of a tensor."""
    return x.to_local() if hasattr(x, "to_local") else x


class Optimizer:
    """AdamW in two groups, mixers and the rest, with float32 masters of lower-precision parameters."""

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        stage: Stage,
        moments: str = "float32",
        total_norm: Callable[[list[Tensor]], Tensor] = torch.nn.utils.get_total_norm,
    ) -> None:
        """`moments` is what they are kept in; `total_norm` knows where gradients are shards of larger ones."""
        self.stage, self.parameters, self.total_norm = stage, parameters, total_norm
        # The same tensor where it is float32 already.
        self.masters = {name: p if p.dtype == torch.float32 else p.detach().float() for name, p in parameters.items()}
        groups: dict[str, list[Tensor]] = {"base": [], "mixer": []}
        self.groups: dict[str, list[str]] = {"base": [], "mixer": []}
        # Updates made so far: steps that were not skipped.
        self.updates = 0
        for name, master in self.masters.items():
            group = "mixer" if ".self_attn." in name else "base"
            self.groups[group].append(name)
            groups[group].append(master)
        tables = [{"params": members, "name": name} for name, members in groups.items() if members]
        settings: dict[str, Any] = {"lr": stage.lr, "betas": stage.betas, "eps": stage.eps, "weight_decay": stage.weight_decay}
        self.adam: torch.optim.Optimizer
        if moments == "float32":
            self.adam = torch.optim.AdamW(tables, **settings, fused=True)
        else:
            self.adam = SmallAdamW(tables, moments, **settings)

    def step(self, number: int) -> tuple[float, float]:
        """Update for optimiser step `number` from the gradients in the parameters, which are cleared.

        Returns (learning rate of the mixers or, without any, of the rest; gradient norm before clipping). A norm that is
        not finite leaves every weight and moment as it was.
        """
        rates = self.rates(number)
        grads = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = self.total_norm(grads).float()
        if bool(torch.isfinite(norm)):
            for group in self.adam.param_groups:
                group["lr"] = rates[group["name"]]
            self.update(norm)
        for parameter in self.parameters.values():
            parameter.grad = None
        return rates[self.adam.param_groups[-1]["name"]], float(norm)

    @torch.no_grad()
    def update(self, norm: Tensor) -> None:
        """One update from the gradients, clipped by their norm; weights that a kernel updates in one pass need no copies."""
        self.updates += 1
        moving: dict[str, Any] = {name: p for name, p in self.parameters.items() if p.grad is not None}
        whole = isinstance(self.adam, torch.optim.AdamW)  # SmallAdamW keeps its moments in another form
        fast = {n for n, p in moving.items() if whole and self.masters[n] is not p and adamw_has_kernel(local(p))}
        slow = [name for name in moving if name not in fast]
        if fast:
            factor = (self.stage.clip / (norm + 1e-6)).clamp(max=1.0) if self.stage.clip else torch.ones_like(norm)
            for group in self.adam.param_groups:
                self.update_in_one_pass([name for name in self.groups[group["name"]] if name in fast], group, factor)
        if self.stage.clip and slow:
            torch.nn.utils.clip_grads_with_norm_([moving[name] for name in slow], self.stage.clip, norm)
        for name in slow:
            if self.masters[name] is not moving[name]:
                self.masters[name].grad = moving[name].grad.float()
        if slow:
            self.adam.step()
        for name in slow:
            if self.masters[name] is not moving[name]:
                moving[name].copy_(self.masters[name])
                self.masters[name].grad = None

    def update_in_one_pass(self, names: list[str], group: dict[str, Any], factor: Tensor) -> None:
        """AdamW of the named weights by kernel, with the gradients times `factor`."""
        settings = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
        for name in names:
            parameter, master = self.parameters[name], self.masters[name]
            state = self.adam.state[master]
            if not state:
                state |= {moment: torch.zeros_like(master) for moment in ("exp_avg", "exp_avg_sq")}
            tensors = (parameter, parameter.grad, master, state["exp_avg"], state["exp_avg_sq"])
            weight, grad, *kept = (local(x) for x in tensors)
            adamw_(weight, grad, *kept, factor=factor, number=self.updates, **settings)

    def rates(self, number: int) -> dict[str, float]:
        """Learning rate of each group at optimiser step `number`."""
        stage, per_step = self.stage, self.stage.tokens_per_step
        peaks = {"base": (stage.lr, stage.lr_final), "mixer": (stage.mixer_lr, stage.mixer_lr_final)}
        return {name: learning_rate(stage, number, number * per_step, per_step, *ends) for name, ends in peaks.items()}

    def tensors(self) -> dict[str, Tensor | Packed]:
        """Masters and both moments by name, as they are kept, for a checkpoint; no moments before the first step."""
        found: dict[str, Tensor | Packed] = {}
        for name, master in self.masters.items():
            found[f"master.{name}"] = master.detach()
            for moment in ("exp_avg", "exp_avg_sq"):
                if moment in self.adam.state.get(master, {}):
                    found[f"{moment}.{name}"] = self.adam.state[master][moment]
        return found

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], updates: int) -> None:
        """Take masters and moments from a checkpoint made after `updates` updates."""
        self.updates = updates
        for name, master in self.masters.items():
            master.copy_(tensors[f"master.{name}"])
            self.parameters[name].copy_(master)
            if f"exp_avg.{name}" in tensors and isinstance(self.adam, SmallAdamW):
                self.adam.put(master, tensors[f"exp_avg.{name}"], tensors[f"exp_avg_sq.{name}"], updates)
            elif f"exp_avg.{name}" in tensors:
                self.adam.state[master] = {
                    "step": torch.tensor(float(updates), device=master.device),
                    **{moment: tensors[f"{moment}.{name}"].to(master.device) for moment in ("exp_avg", "exp_avg_sq")},
                }
