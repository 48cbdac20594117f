"""The directory of a checkpoint: what may be written there, and how a new one takes its place.

The new checkpoint is made under a hidden name beside the target and changes places with what is there in one step of the
file system, so that a whole one is under the name at every moment. Of an old one goes what this toolkit wrote and nobody
has changed, file by file; everything else stays.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from models.checkpoint import RESULTS
from quant.core.errors import InputError
from quant.core.files import existing_parent, is_plain_name, locked, read_json, resolved, sha256_of_file, unlink_all

OWN = "written_sha256"  # entry of results.json: hashes of all files of the checkpoint but results.json itself
MARK = ".unfinished"  # in a new checkpoint until it has its name: tells it from an old one under a hidden name
UNABLE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


def check_target(target: Path, overwrite: bool) -> list[Path]:
    """What lies in ``target`` and will stay beside the checkpoint. Raises InputError where one cannot be written there:
    it holds files, or (overwrite) what cannot be proved to be a checkpoint that this toolkit wrote."""
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file; give a directory for the checkpoint")
    if not os.access(existing_parent(target), os.W_OK):
        raise InputError(f"{target} cannot be written; use another directory for the checkpoint")
    if not target.is_dir() or not any(target.iterdir()):
        return []
    if not overwrite:
        raise InputError(f"{target} is not empty; use another directory or --overwrite")
    own = written_files(target)
    if not own:
        raise InputError(
            f"{target} holds no checkpoint that this toolkit wrote, and --overwrite replaces nothing else; "
            "use another directory"
        )
    others = sorted(set(target.iterdir()) - set(own))
    listed = read_json(target / RESULTS)[OWN]
    if changed := [file for file in others if file.name in listed]:
        raise InputError(
            f"{changed[0]} was changed since it was written, and --overwrite replaces only what this toolkit wrote; "
            "move it away, or use another directory"
        )
    return others


def written_files(directory: Path) -> list[Path]:
    """The files of a checkpoint that this toolkit wrote there and that are still, byte for byte, what it wrote. Empty where
    results.json does not say so."""
    results = directory / RESULTS
    if not results.is_file() or results.is_symlink():
        return []
    hashes = read_json(results).get(OWN)
    if not isinstance(hashes, dict) or not all(is_plain_name(name) for name in hashes):
        return []
    files = {directory / name: digest for name, digest in hashes.items()}
    kept = [f for f, digest in files.items() if f.is_file() and not f.is_symlink() and sha256_of_file(f) == digest]
    return [*kept, results]


def size_on_disk(directory: Path) -> int:
    """Bytes of the files of a checkpoint that this toolkit wrote."""
    results = directory / RESULTS
    return sum((directory / name).stat().st_size for name in read_json(results)[OWN]) + results.stat().st_size


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A directory to write a checkpoint into; at the end it is ``target``. Where anything fails, nothing has changed.

    Raises InputError where another process is writing there, or the new checkpoint has files of names that others have.
    """
    target = resolved(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target):
        _settle(target)
        temporary = _temporary(target)
        temporary.mkdir()
        try:
            (temporary / MARK).touch()
            yield temporary
            _check_names(temporary, target)
            old = _put_in_place(temporary, target)
        except BaseException:
            if (temporary / MARK).exists():
                _remove_unfinished(temporary)
            raise
        (target / MARK).unlink()
        if old is not None:
            _clear(old, target)


def settle(target: Path) -> None:
    """Finish what a process that was killed had begun to put in place of ``target``, or take it back."""
    target = resolved(target)
    left = (_temporary(target), _aside(target), target / MARK, _lock(target))
    if any(path.exists() for path in left):
        with _locked(target):
            _settle(target)


def _settle(target: Path) -> None:
    temporary, aside = _temporary(target), _aside(target)
    if aside.exists() and not target.exists():
        aside.replace(target)  # killed between the two names, where the system cannot exchange them
    (target / MARK).unlink(missing_ok=True)  # it has its place
    for directory in (temporary, aside):
        if (directory / MARK).exists():
            _remove_unfinished(directory)
        elif directory.exists():
            _clear(directory, target)


def _locked(target: Path) -> AbstractContextManager[None]:
    return locked(_lock(target), f"the checkpoint directory {target}")


def _lock(target: Path) -> Path:
    return target.with_name(f".{target.name}.lock")


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.tmp")


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _remove_unfinished(directory: Path) -> None:
    """Delete what was being written; the mark last."""
    mark = directory / MARK
    unlink_all(file for file in directory.iterdir() if file != mark)
    unlink_all([mark])
    directory.rmdir()


def _check_names(new: Path, target: Path) -> None:
    """Raise InputError where others have a file in ``target`` under a name that the new checkpoint needs."""
    own = set(written_files(target)) if target.exists() else set()
    for file in target.iterdir() if target.exists() else ():
        if file not in own and (new / file.name).exists():
            raise InputError(
                f"{file} was not written by this toolkit, and the checkpoint has such a file: move it away"
            )


def _put_in_place(new: Path, target: Path) -> Path | None:
    """Give a finished directory its name; where what had the name is now, if anything had."""
    if not target.exists():
        new.replace(target)
        return None
    if _exchange(new, target):
        return new
    aside = _aside(target)
    target.replace(aside)
    try:
        new.replace(target)
    except BaseException:
        aside.replace(target)
        raise
    return aside


def _clear(old: Path, target: Path) -> None:
    """Empty a directory whose place was taken: others' files go to ``target``, this toolkit's are deleted.

    Raises InputError where nothing says that this toolkit made it, or one of others' has no place in ``target``; it stays
    where it is.
    """
    own = written_files(old)
    others = sorted(set(old.iterdir()) - set(own))
    if others and not own:
        raise InputError(f"{old} is in the way and was not made by this toolkit: move it away")
    for file in others:
        if not target.is_dir() or os.path.lexists(target / file.name):
            raise InputError(f"{file} was not written by this toolkit and has no place in {target}: move it away")
        file.replace(target / file.name)
    unlink_all(own)
    old.rmdir()


def _exchange(first: Path, second: Path) -> bool:
    """Let two directories change names in one step. False where the system cannot. Raises OSError where it may not."""
    name, flag = ("renamex_np", 2) if sys.platform == "darwin" else ("renameat2", 2)
    call = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if call is None:
        return False
    paths = os.fsencode(first), os.fsencode(second)
    here = -100  # AT_FDCWD
    given = (*paths, flag) if sys.platform == "darwin" else (here, paths[0], here, paths[1], flag)
    if call(*given) == 0:
        return True
    number = ctypes.get_errno()
    if number in UNABLE:
        return False
    raise OSError(number, os.strerror(number), str(second))
