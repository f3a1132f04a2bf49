"""A model card shows names as they are, whatever Markdown would make of them."""

import json
from typing import Any

from markdown_it import MarkdownIt

from stcln_geo.train import card as card_module
from stcln_geo.train.card import write_model_card
from stcln_geo.train.run_directory import RunDirectory

NAMES = ["<b>beet", "a|b", "*oats*", "_rye_", "[x](y)", "hay & straw, cut", "`c`", "back\\slash"]


def _card() -> dict[str, Any]:
    """Return a card as `describe_model` makes it."""
    return {
        "kind": "classifier", "checkpoint": "checkpoints/best.safetensors", "sha256": "0" * 64,
        "parameters": 5, "network": dict.fromkeys(
            ("mode", "positions", "widths", "layers", "heads", "dropout"), 1
        ),
        "bands": ["red", "nir"], "legend": NAMES, "ignored_classes": ["x|y"], "temperature": None,
        "calibration": None, "chip": 24, "halo": 4, "season_start": "09-01",
        "trained_days": [0, 300], "splits": None, "figures_hold_for": None, "intended_use": "maps",
        "limits": "none",
        "data": [{"cube": "my|cube_1.zarr", "season": "2021-09-01", "dates": 14,
                  "crs": "EPSG:32631", "fingerprint": "0" * 32}],
        "training": {
            "kind": "finetune", "steps": 2, "best_step": 2, "chips": 4, "chips_per_step": 4,
            "weights": "as trained", "begun_from": None, "masking": None, "device": "cpu",
            "precision": "float32", "seconds": 1.0, "packages": {}, "notes": [],
        },
        "figures": [{"split": "test", "cube": "my|cube_1.zarr", "season": "2021-09-01",
                     "fields": 3, "pixels": 40, "values": {"kappa": 0.5}}],
    }  # fmt: skip


def test_names_in_a_card_are_shown_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(card_module, "describe_model", lambda run: _card())

    write_model_card(RunDirectory(tmp_path))

    page = MarkdownIt("commonmark").enable("table").parse((tmp_path / "model_card.md").read_text())
    shown = [_shown(token) for token in page if token.type == "inline"]
    assert f"classes: {'; '.join(NAMES)}" in shown
    assert "ignored, never an output: x|y" in shown
    cells = [shown[index : index + 2] for index, text in enumerate(shown) if "my|" in text]
    assert cells == [
        ["my|cube_1.zarr", "2021-09-01"],
        ["test of my|cube_1.zarr, 2021-09-01", "3 fields, 40 pixels"],
    ]
    assert json.loads((tmp_path / "model_card.json").read_text())["legend"] == NAMES


def _shown(token: Any) -> str:
    """Return the text of a line or a cell as a reader sees it: markup and tags show nothing."""
    kinds = {"text", "text_special", "code_inline"}
    return "".join(part.content for part in token.children if part.type in kinds)
