"""MTLCC (Rußwurm and Körner 2018): small tiles north of Munich, 2016 and 2017, Level-1C.

Each calendar year is a season of its own, named by 1 January. The set is read in both of its
forms: one gzipped TFRecord per tile, as released, and folders of GeoTIFFs as the PyTorch loaders
use. A year's tiles lie in ``data16`` or ``data17``, or in the folder that was given;
``classes.txt``, ``tileids`` and ``geotransforms.csv`` lie there or above.
"""

from __future__ import annotations

import collections
import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError, MissingFileError
from ..execution import Execution, ProgressHook, run_tasks
from ..legend import UNLABELLED, Legend
from .mtlcc_tiles import BANDS, LABEL_FILES, TileLook, look_at_tile
from .plan import Findings, Form, ImportPlan, SeasonImport, SiteSource

__all__ = ["plan_mtlcc"]

_CRS = "EPSG:32632"
"""Of the whole set, where a tile's files do not say it."""

_FEWEST = 30
"""Tiles with fewer dates are skipped by the published loader."""

_SUFFIX = ".tfrecord.gz"

_ANY = 0
"""In place of the year of a tile that tells none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Folder:
    """A folder with the tiles of a year."""

    form: Form
    tiles: dict[str, Path]
    beside: Path
    """Where classes, splits and places stand."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Set:
    """What all tiles share."""

    root: Path
    form: Form
    shape_yx: tuple[int, int]
    legend: Legend
    places: dict[str, tuple[str, tuple[float, ...]]]


def plan_mtlcc(
    source: str | Path,
    *,
    years: Sequence[int] | None = None,
    execution: Execution | None = None,
    progress: ProgressHook | None = None,
) -> ImportPlan:
    """Look an MTLCC folder through: TFRecords are read and checked wholly, GeoTIFFs by name.

    Parameters
    ----------
    years
        Only these calendar years; by default all that are there.

    Raises
    ------
    MissingFileError
        If the folder does not hold MTLCC.
    InputError
        If files are damaged, or no tile can be imported.
    """
    root = Path(source)
    folders = _folders(root)
    legend = _read_classes(root, folders[0].beside)
    paths = [str(path) for folder in folders for path in folder.tiles.values()]
    looked = run_tasks(
        look_at_tile, paths, execution=execution or Execution(), label="tile", progress=progress
    )
    damaged = [look.problem for look in looked if look.problem]
    if damaged:
        raise InputError(
            f"Cannot import MTLCC from {root}: {len(damaged)} of {len(paths)} tiles are damaged. "
            f"Nothing was written. {' '.join(damaged[:3])}"
        )
    by_path = dict(zip(paths, looked, strict=True))
    shapes = collections.Counter(look.shape_yx for look in looked if look.dates)
    common = _Set(
        root=root,
        form=folders[0].form,
        shape_yx=shapes.most_common(1)[0][0] if shapes else (0, 0),
        legend=legend,
        places={
            name: place
            for folder in folders
            for name, place in _read_places(root, folder.beside).items()
        },
    )
    sites: dict[int, dict[str, SiteSource]] = {}
    homes: dict[int, Path] = {}
    findings: dict[int, Findings] = collections.defaultdict(Findings)
    for folder in folders:
        for name, path in folder.tiles.items():
            found = _plan_tile(name, path, by_path[str(path)], common, findings)
            for year, site in found.items():
                sites.setdefault(year, {}).setdefault(name, site)
                homes.setdefault(year, folder.beside)
    there = sorted(sites)
    lacking = [str(year) for year in years or () if year not in sites]
    if not sites or lacking:
        raise InputError(
            f"Cannot import MTLCC from {root}: it has no whole tile"
            f"{f' of {lacking[0]}' if lacking else ''} (of {len(paths)} tiles; years that are "
            f"there: {', '.join(str(year) for year in there) or 'none'}). Unpack the set "
            "wholly, or correct --years."
        )
    return ImportPlan(
        dataset="mtlcc",
        source=str(root),
        seasons=tuple(
            _season(
                year,
                sites[year],
                common,
                _read_splits(root, homes[year]),
                (findings[year], findings[_ANY]),
            )
            for year in there
            if years is None or year in years
        ),
        notes=(
            "MTLCC is Level-1C: top-of-atmosphere reflectance, clouds left in. 'valid' is True "
            "wherever all bands were measured (digital number above 0).",
        ),
    )


def _season(
    year: int,
    sites: dict[str, SiteSource],
    common: _Set,
    named_by: dict[str, list[str]],
    found: tuple[Findings, Findings],
) -> SeasonImport:
    """Return a year's import.

    Parameters
    ----------
    named_by
        Tile ids of each published split.
    found
        What was found of the year's tiles, and of tiles that tell no year.
    """
    findings = found[0]
    ordered = tuple(sites[name] for name in sorted(sites, key=int))
    for site in ordered:
        if len(site.time) < _FEWEST:
            findings.add(
                "short_series", site.id,
                f"Tiles with fewer than {_FEWEST} dates, imported, though the published loader "
                "skips them",
            )  # fmt: skip
    splits: dict[str, tuple[str, ...]] = {}
    for split, named in named_by.items():
        splits[split] = tuple(name for name in named if name in sites)
        missing = len(named) - len(splits[split])
        if missing:
            findings.add(
                "missing_tiles", f"{split} ({missing} of {len(named)})",
                f"Splits that name tiles which are not there in {year}",
            )  # fmt: skip
    if not splits:
        findings.add("no_splits", "tileids", "Missing folders of splits")
    return SeasonImport(
        name=f"{year:04d}-01-01",
        form=common.form,
        bands=BANDS,
        shape_yx=common.shape_yx,
        sites=ordered,
        legend=common.legend,
        attrs={
            "dataset": "mtlcc",
            "season_start": "01-01",
            "level": "top-of-atmosphere",
            "clouds_masked": False,
            "unknown": {"source": 0, "stored": UNLABELLED},
            "resampling": "nearest: pixels of 20 m and 60 m are repeated",
        },
        splits=splits,
        findings=(*findings.all(), *found[1].all()),
    )


def _plan_tile(
    name: str,
    path: Path,
    look: TileLook,
    common: _Set,
    findings: dict[int, Findings],
) -> dict[int, SiteSource]:
    """Return what to read of a tile by year; note what was left out of it."""
    first: dict[str, int] = {}
    repeated = []
    for date, frame in look.dates:
        if date in first:
            repeated.append(date)
        first.setdefault(date, frame)
    ordered = sorted(first.items())
    years = sorted({int(date[:4]) for date, _ in ordered}) or _years_of(path) or [_ANY]
    for year in years:
        told = findings[year]
        for date in repeated:
            told.add(
                "repeated_date", f"{name} {date}",
                "Dates that stand twice in a tile, of which the first frame is taken",
            )  # fmt: skip
        for text in look.bad:
            told.add(
                "bad_date", f"{name} ({text})",
                "Dates that do not exist or lack one of their three files, left out",
            )  # fmt: skip
        if look.padding:
            told.add(
                "padding",
                f"{name} ({look.padding})",
                "Tiles with padding frames, which are dropped",
            )
        if [date for date, _ in look.dates] != sorted(date for date, _ in look.dates):
            told.add("unsorted_dates", name, "Tiles with unsorted dates, sorted with their frames")
        if not ordered:
            told.add("no_dates", name, "Tiles without a date, left out")
        elif look.shape_yx != common.shape_yx:
            told.add("other_shape", name, "Tiles that are not of the others' size, left out")
        elif not look.labelled:
            told.add("missing_labels", name, "Tiles without classes of their size, unlabelled")
    if not ordered or look.shape_yx != common.shape_yx:
        return {}
    known = {0, *(int(entry.value) for entry in common.legend.classes)}
    unknown = sorted(set(look.classes) - known)
    crs, transform, rule = _place(name, look, common.places)
    found = {}
    for year in years:
        if unknown:
            findings[year].add(
                "unknown_class", name, "Tiles with classes that classes.txt lacks, unlabelled there"
            )
        if rule == "none":
            findings[year].add(
                "no_place", name,
                "Tiles without a place, in their files or in geotransforms.csv, set at the origin "
                f"of {_CRS}",
            )  # fmt: skip
        mine = [(date, frame) for date, frame in ordered if int(date[:4]) == year]
        found[year] = SiteSource(
            id=name, path=str(path), time=tuple(date for date, _ in mine),
            frames=tuple(frame for _, frame in mine), crs=crs, transform=transform,
            georeference=rule, labelled=look.labelled, stamp=look.stamp,
        )  # fmt: skip
    return found


def _place(
    name: str, look: TileLook, places: dict[str, tuple[str, tuple[float, ...]]]
) -> tuple[str, tuple[float, float, float, float, float, float], str]:
    if look.crs is not None and look.transform is not None:
        crs, transform, rule = look.crs, look.transform, "file"
    elif name in places:
        (crs, transform), rule = places[name], "geotransforms.csv"
    else:
        crs, transform, rule = _CRS, (10.0, 0.0, 0.0, 0.0, -10.0, 0.0), "none"
    a, b, c, d, e, f = transform
    return crs, (a, b, c, d, e, f), rule


def _years_of(path: Path) -> list[int]:
    """Return the year in the name of a tile's folders, for a tile that has no dates."""
    for part in reversed(path.parts):
        if part.startswith("data") and part[4:].isdigit() and len(part) == 6:
            return [2000 + int(part[4:])]
    return []


def _folders(root: Path) -> list[_Folder]:
    """Return the folders of tiles: the given one, or those of the years in it."""
    if not root.exists():
        raise MissingFileError(
            f"Cannot import MTLCC from {root}: there is nothing at this path. Give the folder "
            "that holds data16, data17, tileids and classes.txt."
        )
    if root.is_file():
        raise InputError(
            f"Cannot import MTLCC from {root}: it is a file, but the set is read from a folder. "
            "Unpack it, and give the folder that holds data16, data17, tileids and classes.txt."
        )
    years = sorted(path for path in root.glob("data[0-9][0-9]") if path.is_dir())
    found = [folder for path in years or [root] if (folder := _folder(path)) is not None]
    if not found:
        inner = [
            path.parent
            for depth in ("*", "*/*", "*/*/*")
            for path in sorted(root.glob(f"{depth}/data[0-9][0-9]"))
        ]
        named = ", ".join(dict.fromkeys(str(path) for path in inner))
        raise MissingFileError(
            f"Cannot import MTLCC from {root}: it has no tiles, neither <id>{_SUFFIX} nor folders "
            "of GeoTIFFs named by tile ids. Give the folder that holds data16, data17, tileids and "
            f"classes.txt{f', here one of {named}' if named else ''}."
        )
    forms = {folder.form for folder in found}
    if len(forms) > 1:
        raise InputError(
            f"Cannot import MTLCC from {root}: some years are TFRecords, others GeoTIFFs. Import "
            "one year's folder at a time, into the same stack."
        )
    return found


def _folder(path: Path) -> _Folder | None:
    records = {
        file.name.removesuffix(_SUFFIX): file
        for file in sorted(path.glob(f"*{_SUFFIX}"))
        if file.name.removesuffix(_SUFFIX).isdigit()
    }
    if records:
        return _Folder(form="mtlcc-tfrecord", tiles=records, beside=path)
    for inner in (path / "data", path):
        if not inner.is_dir():
            continue
        tiles = {
            child.name: child
            for child in sorted(inner.iterdir())
            if child.name.isdigit() and child.is_dir()
        }
        if tiles:
            return _Folder(form="mtlcc-tif", tiles=tiles, beside=path)
    return None


def _beside(root: Path, folder: Path, name: str) -> Path:
    """Return a file that stands in a year's folder, or above it."""
    for place in (folder, root, folder.parent):
        if (place / name).exists():
            return place / name
    return root / name


def _read_splits(root: Path, folder: Path) -> dict[str, list[str]]:
    """Return the tile ids of each split: one a line of its file in ``tileids``."""
    return {
        file.stem: [line.strip() for line in file.read_text().splitlines() if line.strip()]
        for file in sorted(_beside(root, folder, "tileids").glob("*.tileids"))
    }


def _read_classes(root: Path, folder: Path) -> Legend:
    """Return the classes of classes.txt (``id|name`` lines) but unknown, whose id is 0."""
    path = _beside(root, folder, "classes.txt")
    if not path.is_file():
        raise MissingFileError(
            f"Cannot import MTLCC from {root}: it has no classes.txt, which names the classes "
            f"of {' and '.join(LABEL_FILES)} or of the records. Put it there from the download."
        )
    rows: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        key, bar, name = (part.strip() for part in line.partition("|"))
        if not bar or not key.isdigit() or not name:
            raise InputError(
                f"Cannot import MTLCC from {root}: line {number} of {path.name} is {line!r}; lines "
                "are id|name, such as 26|maize. Correct it, or fetch the file again."
            )
        if int(key):
            rows.setdefault(str(int(key)), name)
    return Legend.from_rows(
        [{"value": key, "name": name} for key, name in rows.items()], source=str(path)
    )


def _read_places(root: Path, folder: Path) -> dict[str, tuple[str, tuple[float, ...]]]:
    """Return CRS and transform of tiles: id, xmin, xres, 0, ymax, 0, -yres, srid in each row."""
    path = _beside(root, folder, "geotransforms.csv")
    if not path.is_file():
        return {}
    places: dict[str, tuple[str, tuple[float, ...]]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.reader(file):
            if len(row) < 7 or not row[0].strip().isdigit():
                continue
            try:
                west, a, b, north, d, e = (float(value) for value in row[1:7])
                srid = int(float(row[7])) if len(row) > 7 and row[7].strip() else 0
            except ValueError as error:
                raise InputError(
                    f"Cannot import MTLCC from {root}: the row of tile {row[0]} in {path.name} "
                    f"holds something that is no number ({error}). Fetch the file again."
                ) from error
            crs = f"EPSG:{srid}" if srid else _CRS
            places[str(int(row[0]))] = (crs, (a, b, west, d, e, north))
    return places
