"""The examples of every training step and every evaluation, in memory or from disk.

What a batch holds depends on (seed, step, rollbacks) alone, however it is read and by how many
hosts.
"""

import contextlib
import functools
import gc
import itertools
import multiprocessing
import os
import re
import secrets
import signal
import sys
import threading
import traceback
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing import resource_tracker, shared_memory, synchronize
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from absl import flags, logging

from flax_resnet.data.photos import Photos
from flax_resnet.errors import InputError, short_reason
from flax_resnet.progress import hush_libraries

Arrays = dict[str, np.ndarray]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

# Where Linux has the memory that processes share, and how ours is named there.
_SHARED_MEMORY = "/dev/shm"
_NAME = "flax_resnet"


@functools.lru_cache(maxsize=1)  # one epoch is asked for at every of its steps
def epoch_order(seed: int, epoch: int, num_examples: int, rollbacks: int = 0) -> np.ndarray:
    """The examples of an epoch, counted from 0, in the order of their use.

    Args:
      seed: of the run, below 2**32.
      epoch: counted from 0.
      num_examples: in the data set.
      rollbacks: how often the run has gone back; each gives another order.

    Returns:
      int32 [num_examples].
    """
    random = np.random.Generator(np.random.Philox(key=[seed + (rollbacks << 32), epoch]))
    order = random.permutation(num_examples).astype(np.int32)
    order.flags.writeable = False
    return order


def example_random(seed: int, epoch: int, index: int, rollbacks: int = 0) -> np.random.Generator:
    """What is drawn for one example in one epoch, whatever batch it stands in.

    Args:
      seed, epoch, rollbacks: see `epoch_order`.
      index: of the example.
    """
    # The order of the epoch counts from 0 in the lowest of the four words.
    key = [seed + (rollbacks << 32), epoch]
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, index, 1]))


class Readable(Protocol):
    """A split as `Source`, `Dataset`, ... are: what gives images of one size by number."""

    def __len__(self) -> int: ...

    def read(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...


def read_for_epoch(
    source: Readable, index: np.ndarray, seed: int, epoch: int, rollbacks: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of some examples as an epoch of training reads them.

    Args:
      source: the training split; of `Photos` with random crops these are read.
      index: of the examples.
      seed, epoch, rollbacks: see `epoch_order`.
    """
    if isinstance(source, Photos) and source.random_crops:
        randoms = (example_random(seed, epoch, int(i), rollbacks) for i in index)
        return source.read_crops(index, randoms)
    return source.read(index)


@dataclass
class TrainBatches:
    """The batches of a run, by the number of the step that they are for.

    A batch is "image", uint8 [n, H, W, C], "label", int32 [n], and "index", int32 [n], the
    places in the split.

    Attributes:
      source: the training split.
      seed: see `epoch_order`.
      batch_size: examples a step.
      share: those of a batch that this host reads.
      first, stop: the steps; `self[0]` is for step `first`.
      rollbacks: see `epoch_order`.
    """

    source: Readable
    seed: int
    batch_size: int
    share: slice
    first: int
    stop: int
    rollbacks: int = 0

    def __len__(self) -> int:
        return self.stop - self.first

    def __getitem__(self, i: int) -> Arrays:
        steps_per_epoch = len(self.source) // self.batch_size
        epoch, position = divmod(self.first + i, steps_per_epoch)
        order = epoch_order(self.seed, epoch, len(self.source), self.rollbacks)
        index = order[position * self.batch_size :][: self.batch_size][self.share]
        image, label = read_for_epoch(self.source, index, self.seed, epoch, self.rollbacks)
        return {"image": image, "label": label, "index": index}


@dataclass
class EvalBatches:
    """A split from its beginning to its end, once or several times.

    A batch is "image", uint8 [n, H, W, C], "label", int32 [n], and "mask", bool [n], which
    is False for the examples that fill up the last batch.

    Attributes:
      source: the split.
      batch_size: examples a batch.
      share: those of a batch that this host reads.
      times: how often the split is read.
    """

    source: Readable
    batch_size: int
    share: slice
    times: int = 1

    @property
    def batches_each_time(self) -> int:
        """Of the split once, the last of them filled up."""
        return -(-len(self.source) // self.batch_size)

    def __len__(self) -> int:
        return self.times * self.batches_each_time

    def __getitem__(self, i: int) -> Arrays:
        first = i % self.batches_each_time * self.batch_size
        index = (first + np.arange(self.batch_size))[self.share]
        mask = index < len(self.source)
        image, label = self.source.read(np.minimum(index, len(self.source) - 1))
        return {"image": image, "label": label, "mask": mask}


def stream(
    batches: TrainBatches | EvalBatches, workers: int, threads: int = 1
) -> Generator[Arrays]:
    """Every batch in turn, read ahead by that many processes of Grain; by this one if 0.

    Each of them reads in so many threads.

    Close it, or read it to its end, for the processes to end. They import the script that calls
    it, which therefore does so under `if __name__ == "__main__":`.

    Raises:
      InputError: if the script cannot be imported, or would begin anew in each of them; if the
        split cannot be pickled for them; if one of them dies.
    """
    if workers:
        _check_script()
        _remove_memory_of_the_dead()
    prefix = f"{_NAME}-{_namespace()}-{os.getpid()}-{secrets.token_hex(4)}-"
    try:
        yield from _read(batches, workers, threads, prefix)
    except Exception as error:
        traceback.clear_frames(error.__traceback__)  # which hold batches too
        gc.collect()
        _remove_memory_of(prefix)
        if reason := _reason_of_grain(error):
            raise InputError(reason) from error
        raise
    finally:
        gc.collect()  # Grain leaves the last batch in a cycle, and the memory that it shares


def _check_script() -> None:
    main = sys.modules["__main__"]
    script = getattr(main, "__file__", None)
    if script is None or main.__spec__:  # a notebook; a module, which is imported by its name
        return
    advice = "or set stream_workers=0"
    try:
        is_guarded = "__main__" in Path(script).read_text(errors="replace")
    except OSError as error:
        raise InputError(
            f"the processes that read the data import the script, and {script} is no file: "
            f"write it to one, {advice}"
        ) from error
    if not is_guarded:
        raise InputError(
            f"the processes that read the data import {script}, and would run it: put what it "
            f'does under if __name__ == "__main__":, {advice}'
        )


def _reason_of_grain(error: Exception) -> str | None:
    """What is wrong with the split or the machine, for which Grain has no exceptions of its own."""
    if any("cannot be pickled" in note for note in getattr(error, "__notes__", ())):
        return (
            f"the processes that read the data cannot be given it: {short_reason(error)}; open "
            "files when an example is first asked for, or set stream_workers=0"
        )
    if match := re.search("Worker process was terminated .* exit code (-?[0-9]+)", str(error)):
        died = f"a process that reads the data has died (exit code {match[1]})"
        if int(match[1]) > 0:  # by itself, in code of the data's
            return f"{died}; with stream_workers=0 the run reads by itself"
        return (
            f"{died}, mostly of too little memory, or of too little in /dev/shm (Docker: "
            "--shm-size): fewer stream_workers take less, and stream_workers=0 none"
        )
    return None


def _read(
    batches: TrainBatches | EvalBatches, workers: int, threads: int, prefix: str
) -> Generator[Arrays]:
    import grain  # half a second, for streaming alone

    if not flags.FLAGS.is_parsed():  # Grain reads flags of its own, also outside of programs
        flags.FLAGS.mark_as_parsed()
    source: Any = batches  # Grain asks for more than the two methods that it uses
    dataset: Any = grain.MapDataset.source(source).to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    )
    if workers:
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        dataset = dataset.mp_prefetch(options, worker_init_fn=partial(_begin, prefix=prefix))
    with contextlib.closing(iter(dataset)) as read:
        # The processes begin in here, and inherit it.
        with contextlib.ExitStack() as stack:
            if workers:
                stack.enter_context(_signals_blocked())
                stack.enter_context(_semaphores_named(prefix))
            first = list(itertools.islice(read, 1))
        for batch in itertools.chain(first, read):
            # Out of the memory that the processes share: JAX lets go of arrays late.
            yield {name: np.array(array) for name, array in batch.items()}


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """SIGINT and SIGTERM, also to a whole process group, are for the program alone."""
    resource_tracker.ensure_running()  # which would let them through again as it begins
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# Memory that processes share, and their semaphores, are files with names, which nobody removes
# when SIGKILL takes the program and its processes at once. Ours say whose they are.


def _remove_memory_of_the_dead() -> None:
    """Removes what programs of this user, killed earlier, have left in /dev/shm."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(_SHARED_MEMORY):
            match = re.match(rf"(?:sem\.)?{_NAME}-(\d+)-(\d+)-", entry.name)
            if match is None or int(match[1]) != _namespace():
                continue
            with contextlib.suppress(OSError):
                if entry.stat().st_uid == os.getuid() and not _is_alive(int(match[2])):
                    os.unlink(entry.path)


@contextlib.contextmanager
def _semaphores_named(prefix: str) -> Iterator[None]:
    locks: Any = synchronize.SemLock  # whose names are otherwise random
    before = vars(locks)["_make_name"]
    if sys.platform == "linux":  # elsewhere names are to be short
        locks._make_name = staticmethod(lambda: f"/{prefix}{secrets.token_hex(8)}")
    try:
        yield
    finally:
        locks._make_name = before


def _remove_memory_of(prefix: str) -> None:
    """Removes what Grain loses when a process fails: the tracker of resources would tell of it."""
    with contextlib.suppress(OSError):
        for name in os.listdir(_SHARED_MEMORY):
            if name.startswith(prefix):
                with contextlib.suppress(OSError):
                    try:
                        memory = shared_memory.SharedMemory(name)
                    except ValueError:  # empty: its process was killed just then
                        os.unlink(os.path.join(_SHARED_MEMORY, name))
                        continue
                    memory.close()
                    memory.unlink()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        pass
    return True


def _namespace() -> int:
    """In which process numbers count: containers may share their memory, and not these."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def _begin(worker: int, workers: int, prefix: str) -> None:
    hush_libraries(logging.FATAL)  # as train.py does
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        module: Any = shared_memory
        module._SHM_NAME_PREFIX = f"/{prefix}"
        module._SHM_SAFE_NAME_LENGTH = len(module._SHM_NAME_PREFIX) + 16
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this process when the program that reads from it is killed, which Grain misses."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
