"""Files: written whole or not at all, read only where they are plain files, deleted only one by one by name."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from quant.core.errors import InputError

JSON_BYTES = 1 << 28  # a configuration, an index, a journal line: far below; what is above is no such file
LONGEST_NAME = 255  # bytes of a file's name, by every usual file system
TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{12}\.tmp")  # the names that `temporary_name` gives


def temporary_name(path: Path) -> Path:
    """A name of its own beside ``path``: two processes that write the same file do not meet."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file under its final name only when every byte is on disk. Raises OSError that names the file. What processes
    that were killed left of it goes."""
    temporary = temporary_name(path)
    try:
        with temporary.open("xb") as stream:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(stream, fcntl.LOCK_EX)
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
            temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):  # a write that fails knows its descriptor only
            error.filename = str(path)
        raise
    _sweep(path)


def _sweep(path: Path) -> None:
    """Delete temporary files of ``path`` that nobody is writing: locks end with their processes."""
    for file in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with suppress(OSError):  # it is gone, or locked
            if TEMPORARY.fullmatch(file.name) and stat.S_ISREG(file.lstat().st_mode):
                with file.open("rb") as stream:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    about = os.fstat(stream.fileno())
                    if about.st_size or time.time() - about.st_mtime > 60:  # else one that is about to be locked
                        file.unlink()


def write_json(path: Path, value: Any) -> None:
    """JSON, indented for people, written atomically."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def check_plain_file(path: Path) -> None:
    """Raise InputError for a pipe, a device, a socket, a directory or a loop of links, which must not be opened: a pipe
    waits for ever. What is not there is left to whoever opens it."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise InputError(f"{path} is {_kind(mode)}, not a file: give a plain file")


def _kind(mode: int) -> str:
    kinds = (
        (stat.S_ISREG, "a file"),
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISLNK, "a link to nothing"),
    )
    return next((name for test, name in kinds if test(mode)), "a device")


def is_plain_name(name: object) -> bool:
    """Whether an entry of somebody's index is the name of a file beside it: no path, no parent, nothing hidden in it, and
    no more than a file system takes."""
    if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\\x00-\x1f\x7f\ud800-\udfff]", name):
        return False
    return len(os.fsencode(name)) <= LONGEST_NAME


def read_json(path: Path) -> dict[str, Any]:
    """An object of a JSON file. Raises InputError where it is none, or is no plain file."""
    check_plain_file(path)
    try:
        if path.stat().st_size > JSON_BYTES:
            raise InputError(f"{path} has {path.stat().st_size / 1e6:.0f} MB, which no such file needs")
        value = json.loads(path.read_bytes().decode())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, nested without end
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is truncated or not JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object")
    return value


def resolve_links(path: Path) -> Path:
    """The absolute path without links and dots. Raises InputError for a loop of links, a name that is too long, and what
    no system takes as a path."""
    try:
        path.stat()
    except ValueError as error:
        raise InputError(f"{str(path)!r} is not a usable path ({error})") from error
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
            what = "a loop of symbolic links" if error.errno == errno.ELOOP else "longer than the system allows"
            raise InputError(f"{str(path)[:200]} is {what}: give another place") from error
    return Path(os.path.realpath(path))


def existing_parent(path: Path) -> Path:
    """The nearest of the path and its parents that is there."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def check_directory(path: Path) -> None:
    """Raise InputError where a directory cannot be made at ``path``, as it or a parent is something else."""
    resolve_links(path)
    place = next(p for p in (path, *path.absolute().parents) if os.path.lexists(p))
    if not place.is_dir():
        mode = (place.stat() if place.exists() else place.lstat()).st_mode
        raise InputError(f"{place} is {_kind(mode)}, not a directory: give another place")


def check_space(path: Path, size: int) -> None:
    """Raise InputError where the disk of ``path`` has not ``size`` bytes left."""
    free = shutil.disk_usage(existing_parent(path)).free
    if free < size:
        raise InputError(f"{path} needs about {size / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free")


def reserve(path: Path, size: int) -> None:
    """Give a new file ``size`` bytes that are really there: a sparse file that is mapped would end the process by SIGBUS
    when its disk fills. Raises OSError (no space) that names the file; nothing is then left."""
    try:
        with path.open("xb") as stream:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(stream.fileno(), 0, max(1, size))
            else:  # macOS: zeros, which take the space too
                zeros = bytes(1 << 20)
                for start in range(0, size, len(zeros)):
                    stream.write(zeros[: size - start])
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)
        raise


def sha256_of_file(file: Path) -> str:
    """Hash of a file, read in pieces, once as long as its size and time stay."""
    check_plain_file(file)
    about = file.stat()
    return _sha256_of(file, about.st_size, about.st_mtime_ns)


@cache
def _sha256_of(file: Path, size: int, modified: int) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def json_sha256(value: Mapping[str, Any]) -> str:
    """Hash of a JSON object, whatever the order of its entries."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def unlink_all(files: Iterable[Path]) -> None:
    """Delete files by name, never what is in a directory of that name."""
    for file in files:
        file.unlink(missing_ok=True)


_held: dict[Path, tuple[int, int]] = {}  # lock file -> descriptor, how often this process holds it


@contextmanager
def hold_lock(lock: Path, what: str, patience: float = 0.0) -> Iterator[None]:
    """Hold ``lock`` (a file that is made for this and goes at the end): one process at a time, any number of times in it.

    The system's own file lock decides, so that of a dead process is free; the file says who holds it. what: what is
    locked, in words. patience: seconds to wait for another process. Raises InputError that says who holds it then.
    """
    lock = resolve_links(lock.parent) / lock.name  # a link in its place is refused, not followed
    descriptor, times = _held.get(lock, (-1, 0))
    if not times:
        descriptor = _take(lock, what, time.monotonic() + patience)
    _held[lock] = (descriptor, times + 1)
    try:
        yield
    finally:
        descriptor, times = _held[lock]
        if times > 1:
            _held[lock] = (descriptor, times - 1)
        else:
            del _held[lock]
            lock.unlink(missing_ok=True)  # first the name: who opens it from now on makes a new one
            os.close(descriptor)


def _take(lock: Path, what: str, until: float) -> int:
    """The descriptor of a lock file that this process now holds. Raises OSError where it cannot be made."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            _check_lock_file(descriptor, lock)
            free = _is_free(descriptor, lock)
            if free and _is_still(descriptor, lock):
                _say_holder(descriptor, lock)
                return descriptor
            if not free and time.monotonic() >= until:
                raise InputError(f"{what} is in use by {_holder(descriptor)}; wait until it ends, or use another place")
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # taken, or its holder ended and took the name away between the two calls
        if not free:
            time.sleep(0.05)


def _say_holder(descriptor: int, lock: Path) -> None:
    """Write into a lock file that this process holds it. Raises OSError, and leaves no file, on a full disk."""
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"process": os.getpid(), "host": socket.gethostname()}).encode(), 0)
    except OSError as error:
        lock.unlink(missing_ok=True)
        error.filename = str(lock)
        raise


def _check_lock_file(descriptor: int, lock: Path) -> None:
    """Raise InputError where a file of this name is not a lock of this toolkit: it would be emptied and deleted."""
    about = os.fstat(descriptor)
    legal = stat.S_ISREG(about.st_mode) and about.st_nlink <= 1
    if legal and about.st_size:
        try:
            legal = set(json.loads(os.pread(descriptor, 4096, 0).decode())) == {"process", "host"}
        except ValueError:
            legal = False
    if not legal:
        raise InputError(f"{lock} is in the way and is not a lock of this toolkit: move it away")


def _is_free(descriptor: int, lock: Path) -> bool:
    """Lock a file if nobody else has. Raises InputError where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
            return False
        raise InputError(f"{lock} cannot be locked ({error.strerror}): use a place on another file system") from error
    return True


def _holder(descriptor: int) -> str:
    """Who a lock file says holds it. Its holder writes that just after it has the lock, so it may take a moment."""
    until = time.monotonic() + 2
    while not (content := os.pread(descriptor, 4096, 0)) and time.monotonic() < until:
        time.sleep(0.01)
    try:
        holder = json.loads(content.decode())
        return f"process {int(holder['process'])} on {holder['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


def _is_still(descriptor: int, path: Path) -> bool:
    """Whether a path still names the file of a descriptor."""
    try:
        named = path.stat()
    except FileNotFoundError:
        return False
    own = os.fstat(descriptor)
    return (named.st_dev, named.st_ino) == (own.st_dev, own.st_ino)


RECORD = ".llm-quantizer.json"  # beside loose files that this toolkit wrote: their names and hashes
RECORD_LOCK = f"{RECORD}.lock"


def write_owned(directory: Path, contents: Mapping[str, bytes]) -> None:
    """Write files into a directory that may hold others: what is there under these names goes only if it is, byte for
    byte, what was written here before (RECORD knows). Raises InputError that names the first that is not.
    """
    if strange := [name for name in contents if not is_plain_name(name) or name in (RECORD, RECORD_LOCK)]:
        raise InputError(f"{strange[0]!r} is not the name of a file that can be written here")
    check_directory(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with hold_lock(directory / RECORD_LOCK, str(directory), patience=20):
        record = read_record(directory)
        written = {*record, *contents, RECORD}
        killed = (
            file
            for file in directory.iterdir()
            if (match := TEMPORARY.fullmatch(file.name)) and match["name"] in written
        )
        unlink_all(killed)
        for name in contents:
            check_owned(directory / name, record)
        new = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
        # First both hashes, so that a file is known as ours whenever the process is killed.
        write_json(
            directory / RECORD, {"schema": 1, "files": record | {n: [*record.get(n, ()), h] for n, h in new.items()}}
        )
        for name, data in contents.items():
            write_atomically(directory / name, data)
        write_json(
            directory / RECORD, {"schema": 1, "files": record | {name: [digest] for name, digest in new.items()}}
        )


def read_record(directory: Path) -> dict[str, list[str]]:
    """Hashes by name of the loose files that this toolkit wrote into a directory."""
    path = directory / RECORD
    record: Any = read_json(path).get("files") if path.exists() else {}
    legal = isinstance(record, dict) and all(is_plain_name(k) and isinstance(v, list) for k, v in record.items())
    if not legal:
        raise InputError(f"{path} is damaged: delete it, and the files that it stood for")
    return {name: [str(digest) for digest in hashes] for name, hashes in record.items()}


def check_owned(path: Path, record: Mapping[str, list[str]] | None = None) -> None:
    """Raise InputError where something is at ``path`` that this toolkit did not write, or that was changed since, or where
    its directory cannot be made."""
    check_directory(path.parent)
    if not os.path.lexists(path):
        return
    hashes = (read_record(path.parent) if record is None else record).get(path.name, [])
    if path.is_symlink() or not path.is_file() or sha256_of_file(path) not in hashes:
        raise InputError(f"{path} was not written by this toolkit, or was changed since: move it, or use another place")
