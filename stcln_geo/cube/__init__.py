"""From STAC items to a Zarr cube: search, plan, build, store."""
