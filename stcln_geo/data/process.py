"""Tell the process in which a reader was made from a forked copy of it."""

from __future__ import annotations

import os

from ..errors import InputError

__all__ = ["HomeProcess"]


class HomeProcess:
    """The process in which this was made, or unpickled.

    A fork copies none of the threads that read and decode, and their locks as they happen to be:
    reading in the copy hangs sooner or later, so it is refused at once.
    """

    def __init__(self) -> None:
        self._number = os.getpid()

    def __reduce__(self) -> tuple[type[HomeProcess], tuple[()]]:
        return HomeProcess, ()

    def check(self) -> None:
        """Refuse to go on in a forked copy.

        Raises
        ------
        InputError
            If this is not the process.
        """
        if os.getpid() != self._number:
            raise InputError(
                f"Cannot read chips in process {os.getpid()}: the reader was made in process "
                f"{self._number}, and a fork copies none of its threads. Streams read in threads "
                "of their own: use them without a DataLoader, or with num_workers=0; or start "
                "processes with multiprocessing_context='spawn'."
            )
