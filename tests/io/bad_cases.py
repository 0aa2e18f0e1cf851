"""Mistakes in the input and what their error has to say: see test_bad_input.py."""

import numpy as np
from builders import BOX, Project

P, O, T, S = "particles", "optics", "tomograms.star", "tilt_series/01.star"


def cell(star, block, row, column, value):
    """A mutation that sets one cell."""
    return lambda project: project.set(star, block, row, column, value)


def drop(star, block, *columns):
    """A mutation that drops columns."""
    return lambda project: project.drop(star, block, *columns)


def particle(row, column, value):
    return cell("particles.star", P, row, column, value)


def optics(row, column, value):
    return cell("particles.star", O, row, column, value)


def remove_block(star, block):
    return lambda project: project.stars[star].pop(block)


def raw(star, content):
    return lambda project: project.raw.__setitem__(star, content)


def empty(star, block):
    return lambda project: project.stars[star].__setitem__(block, project.stars[star][block].iloc[:0])


def remove_file(name):
    return lambda project: (project.images.pop(name, None), project.stars.pop(name, None))


def image(name, array):
    return lambda project: project.images.__setitem__(name, array)


def patch(name, index, value):
    return lambda project: project.images[name].__setitem__(index, value)


def truncated(project: Project):
    project.write()
    name = next(iter(project.images))
    project.images[name] = (project.folder / name).read_bytes()[:-10]


def entry(column, value):
    def mutate(project):
        project.stars["optimisation_set.star"][""][column] = value

    return mutate


def short_row(project: Project):
    """The copy of particles.star stopped in its last row."""
    project.write()
    content = (project.folder / "particles.star").read_bytes().rstrip()
    project.raw["particles.star"] = content[: content.rindex(b"\t")]


def column_twice(project: Project):
    """As when two files are pasted together."""
    project.write()
    content = (project.folder / "particles.star").read_bytes()
    project.raw["particles.star"] = content.replace(b"_rlnUnknownColumn", b"_rlnAngleRot")


# name: (change of a valid project, parts of the error's text)
OPENING = {
    "particles file missing": (
        remove_file("particles.star"),
        ["optimisation_set.star", "rlnTomoParticlesFile", "particles.star", "correct the path"],
    ),
    "tomograms file missing": (
        remove_file("tomograms.star"),
        ["optimisation_set.star", "rlnTomoTomogramsFile", "tomograms.star", "correct the path"],
    ),
    "trajectories file missing": (
        entry("rlnTomoTrajectoriesFile", "motion.star"),
        ["optimisation_set.star", "rlnTomoTrajectoriesFile", "motion.star", "correct the path"],
    ),
    "particles entry empty": (
        entry("rlnTomoParticlesFile", ""),
        ["optimisation_set.star", "rlnTomoParticlesFile", "''", "give"],
    ),
    "set is another file": (
        raw("optimisation_set.star", b"data_x\n_rlnA 1\n"),
        ["optimisation_set.star", "rlnTomoParticlesFile", "give"],
    ),
    "set is a particle file": (
        raw("optimisation_set.star", b"data_particles\nloop_\n_rlnTomoName\n01\n"),
        ["optimisation_set.star", "is a particle file", "particles=", "tomograms="],
    ),
    "particles file empty": (raw("particles.star", b""), ["particles.star", "empty", "write it again"]),
    "particles file binary": (
        raw("particles.star", b"\x93NUMPY\x00"),
        ["particles.star", "not a STAR file", "give"],
    ),
    "last row cut off": (short_row, ["particles.star", "row 3", "rlnImageName", "''", "complete"]),
    "no particles block": (
        remove_block("particles.star", P),
        ["particles.star", "data_particles", "data_optics", "give"],
    ),
    "no optics block": (
        remove_block("particles.star", O),
        ["particles.star", "data_optics", "data_general", "give"],
    ),
    "no particles": (empty("particles.star", P), ["particles.star", "data_particles", "no rows", "give"]),
    "no optics groups": (empty("particles.star", O), ["particles.star", "data_optics", "no rows", "give"]),
    "no tomogram name": (
        drop("particles.star", P, "rlnTomoName"),
        ["particles.star", "data_particles", "rlnTomoName", "give"],
    ),
    "no image name": (drop("particles.star", P, "rlnImageName"), ["particles.star", "rlnImageName", "give"]),
    "no visible frames": (
        drop("particles.star", P, "rlnTomoVisibleFrames"),
        ["particles.star", "rlnTomoVisibleFrames", "give"],
    ),
    "no coordinate": (
        drop("particles.star", P, "rlnCenteredCoordinateZAngst"),
        ["particles.star", "rlnCenteredCoordinateZAngst", "give"],
    ),
    "no pixel size": (
        drop("particles.star", O, "rlnImagePixelSize"),
        ["particles.star", "data_optics", "rlnImagePixelSize", "give"],
    ),
    "angle NaN": (
        particle(1, "rlnAngleTilt", np.nan),
        ["particles.star", "row 2", "rlnAngleTilt", "nan", "correct"],
    ),
    "angle is text": (
        particle(2, "rlnAnglePsi", "ten"),
        ["particles.star", "row 3", "rlnAnglePsi", "'ten'", "correct"],
    ),
    "coordinate NaN": (
        particle(0, "rlnCenteredCoordinateXAngst", np.nan),
        ["particles.star", "row 1", "rlnCenteredCoordinateXAngst", "nan", "correct"],
    ),
    "coordinate infinite": (
        particle(2, "rlnCenteredCoordinateYAngst", np.inf),
        ["particles.star", "row 3", "rlnCenteredCoordinateYAngst", "inf", "correct"],
    ),
    "subtomogram angle NaN": (
        particle(1, "rlnTomoSubtomogramRot", np.nan),
        ["particles.star", "row 2", "rlnTomoSubtomogramRot", "nan", "correct"],
    ),
    "prior is text": (
        particle(1, "rlnAngleTiltPrior", "x"),
        ["particles.star", "row 2", "rlnAngleTiltPrior", "'x'", "correct"],
    ),
    "unknown optics group": (
        particle(1, "rlnOpticsGroup", 7),
        ["particles.star", "row 2", "rlnOpticsGroup", "value 7", "1, 2", "correct"],
    ),
    "unknown tomogram": (
        particle(1, "rlnTomoName", "1"),
        ["particles.star", "row 2", "rlnTomoName", "'1'", "tomograms.star", "add"],
    ),
    "section of a stack": (
        particle(1, "rlnImageName", "3@a.mrcs"),
        ["particles.star", "row 2", "rlnImageName", "'3@a.mrcs'", "give"],
    ),
    "visible frames too short": (
        particle(2, "rlnTomoVisibleFrames", "[1,1,1]"),
        ["particles.star", "row 3", "rlnTomoVisibleFrames", "'[1,1,1]'", "3 entries", "4 tilts", "use"],
    ),
    "visible frames not 0 or 1": (
        particle(0, "rlnTomoVisibleFrames", "[1,2,1,1,1]"),
        ["particles.star", "row 1", "rlnTomoVisibleFrames", "'[1,2,1,1,1]'", "write it as"],
    ),
    "visible frames no vector": (
        particle(0, "rlnTomoVisibleFrames", "11111"),
        ["particles.star", "row 1", "rlnTomoVisibleFrames", "'11111'", "write it as"],
    ),
    "box odd": (
        optics(1, "rlnImageSize", 9),
        ["particles.star", "data_optics row 2", "rlnImageSize", "value 9", "extract"],
    ),
    "box tiny": (
        optics(0, "rlnImageSize", 6),
        ["particles.star", "data_optics row 1", "rlnImageSize", "value 6", "extract"],
    ),
    "pixel size zero": (
        optics(0, "rlnImagePixelSize", 0.0),
        ["particles.star", "data_optics row 1", "rlnImagePixelSize", "value 0", "give"],
    ),
    "contrast in percent": (
        optics(1, "rlnAmplitudeContrast", 10),
        ["particles.star", "data_optics row 2", "rlnAmplitudeContrast", "value 10", "between 0 and 1", "fraction"],
    ),
    "column twice": (
        column_twice,
        ["particles.star", "data_particles", "rlnAngleRot", "remove"],
    ),
    "optics group twice": (
        optics(1, "rlnOpticsGroup", 1),
        ["particles.star", "data_optics row 2", "rlnOpticsGroup", "value 1", "once"],
    ),
    "stack flag odd": (
        lambda p: p.stars["particles.star"].__setitem__("general", {"rlnTomoSubTomosAre2DStacks": 2}),
        ["particles.star", "data_general", "rlnTomoSubTomosAre2DStacks", "value 2", "write"],
    ),
    "stack flag lost": (
        remove_block("particles.star", "general"),
        [
            "particles.star",
            "rlnImageDimensionality",
            "value 2",
            "rlnTomoSubTomosAre2DStacks",
            "set that flag",
        ],
    ),
    "no global block": (
        lambda p: p.stars[T].__setitem__("x", p.stars[T].pop("global")),
        ["tomograms.star", "data_global", "give"],
    ),
    "no hand": (drop(T, "global", "rlnTomoHand"), ["tomograms.star", "data_global", "rlnTomoHand", "give"]),
    "hand zero": (
        cell(T, "global", 1, "rlnTomoHand", 0),
        ["tomograms.star", "row 2", "rlnTomoHand", "value 0", "1 or -1"],
    ),
    "tomogram twice": (
        cell(T, "global", 1, "rlnTomoName", "01"),
        ["tomograms.star", "row 2", "rlnTomoName", "'01'", "rename"],
    ),
    "tilt series missing": (
        remove_file(S),
        ["tomograms.star", "row 1", "rlnTomoTiltSeriesStarFile", "tilt_series/01.star", "correct the path"],
    ),
    "no tilt angle": (
        drop(S, "01", "rlnTomoYTilt"),
        ["tilt_series/01.star", "data_01", "rlnTomoYTilt", "give"],
    ),
    "no dose": (
        drop(S, "01", "rlnMicrographPreExposure"),
        ["tilt_series/01.star", "rlnMicrographPreExposure", "give"],
    ),
    "defocus NaN": (
        cell(S, "01", 3, "rlnDefocusV", np.nan),
        ["tilt_series/01.star", "row 4", "rlnDefocusV", "nan", "correct"],
    ),
    "no tilts": (empty(S, "01"), ["tilt_series/01.star", "data_01", "no rows", "needs"]),
}

IMAGE, WEIGHTS = "rlnImageName", "rlnCtfImage"
# name: (kind of project, change, particle, parts of the error's text, found from the header alone)
LOADING = {
    "stack missing": (
        "stack",
        remove_file("sub/1_stack2d.mrcs"),
        1,
        [IMAGE, "sub/1_stack2d.mrcs", "restore"],
        True,
    ),
    "stack truncated": (
        "stack",
        truncated,
        0,
        [IMAGE, "0_stack2d.mrcs", "need 2304 bytes and 2294", "extract"],
        True,
    ),
    "stack is garbage": (
        "stack",
        image("sub/2_stack2d.mrcs", b"no image " * 300),
        2,
        [IMAGE, "not an MRC file", "extract"],
        True,
    ),
    "stack of another box": (
        "stack",
        image("sub/1_stack2d.mrcs", np.ones((4, 6, 6), "f4")),
        1,
        [IMAGE, "6 x 6 x 4", "8 x 8 x 4 or 8 x 8 x 5", "extract"],
        True,
    ),
    "stack with too few sections": (
        "stack",
        image("sub/2_stack2d.mrcs", np.ones((2, BOX, BOX), "f4")),
        2,
        [IMAGE, "8 x 8 x 2", "8 x 8 x 3", "extract"],
        True,
    ),
    "stack with NaN": (
        "stack",
        patch("sub/1_stack2d.mrcs", (2, 3, 4), np.nan),
        1,
        [IMAGE, "1_stack2d.mrcs", "nan at section 3", "remove"],
        False,
    ),
    "stack with a value beyond all measure": (
        "stack",
        patch("sub/1_stack2d.mrcs", (2, 3, 4), 1e30),
        1,
        [IMAGE, "1_stack2d.mrcs", "1e+30 at section 3", "at most 1e+15", "remove"],
        False,
    ),
    "stack all zero": (
        "stack",
        image("sub/1_stack2d.mrcs", np.zeros((4, BOX, BOX), "f4")),
        1,
        [IMAGE, "every value is 0", "remove"],
        False,
    ),
    "no visible tilt": (
        "stack",
        particle(0, "rlnTomoVisibleFrames", "[0,0,0,0,0]"),
        0,
        [IMAGE, "rlnTomoVisibleFrames is 0", "remove"],
        True,
    ),
    "volume missing": (
        "volume",
        remove_file("sub/1_data.mrc"),
        1,
        [IMAGE, "sub/1_data.mrc", "restore"],
        True,
    ),
    "volume truncated": ("volume", truncated, 0, [IMAGE, "0_data.mrc", "bytes", "extract"], True),
    "volume not cubic": (
        "volume",
        image("sub/0_data.mrc", np.ones((6, BOX, BOX), "f4")),
        0,
        [IMAGE, "8 x 8 x 6", "8 x 8 x 8", "extract"],
        True,
    ),
    "volume with infinity": (
        "volume",
        patch("sub/2_data.mrc", (0, 0, 0), np.inf),
        2,
        [IMAGE, "inf at section 1", "remove"],
        False,
    ),
    "volume all zero": (
        "volume",
        image("sub/2_data.mrc", np.zeros((BOX,) * 3, "f4")),
        2,
        [IMAGE, "every value is 0", "remove"],
        False,
    ),
    "weights missing": (
        "volume",
        remove_file("sub/1_weights.mrc"),
        1,
        [WEIGHTS, "sub/1_weights.mrc", "restore"],
        True,
    ),
    "weights of wrong shape": (
        "volume",
        image("sub/1_weights.mrc", np.ones((BOX, BOX, 4), "f4")),
        1,
        [WEIGHTS, "4 x 8 x 8", "5 x 8 x 16", "extract"],
        True,
    ),
    "weights all zero": (
        "volume",
        image("sub/1_weights.mrc", np.zeros((BOX, BOX, 5), "f4")),
        1,
        [WEIGHTS, "every value is 0", "remove"],
        False,
    ),
}
