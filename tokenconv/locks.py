"""One process at a time: lock files, which are gone when nobody holds them."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def locked(path: Path, *, wait_s: float = -1) -> Iterator[None]:
    """Hold a lock that one process can hold; it ends with the process, however that ends.

    The file goes before the lock does. Who has opened it meanwhile sees that it is gone, and makes
    it anew.

    Args:
        path: Of the lock file, in a folder that exists.
        wait_s: How long to wait for another process; a negative number waits until it is done.

    Raises:
        TimeoutError: If another process holds it for longer.
        OSError: If the file cannot be made.
    """
    from filelock import FileLock  # not for `import tokenconv`

    with FileLock(path, timeout=wait_s):
        try:
            yield
        finally:
            with suppress(OSError):  # where open files cannot go
                path.unlink()
