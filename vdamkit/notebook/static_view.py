"""3D layers drawn on paper: surfaces, points and arrows seen along an axis, without OpenGL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vdamkit.notebook.figures import new_figure
from vdamkit.notebook.layers import LIGHT, LayerData, lit_surface, zyx
from vdamkit.picture import GREY, house_style

SEEN_ALONG = {"z": (0, 1, 2), "y": (0, 2, 1), "x": (1, 2, 0)}
"""Axes to the right, upwards and towards the viewer (xyz); seen along y the far side is towards the viewer."""


@house_style()
def static_figure(layers: Sequence[LayerData], *, along: Sequence[str] = ("z", "y"), heading: str | None = None) -> Any:
    """The layers (see :mod:`vdamkit.notebook.layers`) seen along axes of the map or tomogram, true to scale in Å."""
    figure = new_figure(4.2 * len(along), 4.3)
    axes = np.atleast_1d(figure.subplots(1, len(along)))
    for axis, name in zip(axes, along, strict=True):
        right, up, towards = SEEN_ALONG[name]
        sign = -1.0 if name == "y" else 1.0  # x right, z up: the viewer stands at −y
        view = (right, up, towards)
        shown = [layer for layer in layers if layer[1].get("visible", True)]
        _draw_triangles(
            axis, [MESH[kind](data, options, view, sign) for data, options, kind in shown if kind in MESH], view, sign
        )
        for data, options, kind in shown:
            if kind in DRAW:
                DRAW[kind](axis, data, options, view, sign)
        axis.set_aspect("equal")
        axis.autoscale_view()
        axis.set_xlabel(f"{'xyz'[right]} (Å)")
        axis.set_ylabel(f"{'xyz'[up]} (Å)")
        axis.set_title(f"seen along {name}", fontsize=8.5, color=GREY)
    if heading:
        figure.suptitle(heading, fontsize=10)
    return figure


@dataclass(frozen=True)
class Mesh:
    """Triangles of one layer."""

    points: np.ndarray  # (v, 3) xyz, Å
    faces: np.ndarray  # (t, 3)
    brightness: np.ndarray  # (v,) 0 … 1
    colour: str


def _mesh_of_image(data: np.ndarray, options: dict, view: tuple, sign: float) -> Mesh:
    """The isosurface of a map, lit from where the viewer stands."""
    lamp = np.empty(3)
    lamp[list(view)] = LIGHT * [1, 1, sign]
    colormap = options.get("colormap", "gray")
    return Mesh(*lit_surface(data, options, lamp), colormap["colors"][-1] if isinstance(colormap, dict) else "white")


def _mesh_of_surface(data: tuple, options: dict, view: tuple, sign: float) -> Mesh:
    vertices, faces, values = data
    return Mesh(zyx(vertices), faces, values, "white")


def _draw_triangles(axis: Any, meshes: list[Mesh], view: tuple, sign: float) -> None:
    """The triangles of all layers, from back to front."""
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import to_rgb

    meshes = [mesh for mesh in meshes if len(mesh.faces)]
    if not meshes:
        return
    right, up, towards = view
    corners = np.concatenate([mesh.points[mesh.faces] for mesh in meshes])  # (t, 3, 3)
    shade = np.concatenate([np.clip(mesh.brightness[mesh.faces].mean(1), 0, 1) for mesh in meshes])
    colours = np.concatenate([np.tile(to_rgb(mesh.colour), (len(mesh.faces), 1)) for mesh in meshes])
    depth = sign * corners[:, :, towards].mean(1)
    order = np.argsort(depth, kind="stable")
    faded = 0.35 * (depth.max() - depth) / (np.ptp(depth) or 1.0)  # what is further away is paler
    rgb = shade[:, None] * colours
    rgb = (rgb + (1 - rgb) * faded[:, None])[order]
    flat = corners[order][:, :, [right, up]]
    # edges in the face's colour and no smoothing, or the seams between triangles shine through
    axis.add_collection(PolyCollection(flat, facecolors=rgb, edgecolors=rgb, linewidths=0.4, antialiaseds=False))
    axis.update_datalim(flat.reshape(-1, 2))


def _draw_points(axis: Any, data: np.ndarray, options: dict, view: tuple, sign: float) -> None:
    points = zyx(data)
    order = np.argsort(sign * points[:, view[2]])
    colours = np.asarray(options.get("face_color"))
    axis.scatter(points[order, view[0]], points[order, view[1]], s=7, c=colours[order], zorder=3, linewidths=0)


def _draw_vectors(axis: Any, data: np.ndarray, options: dict, view: tuple, sign: float) -> None:
    start, step = zyx(data[:, 0]), zyx(data[:, 1])
    colour = options.get("edge_color")
    colours = np.tile([[0.55, 0.55, 0.55, 1]], (len(start), 1)) if isinstance(colour, str) else np.asarray(colour)
    prior = options.get("vector_style") == "line"
    look = (
        {"width": 0.0025, "headwidth": 1, "zorder": 2, "alpha": 0.6} if prior else {"width": 0.004, "headwidth": 4, "zorder": 3}
    )
    axis.quiver(start[:, view[0]], start[:, view[1]], step[:, view[0]], step[:, view[1]], color=colours, angles="xy",
                scale_units="xy", scale=1, **look)  # fmt: skip


MESH = {"image": _mesh_of_image, "surface": _mesh_of_surface}
DRAW = {"points": _draw_points, "vectors": _draw_vectors}
