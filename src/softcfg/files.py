"""Open only regular files of bounded size; write files whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import io
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from softcfg.errors import UserError, quote

FileStates = tuple[tuple[int, ...], ...]

TEMPORARY = ".tmp"
A_LINK = "it is a link, not a regular file"
OF_A_WRITER = re.compile(r"[0-9a-f]{16}\.tmp")
LEFT_BEHIND = re.compile(r"\..+\.[0-9a-f]{16}\.tmp|\..+\.[^.]+\.\d+\.tmp")  # the latter by earlier versions

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def as_path(path: str | Path) -> Path:
    """The path that a person wrote; `~` is the home folder. Raises `UserError` if it is empty, or no path."""
    if not isinstance(path, (str, os.PathLike)):
        raise UserError(f"a path must be a text or a Path, got {quote(path)}")
    if path == "":  # for `Path` it would be the working directory
        raise UserError("a path must not be empty")
    return Path(os.path.expanduser(path))


# ---- reading


def open_regular(path: str | Path, limit: int | None = None) -> BinaryIO:
    """Open a regular file for reading.

    Whether it is one is decided by what was opened, not by a look beforehand, and a FIFO or a device does not hang.

    Args:
        limit: bytes that the file may have at most.

    Raises:
        OSError: the file cannot be opened, is not a regular file or is too large; `strerror` says which.
    """
    file = io.BufferedReader(_open(path, os.O_RDONLY))
    if limit is not None and os.fstat(file.fileno()).st_size > limit:
        file.close()
        raise _too_large(path, limit)
    return file


def read_bounded(path: str | Path, limit: int) -> bytes:
    """Read a regular file of at most `limit` bytes; raises `OSError` like `open_regular`."""
    with open_regular(path, limit) as file:
        content = file.read(limit + 1)  # a file may grow, and those of /proc have no size
    if len(content) > limit:
        raise _too_large(path, limit)
    return content


def read_text(path: str | Path, limit: int) -> str:
    """Read a UTF-8 text of at most `limit` bytes.

    Raises:
        OSError: like `open_regular`; `strerror` also says if the file is not UTF-8.
    """
    try:
        return read_bounded(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise OSError(errno.EILSEQ, f"it is no UTF-8 text ({error.reason} at byte {error.start})", str(path)) from error


@contextlib.contextmanager
def reading(path: str | Path, kind: type[UserError] = UserError, what: str = "") -> Iterator[None]:
    """Turn an `OSError` of the block into a `kind` that says in one sentence what is wrong with the file.

    Args:
        what: the file is, in front of its path.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise kind(f"{what}{path} does not exist") from error
    except OSError as error:
        raise kind(f"{what}{path} cannot be read: {error.strerror}") from error


def iterate_lines(text: str) -> Iterator[str]:
    """The lines of a text, which end with LF, CR LF or CR alone; `str.splitlines` splits at other characters too."""
    return (line.removesuffix("\n") for line in io.StringIO(text, newline=None))


def reopened(file: BinaryIO) -> str:
    """Return a path to the very file that is open, for libraries that want a path; use it while `file` is open."""
    path = f"/dev/fd/{file.fileno()}"
    return path if os.path.exists(path) else file.name


def open_own(path: str | Path) -> BinaryIO:
    """Open a small file of our own for reading and writing, and create it if it is not there.

    Raises:
        OSError: a link, or anything else but a regular file, has its name; nothing was changed.
    """
    if os.path.islink(path):  # for Windows, whose `open` does not refuse links
        raise OSError(errno.ELOOP, A_LINK, str(path))
    return io.BufferedRandom(_open(path, os.O_RDWR | os.O_CREAT | _flags("O_NOFOLLOW")))


def hash_file(path: str | Path, digest: hashlib._Hash | None = None) -> str:
    """Return the hash of a regular file, in hexadecimal; raises `UserError` if it cannot be read.

    Args:
        digest: what the file is added to; SHA-256 by default.
    """
    digest = digest or hashlib.sha256()
    try:
        with open_regular(path) as file:
            while block := file.read(1 << 22):
                digest.update(block)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def file_states(paths: Iterable[str | Path], kind: type[UserError] = UserError) -> FileStates:
    """What tells that one of some files was written anew or replaced; raises a `kind` if one cannot be read."""
    states = []
    for path in paths:
        with reading(path, kind):
            found = os.stat(path)
        states.append((found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns))
    return tuple(states)


def is_file(path: str | Path) -> bool:
    """Whether there is a regular file; unlike `Path.is_file`, False for a name that no file can have."""
    return stat.S_IFMT(_mode(path)) == stat.S_IFREG


def is_folder(path: str | Path) -> bool:
    """Whether there is a folder; unlike `Path.is_dir`, False for a name that no folder can have."""
    return stat.S_IFMT(_mode(path)) == stat.S_IFDIR


def _open(path: str | Path, flags: int) -> io.FileIO:
    def opener(name: str, _: int) -> int:
        descriptor = os.open(name, flags | _flags("O_NONBLOCK", "O_CLOEXEC", "O_BINARY"), 0o666)
        kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
        if kind != stat.S_IFREG:
            os.close(descriptor)
            raise OSError(errno.EINVAL, f"it is {KINDS.get(kind, 'something else')}, not a regular file", name)
        return descriptor

    try:
        return io.FileIO(path, "r+" if flags & os.O_RDWR else "r", opener=opener)
    except ValueError as error:
        raise OSError(errno.EINVAL, f"no file can have this name ({error})", str(path)) from error
    except OSError as error:
        if error.errno == errno.ELOOP and flags & _flags("O_NOFOLLOW"):
            raise OSError(errno.ELOOP, A_LINK, str(path)) from error
        raise


def _flags(*names: str) -> int:
    """The flags of `os.open` with these names, as far as the system has them."""
    return sum(getattr(os, name, 0) for name in names)


def _mode(path: str | Path) -> int:
    try:
        return os.stat(path).st_mode
    except (OSError, ValueError):
        return 0


def _too_large(path: str | Path, limit: int) -> OSError:
    return OSError(errno.EFBIG, f"it is larger than {limit / (1 << 20):,.4g} MiB, the limit for such a file", str(path))


# ---- writing


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn an `OSError` of the block into a `UserError` that says in one sentence why the file cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def write_atomically(path: str | Path, content: bytes, *, durable: bool = True, replace: bool = False) -> None:
    """Write `content` to a temporary file beside `path` and rename it; see `open_atomically`.

    Raises:
        UserError: the file cannot be written; nothing is left behind.
    """
    with _opened(path, durable=durable, replace=replace, tidy=False) as file:
        file.write(content)


@contextlib.contextmanager
def open_atomically(path: str | Path, *, durable: bool = True, replace: bool = False) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`; it is renamed to `path` when the block ends without an error.

    Of a link, the file that it points to is replaced and the link stays. A device or a FIFO is written to as it is.

    Args:
        durable: flush the file and its folder to the disk, so that the file also survives a crash of the machine.
        replace: `path` is a place of ours, in a folder of ours: replace a link, a device or a FIFO that stands there.

    Raises:
        UserError: the file cannot be written; nothing is left behind.
    """
    with _opened(path, durable=durable, replace=replace, tidy=True) as file:
        yield file


@contextlib.contextmanager
def _opened(path: str | Path, *, durable: bool, replace: bool, tidy: bool) -> Iterator[BinaryIO]:
    with writing(path):
        kind = stat.S_IFMT(_mode(path))
        if not replace and (kind not in (0, stat.S_IFREG, stat.S_IFDIR) or str(path).startswith(("/dev/", "/proc/"))):
            with open(os.open(path, os.O_WRONLY | _flags("O_CLOEXEC", "O_BINARY")), "wb") as file:
                yield file
            return
        target = Path(path) if replace else _behind_links(path)
        with _renamed(target, durable=durable, tidy=tidy) as (_, descriptor):  # noqa: SIM117
            with open(os.dup(descriptor), "wb") as file:  # closed before the file is flushed and renamed
                yield file


@contextlib.contextmanager
def path_atomically(path: Path) -> Iterator[Path]:
    """The path of a temporary file beside `path`, for libraries that want one; it is renamed as `open_atomically` does.

    Raises:
        UserError: the file cannot be written; nothing is left behind.
    """
    with writing(path), _renamed(path, durable=True, tidy=True) as (temporary, _):
        yield temporary


@contextlib.contextmanager
def _renamed(target: Path, *, durable: bool, tidy: bool) -> Iterator[tuple[Path, int]]:
    """Path and descriptor of an empty file, which has the name of `target` when the block ends without an error.

    Args:
        tidy: remove what killed writers of `target` left, which takes time in a large folder.
    """
    if tidy:
        remove_temporary(target.parent, target.name)
    temporary, descriptor, locked = _temporary(target)
    with contextlib.ExitStack() as opened:
        opened.callback(os.close, descriptor)
        try:
            yield temporary, descriptor
            if durable:
                with open(temporary, "rb+") as file:
                    os.fsync(file.fileno())
            if not locked:  # on Windows, say, where an open file is neither renamed nor removed
                opened.close()
            os.replace(temporary, target)
            if durable:
                _flush_folder(target.parent)
        except BaseException:
            if not locked:
                opened.close()
            temporary.unlink(missing_ok=True)
            raise


def _temporary(target: Path) -> tuple[Path, int, bool]:
    """A new file beside `target`: its path, its descriptor, and whether a lock says that it is being written."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | _flags("O_NOFOLLOW", "O_CLOEXEC", "O_BINARY")
    while True:
        # Nobody can guess the name and plant a link there, and processes on several machines do not meet.
        path = target.with_name(f".{target.name[:100]}.{secrets.token_hex(8)}{TEMPORARY}")
        descriptor = os.open(path, flags, 0o666)
        try:
            locked = lock(descriptor)
        except (ImportError, OSError):
            return path, descriptor, False
        if locked and os.path.lexists(path):
            return path, descriptor, True
        os.close(descriptor)  # before it was locked, it was taken for one that was left behind


def lock(descriptor: int, *, shared: bool = False) -> bool:
    """Lock an open file until it is closed; return False if somebody else holds the lock.

    Args:
        shared: others may hold such a lock as well.

    Raises:
        ImportError: this system has no such locks, as Windows.
        OSError: this file system has none.
    """
    import fcntl

    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _behind_links(path: str | Path) -> Path:
    if is_folder(path):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    try:
        return Path(os.path.realpath(path))
    except ValueError as error:
        raise OSError(errno.EINVAL, f"no file can have this name ({error})", str(path)) from error


def remove_temporary(folder: Path, name: str = "", *, alone: bool = False) -> None:
    """Remove what writers that were killed left in `folder`, those of the file `name` or all.

    Args:
        alone: nobody else writes there, so that it need not be asked whether a file is still being written.
    """
    for path in folder.glob(f".{glob.escape(name[:100])}*{TEMPORARY}"):
        if LEFT_BEHIND.fullmatch(path.name) and (not name or OF_A_WRITER.fullmatch(path.name, len(name[:100]) + 2)):
            with contextlib.suppress(ImportError, OSError):
                if alone and is_file(path):
                    path.unlink()
                    continue
                with _open(path, os.O_RDONLY | _flags("O_NOFOLLOW")) as file:
                    if lock(file.fileno()):
                        path.unlink()


def remove_file(path: Path) -> None:
    """Remove a file, or the link that stands for one, if it is there; raises `UserError` if it cannot be removed."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be removed: {error.strerror}") from error


def _flush_folder(folder: Path) -> None:
    """Make a rename durable, where folders can be opened: on Windows they cannot."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_same_file(one: str | Path, other: str | Path) -> bool:
    """Whether two paths lead to one file, behind links too; also where it is not there yet."""
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):
        pass
    try:
        return os.path.realpath(one) == os.path.realpath(other)
    except (OSError, ValueError):
        return False


def refuse_overwriting(
    written: Mapping[str, str | Path | None], read: Sequence[tuple[str, str | Path | None]] = ()
) -> None:
    """Raise `UserError` if a file that is to be written is one that is read, or two that are written are one file.

    A device or a FIFO is written to as often as one likes.

    Args:
        written: the paths by what the user calls them, such as a flag; None for what is not given.
        read: likewise, each name as often as there are files of it.
    """
    files = {name: path for name, path in written.items() if path and stat.S_IFMT(_mode(path)) in (0, stat.S_IFREG)}
    for name, path in files.items():
        for what, source in read:
            if source and os.path.exists(source) and is_same_file(path, source):
                raise UserError(f"{name}: {path} would overwrite {what}, an input; give another file")
        for other, taken in files.items():
            if other != name and is_same_file(path, taken):
                raise UserError(f"{name} and {other} are one file, {path}; give two")


def refuse_foreign(folder: Path, mark: str | Path, names: Iterable[str | Path]) -> None:
    """Raise `UserError` if files in `folder` have the names of ours, but `mark`, which is made before, is missing."""
    if os.path.lexists(folder / mark):
        return
    for name in names:
        if os.path.lexists(folder / name):
            raise UserError(f"{folder} holds {name}, which was not made by this command; give another folder")


def make_folder(path: str | Path) -> Path:
    """Create `path` and its parents and make sure that files can be written there; raises `UserError` if not."""
    path = as_path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write into folder {path}: {getattr(error, 'strerror', None) or error}") from error
    return path
