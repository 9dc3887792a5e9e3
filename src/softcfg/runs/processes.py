"""The processes of a run. Accelerate carries them; one process needs none of it."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from softcfg.errors import UserError, needing, quote

T = TypeVar("T")


class Processes:
    """This process among those of its launch.

    Attributes:
        rank: 0 .. world - 1; rank 0 speaks for all.
        world: number of processes.
        device: where this process computes; None for the default of a single process.
    """

    def __init__(self, device: str | None = None, *, alone: bool = False) -> None:
        """Join the processes that torchrun or `accelerate launch` started, if they did.

        Args:
            device: as on the command line: "cpu", "cuda" or, for one process, "cuda:N".
            alone: join nobody; this process has work of its own.

        Raises:
            UserError: Accelerate is missing or cannot join the processes, a single device was named for several of
                them, or `WORLD_SIZE` is no number.
        """
        self.rank, self.world = 0, 1
        self.device: torch.device | str | None = device
        self._state: Any = None
        launched = _launched()
        if alone or launched == 1:
            return
        if device not in (None, "cpu", "cuda"):
            raise UserError(f"--device {device} names one device for several processes; leave it out, or give cpu")
        with needing("several processes need Accelerate", "runs"):
            from accelerate import PartialState
        wants_cpu = device == "cpu" or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
        advice = "start them with torchrun or 'accelerate launch', or unset WORLD_SIZE for a single one"
        if "MASTER_ADDR" not in os.environ:  # before Accelerate fills the environment
            raise UserError(f"WORLD_SIZE is {launched}, but no launcher said where these processes meet: {advice}")
        # Accelerate takes a launch without GPUs for a single process unless it is told.
        try:
            self._state = PartialState(cpu=wants_cpu or not torch.cuda.is_available())
        except (ValueError, RuntimeError, OSError) as error:
            PartialState._reset_state()  # of which half is there
            problem = " ".join(str(error).split())
            raise UserError(f"these {launched} processes cannot be joined: {advice} ({problem})") from error
        self.rank, self.world = self._state.process_index, self._state.num_processes
        if self.world != launched:
            raise UserError(f"{launched} processes were launched, but Accelerate joined {self.world}; see its set-up")
        self.device = self._state.device
        atexit.register(self.leave)

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    @property
    def first(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0

    def agree(self, task: Callable[[], T]) -> T:
        """Run `task` in rank 0 and return its result in every process; its `UserError` is raised in every one."""
        if self.world == 1:
            return task()
        from accelerate.utils import broadcast_object_list

        outcome: list[Any] = [None, None]
        cause: UserError | None = None
        if self.first:
            try:
                outcome = [task(), None]
            except UserError as error:
                cause = error
                outcome = [None, str(error)]
        result, problem = broadcast_object_list(outcome, from_process=0)
        if problem is not None:
            raise cause or UserError(problem)
        return result

    def leave(self) -> None:
        """Leave the group of processes; a process that ends does so by itself."""
        if self._state is not None and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _launched() -> int:
    """How many processes the launcher says that it started; 1 without one."""
    text = os.environ.get("WORLD_SIZE") or "1"
    if not text.isdecimal() or len(text) > 9 or not int(text):
        raise UserError(
            f"WORLD_SIZE must be the number of processes, got {quote(text)}; launchers set it, else unset it"
        )
    return int(text)
