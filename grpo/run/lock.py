"""One run per folder: a lock that the kernel releases when the process ends, however it ends."""

import fcntl
import os
import socket
from pathlib import Path

from data.sample import InputError
from grpo.ranks import print_rank0


class FolderInUse(InputError):
    """Another run has locked a folder."""


_held = {}  # open lock files by path: to close one, or to open it again and close that, would release the lock


def lock_folder(folder: str) -> None:
    """Lock an existing folder for this process until it ends; raise FolderInUse that names the holder if it is taken.

    A POSIX record lock: the kernel drops it when the process dies, child processes do not inherit it, and network file
    systems share it between hosts. The file `.lock` stays, with the last holder in it. Raises OSError if it cannot be
    written.
    """
    path = Path(folder, ".lock").resolve()
    if path in _held and path.exists():
        return
    file = open(path, "a+")  # noqa: SIM115  not closed, on purpose
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        raise FolderInUse(
            f"--output_dir {folder!r} is in use by {file.read() or 'another run'}: wait for it, end it, or name "
            "another folder"
        ) from error
    except OSError as error:
        print_rank0(f"{str(path)!r} cannot be locked ({error.strerror}): make sure that no other run writes there")
        return
    _held[path] = file
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
