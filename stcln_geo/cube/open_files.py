"""Keep files of the web open from one task of a process to the next: their headers are read once.

A task reads a window of every file, and so does the next one. Opening a file far away takes two
requests before the first pixel. Files of this machine are opened anew, as they may be replaced.

A file of the web must be an image in itself. GDAL goes by content, not by name, and some formats
only point at other files (VRT, WMS): opened from somebody's server, they would read this machine's.
"""

from __future__ import annotations

import atexit
import contextlib
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

__all__ = ["close_files", "open_file"]

MOST = 256
"""Files that a process keeps open while nobody reads them; each takes about 0.1 MB."""
IDLE_SECONDS = 600.0
"""After so long without a reader a file is opened anew, as a provider may have replaced it, and
makes room for another."""

_FAR = re.compile(r"(https?|s3|gs|az|abfss?)://|/vsi(curl|s3|gs|az|adls)/")
_IMAGES = ("GTiff", "JP2OpenJPEG", "JP2KAK", "JP2ECW", "JP2MrSID")
"""GDAL's drivers for what providers offer; those of a build without them count for nothing."""

_idle: OrderedDict[str, tuple[float, Any]] = OrderedDict()
"""When it was last read, and the dataset, by address; the longest idle first."""
_lock = threading.Lock()


@contextlib.contextmanager
def open_file(address: str) -> Iterator[Any]:
    """Give a rasterio dataset that no other thread has; of the web perhaps one used before.

    GDAL's options for reading must be set around this. A dataset that fails is closed for good.

    Raises
    ------
    rasterio.errors.RasterioIOError
        If the file cannot be opened, or is of the web and neither a GeoTIFF nor a JPEG 2000.
    """
    with _lock:
        last, source = _idle.pop(address, (0.0, None))
    if source is not None and time.monotonic() - last >= IDLE_SECONDS:
        source.close()
        source = None
    if source is None:
        source = _open(address)
    try:
        yield source
    except BaseException:
        source.close()
        raise
    for spare in _keep(address, source):
        spare.close()


def close_files() -> None:
    """Close what nobody reads."""
    with _lock:
        spares = [source for _, source in _idle.values()]
        _idle.clear()
    for source in spares:
        source.close()


def _open(address: str) -> Any:
    import rasterio
    from rasterio.env import ensure_env_with_credentials

    if not _FAR.match(address):
        return rasterio.open(address)
    # `rasterio.open` takes one driver only; the credentials for a bucket are its decorator's.
    reader = ensure_env_with_credentials(rasterio.DatasetReader)
    return reader(address, driver=list(_IMAGES))


def _keep(address: str, source: Any) -> list[Any]:
    """Keep a dataset for the next reader; return those that are to be closed in its favour."""
    if "://" not in address or address.startswith("file:"):
        return [source]
    now = time.monotonic()
    with _lock:
        if address in _idle:  # another thread's
            return [source]
        spares = []
        if len(_idle) >= MOST:
            # Tasks read files in turn: giving up the oldest for each new one would keep none.
            if now - next(iter(_idle.values()))[0] < IDLE_SECONDS:
                return [source]
            spares.append(_idle.popitem(last=False)[1][1])
        _idle[address] = now, source
    return spares


atexit.register(close_files)
