"""Start a network from the weights of another one, with bands matched by name."""

from __future__ import annotations

import os
from collections.abc import Mapping

from torch import Tensor

from ..errors import CheckpointError
from ..storage import Location, public_name
from .checkpoint import CheckpointInfo, differences, find_checkpoint, read_checkpoint
from .config import StclnConfig
from .reference import MTLCC_BANDS
from .stcln import Encoder, MaskedPretrainer, Stcln

__all__ = ["brings_zscore", "check_sizes", "load_encoder_into", "load_pretrainer_into"]


def load_encoder_into(
    module: Stcln | Encoder | MaskedPretrainer, path: str | os.PathLike[str] | Location
) -> list[str]:
    """Start a network from the encoder of a checkpoint of any kind, and tell what was done.

    The sizes must agree. Bands are matched by name: the first convolution takes the weights of
    the bands both know. Those of other bands begin at zero: at first the features are the
    checkpoint's, and training brings the new bands in. A band of the checkpoint that is left out
    is to the features as if it were always at its mean. The z-score of shared bands comes along,
    except from published PASTIS weights, which were trained on bands normalised outside the
    network; that of other bands stays as the caller set it.

    Returns
    -------
    One sentence for each thing worth telling, the first of them what was loaded.
    """
    encoder = module if isinstance(module, Encoder) else module.encoder
    return _load_encoder(encoder, *read_checkpoint(find_checkpoint(path)))


def load_pretrainer_into(
    module: MaskedPretrainer, path: str | os.PathLike[str] | Location
) -> list[str]:
    """Start a pre-trainer from a checkpoint of any kind, and tell what was done.

    The encoder is carried as `load_encoder_into` does. From a pre-trainer come the mask token too,
    and the reconstruction of each band that both know; that of other bands stays as it was. Other
    kinds have neither, and both stay as they were.

    Returns
    -------
    One sentence for each thing worth telling, the first of them what was loaded.

    Raises
    ------
    CheckpointError
        If the sizes differ, no band is shared, or the checkpoint is not whole.
    """
    info, state = read_checkpoint(find_checkpoint(path))
    report = _load_encoder(module.encoder, info, state)
    if info.kind != "pretrainer":
        what = "a bare encoder" if info.kind == "encoder" else f"a {info.kind}"
        return [*report, f"reconstruction and mask token begin anew: {what} has none"]
    head = {
        "token": (1,),
        "reconstruction.weight": (len(info.bands), info.config.dim),
        "reconstruction.bias": (len(info.bands),),
    }
    wrong = [name for name in head if name not in state or tuple(state[name].shape) != head[name]]
    if wrong:
        raise CheckpointError(
            f"Cannot start from {info.path}: {', '.join(wrong)} is missing or of another shape. A "
            "pre-trainer must hold the whole network that its configuration describes. Write it "
            "again."
        )
    to, of = _shared_places(module.config.bands, info.bands)
    own = module.state_dict()
    own["token"].copy_(state["token"])
    for name in ("reconstruction.weight", "reconstruction.bias"):
        own[name][to] = state[name][of].to(own[name].dtype)
    fresh = [band for band in module.config.bands if band not in info.bands]
    anew = f"; the reconstruction of {', '.join(fresh)} begins anew" if fresh else ""
    return [*report, f"mask token and reconstruction of {len(to)} bands carried too{anew}"]


def brings_zscore(info: CheckpointInfo) -> bool:
    """Tell whether a checkpoint's mean and deviation are those its encoder was trained with.

    Published PASTIS weights, imported ones too, were trained on bands normalised outside the
    network: they bring none. Published MTLCC weights take plain reflectance.
    """
    identity = set(info.mean) == {0.0} and set(info.std) == {1.0}
    return not (info.config.mode == "reference" and identity and info.bands != MTLCC_BANDS)


def _shared_places(ours: tuple[str, ...], theirs: tuple[str, ...]) -> tuple[list[int], list[int]]:
    """Return the places of the bands that both know: in ours, and in theirs."""
    shared = [band for band in ours if band in theirs]
    return [ours.index(band) for band in shared], [theirs.index(band) for band in shared]


def _load_encoder(encoder: Encoder, info: CheckpointInfo, state: Mapping[str, Tensor]) -> list[str]:
    check_sizes(info, encoder.config)
    prefix = "" if info.kind == "encoder" else "encoder."
    source = {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}
    target = encoder.state_dict()
    gaps = differences(source, target, but=("mean", "std"))
    if gaps:
        raise CheckpointError(
            f"Cannot start from {info.path}: {gaps}. Its encoder must hold the whole network that "
            "its configuration describes. Write it again."
        )

    ours, theirs = encoder.config.bands, info.bands
    to, of = _shared_places(ours, theirs)
    if not to:
        raise CheckpointError(
            f"Cannot start from {info.path}: it knows the bands {', '.join(theirs)}, and the "
            f"network takes {', '.join(ours)}. At least one must be shared. Rename the cube's "
            "bands to common names, or choose another checkpoint."
        )
    name = public_name(info.path)
    report = [f"encoder from {name} ({info.kind}, {len(to)} of {len(ours)} bands)"]
    first = "convolutions.blocks.0.convolution.weight"
    with_zscore = brings_zscore(info)
    for name, tensor in source.items():
        if name == first:
            target[name].zero_()
            target[name][:, to] = tensor[:, of].to(target[name].dtype)
        elif name in ("mean", "std"):
            if with_zscore:
                target[name][to] = tensor[of].to(target[name].dtype)
        else:
            target[name] = tensor
    encoder.load_state_dict(target)

    if len(to) < len(ours):
        fresh = ", ".join(band for band in ours if band not in theirs)
        report.append(f"the checkpoint does not know {fresh}: their weights begin at zero")
    if len(to) < len(theirs):
        unused = ", ".join(band for band in theirs if band not in ours)
        report.append(f"weights of the checkpoint's bands {unused} are not used")
    if not with_zscore:
        report.append("the z-score stays as it was: the checkpoint holds none")
    for field in ("mode", "positions", "affinity_dates", "position_base"):
        old, new = getattr(info.config, field), getattr(encoder.config, field)
        if old != new:
            report.append(f"the checkpoint was trained with {field}={old!r}, this has {new!r}")
    return report


def check_sizes(info: CheckpointInfo, config: StclnConfig) -> None:
    """Raise CheckpointError unless a network's encoder has the sizes of a checkpoint's."""
    if info.members > 1:
        raise CheckpointError(
            f"Cannot start from {info.path}: it is an ensemble of {info.members} networks, and "
            "training starts from one. Start from one of the runs that it was made of."
        )
    wrong = [
        f"{field} {getattr(info.config, field)} (network: {getattr(config, field)})"
        for field in ("widths", "layers", "heads", "feedforward")
        if getattr(info.config, field) != getattr(config, field)
    ]
    if wrong:
        raise CheckpointError(
            f"Cannot start from {info.path}: it has {', '.join(wrong)}. The sizes of the encoders "
            "must agree. Choose the preset that the checkpoint was trained with, or name neither "
            "preset nor sizes: training takes those of the checkpoint."
        )
