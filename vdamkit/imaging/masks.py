"""Soft spherical and circular masks, as RELION draws them."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

EDGE = 5.0  # px, width of the raised-cosine edge (RELION --maskedge, mask.h)


@lru_cache(maxsize=16)
def soft_sphere(box: int, radius: float, ndim: int = 3, edge: float = EDGE) -> np.ndarray:
    """1 inside `radius` (px), 0 beyond `radius + edge`, a raised cosine between; centred on box//2.

    Returns a read-only float32 array `(box,) * ndim`. Source: RELION mask.cpp:raisedCosineMask, softMaskOutsideMap.
    """
    line = (np.arange(box) - box // 2).astype(np.float64) ** 2
    r2 = line
    for _ in range(ndim - 1):
        r2 = r2[..., None] + line
    ramp = np.clip((np.sqrt(r2) - radius) / edge, 0, 1)
    mask = (0.5 + 0.5 * np.cos(np.pi * ramp)).astype(np.float32)
    mask.flags.writeable = False
    return mask


def blend_outside(images: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Replace what lies outside `mask` by the mean of the outside, each image or volume by its own mean.

    `images` `(..., *mask.shape)`; returns the same shape and dtype.
    Source: RELION mask.cpp:softMaskOutsideMap (what `--zero_mask` really does).
    """
    outside = 1 - mask
    total = float(outside.sum(dtype=np.float64))
    axes = tuple(range(-mask.ndim, 0))
    if total == 0:
        return images
    mean = (images * outside).sum(axes, keepdims=True, dtype=np.float64) / total
    return (images * mask + mean * outside).astype(images.dtype)


def mask_power(box: int, radius: float, ndim: int) -> float:
    """Mean of the squared mask over the box: how much white-noise variance survives masking."""
    return float(np.mean(np.asarray(soft_sphere(box, radius, ndim), np.float64) ** 2))


def soften_corners(volume: np.ndarray, edge: float = 3.0) -> np.ndarray:
    """Blend what lies outside the inscribed sphere to its mean (RELION backprojector.cpp:reconstructGrad)."""
    box = volume.shape[0]
    return blend_outside(volume, soft_sphere(box, box // 2 - edge, 3, edge))
