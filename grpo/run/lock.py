"""One run per folder: a lock that the kernel releases when the process ends, however it ends."""

import errno
import fcntl
import json
import os
import socket
from pathlib import Path

from data.sample import InputError
from grpo.ranks import print_rank0

NAME = ".lock"
_held = {}  # open lock files by path: the lock lasts as long as the file is open


def lock_folder(folder: str) -> None:
    """Lock an existing folder for this process until it ends; raise InputError that names the holder if it is taken.

    A POSIX record lock: the kernel drops it when the process dies, child processes do not inherit it, and network file
    systems share it between hosts. The file stays, with the last holder in it.
    """
    path = Path(folder, NAME).resolve()
    if path in _held and path.exists():
        return  # to open it again and close either file would release the lock
    try:
        file = open(path, "a+")  # noqa: SIM115  not closed, on purpose
    except OSError as error:
        raise InputError(
            f"--output_dir {folder!r} cannot be written ({error.strerror}): name another folder"
        ) from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise InputError(
                f"--output_dir {folder!r} is in use by {holder(file)}: wait for it, end it, or name another folder"
            ) from error
        print_rank0(f"{str(path)!r} cannot be locked ({error.strerror}): make sure that no other run writes there")
        return
    _held[path] = file
    file.truncate(0)
    file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
    file.flush()


def holder(file) -> str:
    """Describe the process that holds the lock."""
    file.seek(0)
    try:
        found = json.loads(file.read())
        return f"process {found['pid']} on {found['host']}"
    except (ValueError, KeyError, TypeError):  # it has not written this yet
        return "another run"
