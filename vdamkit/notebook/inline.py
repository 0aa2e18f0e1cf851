"""Layers as objects of k3d, the inline WebGL view."""

from __future__ import annotations

from typing import Any

import numpy as np

from vdamkit.notebook.layers import LayerData, zyx


def k3d_objects(k3d: Any, layers: list[LayerData]) -> list[Any]:
    """One k3d object per layer, in Å, x to the right, y up, z towards the viewer (a right hand)."""
    return [MAKE[kind](k3d, data, options) for data, options, kind in layers]


def first_camera(layers: list[LayerData]) -> list[float]:
    """Where k3d's camera stands at first, `(9,)`: position, target, up. It looks down the z axis with y up at everything."""
    corners = np.concatenate([_corners(data, options, kind) for data, options, kind in layers if options.get("visible", True)])
    low, high = corners.min(0), corners.max(0)
    middle, size = (low + high) / 2, float(np.linalg.norm(high - low)) or 1.0
    above = middle + np.array([0, 0, 1.1 * size])
    return [*above.tolist(), *middle.tolist(), 0.0, 1.0, 0.0]


def _corners(data: Any, options: dict, kind: str) -> np.ndarray:
    """Points xyz that a layer reaches to."""
    if kind == "image":
        first = np.array(options["translate"][::-1])
        reach = options["scale"][0] * (np.array(data.shape[::-1]) - 1)
        return np.stack([first + 0.2 * reach, first + 0.8 * reach])  # a particle does not fill its box
    points = data[0] if kind == "surface" else data[:, 0] if kind == "vectors" else data
    return zyx(points)


def _image(k3d: Any, data: np.ndarray, options: dict) -> Any:
    spacing, first = options["scale"][0], np.array(options["translate"][::-1])
    # k3d stretches the array over its bounds from the first voxel to the last
    last = first + spacing * (np.array(data.shape[::-1]) - 1)
    bounds = np.stack([first, last], 1).ravel()
    return k3d.marching_cubes(
        np.ascontiguousarray(data, np.float32), level=options["iso_threshold"], color=_colour(options), flat_shading=False,
        name=options["name"], visible=options.get("visible", True), bounds=bounds.tolist(),
    )  # fmt: skip


def _colour(options: dict) -> int:
    colormap = options.get("colormap", "gray")
    text = colormap["colors"][-1] if isinstance(colormap, dict) else "#c8c8c8"
    return int(text.lstrip("#"), 16)


def _surface(k3d: Any, data: tuple, options: dict) -> Any:
    vertices, faces, values = data
    return k3d.mesh(
        np.ascontiguousarray(zyx(vertices), np.float32), np.ascontiguousarray(faces[:, ::-1], np.uint32), side="double",
        attribute=values.astype(np.float32), color_map=[0, 0, 0, 0, 1, 1, 1, 1], color_range=[0.0, 1.0],
        flat_shading=False, name=options["name"],
    )  # fmt: skip


def _points(k3d: Any, data: np.ndarray, options: dict) -> Any:
    return k3d.points(
        np.ascontiguousarray(zyx(data), np.float32), colors=_packed(options["face_color"]), shader="3d",
        point_size=float(options["size"]), name=options["name"],
    )  # fmt: skip


def _vectors(k3d: Any, data: np.ndarray, options: dict) -> Any:
    colour = options["edge_color"]
    n = len(data)
    packed = np.full(n, int(colour.lstrip("#"), 16), np.uint32) if isinstance(colour, str) else _packed(colour)
    return k3d.vectors(
        np.ascontiguousarray(zyx(data[:, 0]), np.float32), np.ascontiguousarray(zyx(data[:, 1]), np.float32),
        colors=np.repeat(packed, 2), use_head=options.get("vector_style") == "arrow", head_size=25.0,
        line_width=float(options["edge_width"]) / 3, name=options["name"],
    )  # fmt: skip


def _packed(rgba: np.ndarray) -> np.ndarray:
    """RGBA `(n, 4)` 0 … 1 as 0xRRGGBB."""
    rgb = np.rint(np.asarray(rgba)[:, :3] * 255).astype(np.uint32)
    return (rgb[:, 0] << 16) | (rgb[:, 1] << 8) | rgb[:, 2]


MAKE = {"image": _image, "surface": _surface, "points": _points, "vectors": _vectors}
