"""``vdamkit align-symmetry``."""

from __future__ import annotations

from pathlib import Path

import click

from vdamkit.cli_options import SectionCommand
from vdamkit.errors import InputError, OutputError


@click.command("align-symmetry", cls=SectionCommand, short_help="Find a map's symmetry axes and turn it onto them.")
@click.option("--i", "map_path", required=True, metavar="MAP", help="The map (.mrc), made in C1.")
@click.option("--sym", "group", required=True, metavar="GROUP", help="Point group, e.g. C6, D7, O, I1.")
@click.option("--o", "output", required=True, metavar="MAP", help="Where the turned map is written.")
@click.option("--apply", "apply_it", is_flag=True, help="Also symmetrise it (RELION: --apply_sym).")
@click.option("--particles", default=None, metavar="FILE", help="run_itNNN_data.star of the map; its particles are moved too.")
@click.option("--o-particles", default=None, metavar="FILE", help="Where they are written; default: --o with _data.star.")
@click.option("--radius", default=None, type=click.FLOAT, metavar="Å", help="Sphere to look at; default 0.4 of the box.")
def align_symmetry(
    map_path: str, group: str, output: str, apply_it: bool, particles: str | None, o_particles: str | None, radius: float | None
) -> None:
    """Find the axes of a point group in a map made in C1, and turn and shift the map so that they lie as RELION sets them.

    All axes and centres are searched, so the result needs no seed. With --particles their angles and origins go on
    fitting the map. RELION's counterpart is relion_align_symmetry.
    """
    import numpy as np

    from vdamkit.compare import moved
    from vdamkit.io.mrc import read_map, write_mrc
    from vdamkit.symmetry import find_symmetry, symmetrised

    volume, pixel_size = read_map(map_path)
    if not np.isfinite(volume).all() or not np.ptp(volume):
        raise InputError(f"{map_path}: the map holds nothing (constant, or not finite); give another map")
    blocks = _with_poses(particles) if particles else None
    target = Path(o_particles) if o_particles else Path(output).with_name(f"{Path(output).stem}_data.star")
    match = find_symmetry(volume, pixel_size, group, radius=radius)
    turned = moved(volume, match.rotation, match.shift / pixel_size)
    try:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        write_mrc(output, symmetrised(turned, match.group) if apply_it else turned, pixel_size)
    except OSError as problem:
        raise OutputError(f"cannot write {output} ({problem.strerror or problem}); choose another --o") from None
    click.echo(str(match))
    click.echo(f"map: {output}")
    if blocks is not None:
        _write_moved(blocks, match, target)
        click.echo(f"particles: {target}")


POSE = (*(f"rlnAngle{name}" for name in ("Rot", "Tilt", "Psi")), *(f"rlnOrigin{axis}Angst" for axis in "XYZ"))


def _with_poses(path: str) -> dict:
    """The blocks of a particle file that has poses."""
    from vdamkit.io.star_tables import read_star

    blocks = read_star(path)
    if "particles" not in blocks:
        raise InputError(f"{path}: there is no data_particles; give a run_itNNN_data.star")
    missing = [name for name in POSE if name not in blocks["particles"].columns]
    if missing:
        raise InputError(f"{path}: data_particles lacks the column {missing[0]}; give a run_itNNN_data.star, which has poses")
    return blocks


def _write_moved(blocks: dict, match, target: Path) -> None:
    from vdamkit.io.star_tables import write_star
    from vdamkit.symmetry import moved_angles_and_offsets

    table = blocks["particles"].copy()
    values = table[list(POSE)].to_numpy(float)
    angles, offsets = moved_angles_and_offsets(values[:, :3], values[:, 3:], match)
    for i, name in enumerate(POSE):
        table[name] = (angles if i < 3 else offsets)[:, i % 3]
    write_star(target, blocks | {"particles": table})
