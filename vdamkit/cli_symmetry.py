"""``vdamkit align-symmetry`` and ``vdamkit symmetry-scores``."""

from __future__ import annotations

from pathlib import Path

import click

from vdamkit.cli_options import FlagCommand, SectionCommand
from vdamkit.errors import InputError, OutputError, SettingsError


@click.command("align-symmetry", cls=FlagCommand, short_help="Find a map's symmetry axes and turn it onto them.")
@click.option("--i", "map_path", required=True, metavar="MAP", help="The map (.mrc), made in C1; or a run_itNNN_model.star.")
@click.option("--sym", "group", required=True, metavar="GROUP", help="Point group, e.g. C6, D7, O, I1.")
@click.option("--o", "output", required=True, metavar="MAP", help="Where the turned map is written.")
@click.option("--apply", "apply_it", is_flag=True, help="Also symmetrise it (RELION: --apply_sym).")
@click.option("--particles", default=None, metavar="FILE", help="run_itNNN_data.star of the map; its particles are moved too.")
@click.option("--o-particles", default=None, metavar="FILE", help="Where they are written; default: --o with _data.star.")
@click.option("--select-largest-class", "largest", is_flag=True, help="Of a model.star with several classes take the largest.")
@click.option("--radius", default=None, type=click.FLOAT, metavar="Å", help="Sphere to look at; default 0.4 of the box.")
@click.option("--j", "threads", default=None, type=click.IntRange(1), help="Threads; all cores by default.")
@click.option("--overwrite", is_flag=True, help="Replace files of these names that are there already.")
def align_symmetry(
    map_path: str, group: str, output: str, apply_it: bool, particles: str | None, o_particles: str | None, largest: bool,
    radius: float | None, threads: int | None, overwrite: bool,
) -> None:  # fmt: skip
    """Find the axes of a point group in a map made in C1, and turn and shift the map so that they lie as RELION sets them.

    All axes and centres are searched, so the result needs no seed. With --particles their angles and origins go on
    fitting the map. RELION's counterpart is relion_align_symmetry.
    """
    from vdamkit.compare import moved
    from vdamkit.io.mrc import write_mrc
    from vdamkit.symmetry import find_symmetry, symmetrised

    target = Path(o_particles) if o_particles else Path(output).with_name(f"{Path(output).stem}_data.star")
    given, (map_path, number) = map_path, _map_file(map_path, largest)
    inputs = [given, map_path, *([particles] if particles else [])]
    targets = [Path(output), *([target] if particles else [])]
    if len({path.resolve() for path in targets}) < len(targets):
        raise OutputError(f"--o and --o-particles are both {output}; give two names")
    _refuse_existing(targets, inputs, overwrite)
    volume, pixel_size = _read(map_path, radius)
    blocks = _with_poses(particles) if particles else None
    match = find_symmetry(volume, pixel_size, group, radius=radius, threads=threads)
    turned = moved(volume, match.rotation, match.shift / pixel_size)
    try:
        for path in targets:
            path.parent.mkdir(parents=True, exist_ok=True)
        write_mrc(output, symmetrised(turned, match.group) if apply_it else turned, pixel_size)
    except OSError as problem:
        raise OutputError(f"cannot write {output} ({problem.strerror or problem}); choose another --o") from None
    click.echo(str(match))
    click.echo(f"map: {output}")
    if blocks is not None:
        _write_moved(blocks, match, target, number)
        click.echo(f"particles: {target}")


def _refuse_existing(targets: list[Path], inputs: list[str], overwrite: bool) -> None:
    """Raises OutputError where a file to be written is an input, or is there already and may not be replaced."""
    for path in targets:
        if path.resolve() in [Path(name).resolve() for name in inputs]:
            raise OutputError(f"{path} is an input of this command and would be replaced; choose another name")
        if path.exists() and not overwrite:
            raise OutputError(f"{path} exists already; choose another name, or give --overwrite")


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


def _read(map_path: str, radius: float | None) -> tuple:
    """A map and its pixel size in Å; InputError where nothing can be found in it, SettingsError where the sphere of `radius`
    (Å) holds next to nothing of it."""
    import numpy as np

    from vdamkit.io.mrc import read_map
    from vdamkit.io.particle_columns import SMALLEST_BOX

    volume, pixel_size = read_map(map_path)
    if not np.isfinite(volume).all() or not np.ptp(volume):
        raise InputError(f"{map_path}: the map holds nothing (constant, or not finite); give another map")
    if len(set(volume.shape)) != 1 or len(volume) < SMALLEST_BOX:
        size = " x ".join(str(length) for length in reversed(volume.shape))
        raise InputError(f"{map_path}: is {size} voxels (x, y, z), not a cube of at least {SMALLEST_BOX}; pad or cut it to one")
    if not pixel_size > 0:
        raise InputError(f"{map_path}: the header has no pixel size; set it there (in Å)")
    if radius is not None and not radius >= 2 * pixel_size:
        raise SettingsError(f"--radius is {radius:g}; it must be in Å, at least 2 px of this map ({2 * pixel_size:g} Å)")
    return volume, pixel_size


@click.command("symmetry-scores", cls=SectionCommand, short_help="Which point groups a map made in C1 supports.")
@click.option("--i", "map_path", required=True, metavar="MAP", help="The map (.mrc), made in C1; or a run_itNNN_model.star.")
@click.option("--select-largest-class", "largest", is_flag=True, help="Of a model.star with several classes take the largest.")
@click.option("--radius", default=None, type=click.FLOAT, metavar="Å", help="Sphere to look at; default 0.4 of the box.")
@click.option("--resolution", default=None, type=click.FLOAT, metavar="Å", help="Finest detail; default 1.5 times Nyquist's.")
@click.option("--j", "threads", default=None, type=click.IntRange(1), help="Threads; all cores by default.")
@click.option("--o", "output", default=None, metavar="PNG", help="Also draw the scores.")
def symmetry_scores(
    map_path: str, largest: bool, radius: float | None, resolution: float | None, threads: int | None, output: str | None,
) -> None:  # fmt: skip
    """Score the groups C2 to C14, D2 to D12, T, O and I: how well the map agrees with the copy of each that fits least.

    A true group scores as well as the best one, the others no better than chance. RELION has no counterpart.
    """
    from vdamkit.symmetry import symmetry_scores as score

    if resolution is not None and not resolution > 0:
        raise SettingsError(f"--resolution is {resolution:g}; it must be a length in Å, greater than 0")
    map_path, _ = _map_file(map_path, largest)
    volume, pixel_size = _read(map_path, radius)
    scores = score(volume, pixel_size, radius=radius, resolution=resolution, threads=threads)
    click.echo(scores.table().head(10).round(2).to_string())
    click.echo(str(scores))
    if output is not None:
        from vdamkit.notebook import Picture
        from vdamkit.notebook.figures import png
        from vdamkit.notebook.symmetry_figure import symmetry_figure

        click.echo(f"picture: {Picture(png(symmetry_figure(scores, heading=Path(map_path).name))).save(output)}")


def _map_file(path: str, largest: bool) -> tuple[str, int | None]:
    """The map itself, and the number of its class where it is named by a model.star."""
    return _map_of_model(path, largest) if path.endswith(".star") else (path, None)


def _map_of_model(path: str, largest: bool) -> tuple[str, int]:
    """File of a class's map, and the class's number: the only one, or the one with the largest rlnClassDistribution."""
    from vdamkit.io.star_tables import as_table, find_block, numeric_column, read_star, require_columns, resolve_path

    table = as_table(find_block(read_star(path), "model_classes", path))
    require_columns(table, ["rlnReferenceImage", "rlnClassDistribution"], path, "model_classes")
    if len(table) > 1 and not largest:
        raise InputError(f"{path}: has {len(table)} classes; give --select-largest-class, or the map of one of them (--i)")
    best = int(numeric_column(table, "rlnClassDistribution", path, "model_classes").argmax())
    name = table["rlnReferenceImage"].iloc[best]
    found = resolve_path(name, path)
    if found is None:
        raise InputError(f"{path}: rlnReferenceImage {name} of class {best + 1} is not there; give the map itself (--i)")
    return str(found), best + 1


def _write_moved(blocks: dict, match, target: Path, number: int | None) -> None:
    """The particles with moved poses; `number`: only those of this class (and those of none), the others have another map."""
    from vdamkit.io.star_tables import write_star
    from vdamkit.symmetry import moved_angles_and_offsets

    table = blocks["particles"].copy()
    values = table[list(POSE)].to_numpy(float, copy=True)
    angles, offsets = moved_angles_and_offsets(values[:, :3], values[:, 3:], match)
    mine = slice(None)
    if number is not None and "rlnClassNumber" in table.columns:
        mine = table["rlnClassNumber"].isin([0, number]).to_numpy()
    for i, name in enumerate(POSE):
        values[mine, i] = (angles if i < 3 else offsets)[mine, i % 3]
        table[name] = values[:, i]
    write_star(target, blocks | {"particles": table})
