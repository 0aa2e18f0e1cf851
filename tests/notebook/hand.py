"""A scene whose picture tells left from right, up from down and near from far; the judge of every 3D view.

A blue blob lies at +x, an orange one at +y, a green one at +z (towards the viewer) and hides a pink one at -z.
"""

from __future__ import annotations

import numpy as np

from vdamkit.notebook.layers import LayerData, map_layers

BOX, PIXEL = 32, 8.0
BLOBS = (((60.0, 0, 0), 22.0), ((0, 60.0, 0), 22.0), ((0, 0, 60.0), 26.0), ((0, 0, -60.0), 20.0))  # centre xyz, radius; Å
COLOURS = {"x": "#0072B2", "y": "#D55E00", "z": "#009E73", "behind": "#CC79A7"}  # those of classes 1 to 4


def hand_maps() -> np.ndarray:
    """A class per blob, `(4, BOX, BOX, BOX)` zyx."""
    line = (np.arange(BOX) - BOX // 2) * PIXEL
    z, y, x = np.meshgrid(line, line, line, indexing="ij")
    return np.stack(
        [np.exp(-((x - c[0]) ** 2 + (y - c[1]) ** 2 + (z - c[2]) ** 2) / (2 * (r / 1.5) ** 2)) for c, r in BLOBS]
    ).astype(np.float32)


def hand_layers() -> list[LayerData]:
    """All four as visible isosurfaces."""
    layers = map_layers(hand_maps(), PIXEL, sigma=3.0, populations=np.full(4, 0.25))
    return [(data, options | {"visible": True}, kind) for data, options, kind in layers]


def centres_of_colours(rgb: np.ndarray) -> dict[str, np.ndarray]:
    """Where each colour lies in a picture `(h, w, 3)` 0 … 1: (right, up) from the middle of all; absent where it is not seen.

    Shading changes brightness, so hues are compared.
    """
    from matplotlib.colors import rgb_to_hsv, to_rgb

    hsv = rgb_to_hsv(np.clip(rgb[..., :3], 0, 1))
    coloured = (hsv[..., 1] > 0.35) & (hsv[..., 2] > 0.15)
    found = {}
    for name, colour in COLOURS.items():
        hue = rgb_to_hsv(to_rgb(colour))[0]
        away = np.abs((hsv[..., 0] - hue + 0.5) % 1 - 0.5)
        mine = coloured & (away < 0.045)
        if mine.sum() > 25:
            rows, columns = np.nonzero(mine)
            found[name] = np.array([columns.mean(), -rows.mean()])
    return found


def check_hand(rgb: np.ndarray) -> None:
    """x to the right, y up, z towards the viewer, where z is green and hides what is behind."""
    found = centres_of_colours(rgb)
    assert {"x", "y", "z"} <= set(found), f"seen: {sorted(found)}"
    right, up = found["x"] - found["z"], found["y"] - found["z"]
    assert right[0] > 20 and abs(right[1]) < 0.4 * right[0], right
    assert up[1] > 20 and abs(up[0]) < 0.4 * up[1], up
    assert "behind" not in found, "what lies at -z is seen in front"
