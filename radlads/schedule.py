"""The shape of the learning rate over a stage (protocol section 1.3); which weights get which rate is the trainer's matter."""

import math

from radlads.recipe import Stage


def learning_rate(stage: Stage, step: int, tokens_seen: int, tokens_per_step: int, peak: float, final: float) -> float:
    """Learning rate of optimiser step `step` (from 0), before which `tokens_seen` tokens of the stage were trained on.

    With p = (tokens_seen - warm-up tokens) / (stage.tokens - warm-up tokens), clamped to 0..1, and
    q = (p - lr_wait) / (lr_endpoint - lr_wait), clamped to 0..1:

    - constant: peak
    - linear: peak + (final - peak) q
    - exponential: peak (final / peak)^q
    - quarter_cosine (the published "cos"): final + (peak - final) cos(pi/2 q)
    - stable_cosine_stable (step 2a): the same with lr_wait 0.833 and lr_endpoint 0.875
    - cosine (the usual half cosine, not the published one): final + (peak - final) (1 + cos(pi q)) / 2

    During warm-up the rate is multiplied by 0.01 + 0.99 step / warmup_steps.
    """
    warmup_tokens = stage.warmup_steps * tokens_per_step
    progress = fraction(tokens_seen - warmup_tokens, stage.tokens - warmup_tokens)
    q = fraction(progress - stage.lr_wait, stage.lr_endpoint - stage.lr_wait)
    warmup = 0.01 + 0.99 * step / stage.warmup_steps if step < stage.warmup_steps else 1.0
    if stage.schedule == "exponential":
        return warmup * peak * (final / peak) ** q if peak else 0.0
    shape = decay(stage.schedule, q)
    return warmup * (final + (peak - final) * shape)


def decay(schedule: str, q: float) -> float:
    """Share of the way from the final rate (0) back to the first one (1) at `q` in 0..1."""
    match schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - q
        case "cosine":
            return (1.0 + math.cos(math.pi * q)) / 2
        case "quarter_cosine" | "stable_cosine_stable":
            return math.cos(math.pi / 2 * q)
    raise ValueError(f"unknown schedule {schedule!r}")


def fraction(part: float, whole: float) -> float:
    """part / whole clamped to 0..1; a whole of nothing is not begun until `part` is positive."""
    if whole <= 0:
        return float(part > 0)
    return min(1.0, max(0.0, part / whole))
