"""Ask a STAC API for items, page after page, however it behaves."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin

from ..catalog import Catalog
from ..errors import SearchError, StclnGeoError, StclnGeoWarning, UnsafeAddressError
from ..web import guard_redirects
from .addresses import asset_access, check_reachable, redact

if TYPE_CHECKING:
    from shapely.geometry.base import BaseGeometry

__all__ = ["ApiSearch", "search_api"]

_RETRIES = 6
_BACKOFF_SECONDS = 0.5
_TIMEOUT_SECONDS = (10, 120)
_BUSY = (429, 500, 502, 503, 504)
_MOST_STALE_PAGES = 3
"""So many pages in a row may bring nothing new before the search is given up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiSearch:
    """A search that is prepared; iterating asks page after page.

    A refusal that passes (429, 5xx, a broken or silent connection) is asked again after a pause, or
    after the time the server names in ``Retry-After``. A page that was there before is passed
    over; where pages only repeat, the search ends with a warning.

    Raises
    ------
    SearchError
        While iterating, if the server cannot be searched.
    """

    catalog: Catalog
    url: str
    """Where the search is sent."""
    body: Mapping[str, Any]
    """What is sent to it for the first page."""
    pages: Iterator[dict[str, Any]]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the items of all pages; each may come more than once."""
        with _search_errors(self.catalog):
            yield from _new_pages(self.catalog, self.pages)


def search_api(
    catalog: Catalog,
    *,
    collection: str | None,
    area: BaseGeometry | None,
    datetime: str | None,
    server_filter: Mapping[str, Any] | None = None,
    limit: int | None = None,
) -> ApiSearch:
    """Find out where a STAC API is searched, and prepare a search.

    Parameters
    ----------
    area
        In lon/lat; None is the whole Earth.
    datetime
        As a STAC API writes a range.
    server_filter
        More arguments of a pystac-client search.
    limit
        Items per page, in place of the catalog's.

    Raises
    ------
    SearchError
        If the server cannot be searched.
    UnsafeAddressError
        If it names, or redirects to, a private host that is not allowed.
    """
    from pystac_client import Client
    from pystac_client.stac_api_io import StacApiIO
    from shapely.geometry import mapping
    from urllib3.util.retry import Retry

    retry = Retry(
        total=_RETRIES, backoff_factor=_BACKOFF_SECONDS, status_forcelist=_BUSY,
        allowed_methods=None, respect_retry_after_header=True,
    )  # fmt: skip
    io = StacApiIO(max_retries=retry, timeout=_TIMEOUT_SECONDS)
    access = asset_access(catalog)
    guard_redirects(io.session, access.allow_hosts, what=f"a page of catalog '{catalog.name}'")
    with _search_errors(catalog):
        client = Client.open(str(catalog.endpoint), stac_io=io)
        search = client.search(
            collections=[collection] if collection is not None else None,
            intersects=mapping(area) if area is not None else None,
            datetime=datetime,
            limit=limit or catalog.page_limit,
            **(server_filter or {}),
        )
    check_reachable(str(search.url), access, what=f"the search of catalog '{catalog.name}'")
    return ApiSearch(
        catalog=catalog,
        url=str(search.url),
        body=search.get_parameters(),
        pages=search.pages_as_dicts(),
    )


@contextlib.contextmanager
def _search_errors(catalog: Catalog) -> Iterator[None]:
    from pystac_client.exceptions import APIError
    from requests.exceptions import RequestException

    try:
        yield
    except (APIError, RequestException, OSError, NotImplementedError, ValueError) as error:
        if isinstance(error, StclnGeoError):
            raise
        # pystac-client wraps what its session raises.
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, UnsafeAddressError):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        raise SearchError(
            f"Cannot search '{catalog.name}' at {redact(str(catalog.endpoint))}: "
            f"{redact(str(error))[:300]}. Check the connection and the address, or try again later."
        ) from error


def _new_pages(catalog: Catalog, pages: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the items of the pages until they end, or only repeat."""
    known: set[tuple[str, str]] = set()
    links: set[str] = set()
    stale = 0
    for number, page in enumerate(_readable(pages), start=1):
        features = _features(page)
        keys = {(str(item.get("collection")), str(item.get("id"))) for item in features}
        following = _next_link(catalog, page)
        stale = stale + 1 if keys <= known else 0
        # A link that was followed before leads to what was seen before.
        endless = following is not None and following in links
        if stale and (endless or following is None or stale >= _MOST_STALE_PAGES):
            _report_repeated_page(catalog, number, len(known), _matched(page))
            return
        known |= keys
        yield from features
        if following is not None:
            links.add(following)


def _readable(pages: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the pages; raises ValueError where pystac-client stumbles over one."""
    try:
        yield from pages
    except (AttributeError, TypeError, LookupError) as error:
        raise ValueError("its answer is no FeatureCollection") from error


def _features(page: Any) -> list[dict[str, Any]]:
    """Return the items of a page; raises ValueError where it is no page."""
    features = page.get("features", []) if isinstance(page, Mapping) else None
    if not isinstance(features, list) or not all(isinstance(one, dict) for one in features):
        raise ValueError("its answer is no FeatureCollection")
    return features


def _next_link(catalog: Catalog, page: Mapping[str, Any]) -> str | None:
    """Return the link to the next page as text that can be compared, once it is found safe."""
    links = page.get("links")
    for link in links if isinstance(links, list) else ():
        if not isinstance(link, Mapping):
            raise ValueError("a link of its page is no JSON object")
        if link.get("rel") == "next":
            href = urljoin(str(catalog.endpoint), str(link.get("href", "")))
            check_reachable(href, asset_access(catalog), what="the link to the next page")
            return json.dumps([href, link.get("body")], sort_keys=True)
    return None


def _matched(page: Mapping[str, Any]) -> int | None:
    context = page.get("context")
    told = context.get("matched") if isinstance(context, Mapping) else None
    matched = page.get("numberMatched", told)
    return matched if isinstance(matched, int) else None


def _report_repeated_page(catalog: Catalog, number: int, known: int, matched: int | None) -> None:
    if matched is not None and known >= matched:
        return
    warnings.warn(
        f"The answer of '{catalog.name}' repeats itself at page {number}, after {known} items"
        f"{f' of {matched}' if matched is not None else ''}: items may be missing. Search shorter "
        "time ranges, and compare the number of dates.",
        StclnGeoWarning,
        stacklevel=6,
    )
