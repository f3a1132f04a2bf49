"""Cubes as files: a cloud-optimized GeoTIFF per date, with STAC items beside them.

GDAL before 3.11 cannot read sharded Zarr v3, and many people work with files. The order of
imports: ``plan`` (what to write), ``stac`` (what describes it), ``files`` (write it).
"""

from __future__ import annotations

from .files import ExportReport, export_cube
from .plan import ExportFile, ExportPlan, What, plan_export

__all__ = ["ExportFile", "ExportPlan", "ExportReport", "What", "export_cube", "plan_export"]
