"""Write the report of a prediction: one HTML page that holds everything it shows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .html import Picture, write_page

__all__ = ["write_prediction_report"]


def write_prediction_report(out_html: str | Path, run: Mapping[str, Any], *, title: str) -> Path:
    """Write the page beside the maps, with the pictures that lie there inside it.

    Parameters
    ----------
    out_html
        File to write; ``quicklook.png``, ``confidence.png`` and ``qa.png`` stand in its folder.
    run
        Content of ``run.json``.
    title
        Name of the map.

    Raises
    ------
    MissingFileError
        If a picture does not exist.
    """
    target = Path(out_html)
    pixel_ha = run["transform"][0] ** 2 / 10_000
    counts = {int(value): int(count) for value, count in run["histogram"].items()}
    mapped = max(int(run["owned_pixels"]), 1)
    classes = [
        {
            "name": entry["name"],
            "color": entry["color"],
            "pixels": counts.get(code, 0),
            "hectares": counts.get(code, 0) * pixel_ha,
            "share": counts.get(code, 0) / mapped,
        }
        for code, entry in enumerate(run["legend"])
    ]
    pictures = [
        Picture(
            path=target.parent / "quicklook.png",
            title="Classes",
            alt="Map of the crop classes, with its legend",
        ),
        Picture(
            path=target.parent / "confidence.png",
            title="Confidence",
            alt="Map of the confidence in five steps",
            caption="The highest probability of each pixel: not the chance of being right.",
        ),
        Picture(
            path=target.parent / "qa.png",
            title="Quality",
            alt="Map of the reasons for which pixels have a class or none",
            caption="Why a pixel has a class or none.",
        ),
    ]
    quality = [
        {"name": name, "pixels": count, "hectares": count * pixel_ha}
        for name, count in run["quality"].items()
    ]
    seconds = run["seconds"]
    stages = [
        ("Labelling", seconds["label"]),
        ("Seam audit", seconds.get("seam_audit", 0.0)),
        ("Assembling the maps", seconds["assemble"]),
    ]
    shards = seconds.get("shards")
    work = []
    if shards is not None:
        work = [
            ("Network", shards["device"], "the device is busy"),
            ("Reading", shards["read"], "beside the network, in a thread of its own"),
            ("Waiting", shards["wait"], "the network waits for what is being read"),
            ("Writing", shards["write"], "compressing the shards, after the network"),
            ("Device idle", shards["idle"], "waiting, writing, and all else"),
        ]
    return write_page(
        target,
        "prediction.html.j2",
        run=run,
        title=title,
        classes=classes,
        largest=max((row["share"] for row in classes), default=0.0) or 1.0,
        quality=quality,
        pictures=pictures,
        stages=stages,
        longest_s=max(value for _, value in stages) or 1.0,
        work=work,
        worked_s=max(shards["total"], 1e-9) if shards is not None else 1.0,
    )
