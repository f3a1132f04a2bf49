"""The options that the ``stcln-geo cube`` commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "AllowHostOption",
    "BandsOption",
    "BboxOption",
    "CatalogOption",
    "CloudMarginOption",
    "CloudMaskOption",
    "CollectionOption",
    "CompositeOption",
    "CrsOption",
    "CubeArgument",
    "FailedFractionOption",
    "HaloOption",
    "MaxCloudOption",
    "MemoryOption",
    "OffsetOption",
    "OnErrorOption",
    "OrbitsOption",
    "PerZoneOption",
    "PeriodOption",
    "RegionOption",
    "ResamplingOption",
    "ResolutionOption",
    "SchedulerOption",
    "ScratchOption",
    "SeasonOption",
    "SeasonStartOption",
    "ShadowMarginOption",
    "TilesOption",
    "TimeOption",
    "WindowOption",
    "WorkersOption",
]

CatalogOption = Annotated[
    str,
    typer.Option(
        "--catalog",
        help="Where to search: a name (stcln-geo catalogs list), a YAML file, a folder with "
        "catalog.json, or an address.",
    ),
]
CollectionOption = Annotated[
    str | None,
    typer.Option("--collection", help="Collection id; by default the only one that fits."),
]
BboxOption = Annotated[
    str | None, typer.Option("--bbox", metavar="W,S,E,N", help="Region in degrees.")
]
RegionOption = Annotated[
    Path | None,
    typer.Option("--region", help="Region as polygons in a vector file (GeoJSON, GeoPackage)."),
]
TimeOption = Annotated[
    str | None,
    typer.Option("--time", metavar="START/END", help="Dates, both included, as YYYY-MM-DD."),
]
BandsOption = Annotated[
    str | None,
    typer.Option("--bands", help="Common names, by commas; by default the ten of 10 and 20 m."),
]
ResolutionOption = Annotated[float, typer.Option("--resolution", help="Pixel size in metres.")]
CrsOption = Annotated[
    str, typer.Option("--crs", help="Such as EPSG:32631; auto takes the scenes' or the UTM zone.")
]
PerZoneOption = Annotated[
    bool,
    typer.Option(
        "--per-zone",
        help="One cube per UTM zone of the region: OUT-32631.zarr, OUT-32632.zarr.",
    ),
]
SeasonStartOption = Annotated[
    str, typer.Option("--season-start", metavar="MM-DD", help="The day a season begins.")
]
CompositeOption = Annotated[
    str,
    typer.Option(
        "--composite",
        help="Merge the clear observations of each period by median, medoid or least-cloudy; "
        "none keeps every solar day with a scene.",
    ),
]
PeriodOption = Annotated[
    str | None,
    typer.Option(
        "--period",
        help="Of a composite: P5D, P10D, P16D (days from the season's first) or P1M (months).",
    ),
]
ResamplingOption = Annotated[
    str,
    typer.Option("--resampling", help="nearest, bilinear, cubic or average; scl is by nearest."),
]
CloudMaskOption = Annotated[
    str,
    typer.Option(
        "--cloud-mask",
        help="What finds clouds and shadows: scl (the provider's scene classes), or omnicloudmask "
        "(a model; pip install 'stcln-geo[omnicloudmask]').",
    ),
]
CloudMarginOption = Annotated[
    int, typer.Option("--cloud-margin", help="Pixels around clouds that are not clear either.")
]
ShadowMarginOption = Annotated[
    int, typer.Option("--shadow-margin", help="Pixels around cloud shadows, likewise.")
]
OffsetOption = Annotated[
    float | None,
    typer.Option("--offset", help="Reflectance to add, in place of what the items declare."),
]
WindowOption = Annotated[
    int, typer.Option("--window", help="Window of the network the grid is padded for, in pixels.")
]
HaloOption = Annotated[int, typer.Option("--halo", help="Context pixels per side of a window.")]
OnErrorOption = Annotated[
    str, typer.Option("--on-error", help="fail, or skip scenes with an asset that cannot be read.")
]
FailedFractionOption = Annotated[
    float | None,
    typer.Option(
        "--max-failed-fraction",
        help="With --on-error skip: share of a season's scenes that may be left out, 0 to 1.",
    ),
]
SchedulerOption = Annotated[
    str | None, typer.Option("--scheduler", help="Address of a Dask scheduler (tcp://...).")
]
CubeArgument = Annotated[Path, typer.Argument(metavar="CUBE", help="Folder of the cube.")]
MemoryOption = Annotated[
    str, typer.Option("--memory", help="Memory for all workers together, such as 8GB.")
]
ScratchOption = Annotated[
    Path | None,
    typer.Option(
        "--scratch",
        metavar="DIR",
        help="Local folder of each worker for pixels that --memory cannot hold; default: "
        "temporary files.",
    ),
]
WorkersOption = Annotated[
    int, typer.Option("--workers", help="Local worker processes; 0 works in this process.")
]
TilesOption = Annotated[
    str | None, typer.Option("--tiles", help="MGRS tiles to take, by commas, such as 31UES.")
]
OrbitsOption = Annotated[
    str | None, typer.Option("--orbits", help="Relative orbits to take, by commas, such as 51,94.")
]
MaxCloudOption = Annotated[
    float | None,
    typer.Option("--max-cloud", help="Largest cloud cover of a scene in percent; by default any."),
]
AllowHostOption = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-host",
        help="A private host (this machine, its network) that assets may be on; can be repeated.",
    ),
]
SeasonOption = Annotated[
    str | None, typer.Option("--season", help="Season (YYYY-MM-DD); by default the only one.")
]
