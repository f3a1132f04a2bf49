"""Map a whole region: plan, label shard by shard, assemble the product.

``plan`` decides what will be done, ``stitch`` which window owns which pixel, ``forward`` runs
the network, ``shard`` labels one square, ``product`` writes what people open, ``run`` is the
whole.
"""

from __future__ import annotations

from .plan import PredictionPlan, PredictSpec, plan_prediction
from .run import Prediction, predict_region

__all__ = [
    "PredictSpec",
    "Prediction",
    "PredictionPlan",
    "plan_prediction",
    "predict_region",
]
