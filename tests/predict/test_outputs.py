"""The further layers: what the numbers say, what the files say of themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import rasterio
import torch
import xarray as xr
from PIL import Image

from stcln_geo.cog import validate_cog
from stcln_geo.grid import Window, geobox_from_window, tiles
from stcln_geo.model.checkpoint import load_model
from stcln_geo.predict import Prediction, PredictSpec, predict_region
from stcln_geo.predict.embeddings import write_embeddings
from stcln_geo.predict.outputs import OPTIONAL, decide
from stcln_geo.predict.qa import QA_LEGEND
from stcln_geo.predict.style import write_quicklook

CPU = {"device": "cpu", "precision": "float32", "seam_audit": 0}


@pytest.fixture(scope="module")
def product(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Prediction:
    spec = PredictSpec(**CPU, outputs=OPTIONAL, shard_size=40)
    out = tmp_path_factory.mktemp("outputs") / "map"
    return predict_region(world.cube, world.checkpoint, out, spec=spec)


def scaled(path: Path) -> np.ndarray:
    """Read as GDAL says: value x scale, NaN where masked; (bands, H, W)."""
    with rasterio.open(path) as source:
        values = source.read(masked=True).astype(float)
        return values.filled(np.nan) * np.array(source.scales)[:, None, None]


def test_layers_follow_from_the_probabilities(product: Prediction, world: Any) -> None:
    probability = scaled(product.out / "probabilities.tif")
    with rasterio.open(product.classes) as source:
        classes = source.read(1)
    mapped = classes != 255
    assert np.array_equal(np.isfinite(probability[0]), mapped)
    p = probability[:, mapped]
    assert np.allclose(p.sum(0), 1, atol=0.011), "rounding of four classes"
    best = np.take_along_axis(p, classes[mapped][None].astype(int), 0)[0]
    assert (best >= p.max(0) - 0.0041).all()
    ordered = np.sort(p, 0)
    margin = scaled(product.out / "margin.tif")[0, mapped]
    assert np.abs(margin - (ordered[-1] - ordered[-2])).max() <= 0.0061
    entropy = scaled(product.out / "entropy.tif")[0, mapped]
    terms = np.where(p > 0, -p * np.log(np.maximum(p, 1e-12)), 0).sum(0) / np.log(4)
    assert np.abs(entropy - terms).max() < 0.03
    assert entropy.min() >= 0
    assert entropy.max() <= 1


def test_decisions_at_the_edges() -> None:
    sure = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    even = torch.tensor([0.5, 0.5]).view(1, 2, 1, 1)
    one = torch.ones((1, 1, 1, 1))
    names = ("classes", "confidence", "margin", "entropy", "probabilities")
    rows = [[int(decide(p, names)[name].flatten()[0]) for name in names] for p in (sure, even, one)]
    assert rows == [[0, 100, 250, 0, 250], [0, 50, 0, 250, 125], [0, 100, 250, 0, 250]]


def test_decisions_are_those_of_plain_numbers_pixel_by_pixel() -> None:
    generator = np.random.default_rng(9)
    logits = 2 * generator.normal(size=(3, 5, 7, 11))
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    probability = torch.from_numpy(shares.astype(np.float32))
    made = decide(probability, ("classes", "confidence", "margin", "entropy", "probabilities"))
    assert all(layer.dtype == torch.uint8 for layer in made.values())
    p = np.moveaxis(probability.double().numpy(), 1, -1)
    ordered = np.sort(p, axis=-1)
    exact = {
        "confidence": 100 * ordered[..., -1],
        "margin": 250 * (ordered[..., -1] - ordered[..., -2]),
        "entropy": -250 * (p * np.log(p)).sum(-1) / np.log(5),
        "probabilities": 250 * np.moveaxis(p, -1, 1),
    }
    for name, values in exact.items():
        assert np.abs(made[name].numpy() - values).max() < 0.5001, name
    assert np.array_equal(made["classes"], p.argmax(-1))
    tied = torch.tensor([0.1, 0.3, 0.1, 0.3, 0.2]).view(1, 5, 1, 1)
    assert int(decide(tied, ("classes",))["classes"]) == 1, "the lowest code"
    ranked = decide(probability, ("classes", "confidence"), ranking=probability.flip(1))
    assert np.array_equal(ranked["classes"], p[..., ::-1].argmax(-1))
    assert torch.equal(ranked["confidence"], made["confidence"])


def test_the_files_explain_themselves(product: Prediction, world: Any) -> None:
    for name in ("qa", "observations", "probabilities", "entropy", "margin"):
        assert validate_cog(product.out / f"{name}.tif") == ([], [])
    with rasterio.open(product.out / "probabilities.tif") as source:
        assert source.descriptions == world.legend.names
        assert source.scales == (0.004,) * 4
        assert source.nodata == 255
    with rasterio.open(product.out / "entropy.tif") as source:
        assert "0.004" in source.tags()["TIFFTAG_IMAGEDESCRIPTION"]
    with rasterio.open(product.out / "qa.tif") as source:
        palette = source.colormap(1)
        assert all(palette[code] == color for code, color in QA_LEGEND.colormap().items())
        assert source.descriptions == ("qa",)
        assert source.tags()["TIFFTAG_IMAGEDESCRIPTION"] == "quality codes"


@pytest.mark.parametrize("name", ["classes", "qa"])
def test_names_and_styles_are_read_by_name(product: Prediction, world: Any, name: str) -> None:
    legend = world.legend if name == "classes" else QA_LEGEND
    sidecar = ElementTree.parse(product.out / f"{name}.tif.aux.xml")
    assert tuple(entry.text for entry in sidecar.iter("Category")) == legend.names
    style = ElementTree.parse(product.out / f"{name}.qml").getroot()
    assert style.tag == "qgis"
    renderer = style.find("pipe/rasterrenderer")
    assert renderer is not None
    assert renderer.get("type") == "paletted"
    entries = renderer.findall("colorPalette/paletteEntry")
    assert [
        (int(e.get("value", "")), e.get("color"), e.get("alpha"), e.get("label")) for e in entries
    ] == [(e.code, e.color, "255", e.name) for e in legend.classes]


def test_embeddings_of_more_shards_than_files_may_be_open(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    places = tiles((101, 203), 9)
    parts = []
    for number, place in enumerate(places):
        parts.append((tmp_path / f"{number}.npy", place))
        np.save(parts[-1][0], np.full((2, *place.shape_yx), number, dtype=np.float16))
    geobox = geobox_from_window(Window(3, 5, 101, 203), crs="EPSG:32631", resolution=10)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert len(parts) > 200
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, before[1]))
    try:
        store = write_embeddings(parts, tmp_path / "e.zarr", geobox=geobox, dim=2, attrs={})
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    found = xr.open_zarr(store)["embedding"].values
    for number, place in enumerate(places):
        assert (found[:, place.rows, place.cols] == number).all()


def test_embeddings_are_what_the_classifier_sees(product: Prediction, world: Any) -> None:
    opened = xr.open_zarr(product.out / "embeddings.zarr")
    embedding = opened["embedding"]
    with rasterio.open(product.classes) as source:
        classes = source.read(1)
        place = source.transform
    assert embedding.dims == ("dim", "y", "x")
    assert embedding.dtype == np.float16
    assert float(opened.x[0]) == place.c + 5
    assert float(opened.y[0]) == place.f - 5
    assert "32631" in opened.spatial_ref.attrs["crs_wkt"]
    values = embedding.values.astype(np.float32)
    mapped = classes != 255
    assert np.array_equal(np.isfinite(values).all(0), mapped)
    module = load_model(world.checkpoint)
    series = torch.from_numpy(values[:, mapped].T)[None]
    with torch.inference_mode():
        logits = module.classify(series, (1, int(mapped.sum())))[0, :, 0].numpy()
    assert (logits.argmax(0) == classes[mapped]).mean() > 0.99


def test_the_item_has_every_layer(product: Prediction, world: Any) -> None:
    import pystac

    item = pystac.Item.from_file(str(product.item))
    for key, asset in item.assets.items():
        assert (product.out / asset.href).exists(), key
    assert {*OPTIONAL, "classes", "confidence", "qa", "observations", "report"} <= set(item.assets)
    bands = item.assets["probabilities"].extra_fields["raster:bands"]
    assert [band["name"] for band in bands] == list(world.legend.names)
    assert bands[0]["scale"] == 0.004
    codes = item.assets["qa"].extra_fields["classification:classes"]
    assert [entry["title"] for entry in codes] == list(QA_LEGEND.names)
    counted = {entry["title"]: entry["count"] for entry in codes if entry["count"]}
    assert counted == product.quality


def test_the_report_shows_the_run(product: Prediction, world: Any) -> None:
    page = (product.out / "report.html").read_text()
    for text in ("Maïs", "Beet &amp; Co", "no clear date", "Not measured", "data:image/png;base64"):
        assert text in page
    run = json.loads((product.out / "run.json").read_text())
    assert run["layers"] == [
        "classes", "confidence", "qa", "observations", "probabilities", "entropy", "margin",
        "embeddings",
    ]  # fmt: skip


@pytest.mark.parametrize("shape", [(1, 1), (3000, 1), (2, 999)])
def test_a_quicklook_of_any_shape(tmp_path: Path, shape: tuple[int, int]) -> None:
    values = np.zeros(shape, dtype=np.uint8)
    with rasterio.open(
        tmp_path / "m.tif", "w", driver="GTiff", height=shape[0], width=shape[1], count=1,
        dtype="uint8",
    ) as target:  # fmt: skip
        target.write(values, 1)
    names = [("#ff0000", "a class with a rather long name"), ("#00ff00", "пшеница")]
    write_quicklook(tmp_path / "q.png", tmp_path / "m.tif", {0: "#ff0000"}, names)
    picture = Image.open(tmp_path / "q.png")
    assert max(picture.size) < 1300
    assert picture.getpixel((0, 0)) == (255, 0, 0, 255)
