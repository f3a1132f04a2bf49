"""A random forest on the fields of a run: the simple method that a network is compared with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..cube.contract import FILL, SCALE
from ..data.batch import IGNORE_INDEX
from ..data.chips import Chip, ChipDataset, plan_windows
from ..data.source import LabelReader, Source, open_source
from ..errors import CheckpointError, InputError
from ..execution import ProgressHook
from ..grid import Lattice
from ..report.metrics import Metrics, confusion_matrix, metrics_from_confusion
from ..storage import location
from .classes import ClassChoice
from .config import FinetuneConfig, load_config
from .evaluation import EvaluationPlan
from .provenance import fingerprint_labels, fingerprint_season
from .run_directory import read_environment

__all__ = [
    "Baseline",
    "check_forest",
    "check_installed",
    "compare_by_field",
    "fill_gaps",
    "forest_baseline",
]

TREES = 300
STEP = 10
"""Days between the dates that the forest sees."""
MOST_PIXELS = 50_000
"""To train on, of all fields together."""
_AT_ONCE = 8192
_LEVEL = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pixels:
    features: np.ndarray
    """(N, D * C) float32 reflectance, by date and band."""
    target: np.ndarray
    """(N,) int64, the network's outputs."""
    field: np.ndarray
    """(N,) int64, equal for pixels of one field."""

    @staticmethod
    def join(parts: Sequence[_Pixels]) -> _Pixels:
        return _Pixels(
            features=np.concatenate([part.features for part in parts]),
            target=np.concatenate([part.target for part in parts]),
            field=np.concatenate([part.field for part in parts]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """What a random forest makes of the pixels that a network was judged on."""

    metrics: Metrics
    trained_fields: int
    trained_pixels: int
    trees: int
    seed: int
    days: tuple[int, ...]
    """Days since the season's first day on which the forest sees the bands."""
    fields: int
    """Fields judged, by which the interval is computed."""
    difference: float
    """Overall accuracy of the network less that of the forest."""
    half_width: float | None
    """Of the difference's 95 % interval; None of a single field."""

    def differences(self, network: Metrics) -> dict[str, float | None]:
        """Return each figure of the network less the forest's; None where one has none."""
        ours, theirs = network.summary(), self.metrics.summary()
        return {
            name: None if value is None or (other := theirs[name]) is None else value - other
            for name, value in ours.items()
        }

    def lines(self, network: Metrics) -> list[str]:
        """Return the comparison as lines of text for people."""
        told = ", ".join(
            f"{name} {'-' if value is None else f'{value:.4f}'}"
            for name, value in self.metrics.summary().items()
        )
        apart = ", ".join(
            f"{name} {'-' if value is None else f'{value:+.4f}'}"
            for name, value in self.differences(network).items()
        )
        lines = [
            f"random forest ({self.trees} trees) on the same {self.trained_fields} training "
            f"fields: {told}",
            f"network less forest: {apart}",
        ]
        if self.half_width is None:
            return [*lines, "One field was judged: how sure the difference is cannot be told."]
        low, high = self.difference - self.half_width, self.difference + self.half_width
        sure = "" if low > 0 or high < 0 else "; it holds zero, so no difference is shown"
        return [
            *lines,
            f"95 % interval of the difference in overall accuracy, over {self.fields} fields: "
            f"{low:+.4f} to {high:+.4f}{sure}",
        ]

    def to_json(self, network: Metrics) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return {
            **self.metrics.summary(),
            "method": "random forest",
            "confusion": self.metrics.confusion.tolist(),
            "trained_fields": self.trained_fields,
            "trained_pixels": self.trained_pixels,
            "trees": self.trees,
            "seed": self.seed,
            "days": list(self.days),
            "network_less_forest": {
                **self.differences(network),
                "fields": self.fields,
                "half_width_overall_accuracy": self.half_width,
                "confidence_level": _LEVEL,
            },
        }


def check_installed() -> None:
    """Raise InputError where scikit-learn, which grows the trees, is not installed."""
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise InputError(
            "Cannot train a random forest: scikit-learn is not installed. Install the extra with "
            "`pip install 'stcln-geo[forest]'`, or leave --baseline out."
        ) from error


def check_forest(plan: EvaluationPlan) -> None:
    """Check that a forest can be trained beside a checkpoint.

    Raises
    ------
    InputError
        If scikit-learn is not installed.
    CheckpointError
        If the checkpoint lies in no run directory, whose recipe names the training fields.
    """
    check_installed()
    run = plan.info.path.parent.parent
    if not (run / "config.toml").is_file() or plan.info.provenance.get("trained") != "finetune":
        raise CheckpointError(
            f"Cannot train a random forest beside {plan.info.path}: the fields that the network "
            "was trained on are named by its run directory, and the checkpoint lies in none. "
            "Evaluate the run itself: `stcln-geo evaluate RUN CUBE --baseline forest`."
        )


def forest_baseline(
    plan: EvaluationPlan,
    right: np.ndarray,
    *,
    trees: int = TREES,
    threads: int = 2,
    progress: ProgressHook | None = None,
) -> Baseline:
    """Train a random forest on a run's own training fields, and judge it as the network was.

    It sees the run's bands at each pixel, every ten days: what is not clear is filled linearly in
    time between the clear dates before and after, and with the nearest clear date at either end, as
    is usual for operational maps (Inglada et al. 2017, doi:10.3390/rs9010095). Classes weigh alike.
    Of more than 50,000 training pixels so many are taken at random.

    Parameters
    ----------
    right : (N,) bool
        Where the network was right, of the judged pixels in the order of ``plan.dataset``.
    threads
        That grow trees.

    Raises
    ------
    CheckpointError
        If the cube that the run was trained on is gone or has changed.
    """
    from sklearn.ensemble import RandomForestClassifier

    from .finetune_setup import training_fields  # and Lightning, which takes seconds

    config = load_config(FinetuneConfig, file=plan.info.path.parent.parent / "config.toml")
    source = _trained_source(plan)
    learnt = training_fields(source, config)
    first, last = source.day_range
    days = np.arange(first, last + STEP, STEP)
    lattice = Lattice(window=plan.info.chip or plan.lattice.window, halo=0)
    dataset = ChipDataset(
        [source],
        plan_windows(source, learnt.chosen, lattice=lattice, within=learnt.within),
        bands=plan.info.bands,
        wanted=[learnt.chosen],
        within=learnt.within,
        dates=plan.dates,
    )
    share = MOST_PIXELS / max(int(learnt.fields.pixels[learnt.chosen].sum()), 1)
    shown = _Pixels.join(list(_read(dataset, learnt.classes, days, share=share, seed=config.seed)))
    forest = RandomForestClassifier(
        n_estimators=trees, class_weight="balanced", random_state=config.seed, n_jobs=threads
    )
    forest.fit(shown.features, shown.target)

    def tell(done: int) -> None:
        if progress is not None:
            progress(done, len(plan.dataset.units), "reads of the forest")

    count = len(plan.classes.legend)
    confusion = np.zeros((count, count), dtype=np.int64)
    hits, field = [], []
    for part in _read(plan.dataset, plan.classes, days, progress=tell):
        found = forest.predict(part.features)
        confusion += confusion_matrix(part.target, found, classes=count)
        hits.append(found == part.target)
        field.append(part.field)
    difference, half_width, number = compare_by_field(
        right, np.concatenate(hits), np.concatenate(field)
    )
    return Baseline(
        metrics=metrics_from_confusion(confusion),
        trained_fields=len(np.unique(shown.field)),
        trained_pixels=len(shown.target),
        trees=trees,
        seed=config.seed,
        days=tuple(days.tolist()),
        fields=number,
        difference=difference,
        half_width=half_width,
    )


def fill_gaps(
    values: np.ndarray, valid: np.ndarray, days: np.ndarray, wanted: np.ndarray
) -> np.ndarray:
    """Interpolate series linearly in time between their valid dates.

    Parameters
    ----------
    values : (N, T, C) float32.
    valid : (N, T) bool; each series has a valid date.
    days : (T,) int, increasing.
    wanted : (D,) int
        Days to interpolate at. Before the first valid date and after the last one its value holds.

    Returns
    -------
    (N, D, C) float32.
    """
    dates = len(days)
    place = np.arange(dates)
    before = np.maximum.accumulate(np.where(valid, place, -1), axis=1)
    after = np.minimum.accumulate(np.where(valid, place, dates)[:, ::-1], axis=1)[:, ::-1]
    filled = np.empty((len(values), len(wanted), values.shape[2]), dtype=np.float32)
    rows = np.arange(len(values))
    for position, day in enumerate(wanted):
        at = int(np.searchsorted(days, day, side="right"))
        low = before[:, at - 1] if at > 0 else np.full(len(values), -1)
        high = after[:, at] if at < dates else np.full(len(values), dates)
        low, high = np.where(low < 0, high, low), np.where(high >= dates, low, high)
        span = np.maximum(days[high] - days[low], 1)
        share = np.clip((day - days[low]) / span, 0.0, 1.0).astype(np.float32)[:, None]
        filled[:, position] = values[rows, low] * (1 - share) + values[rows, high] * share
    return filled


def compare_by_field(
    first: np.ndarray, second: np.ndarray, field: np.ndarray
) -> tuple[float, float | None, int]:
    """Compare two classifiers on the same pixels, of which those of a field are no evidence each.

    The difference of overall accuracies is a ratio of sums over fields, which are the sample; its
    variance is that of a ratio estimate over clusters (Cochran 1977, chapter 6), the interval
    Student's with one degree of freedom less than fields.

    Parameters
    ----------
    first, second : (N,) bool, where each was right.
    field : (N,) int, which field each pixel lies in.

    Returns
    -------
    Accuracy of the first less that of the second, half of the width of its 95 % interval (None of a
    single field), and the number of fields.
    """
    from scipy.stats import t as student

    _, place = np.unique(field, return_inverse=True)
    pixels = np.bincount(place)
    apart = np.bincount(place, weights=first.astype(np.float64) - second)
    difference, count = float(apart.sum() / pixels.sum()), len(pixels)
    if count < 2:
        return difference, None, count
    squares = float(((apart - difference * pixels) ** 2).sum())
    error = math.sqrt(count / (count - 1) * squares) / float(pixels.sum())
    return difference, float(student.ppf((1 + _LEVEL) / 2, count - 1)) * error, count


def _trained_source(plan: EvaluationPlan) -> Source:
    """Open the season that the run was trained on, as it was then."""
    if plan.same_cube:
        return plan.source
    cube = read_environment(plan.info.path.parent.parent)["cubes"][0]
    source = open_source(location(cube["cube"]), cube["season"])
    if (fingerprint_season(source), fingerprint_labels(source)) != (
        cube["fingerprint"], cube.get("labels")
    ):  # fmt: skip
        raise CheckpointError(
            f"Cannot train a random forest beside {plan.info.path}: {source}, which the run was "
            "trained on, has other pixels, labels or split now, so the fields would not be the "
            "same. Fine-tune again, or leave --baseline out."
        )
    return source


def _read(
    dataset: ChipDataset,
    classes: ClassChoice,
    days: np.ndarray,
    *,
    share: float = 1.0,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Iterator[_Pixels]:
    """Yield the pixels that have a target, some thousands at a time, in the order of the chips.

    Parameters
    ----------
    share
        Of them that are taken, at random by the seed.
    """
    generator = np.random.default_rng(seed)
    held: list[_Pixels] = []
    labels = LabelReader(dataset.sources[0])
    for unit in range(len(dataset.units)):
        held += [
            _pixels_of(chip, labels, classes, days, share, generator) for chip in dataset.read(unit)
        ]
        if sum(len(part.target) for part in held) >= _AT_ONCE:
            yield _Pixels.join(held)
            held = []
        if progress is not None:
            progress(unit + 1)
    if any(len(part.target) for part in held):
        yield _Pixels.join(held)


def _pixels_of(
    chip: Chip,
    labels: LabelReader,
    classes: ClassChoice,
    days: np.ndarray,
    share: float,
    generator: np.random.Generator,
) -> _Pixels:
    outputs = np.full(256, IGNORE_INDEX)
    outputs[list(classes.codes)] = classes.outputs
    if chip.target is None or chip.source is None:
        raise ValueError("a chip without a target or a place cannot be judged")
    target = outputs[chip.target]
    used = (target != IGNORE_INDEX) & chip.valid.any(axis=0)
    if share < 1.0:
        used &= generator.random(used.shape) < share
    values = np.moveaxis(chip.reflectance, (2, 3), (0, 1))[used].astype(np.float32)
    values[values == FILL] = 0.0  # as the network sees a band without a value
    valid = np.moveaxis(chip.valid, 0, -1)[used]
    site = labels.source.site_of(chip.source)
    _, field = labels.read(chip.source.window, site=site)
    # Pixels in no field count as one of their class and site.
    apart = -1 - (site * 256 + chip.target.astype(np.int64))
    filled = fill_gaps(values * np.float32(SCALE), valid, chip.days, days)
    return _Pixels(
        features=filled.reshape(len(filled), filled.shape[1] * filled.shape[2]),
        target=target[used],
        field=np.where(field > 0, field, apart)[used],
    )
