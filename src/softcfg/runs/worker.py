"""Drawing the shards of a run, by one process among many."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from softcfg.errors import UserError
from softcfg.runs.folder import RunFolder
from softcfg.runs.shards import Shard, write_shard

if TYPE_CHECKING:
    from softcfg.decoding import Sampling
    from softcfg.guidance import CFG
    from softcfg.pipeline import Pipeline, PipelineOutput
    from softcfg.runs.plan import Prompts
    from softcfg.runs.processes import Processes
    from softcfg.runs.tracking import Tracker

LOOK = 2.0  # seconds between two looks at what the other processes have done


class Artist:
    """Draws images of given indices; when memory runs out it halves the batch and goes on.

    Attributes:
        at_once: images in a batch as the model sees it.
        speculative_jacobi: the window, see `Pipeline`.
        prompts: what labels stand for; None where they are classes.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        guidance: CFG,
        sampling: Sampling,
        seed: int,
        batch_size: int,
        speculative_jacobi: int = 0,
        prompts: Prompts | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.guidance = guidance
        self.sampling = sampling
        self.seed = seed
        self.at_once = batch_size
        self.speculative_jacobi = speculative_jacobi
        self.prompts = prompts

    def draw(
        self, indices: Sequence[int], labels: Sequence[int], on_step: Callable[[float], None] | None = None
    ) -> PipelineOutput:
        """Draw the images `indices` of the seed, of the classes or prompts `labels`.

        Args:
            on_step: called with the share of the work that is done, after every token.

        Raises:
            UserError: there is not even memory for one image at a time.
        """
        what: dict[str, Any] = {"labels": labels}
        tokens = self.pipeline.generator.num_tokens
        if self.prompts is not None:
            what = {"prompts": [self.prompts[label] for label in labels]}
            tokens = self.pipeline.num_tokens(self.prompts.width, self.prompts.height)
        while True:
            steps = -(-len(indices) // self.at_once) * tokens

            def step(done: int, steps: int = steps) -> None:
                if on_step is not None:
                    on_step(done / steps)

            try:
                return self.pipeline(
                    **what,
                    guidance=self.guidance,
                    seed=self.seed,
                    indices=indices,
                    batch_size=self.at_once,
                    sampling=self.sampling,
                    speculative_jacobi=self.speculative_jacobi,
                    on_step=step,
                )
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # Here the exception is gone, and with it the frames that held tensors.
            if self.at_once == 1:
                raise UserError(f"out of memory with one image at a time on {self.pipeline.generator.device}")
            self.at_once = -(-self.at_once // 2)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            print(
                f"softcfg: out of memory on {self.pipeline.generator.device}; going on with {self.at_once} images at "
                "once (the same images up to floating-point noise)",
                file=sys.stderr,
            )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the machine had no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(sign in str(error) for sign in ("out of memory", "can't allocate memory", "ALLOC_FAILED"))


class Progress:
    """One bar for all processes, kept by rank 0: it looks which of the missing shards are there by now."""

    def __init__(self, run: RunFolder, todo: Sequence[int], tracker: Tracker | None = None) -> None:
        from tqdm import tqdm

        self.run = run
        self.total = run.plan.num_samples
        self.before = self.total - sum(len(run.plan.indices(number)) for number in todo)
        self.tracker = tracker
        self._done = self.before
        self._open = set(todo)
        self._looked = self._started = time.monotonic()
        self._ended: float | None = None
        terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=self.total,
            initial=self.before,
            desc="sampling",
            unit="image",
            mininterval=0.2 if terminal else 30.0,
            dynamic_ncols=True,
        )

    def update(self, own: float = 0.0) -> None:
        """Show what is done: shard files of all processes, and `own` images of the batch at hand."""
        now = time.monotonic()
        if now - self._looked > LOOK:
            self.look()
        self._show(min(self.total, int(self._done + own)))

    def look(self) -> int:
        """Look for shards that have come to be; returns the images done."""
        self._looked = time.monotonic()
        # A file may be there from before, torn or too short for a run that grew.
        new = {number for number in self._open & self.run.present() if self.run.is_whole(number)}
        self._open -= new
        self._done += sum(len(self.run.plan.indices(number)) for number in new)
        if self.tracker is not None:
            self.tracker.throughput(self._done, self.rate(self._done))
        self._show(self._done)
        return self._done

    def rate(self, done: int) -> float:
        """Images a second of all processes since the start."""
        return (done - self.before) / self.seconds

    def _show(self, done: int) -> None:
        if done > self.bar.n:
            self.bar.update(done - self.bar.n)

    @property
    def seconds(self) -> float:
        """Since the start, until the end if it has come."""
        return max((self._ended or time.monotonic()) - self._started, 1e-9)

    def wait(self, processes: Processes) -> None:
        """Wait for the other processes. The launcher ends all when one fails, so this ends too."""
        while processes.world > 1 and self.look() < self.total:
            time.sleep(0.5)

    def close(self) -> None:
        """Stop the clock and leave the bar as it is."""
        self._ended = time.monotonic()
        self.bar.close()


def draw_shards(
    run: RunFolder,
    todo: Sequence[int],
    artist: Artist,
    processes: Processes | None = None,
    *,
    written: Callable[[Shard], None] | None = None,
    progress: Progress | None = None,
) -> None:
    """Draw this process's part of the shards `todo`, every world-th; rank 0 then waits for the others.

    Args:
        processes: those that share the work; None if this one does it all.
        written: called with every shard that was written, off the main thread.

    Raises:
        UserError: a file cannot be written, or memory ran out for good. Every shard that was finished is kept.
    """

    def write(shard: Shard) -> None:
        write_shard(run.shard_path(shard.number), shard)
        if written is not None:
            written(shard)

    try:
        # Files are written while the next batch is drawn. However this block ends, a batch that was drawn is kept.
        with ThreadPoolExecutor(max_workers=1) as writer:
            writing: Future[None] | None = None
            for number in todo if processes is None else todo[processes.rank :: processes.world]:
                indices = run.plan.indices(number)

                def on_step(share: float, images: int = len(indices)) -> None:
                    if progress is not None:
                        progress.update(share * images)

                labels = run.plan.labels_of(indices)
                drawn = artist.draw(indices, labels, on_step)
                if writing is not None:
                    writing.result()
                writing = writer.submit(write, shard_of(run, number, labels, drawn, artist.at_once))
            if writing is not None:
                writing.result()
        if progress is not None:
            progress.look()
            if processes is not None:
                progress.wait(processes)
    finally:
        if progress is not None:
            progress.close()


def shard_of(run: RunFolder, number: int, labels: Sequence[int], drawn: PipelineOutput, at_once: int) -> Shard:
    """The shard that holds a pipeline's output."""
    return Shard(
        number,
        run.run,
        at_once,
        np.asarray(drawn.indices, dtype=np.int64),
        np.asarray(labels, dtype=np.int64),
        drawn.codes.cpu().numpy(),
        drawn.pixels,
    )
