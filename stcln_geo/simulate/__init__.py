"""Simulate a Sentinel-2 archive of a farm landscape: demos, tests and benchmarks off line.

The parts, lowest first: `noise` (numbers that depend on place), `spec` (what and when),
`phenology` (crops and colours), `fields` (the land), `sky` (clouds), `scene` (one block of one
date), `stac` and `archive` (the files).

Simulated data show that a path works. They say nothing about accuracy on real crops.
"""

from __future__ import annotations

from .archive import ArchivePlan, SimulatedArchive, plan_archive, simulate_archive
from .fields import Landscape, make_landscape
from .phenology import CROPS
from .scene import Scene, render_scene
from .sky import Sky, make_sky
from .spec import Acquisition, SimulationSpec

__all__ = [
    "CROPS",
    "Acquisition",
    "ArchivePlan",
    "Landscape",
    "Scene",
    "SimulatedArchive",
    "SimulationSpec",
    "Sky",
    "make_landscape",
    "make_sky",
    "plan_archive",
    "render_scene",
    "simulate_archive",
]
