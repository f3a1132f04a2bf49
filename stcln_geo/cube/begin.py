"""Begin a cube: its folder, and the empty arrays of its seasons with what is known of each date."""

from __future__ import annotations

from ..errors import CubeError, OutputError
from ..storage import Location, S3Path, make_folder, remove_tree, writing
from .audit import SUSPECT
from .calendar import season_periods
from .planned import CubePlan, SeasonPlan
from .publish import recover_publications
from .replace import store_season_plan
from .snapshot import write_items
from .store import create_season, list_seasons, open_building
from .stored import (
    ITEMS_FILE,
    PLAN_FILE,
    manifest_folder,
    read_plan_file,
    season_fingerprint,
    store_plan,
)

__all__ = ["date_provenance", "open_or_create", "prepare_folder"]

_POLICY = ("on_error", "max_failed_fraction")
"""Choices that do not change what cube is built."""


def prepare_folder(plan: CubePlan, path: Location, *, overwrite: bool) -> None:
    """Make the folder ready: new, or holding an earlier run of the same plan."""
    is_cube = _is_cube(path)
    if path.exists() and not path.is_dir():
        raise OutputError(
            f"Cannot write the cube {path}: it is a file, but a cube is a folder. "
            "Choose another path."
        )
    if path.is_dir() and not is_cube and not all(_is_of_a_start(entry) for entry in path.iterdir()):
        raise OutputError(
            f"Cannot write the cube {path}: the folder holds other files, and a cube needs a "
            "folder of its own. Choose a new path such as region.zarr."
        )
    if is_cube and not overwrite:
        if (path / PLAN_FILE).is_file():
            stored = CubePlan.from_json(read_plan_file(path)["plan"])
            if stored.fingerprint == plan.fingerprint:
                store_plan(plan, path)
                return
            why = _difference(stored, plan)
        else:
            why = "it was not made by 'cube build'"
        raise CubeError(
            f"Cannot build into {path}: it holds another cube ({why}). Choose another path, or "
            "replace the cube and its labels with --overwrite."
        )
    with writing(path):
        if is_cube:
            if isinstance(path, S3Path):
                # A journal must not outlive the objects it speaks of.
                recover_publications(path)
            remove_tree(path)
        make_folder(path)
        write_items(path / ITEMS_FILE, plan.items, plan.queries)
    store_plan(plan, path)


def _is_cube(path: Location) -> bool:
    """Return True where a folder holds a cube, or one that is begun, and so may be replaced."""
    if (path / PLAN_FILE).is_file() and (path / ITEMS_FILE).is_file():
        return True
    if not (path / "zarr.json").is_file():
        return False
    return bool(list_seasons(path)) or any(path.glob("*.building"))


def _is_of_a_start(entry: Location) -> bool:
    """Return True of what a call leaves that is killed before the plan is there."""
    hidden = entry.name.startswith(".") and entry.name.endswith(".part")
    return hidden or entry.name == ITEMS_FILE


def open_or_create(plan: CubePlan, season: SeasonPlan, path: Location, *, replacing: bool) -> None:
    """Create the season's empty arrays, unless an earlier run of the plan has."""
    fingerprint = season_fingerprint(plan, season)
    building = open_building(path, season.name)
    if building is not None and building.attrs.get("fingerprint") == fingerprint:
        return
    with writing(path):
        remove_tree(manifest_folder(path, season.name, replacing=replacing))
    create_season(
        path,
        season.name,
        geobox=plan.geobox,
        time=season.time,
        bands=plan.bands,
        aoi=plan.aoi,
        layout=season.layout,
        lattice=plan.spec.lattice,
        with_scl=plan.keeps_scl,
        with_observations=plan.spec.composite != "none",
        attrs={
            "season_start": plan.spec.season_start,
            "catalog": plan.catalog,
            "collection": plan.collection,
            "region": plan.region,
            "fingerprint": fingerprint,
            "clouds_masked": plan.cloud_mask != "none",
            "cloud_mask": plan.cloud_mask,
            **(
                {"cloud_mask_weights": plan.spec.clouds.weights}
                if plan.cloud_mask == "omnicloudmask"
                else {}
            ),
            "level": plan.level,
            "composite": plan.spec.composite,
            "period": plan.spec.period,
        },
        date_attrs={
            **date_provenance(plan, season),
            **_spans(plan, season),
            SUSPECT: [False] * len(season.dates),
        },
    )
    store_season_plan(path, plan, season.name, replacing=replacing)


def date_provenance(plan: CubePlan, season: SeasonPlan) -> dict[str, list[str]]:
    """Return, per date, what its scenes are; several scenes are joined by a space."""

    def joined(values: list[str]) -> str:
        return " ".join(dict.fromkeys(value.replace(" ", "_") for value in values if value))

    columns: dict[str, list[str]] = {
        name: []
        for name in ("platform", "orbit", "baseline", "offset_rule", "offset_dn", "item_ids")
    }
    for date in season.dates:
        scenes = date.scenes
        rules = [asset.radiometry for scene in scenes for asset in scene.bands]
        columns["platform"].append(joined([scene.platform for scene in scenes]))
        columns["orbit"].append(
            joined([f"{scene.orbit:03d}" for scene in scenes if scene.orbit is not None])
        )
        columns["baseline"].append(
            joined([(scene.substitute or scene).baseline for scene in scenes])
        )
        columns["offset_rule"].append(joined([rule.source for rule in rules]))
        columns["offset_dn"].append(joined([str(rule.offset) for rule in rules]))
        columns["item_ids"].append(joined([(scene.substitute or scene).item for scene in scenes]))
    if plan.spec.composite != "none":
        columns["solar_days"] = [" ".join(date.days()) for date in season.dates]
    return columns


def _spans(plan: CubePlan, season: SeasonPlan) -> dict[str, list[str]]:
    """Return first and last day of each composite's period."""
    if plan.spec.period is None:
        return {}
    spans = season_periods(season.name, plan.spec.period)
    return {
        "period_start": [str(span.start) for span in spans],
        "period_end": [str(span.last) for span in spans],
    }


def _difference(stored: CubePlan, asked: CubePlan) -> str:
    """Say in what two plans differ, the most telling first."""
    if stored.bands != asked.bands:
        return f"its bands are {', '.join(stored.bands)}"
    if (stored.crs, stored.window, stored.spec.resolution) != (
        asked.crs, asked.window, asked.spec.resolution,
    ):  # fmt: skip
        height, width = stored.window.shape_yx
        return (
            f"its grid is {width} x {height} px of {stored.spec.resolution:g} m in {stored.crs}, "
            f"for {stored.region}"
        )
    before, now = ({scene.item for scene in plan.scenes} for plan in (stored, asked))
    if now < before:
        return f"it has {len(before - now)} items more, as after 'cube append'"
    if before != now:
        return f"{len(now - before)} items are new and {len(before - now)} are gone"
    ours, theirs = stored.spec.to_json(), asked.spec.to_json()
    differing = [name for name in ours if ours[name] != theirs[name] and name not in _POLICY]
    if differing:
        return ", ".join(f"its {name} is {ours[name]}" for name in differing)
    return "the same items now have other addresses or other metadata"
