"""Runs, of the command line or of Python, in processes that start in a moment: forked from one that imported torch."""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.process import BaseProcess

PRELOADED = [
    "torch", "torch.distributed", "accelerate.utils", "tqdm", "PIL.Image", "softcfg.cli.main", "softcfg.pipeline",
    "softcfg.models.alitok", "softcfg.tokenizers.maskgit_vq", "softcfg.runs.job", "softcfg.runs.processes",
    "softcfg.tuning", "matplotlib.figure", "launching",
]  # fmt: skip


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def command_line(words: Sequence[str]) -> int:
    """Run `softcfg` with these words."""
    from softcfg.cli.main import main

    return main(words)


def python_call(words: Sequence[str]) -> int:
    """Draw a run as a script of a user does; the words are the model, the folder, and the numbers of images."""
    from softcfg.runs import RunRequest, draw_run

    model, folder, num_samples, batch_size = words
    draw_run(RunRequest(model, "random", num_samples=int(num_samples), batch_size=int(batch_size)), folder)
    return 0


def _process(program: Callable[[Sequence[str]], int], rank: int, world: int, port: int, words: Sequence[str]) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    if world > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
    sys.exit(program(words))


class Job:
    """The processes of one launch, with the environment that torchrun gives them."""

    def __init__(
        self, world: int, words: Sequence[str], program: Callable[[Sequence[str]], int] = command_line
    ) -> None:
        os.environ["OMP_NUM_THREADS"] = "1"  # before the server starts
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        port = free_port()
        self.processes: list[BaseProcess] = [
            context.Process(target=_process, args=(program, rank, world, port, list(words))) for rank in range(world)
        ]
        for process in self.processes:
            process.start()

    def alive(self) -> list[BaseProcess]:
        return [process for process in self.processes if process.exitcode is None]

    def kill(self, ranks: Iterable[int]) -> int:
        """SIGKILL to some processes; then, as a launcher does, SIGTERM to the others. Returns how many it hit."""
        for rank in ranks:
            self.processes[rank].kill()
        for rank in ranks:
            self.processes[rank].join()
        for process in self.alive():
            process.terminate()
        self.join(5.0)
        for process in self.alive():
            process.kill()
            process.join()
        return sum(process.exitcode == -signal.SIGKILL for process in self.processes)

    def join(self, seconds: float = 120.0) -> list[int | None]:
        """Wait for all processes; their exit codes."""
        until = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        return [process.exitcode for process in self.processes]
