"""The directory of a checkpoint: what may be written there, and how a new one takes its place.

A new checkpoint is made under a hidden name and changes places with what is there in one step of the file system, so
that a whole one is under the name at every moment. (Into a directory that is there and empty, which may be a mount or
stand where nothing else may be made, its files move one by one, config.json last: without it no loader takes them.)
Of an old checkpoint goes what this toolkit wrote and nobody has changed, file by file; everything else stays.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath

from models.checkpoint import RESULTS
from models.side_files import ABOUT, is_one_of
from quant.core.errors import InputError
from quant.core.files import (
    existing_parent,
    hold_lock,
    is_plain_name,
    read_json,
    resolve_links,
    sha256_of_file,
    unlink_all,
)

OWN = "written_sha256"  # entry of results.json: hashes of all files of the checkpoint but results.json itself, by path
HIDDEN = ".llm-quantizer-"
MARK = f"{HIDDEN}new.json"  # in a directory that is being written
REPLACED = f"{HIDDEN}old.json"  # in one that is about to be replaced
UNABLE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


def check_target(target: Path, overwrite: bool) -> list[Path]:
    """What lies in ``target`` and will stay beside the checkpoint. Raises InputError where one cannot be written there:
    it holds files, or (overwrite) what cannot be proved to be a checkpoint that this toolkit wrote."""
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file; give a directory for the checkpoint")
    entries = _entries(target)
    if entries and not overwrite:
        raise InputError(f"{target} is not empty; use another directory or --overwrite")
    if entries and os.path.ismount(target):
        raise InputError(f"{target} is a mount, which cannot be replaced as a whole: use a directory in it")
    place = resolve_links(target).parent if entries else existing_parent(target)
    if not os.access(place, os.W_OK):
        raise InputError(f"{place} cannot be written; use another directory for the checkpoint")
    if not entries:
        return []
    own = written_files(target)
    if not own:
        raise InputError(
            f"{target} holds no checkpoint that this toolkit wrote, and --overwrite replaces nothing else; "
            "use another directory"
        )
    others = _others(target, own)
    if changed := [
        file for file in others if file.name in {PurePosixPath(name).parts[0] for name in read_hashes(target)}
    ]:
        raise InputError(
            f"{changed[0]} was changed since it was written, and --overwrite replaces only what this toolkit wrote; "
            "move it away, or use another directory"
        )
    return others


def check_names(names: Collection[str], others: Iterable[Path]) -> None:
    """Raise InputError where others have a file in a checkpoint's directory under a name that the new one needs. README,
    licence and the like are theirs then, and not written."""
    for file in others:
        if file.name in names and not is_one_of(Path(file.name), ABOUT):
            raise InputError(
                f"{file} was not written by this toolkit, and the checkpoint has such a file: move it away"
            )


def read_hashes(directory: Path) -> dict[str, str]:
    """Hashes of the files that a checkpoint's results.json says were written, by path inside the directory. Empty where it
    says nothing legal."""
    results = directory / RESULTS
    if not results.is_file() or results.is_symlink():
        return {}
    hashes = read_json(results).get(OWN)
    if not isinstance(hashes, dict):
        return {}
    legal = all(name and all(is_plain_name(part) for part in name.split("/")) for name in hashes)
    return {name: str(digest) for name, digest in hashes.items()} if legal else {}


def written_files(directory: Path) -> list[Path]:
    """The files of a checkpoint that this toolkit wrote there and that are still, byte for byte, what it wrote; results.json,
    which says so, is the last. Empty where it does not."""
    files = {directory / name: digest for name, digest in read_hashes(directory).items()}
    kept = [f for f, digest in files.items() if _is_inside(f, directory) and sha256_of_file(f) == digest]
    return [*kept, directory / RESULTS] if files else []


def others_in(target: Path) -> list[Path]:
    """The entries of a checkpoint's directory that this toolkit did not write, or that were changed since."""
    return _others(target, written_files(target))


def is_complete(directory: Path) -> bool:
    """Whether every file that results.json lists is there."""
    names = read_hashes(directory)
    return bool(names) and all((directory / name).is_file() for name in names)


def size_on_disk(directory: Path) -> int:
    """Bytes of the files of a checkpoint that this toolkit wrote."""
    return sum(
        (directory / name).stat().st_size for name in (*read_hashes(directory), RESULTS) if (directory / name).exists()
    )


def hashes_of(directory: Path) -> dict[str, str]:
    """Hash of every file of a checkpoint that is being written, by path: the entry OWN of its results.json."""
    files = sorted(file for file in directory.rglob("*") if file.is_file() and file.name != MARK)
    return {file.relative_to(directory).as_posix(): sha256_of_file(file) for file in files}


def _is_inside(file: Path, directory: Path) -> bool:
    """Whether a file is a file of its own, without a link on the way to it."""
    way = [file, *(parent for parent in file.parents if parent != directory and directory in parent.parents)]
    return file.is_file() and not any(part.is_symlink() for part in way)


def _entries(directory: Path) -> list[Path]:
    """What others would see in a directory: all but this toolkit's hidden files."""
    return [file for file in directory.iterdir() if not file.name.startswith(HIDDEN)] if directory.is_dir() else []


def _others(directory: Path, own: list[Path]) -> list[Path]:
    """The entries of a directory that are not, or not wholly, of the files given and the directories that hold them."""
    ours = {*own, *(parent for file in own for parent in file.parents)}
    return sorted(
        entry
        for entry in _entries(directory)
        if entry.is_symlink() or entry not in ours or (entry.is_dir() and not ours.issuperset(entry.rglob("*")))
    )


@contextmanager
def replacing(target: Path, overwrite: bool) -> Iterator[Path]:
    """A directory to write a checkpoint into; at the end its files are in ``target``. Where anything fails, nothing has changed.

    Raises InputError where another process is writing there, where `check_target` does by now, or where the new checkpoint
    has files of names that others have.
    """
    target = resolve_links(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _hold_lock(target):
        _settle(target)
        inside = target.is_dir() and not _entries(target)
        new = target / f"{HIDDEN}new" if inside else _beside(target, "new")
        new.mkdir()
        try:
            _write_mark(new / MARK, target)
            yield new
            check_target(target, overwrite)  # what others did meanwhile counts
            check_names({file.name for file in new.iterdir()}, others_in(target))
            old = None if inside else _exchange_names(new, target)
        except BaseException:
            if (new / MARK).exists():
                _remove_unfinished(new)
            (target / REPLACED).unlink(missing_ok=True)
            raise
        if inside:
            (new / MARK).unlink()
            _move_in(new, target)
        else:
            (target / MARK).unlink()
        if old is not None:
            _clear(old, target)


def settle(target: Path) -> None:
    """Finish what a process that was killed had begun to put in place of ``target``, or take it back."""
    target = resolve_links(target)
    left = [_beside(target, part) for part in ("new", "old", "lock")]
    left += [target / f"{HIDDEN}new", target / f"{HIDDEN}lock", target / MARK, target / REPLACED]
    if any(path.exists() for path in left):
        with _hold_lock(target):
            _settle(target)


def _settle(target: Path) -> None:
    new, old, inner = _beside(target, "new"), _beside(target, "old"), target / f"{HIDDEN}new"
    if _is_marked(old, REPLACED, target) and not target.exists():
        old.replace(target)  # killed between the two names, where the system cannot exchange them
    for mark in (MARK, REPLACED):  # it has its place, or kept it
        if _is_marked(target, mark, target):
            (target / mark).unlink()
    if inner.is_dir() and not inner.is_symlink():
        if _is_marked(inner, MARK, target):
            _remove_unfinished(inner)
        else:
            _move_in(inner, target)
    for directory in (new, old):
        if _is_marked(directory, MARK, target):
            _remove_unfinished(directory)
        elif _is_marked(directory, REPLACED, target):
            _clear(directory, target)
        elif directory.is_symlink() or (directory.exists() and (not directory.is_dir() or any(directory.iterdir()))):
            raise InputError(f"{directory} is in the way and was not made by this toolkit: move it away")
        elif directory.exists():
            directory.rmdir()  # killed before it had its mark


@contextmanager
def _hold_lock(target: Path) -> Iterator[None]:
    """One process a target: by a file in a directory that is there and empty, else by one beside it. (And by the former, if
    a process that was killed left it.)"""
    inner, what = target / f"{HIDDEN}lock", f"the checkpoint directory {target}"
    empty = target.is_dir() and not _entries(target)
    with ExitStack() as held:
        for lock in (inner,) if empty else (_beside(target, "lock"), *((inner,) if inner.exists() else ())):
            held.enter_context(hold_lock(lock, what))
        yield


def _beside(target: Path, part: str) -> Path:
    return target.with_name(f"{HIDDEN}{part}-of-{target.name}")


def _write_mark(mark: Path, target: Path) -> None:
    mark.write_text(json.dumps(_mark_of(target)), encoding="utf-8")


def _mark_of(target: Path) -> dict[str, object]:
    return {"schema": 1, "target": target.name}


def _is_marked(directory: Path, mark: str, target: Path) -> bool:
    """Whether a directory (not a link to one) carries this toolkit's mark for this target."""
    file = directory / mark
    if directory.is_symlink() or not file.is_file() or file.is_symlink():
        return False
    return file.stat().st_size == 0 or read_json(file) == _mark_of(target)  # 0: killed as it was made


def _remove_unfinished(directory: Path) -> None:
    """Delete what was being written; the mark last."""
    mark = directory / MARK
    _remove(
        [file for file in directory.rglob("*") if file != mark and (file.is_symlink() or not file.is_dir())], directory
    )
    unlink_all([mark])
    directory.rmdir()


def _remove(files: list[Path], root: Path) -> None:
    """Delete files, and the directories below ``root`` that they leave empty."""
    unlink_all(files)
    for directory in sorted({p for f in files for p in f.parents if root in p.parents}, reverse=True):
        if directory.is_dir() and not any(directory.iterdir()):
            directory.rmdir()


def _move_in(new: Path, target: Path) -> None:
    """Move the files of a finished checkpoint into an empty directory: results.json, which proves the others, first, and
    config.json, without which nobody loads them, last."""
    order = {RESULTS: 0, "config.json": 2}
    for file in sorted(new.iterdir(), key=lambda file: order.get(file.name, 1)):
        file.replace(target / file.name)
    new.rmdir()


def _exchange_names(new: Path, target: Path) -> Path | None:
    """Give a finished directory its name; where what had the name is now, if anything had."""
    if not target.exists():
        new.replace(target)
        return None
    _write_mark(target / REPLACED, target)
    if _exchange(new, target):
        return new
    aside = _beside(target, "old")
    target.replace(aside)
    try:
        new.replace(target)
    except BaseException:
        aside.replace(target)
        raise
    return aside


def _clear(old: Path, target: Path) -> None:
    """Empty a directory whose place was taken: others' files go to ``target``, this toolkit's are deleted, the mark last.

    Raises InputError where one of others' has no place in ``target``; it stays where it is.
    """
    own = written_files(old)
    for file in _others(old, own):
        if not target.is_dir() or os.path.lexists(target / file.name):
            raise InputError(f"{file} was not written by this toolkit and has no place in {target}: move it away")
        file.replace(target / file.name)
    _remove(own, old)
    unlink_all([old / REPLACED])
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
