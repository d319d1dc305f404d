"""POSTECH-CVLab/PyTorch-StudioGAN: SAGAN and SNGAN of its ``resnet`` backbone.

Its tables of classes are linear layers, (C, num_classes), in whose place files of 2021 have embeddings. The ReLU of its
discriminators works in place.
"""

from __future__ import annotations

from dataclasses import replace

from torch_sagan.networks.published.dialect import HOOK, Dialect

__all__ = ["STUDIOGAN", "STUDIOGAN_2021"]

_LAYERS = {
    "conv1.": "conv2d1.",
    "conv2.": "conv2d2.",
    "shortcut.": "conv2d0.",
    "query.": "conv1x1_theta.",
    "key.": "conv1x1_phi.",
    "value.": "conv1x1_g.",
    "out.": "conv1x1_attn.",
    "gamma": "sigma",
    **HOOK,
}


def _tables(scale: str, shift: str, left: str, right: str) -> dict[str, str]:
    """Our names of the tables of classes -> those of layers ``scale`` and ``shift``, and of vectors on both sides."""
    parts = {}
    for norm, theirs in (("norm1", "bn1"), ("norm2", "bn2")):
        for ours, plain, table in (("scale", "gamma", scale), ("shift", "beta", shift)):
            parts[f"{norm}.{ours}.parametrizations.weight.0._u"] = f"{theirs}.{table}.weight_{left}"
            parts[f"{norm}.{ours}.parametrizations.weight.0._v"] = f"{theirs}.{table}.weight_{right}"
            parts[f"{norm}.{ours}."] = f"{theirs}.{table}."
            parts[f"{norm}.{plain}"] = f"{theirs}.{table}.weight"
        parts[f"{norm}.norm."] = f"{theirs}.bn."
        parts[f"{norm}."] = f"{theirs}."
    return parts


STUDIOGAN = Dialect(
    framework="PyTorch-StudioGAN",
    marks={
        "generator": r"linear0\..*",
        "discriminator": r"linear1\..*",
    },
    outside={
        "generator": {"blocks.0.linear.": "linear0.", "to_image.0.": "bn4.", "to_image.2.": "conv2d5."},
        "discriminator": {
            "to_logit.projection.linear.": "linear1.",
            "to_logit.projection.embedding.": "embedding.",
        },
    },
    place="blocks.{}.0.",
    attention="sigma",
    # Their rows are our columns, and so are the vectors on the two sides.
    parts=_tables("gain", "bias", "v", "u") | _LAYERS,
    classes_last=True,
    shortcut_after_relu=True,
)
STUDIOGAN_2021 = replace(
    STUDIOGAN,
    marks={"generator": r"blocks\.0\.0\.bn1\.embed0\.weight(_orig)?"},
    parts=_tables("embed0", "embed1", "u", "v") | _LAYERS,
    classes_last=False,
)
