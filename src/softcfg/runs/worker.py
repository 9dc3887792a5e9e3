"""Make the shards of a run in one process of many: draw them, or decode those of another run again."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from softcfg.errors import UserError
from softcfg.models.geometry import Geometry
from softcfg.nn.memory import is_out_of_memory
from softcfg.runs.folder import RunFolder
from softcfg.runs.plan import Prompts
from softcfg.runs.progress import ProgressWatch
from softcfg.runs.shards import Shard, write_shard

if TYPE_CHECKING:
    from softcfg.calls import PipelineOutput
    from softcfg.decoding import Sampling
    from softcfg.guidance import CFG
    from softcfg.pipeline import Pipeline
    from softcfg.runs.processes import Processes
    from softcfg.tokenizers.base import Tokenizer

# Makes the shard of a number, and calls a function with the share of the work that is done.
ShardMaker = Callable[[int, Callable[[float], None]], Shard]


@dataclass
class BatchDrawer:
    """Draws images of given indices; when memory runs out it halves the batch and goes on.

    Attributes:
        batch_size: images that the model draws at once, from now on.
        speculative_jacobi: the window, see `Pipeline`.
        prompts: what labels stand for; None where they are classes.
        passes: of the generator so far, and `steps`, what token by token they would have been.
    """

    pipeline: Pipeline
    guidance: CFG
    sampling: Sampling
    seed: int
    batch_size: int
    speculative_jacobi: int = 0
    prompts: Prompts | None = None
    passes: int = 0
    steps: int = 0

    def draw(
        self,
        indices: Sequence[int],
        labels: Sequence[int],
        on_step: Callable[[float], None] | None = None,
        *,
        pad_batches: bool = False,
    ) -> PipelineOutput:
        """Draw the images `indices` of the seed, of the classes or prompts `labels`.

        Args:
            on_step: called with the share of the work that is done, after every token.
            pad_batches: see `Pipeline`; shards of a run are drawn so.

        Raises:
            UserError: there is not even memory for one image at a time.
        """
        what: dict[str, Any] = {"labels": labels}
        tokens = self.pipeline.generator.num_tokens
        if self.prompts is not None:
            what = {"prompts": [self.prompts[label] for label in labels]}
            tokens = self.pipeline.num_tokens(self.prompts.width, self.prompts.height)
        while True:
            steps = -(-len(indices) // self.batch_size) * tokens

            def step(done: int, steps: int = steps) -> None:
                if on_step is not None:
                    on_step(done / steps)

            try:
                drawn: PipelineOutput = self.pipeline(
                    **what,
                    guidance=self.guidance,
                    seed=self.seed,
                    indices=indices,
                    batch_size=self.batch_size,
                    pad_batches=pad_batches,
                    sampling=self.sampling,
                    speculative_jacobi=self.speculative_jacobi,
                    on_step=step,
                )
                self.passes += drawn.passes
                self.steps += steps
                return drawn
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if self.batch_size == 1:
                    raise UserError(
                        f"out of memory with one image at a time on {self.pipeline.generator.device}"
                    ) from error
            # Here the exception is gone, and with it the frames that held tensors.
            self.batch_size = -(-self.batch_size // 2)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            print(
                f"softcfg: out of memory on {self.pipeline.generator.device}; going on with {self.batch_size} images "
                "at once (the same images up to floating-point noise)",
                file=sys.stderr,
            )

    def shards_of(self, run: RunFolder) -> ShardMaker:
        """What draws the shards of `run`."""

        def draw(number: int, on_step: Callable[[float], None]) -> Shard:
            indices = run.plan.indices(number)
            labels = run.plan.labels_of(indices)
            drawn = self.draw(indices, labels, on_step, pad_batches=True)
            return Shard(
                number,
                run.fingerprint,
                self.batch_size,
                np.asarray(drawn.indices, dtype=np.int64),
                np.asarray(labels, dtype=np.int64),
                drawn.codes.cpu().numpy(),
                drawn.pixels,
            )

        return draw


def require_decodable(source: RunFolder, tokenizer: Tokenizer) -> None:
    """Raise `UserError` unless `tokenizer` decodes the first codes of a run."""
    codes = source.require(0).codes
    try:
        tokenizer.check_tokens(codes, _grid_of(source, tokenizer))
    except UserError as error:
        raise UserError(f"this image tokenizer does not decode the codes of {source.path}: {error}") from error


def _grid_of(run: RunFolder, tokenizer: Tokenizer) -> tuple[int, int] | None:
    """The grid (h, w) of the images of a run; None for a tokenizer's own."""
    prompts = Prompts.of(run.settings) if tokenizer.any_size else None
    return None if prompts is None else Geometry.of_image(prompts.width, prompts.height, tokenizer.patch_size).grid


def decoded_shards(source: RunFolder, tokenizer: Tokenizer, run: RunFolder) -> ShardMaker:
    """What makes the shards of `run`: those of `source` with pixels that `tokenizer` decodes."""
    grid = _grid_of(run, tokenizer)

    def decode(number: int, on_step: Callable[[float], None]) -> Shard:
        shard = source.require(number)
        count, at_once = len(shard.codes), shard.drawn_at_once
        # A partial batch is padded as when it was drawn.
        padded = np.concatenate([shard.codes, shard.codes[-1:].repeat(run.plan.batch_size - count, axis=0)])
        pixels = []
        for start in range(0, count, at_once):
            image = tokenizer.decode(padded[start : start + at_once], grid)
            pixels.append(tokenizer.to_uint8(image).cpu().numpy())
            on_step(min(1.0, (start + at_once) / count))
        return replace(shard, fingerprint=run.fingerprint, pixels=np.concatenate(pixels)[:count])

    return decode


def make_shards(
    run: RunFolder,
    todo: Sequence[int],
    make: ShardMaker,
    processes: Processes,
    *,
    on_shard: Callable[[Shard], None] | None = None,
    watch: ProgressWatch | None = None,
) -> None:
    """Make this process's part of the shards `todo`, every world-th; rank 0 then waits for the others.

    Args:
        processes: those that share the work.
        on_shard: called with every shard that was written, off the main thread.
        watch: follows the run, in rank 0.

    Raises:
        UserError: a file cannot be written, or memory ran out for good. Every shard that was finished is kept.
    """

    writing: Future[int] | None = None

    def write(shard: Shard) -> int:
        write_shard(run.shard_path(shard.number), shard)
        if on_shard is not None:
            on_shard(shard)
        return shard.number

    def wait_for_writer() -> None:
        if writing is not None:
            written = writing.result()
            if watch is not None:
                watch.written(written)

    try:
        # Files are written while the next batch is drawn. However this block ends, a batch that was drawn is kept.
        with ThreadPoolExecutor(max_workers=1) as writer:
            for number in todo[processes.rank :: processes.world]:

                def on_step(share: float, images: int = len(run.plan.indices(number))) -> None:
                    if watch is not None:
                        watch.update(share * images)

                shard = make(number, on_step)
                wait_for_writer()
                writing = writer.submit(write, shard)
            wait_for_writer()
        if watch is not None:
            watch.look()
            watch.wait(processes)
    finally:
        if watch is not None:
            watch.close()
