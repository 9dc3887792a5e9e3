"""The progress of a run, over all its processes."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from softcfg.errors import UserError
from softcfg.runs.folder import RunFolder

if TYPE_CHECKING:
    from tqdm import tqdm

    from softcfg.runs.processes import Processes

SECONDS_BETWEEN_LOOKS = 2.0  # at what the other processes have done


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        done: images that are there, of all processes, and those that the current batch amounts to by now.
        total: images of the run.
        before: images that were there at the start.
        seconds: since the start.
        ended: True in the last report, whether the run is complete, failed or was interrupted.
    """

    done: int
    total: int
    before: int
    seconds: float
    ended: bool = False

    @property
    def rate(self) -> float:
        """Images per second of all processes since the start."""
        return (self.done - self.before) / self.seconds


class ProgressWatch:
    """Follows a run in its first process: looks which of the missing shards are there by now, and reports it."""

    def __init__(
        self, run: RunFolder, todo: Sequence[int], on_progress: Callable[[Progress], None] | None = None
    ) -> None:
        self.run = run
        self.total = run.plan.num_samples
        self.before = self.total - sum(len(run.plan.indices(number)) for number in todo)
        self.on_progress = on_progress
        self._done = self._reported = self.before
        self._open = set(todo)
        self._looked = self._started = time.monotonic()
        self._report()

    def update(self, own: float = 0.0) -> None:
        """Report what is done: the shard files of all processes, and `own` images of the current batch."""
        if time.monotonic() - self._looked > SECONDS_BETWEEN_LOOKS:
            self.look()
        done = min(self.total, int(self._done + own))
        if done > self._reported:
            self._reported = done
            self._report()

    def written(self, number: int) -> None:
        """Count a shard that this process has just written."""
        if number in self._open:
            self._open.remove(number)
            self._done += len(self.run.plan.indices(number))

    def look(self) -> int:
        """Look for shards that were written since, and report them; returns the images done."""
        self._count()
        self._reported = max(self._reported, self._done)
        self._report()
        return self._done

    def _count(self) -> None:
        self._looked = time.monotonic()
        # A file may be there from before, torn or too short for a run that grew.
        new = {number for number in self._open & self.run.present() if self.run.is_whole(number)}
        self._open -= new
        self._done += sum(len(self.run.plan.indices(number)) for number in new)

    @property
    def seconds(self) -> float:
        """Since the start."""
        return max(time.monotonic() - self._started, 1e-9)

    def wait(self, processes: Processes) -> None:
        """Wait for the other processes. The launcher ends all when one fails, so this ends too."""
        while processes.world > 1 and self.look() < self.total:
            time.sleep(0.5)

    def close(self) -> None:
        """Make the last report, of whole shards alone."""
        with contextlib.suppress(UserError):  # the folder may be what went wrong
            self._count()
        self._reported = self._done
        self._report(ended=True)

    def _report(self, *, ended: bool = False) -> None:
        if self.on_progress is not None:
            self.on_progress(Progress(self._reported, self.total, self.before, self.seconds, ended))


class ProgressBar:
    """Shows the reports of a run as a bar on the error stream; for `on_progress` of `draw_run`.

    Args:
        title: what stands in front of the bar.
        keep: whether the bar stays when the run has ended.
    """

    def __init__(self, title: str = "sampling", *, keep: bool = True) -> None:
        self.title = title
        self.keep = keep
        self.bar: tqdm | None = None

    def __call__(self, progress: Progress) -> None:
        """Show a report; the first one opens the bar and the last one closes it."""
        if self.bar is None:
            from tqdm import tqdm

            self.bar = tqdm(
                total=progress.total,
                initial=progress.before,
                desc=self.title,
                unit="image",
                mininterval=0.2 if sys.stderr.isatty() else 30.0,
                dynamic_ncols=True,
                leave=self.keep,
            )
        if progress.done > self.bar.n:
            self.bar.update(progress.done - self.bar.n)
        if progress.ended:
            self.bar.close()
            self.bar = None
