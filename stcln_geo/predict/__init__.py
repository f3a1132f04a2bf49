"""Map a whole region: plan, label shard by shard, assemble the product.

``spec`` holds the options and ``plan`` decides what will be done; ``stitch`` says which window owns
which pixel, ``windows`` reads them, ``forward`` runs the network, ``smooth`` and ``blend`` turn its
probabilities into those of the map, ``outputs`` and ``qa`` name the layers; ``shard`` labels one
square, ``sieve`` merges small patches across them, ``assemble`` joins them, ``seam`` measures the
seams, ``style`` and ``product`` write what people and catalogs open, ``run`` is the whole, and
``zones`` makes it once per UTM zone. ``estimate`` says how long it takes.

Without a cube, ``direct`` plans a map from a search and ``source`` keeps it; ``fetch`` builds the
pixels ahead of the windows, in ``blocks``, in a folder that does not stay.
"""

from __future__ import annotations

from .direct import plan_search, predict_search
from .plan import PredictionPlan
from .planning import plan_prediction
from .run import Prediction, predict_region
from .spec import PredictSpec

__all__ = [
    "PredictSpec",
    "Prediction",
    "PredictionPlan",
    "plan_prediction",
    "plan_search",
    "predict_region",
    "predict_search",
]
