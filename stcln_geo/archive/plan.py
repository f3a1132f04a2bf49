"""Plan an archive: size and cost first.

Only the searches touch the network; their results are kept in the archive's folder, so that
neither a second plan nor the run repeats them. No pixel is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..cube.stack import StackLayout, plan_stack_layout
from ..cube.stored import read_manifest
from ..errors import CubeError, InputError, OutputError, SearchError
from ..execution import ProgressHook
from ..progress import duration_text
from ..storage import Location, location
from .searches import (
    Group,
    GroupSummary,
    Provider,
    SiteCost,
    common_bands,
    make_groups,
    plan_groups,
    search_groups,
    sha256,
)
from .sites import Site
from .spec import ArchiveSpec

__all__ = ["ARCHIVE_FILE", "ArchivePlan", "StackPlan", "plan_archive"]

ARCHIVE_FILE = "archive.json"

_BLOCK = 1024
"""Pixels of a block of the usual Sentinel-2 COGs: what is fetched is whole blocks."""

_COG_BYTES = 1.2
"""Bytes per pixel of such a block, compressed."""

_HEADER_BYTES = 32_768
_REQUESTS = 2
"""Per asset window: the header, then the blocks."""

_COMPRESSION = 2.2
"""How much smaller cubes become on disk."""

_WINDOWS_PER_SECOND = 20
"""Asset windows that one task reads in a second over a good line: an assumption."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StackPlan:
    """The stack of a UTM zone and season."""

    crs: str
    season: str
    sites: tuple[Site, ...]
    """Tile by tile; those without a scene are not there."""
    dates: int
    """Of the site that has the most."""
    layout: StackLayout
    keeps_scl: bool
    groups: tuple[GroupSummary, ...]

    @property
    def folder(self) -> str:
        """Path of the stack in the archive."""
        return stack_folder(self.crs)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides its content."""
        return sha256(
            [
                [(group.name, group.fingerprint) for group in self.groups],
                [(site.id, asdict(site.window)) for site in self.sites],
                self.dates, asdict(self.layout), self.keeps_scl,
            ]
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchivePlan:
    """All a run needs; ``str(plan)`` is for people."""

    spec: ArchiveSpec
    path: Location
    sites: tuple[Site, ...]
    bands: tuple[str, ...]
    groups: tuple[GroupSummary, ...]
    searched: int
    """Searches that were sent now; the others were on disk."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides the archive's content."""
        content = self.to_json()
        return sha256([content, [(group.name, group.fingerprint) for group in self.groups]])

    @property
    def stacks(self) -> list[StackPlan]:
        """The stacks, season by season; none where sites are cubes."""
        if not self.spec.in_stacks:
            return []
        by_id = {site.id: site for site in self.sites}
        found = []
        for season in self.spec.seasons:
            for crs in sorted({site.crs for site in self.sites}):
                groups = [one for one in self.groups if (one.season, one.crs) == (season, crs)]
                costs = {name: cost for group in groups for name, cost in group.sites.items()}
                if not costs:
                    continue
                dates = max(cost.dates for cost in costs.values())
                used = tuple(group for group in groups if group.sites)
                found.append(
                    StackPlan(
                        crs=crs, season=season, sites=tuple(by_id[name] for name in costs),
                        dates=dates, groups=used,
                        keeps_scl=all(group.keeps_scl for group in used),
                        layout=plan_stack_layout(
                            dates, len(self.bands), (self.spec.size, self.spec.size)
                        ),
                    )
                )  # fmt: skip
        return found

    @property
    def cubes(self) -> list[Site]:
        """The sites that become cubes, each with a scene in some season."""
        if self.spec.in_stacks:
            return []
        seen = {name for group in self.groups for name in group.sites}
        return [site for site in self.sites if site.id in seen]

    @property
    def costs(self) -> list[tuple[str, SiteCost]]:
        """Season and cost of each site."""
        return [(group.season, cost) for group in self.groups for cost in group.sites.values()]

    @property
    def windows(self) -> int:
        """Asset windows to read."""
        return sum(cost.windows for _, cost in self.costs)

    @property
    def raw_bytes(self) -> int:
        """Size before compression."""
        pixels = self.spec.size**2
        return sum(cost.dates * pixels * (2 * len(self.bands) + 2) for _, cost in self.costs)

    @property
    def transfer_bytes(self) -> int:
        """About how many bytes are fetched: every asset window takes whole blocks of its file."""
        side = self.spec.size * self.spec.cube.resolution
        per_scene = sum(_window_bytes(side / _native(band)) for band in self.bands)
        return round(self.windows * per_scene / max(len(self.bands), 1))

    def to_json(self) -> dict[str, Any]:
        """Return spec, bands and sites as JSON values."""
        return {
            "spec": self.spec.to_json(),
            "bands": list(self.bands),
            "sites": [asdict(site) for site in self.sites],
        }

    def describe(self, *, workers: int = 0) -> str:
        """Return the plan as text for people, for some number of workers."""
        spec, costs = self.spec, self.costs
        zones = Counter(site.crs for site in self.sites)
        tiles = len({(group.crs, group.cell) for group in self.groups})
        side = spec.size * spec.cube.resolution
        form = (
            f"{len(self.stacks)} stacks, one per UTM zone and season"
            if spec.in_stacks
            else f"{len(self.cubes)} cubes, one per site"
        )
        dropped: Counter[str] = Counter()
        for group in self.groups:
            if group.items:
                dropped.update(group.dropped)
        seconds = self.windows / (_WINDOWS_PER_SECOND * max(workers, 1))
        lines = [
            f"Archive     {self.path}: {form}",
            f"Sites       {len(self.sites)} of {spec.size} x {spec.size} px, "
            f"{spec.cube.resolution:g} m ({len(self.sites) * side**2 / 1e4:,.0f} ha), in "
            + ", ".join(f"{crs} ({count})" for crs, count in sorted(zones.items())),
            f"Catalog     {spec.to_json()['catalog']}, bands {', '.join(self.bands)}",
            f"Searches    {len(self.groups)} ({tiles} MGRS tiles x {len(spec.seasons)} seasons), "
            f"{len(self.groups) - self.searched} of them kept from before; "
            f"{sum(group.items for group in self.groups)} items",
        ]
        if dropped:
            told = "; ".join(f"{count} items: {reason}" for reason, count in dropped.most_common(5))
            lines.append(f"Left out    {told}")
        for season in spec.seasons:
            dates = [cost.dates for name, cost in costs if name == season]
            lacking = len(self.sites) - len(dates)
            span = f"{min(dates)} to {max(dates)} dates each" if dates else "no scene at all"
            lines.append(
                f"Season      {season}: {len(dates)} sites, {span}"
                + (f"; {lacking} sites have no scene" if lacking and dates else "")
            )
        lines += [
            f"To read     {self.windows:,} asset windows, about {_REQUESTS * self.windows:,} "
            f"requests and {size_text(self.transfer_bytes)} to transfer (whole COG blocks)",
            f"On disk     {size_text(self.raw_bytes)} before compression, about "
            f"{size_text(self.raw_bytes / _COMPRESSION)} on disk",
            f"Time        about {duration_text(max(seconds, 1))} at {_WINDOWS_PER_SECOND} asset "
            "windows a second and worker (assumed; the run shows its own)",
        ]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.describe()


def plan_archive(
    sites: Sequence[Site],
    spec: ArchiveSpec,
    path: str | Location,
    *,
    progress: ProgressHook | None = None,
) -> ArchivePlan:
    """Plan an archive; reads no pixel.

    One search is sent per MGRS tile and season in which sites lie. What they found is kept under
    ``path/searches``, so that planning again, or running the plan, sends none.

    Parameters
    ----------
    path
        Folder of the archive to be, or its address in object storage.

    Raises
    ------
    InputError
        If the sites do not fit the spec, or the catalog is not known.
    CubeError
        If the folder holds another archive.
    SearchError
        If the catalog cannot be searched, or nothing usable is found at all.
    """
    path, sites = location(path), tuple(sites)
    _check_sites(sites, spec)
    check_folder(path, sites, spec)
    provider = Provider(spec)
    groups: list[Group] = make_groups(sites, spec)
    searched = search_groups(groups, provider, path, progress=progress)
    bands = common_bands(groups, provider, path)
    summaries = plan_groups(groups, bands, provider, path, progress=progress)
    if not any(group.sites for group in summaries):
        raise SearchError(
            f"Cannot make the archive {path}: none of {len(sites)} sites lies in a scene of the "
            f"{len(groups)} searches. Check the places and the seasons."
        )
    return ArchivePlan(
        spec=spec, path=path, sites=sites, bands=bands, groups=tuple(summaries), searched=searched
    )


def check_folder(path: Location, sites: Sequence[Site], spec: ArchiveSpec) -> None:
    """Raise unless the folder is new, or holds this archive, finished or not."""
    if path.exists() and not path.is_dir():
        raise OutputError(
            f"Cannot write the archive {path}: it is a file, but an archive is a folder. Choose "
            "another path."
        )
    stored = read_manifest(path / ARCHIVE_FILE)
    if not stored:
        if path.is_dir() and any(child.name != "searches" for child in path.iterdir()):
            raise OutputError(
                f"Cannot write the archive {path}: the folder holds other files, and an archive "
                "needs a folder of its own. Choose a new path."
            )
        return
    asked = _flat(spec.to_json())
    told = _flat(stored["spec"])
    differing = [name for name in asked if asked[name] != told.get(name)]
    if differing:
        name = differing[0]
        raise CubeError(
            f"Cannot create the archive {path}: it holds another one (its {name} is "
            f"{told.get(name)}, not {asked[name]}). Choose another path, or repeat the command it "
            "was made with."
        )
    begun = [(site["id"], site["crs"], site["window"]) for site in stored["sites"]]
    if begun != [(site.id, site.crs, asdict(site.window)) for site in sites]:
        raise CubeError(
            f"Cannot create the archive {path}: it was begun with {len(stored['sites'])} other "
            "sites. Choose another path for the new ones, and join them with 'stcln-geo archive "
            "add'."
        )


def _flat(content: dict[str, Any]) -> dict[str, Any]:
    """Return the spec with the cube's choices beside the others, so that a difference is named."""
    return {**{key: value for key, value in content.items() if key != "cube"}, **content["cube"]}


def _check_sites(sites: Sequence[Site], spec: ArchiveSpec) -> None:
    if not sites:
        raise InputError("Cannot make an archive without sites: give at least one point.")
    wrong = [
        site
        for site in sites
        if site.window.shape_yx != (spec.size, spec.size) or site.resolution != spec.cube.resolution
    ]
    if wrong:
        raise InputError(
            f"Cannot plan site {wrong[0].id!r}: it is {wrong[0].window.width} px of "
            f"{wrong[0].resolution:g} m, but the archive's sites are {spec.size} px of "
            f"{spec.cube.resolution:g} m. Place it again with that size."
        )


def stack_folder(crs: str) -> str:
    """Return the path of a zone's stack in the archive."""
    return f"stacks/{crs.removeprefix('EPSG:')}.zarr"


def size_text(size: float) -> str:
    """Return bytes as a text such as ``3.4 GB``."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size / 1e3:.3g} kB"


def _native(band: str) -> int:
    if band in {"blue", "green", "red", "nir"}:
        return 10
    return 60 if band in {"coastal", "nir09", "cirrus"} else 20


def _window_bytes(side: float) -> float:
    """Return what reading a square of so many pixels fetches: a random one meets n/1024 + 1
    blocks in each direction.
    """
    return float((side / _BLOCK + 1) ** 2 * _BLOCK**2 * _COG_BYTES + _HEADER_BYTES)
