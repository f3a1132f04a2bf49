"""Descriptions of STAC providers, one YAML file each; data only."""
