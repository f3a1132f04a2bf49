"""Start a network from the encoder of another one, with bands matched by name."""

from __future__ import annotations

import os

from ..errors import CheckpointError
from .checkpoint import CheckpointInfo, differences, find_checkpoint, read_checkpoint
from .config import StclnConfig
from .reference import MTLCC_BANDS
from .stcln import Encoder, MaskedPretrainer, Stcln

__all__ = ["load_encoder_into"]


def load_encoder_into(
    module: Stcln | Encoder | MaskedPretrainer, path: str | os.PathLike[str]
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
    info, state = read_checkpoint(find_checkpoint(path))
    _check_sizes(info, encoder.config)
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
    shared = [band for band in ours if band in theirs]
    if not shared:
        raise CheckpointError(
            f"Cannot start from {info.path}: it knows the bands {', '.join(theirs)}, and the "
            f"network takes {', '.join(ours)}. At least one must be shared. Rename the cube's "
            "bands to common names, or choose another checkpoint."
        )
    report = [f"encoder from {info.path} ({info.kind}, {len(shared)} of {len(ours)} bands)"]
    to = [ours.index(band) for band in shared]
    of = [theirs.index(band) for band in shared]
    first = "convolutions.blocks.0.convolution.weight"
    # Published MTLCC weights take plain reflectance; those of PASTIS a z-score made outside.
    identity = set(info.mean) == {0.0} and set(info.std) == {1.0}
    with_zscore = not (info.config.mode == "reference" and identity and theirs != MTLCC_BANDS)
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

    if len(shared) < len(ours):
        fresh = ", ".join(band for band in ours if band not in theirs)
        report.append(f"the checkpoint does not know {fresh}: their weights begin at zero")
    if len(shared) < len(theirs):
        unused = ", ".join(band for band in theirs if band not in ours)
        report.append(f"weights of the checkpoint's bands {unused} are not used")
    if not with_zscore:
        report.append("the z-score stays as it was: the checkpoint holds none")
    for field in ("mode", "positions", "affinity_dates", "position_base"):
        old, new = getattr(info.config, field), getattr(encoder.config, field)
        if old != new:
            report.append(f"the checkpoint was trained with {field}={old!r}, this has {new!r}")
    return report


def _check_sizes(info: CheckpointInfo, config: StclnConfig) -> None:
    wrong = [
        f"{field} {getattr(info.config, field)} (network: {getattr(config, field)})"
        for field in ("widths", "layers", "heads", "feedforward")
        if getattr(info.config, field) != getattr(config, field)
    ]
    if wrong:
        raise CheckpointError(
            f"Cannot start from {info.path}: it has {', '.join(wrong)}. The sizes of the encoders "
            "must agree. Choose the preset that the checkpoint was trained with."
        )
