"""What all trainings share: the loop with its schedule, logs, and checkpoints that survive a kill.

A batch depends on nothing but (seed, step), so a resumed training takes the steps that an uninterrupted one takes.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from softcfg.errors import UserError
from softcfg.files import make_folder, write_atomically


@dataclass(frozen=True)
class Budget:
    """What the user grants a training: minutes of training (over all resumes), or a number of steps, and the seed."""

    minutes: float | None = None
    steps: int | None = None
    seed: int = 0

    def progress(self, step: int, seconds: float) -> float:
        """Return how much of the training is done, 0 to 1."""
        if self.steps is not None:
            return min(1.0, step / max(1, self.steps))
        return min(1.0, seconds / (60 * (self.minutes or 1e-9)))


@dataclass(frozen=True)
class Plan:
    """How the learning rate moves (linear warm-up, constant, linear decay to zero) and how often things are logged."""

    warmup_steps: int = 100
    decay_share: float = 0.3
    clip: float = 1.0
    log_every: int = 20
    evaluate_every: int = 500
    save_seconds: float = 120.0

    def factor(self, step: int, progress: float) -> float:
        """Return what the learning rates are multiplied with at a step."""
        return min(1.0, (step + 1) / self.warmup_steps, (1 - progress) / self.decay_share)


@dataclass
class Training:
    """A training: named modules and optimizers, and the state that its checkpoint restores."""

    folder: Path
    accelerator: Accelerator
    modules: dict[str, nn.Module]
    optimizers: list[torch.optim.Optimizer]
    step: int = 0
    seconds: float = 0.0
    seed: int | None = None  # of the training that goes on
    base_rates: list[list[float]] = field(init=False)

    def __post_init__(self) -> None:
        make_folder(self.folder)
        self.base_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        if (path := self.folder / "state.pt").exists():
            self._restore(path)

    def fit(
        self,
        budget: Budget,
        plan: Plan,
        loss: Callable[[int], tuple[Tensor, dict[str, Any]]],
        *,
        after_step: Callable[[int], None] = lambda step: None,
        evaluate: Callable[[], dict[str, float]] = dict,
        stop_at: int | None = None,
    ) -> None:
        """Train until the budget is spent (or until step `stop_at`), then evaluate and save.

        Args:
            budget: the length.
            plan: the schedule of the learning rates and of the log.
            loss: step -> (loss to minimise, further numbers to log).
            after_step: called after each update, e.g. for averages of weights.
            evaluate: numbers to log every `plan.evaluate_every` steps and at the end.
            stop_at: end before this step as a kill would, with a checkpoint; for tests.

        Raises:
            UserError: the training that goes on has another seed.
        """
        if self.seed not in (None, budget.seed):
            raise UserError(
                f"{self.folder} holds a training of seed {self.seed}: go on with it, or give another folder"
            )
        self.seed = budget.seed
        parameters = [p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]]
        mark, last_save = time.monotonic(), time.monotonic()
        while (progress := budget.progress(self.step, self.seconds)) < 1 and self.step != stop_at:
            factor = plan.factor(self.step, progress)
            for optimizer, rates in zip(self.optimizers, self.base_rates, strict=True):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * factor
            with self.accelerator.autocast():
                value, numbers = loss(self.step)
            self.accelerator.backward(value)
            norm = self.accelerator.clip_grad_norm_(parameters, plan.clip)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            after_step(self.step)
            self.step += 1
            now = time.monotonic()
            self.seconds, mark = self.seconds + now - mark, now
            if self.step % plan.log_every == 0:
                self.log(loss=value.detach(), **numbers, gradient_norm=norm, rate=factor)
            if self.step % plan.evaluate_every == 0:
                self.log(**evaluate())
            if now - last_save > plan.save_seconds:
                self.save()
                last_save = now
        self.save()
        if self.step != stop_at:
            self.log(**evaluate(), done=True)

    def log(self, **numbers: Any) -> None:
        """Append one line of numbers to log.jsonl and print it."""
        row = {"step": self.step, "minutes": self.seconds / 60, **numbers}
        line = json.dumps({k: v if isinstance(v, (int, bool)) else float(f"{float(v):.5g}") for k, v in row.items()})
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(line + "\n")
        print(self.folder.name, line, flush=True)

    def save(self) -> None:
        """Write the checkpoint: whole, or not at all."""
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "seed": self.seed,
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        content = io.BytesIO()
        torch.save(state, content)
        write_atomically(self.folder / "state.pt", content.getvalue())

    def _restore(self, path: Path) -> None:
        with path.open("rb") as file:
            try:
                state = torch.load(file, map_location="cpu", weights_only=True)
                self.step, self.seconds, self.seed = state["step"], state["seconds"], state.get("seed")
                for name, module in self.modules.items():
                    module.load_state_dict(state["modules"][name])
                for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                    optimizer.load_state_dict(saved)
            except Exception as error:  # readers raise a dozen types on damaged files
                raise UserError(
                    f"{path} is damaged or of another model: give another folder, or remove {self.folder} to begin anew"
                ) from error
        print(f"{self.folder.name}: continuing at step {self.step}", flush=True)


class Average(nn.Module):
    """Exponential moving average of a module's floating-point parameters and buffers, warm from the start."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self._source = [module]  # in a list: no submodule
        self._names = [name.replace(".", "/") for name, _ in _floats(module)]
        for name, (_, tensor) in zip(self._names, _floats(module), strict=True):
            self.register_buffer(name, tensor.detach().clone())

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the module; early on faster, so that the start is forgotten."""
        decay = min(self.decay, (step + 1) / (step + 10))
        averages = [self.get_buffer(name) for name in self._names]
        torch._foreach_lerp_(averages, [tensor.detach() for _, tensor in _floats(self._source[0])], 1 - decay)

    def weights(self) -> dict[str, Tensor]:
        """Return the module's state dict with the averages in place of the current values."""
        averages = {name.replace("/", "."): self.get_buffer(name) for name in self._names}
        return {name: averages.get(name, tensor) for name, tensor in self._source[0].state_dict().items()}


def _floats(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, t) for name, t in module.state_dict(keep_vars=True).items() if t.is_floating_point())


def save_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write a safetensors file: whole, or not at all."""
    make_folder(path.parent)
    write_atomically(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}))


def described(weights: Path, family: str, config: Any) -> dict[str, Any]:
    """Return a half of a model as model.yaml describes it: its family, its configuration and its weights beside it."""
    with safe_open(weights, "pt") as file:
        parameters = sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}
    return {"family": family, "config": plain, "checkpoint": weights.name, "parameters": parameters}


def batch_index(seed: int, step: int, batch_size: int, size: int) -> Tensor:
    """Return which of `size` examples make the batch of a step: shuffled epochs, each example once an epoch."""
    batches = size // batch_size
    if not batches:
        raise UserError(f"a batch of {batch_size} is larger than the data ({size} images); it must be smaller.")
    epoch, place = divmod(step, batches)
    order = torch.randperm(size, generator=randomness(seed, epoch))
    return order[place * batch_size : (place + 1) * batch_size]


def randomness(seed: int, number: int) -> torch.Generator:
    """Return a CPU generator for the given seed and step or epoch."""
    return torch.Generator().manual_seed(seed * 1_000_003 + number)


def accelerator() -> Accelerator:
    """Return the device to train on: bfloat16 autocast where it is fast, else float32; one process."""
    chosen = Accelerator(mixed_precision="bf16" if fast_bfloat16() else "no")
    if chosen.num_processes > 1:
        raise UserError("this recipe trains on one device; start it without a launcher.")
    return chosen


def by_device(accelerator: Accelerator, *, cpu: int, gpu: int) -> int:
    """Return the number for the kind of device that is trained on."""
    return cpu if accelerator.device.type == "cpu" else gpu


def fast_bfloat16() -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware: a GPU, or a CPU with AMX (ten times faster)."""
    return torch.cuda.is_available() or torch.cpu.get_capabilities().get("amx_bf16", False)
