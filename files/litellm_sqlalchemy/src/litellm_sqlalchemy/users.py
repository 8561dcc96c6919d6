"""Which user root's commands are while they use a spool.

The gateway may write in the spool, whatever runs in it. A link that it leaves there would lead root to any file of the
host: so root looks at a spool as the user whom it belongs to, and is root where it logs in to the database.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def as_owner(directory: Path) -> Iterator[None]:
    """Be the user and the group of a directory for a while, where root is somebody else."""
    if os.geteuid() != 0 or not directory.is_dir() or directory.stat().st_uid == 0:
        yield
        return
    owner, groups = directory.stat(), os.getgroups()
    os.setgroups([owner.st_gid])
    os.setegid(owner.st_gid)
    os.seteuid(owner.st_uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(os.getgid())
        os.setgroups(groups)


@contextmanager
def as_starter() -> Iterator[None]:
    """Be the user who started the program for a while, within `as_owner`; no system call is made outside of it."""
    user, group = os.geteuid(), os.getegid()
    if user == os.getuid():
        yield
        return
    os.seteuid(os.getuid())
    os.setegid(os.getgid())
    try:
        yield
    finally:
        os.setegid(group)
        os.seteuid(user)
