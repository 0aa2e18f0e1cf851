"""Every option of the job, with its unit and its RELION flag. One table serves the library and the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from math import pi
from numbers import Integral
from typing import Any

from vdamkit.backend import device_numbers
from vdamkit.errors import SettingsError
from vdamkit.sampling.point_groups import parse_symmetry

COMPUTING = ("device", "threads", "device_memory")
"""Options that say where a session computes, and the arguments of :func:`vdamkit.backend.get_backend`."""


MOST_SHIFTS = 20_000  # of a search: their phases alone take a GiB


def _option(default: Any, flag: str, doc: str, *, group: str = "expert", low=None, high=None, choices=None) -> Any:
    metadata = {"flag": flag, "doc": doc, "group": group, "low": low, "high": high, "choices": choices}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """Options of a de novo 3D initial model; immutable and checked when made.

    ``Settings(T=2, symmetry="C6")``; change one with ``settings.replace(T=1)``. ``print(Settings.help())`` lists all
    with RELION's flags. Defaults are those of RELION's job (``pipeline_jobs.cpp:initialiseInimodelJob``) with the values of
    the tutorial where it recommends one.

    Raises
    ------
    SettingsError
        naming the option, the value seen and what is allowed.
    """

    # optimisation ------------------------------------------------------------------------------------------------
    mini_batches: int = _option(100, "--iter", "Number of VDAM mini-batches; sets the length of all schedules.",
                                group="optimisation", low=1)  # fmt: skip
    T: float = _option(4.0, "--tau2_fudge", "Regularisation parameter T at the end; annealed from 1 (see T_scheme).",
                       group="optimisation", low=0, high=1000)  # fmt: skip
    classes: int = _option(1, "--K", "Number of classes.", group="optimisation", low=1, high=50)
    mask_diameter: float = _option(230.0, "--particle_diameter", "Diameter in Å of the mask on particles and map.",
                                   group="optimisation", low=1)  # fmt: skip
    solvent: str = _option(
        "mask", "--flatten_solvent",
        "What is done to the map after every mini-batch: 'mask' multiplies it with the soft spherical mask (all that "
        "RELION 5 does, in spite of its label 'flatten and enforce non-negative solvent'); 'mask+non-negative' also sets "
        "negative density to zero; 'none' leaves it. Measured on an HIV-capsid twin (C6, 100 mini-batches), mean FSC to 20 Å "
        "with the true map in a 60 and a 100 Å sphere: 0.975 and 0.947 with the mask, 0.977 and 0.948 non-negative (100 "
        "stacks); 0.969 and 0.934 either way (40 volumes). Seeds differ more, so RELION's plain mask is the default.",
        group="optimisation", choices=("mask", "mask+non-negative", "none"))  # fmt: skip
    symmetry: str = _option("C1", "--sym", "Point group: C1, C2, ... Cn, D1, ... Dn, T, O, I (= I2), I1 ... I4.",
                            group="optimisation")  # fmt: skip
    run_in_c1: bool = _option(False, "(GUI) Run in C1 and apply symmetry later?",
                              "Compute in C1; at the end the axes are found and the final model is symmetrised.",
                              group="optimisation")  # fmt: skip
    tilt_prior_width: float | None = _option(None, "--sigma_tilt", "Width (degrees) of the prior on the tilt angle; "
                                             "None leaves it free.", group="optimisation")  # fmt: skip
    psi_prior_width: float | None = _option(None, "--sigma_psi", "Width (degrees) of the prior on psi. With picked surface "
                                            "normals it keeps the sign of the normal, which a tilt prior alone leaves "
                                            "open.", group="optimisation")  # fmt: skip
    rot_prior_width: float | None = _option(None, "--sigma_rot", "Width (degrees) of the prior on rot.",
                                            group="optimisation")  # fmt: skip

    # CTF ---------------------------------------------------------------------------------------------------------
    correct_ctf: bool = _option(True, "--ctf", "Do CTF correction (with the dose weights).", group="ctf")
    ctf_intact_first_peak: bool = _option(False, "--ctf_intact_first_peak", "Ignore CTFs until their first peak.",
                                          group="ctf")  # fmt: skip

    # compute -----------------------------------------------------------------------------------------------------
    device: str = _option("cpu", "--gpu", "Where to compute: 'cpu', 'cuda', 'cuda:1', or several GPUs, 'cuda:0,cuda:1'. "
                          "MPI has no meaning here: one process serves all.", group="compute")  # fmt: skip
    threads: int | None = _option(None, "--j", "Worker threads on the CPU, also for reading (RELION's parallel disc I/O); "
                                  "None uses all cores. The result does not depend on it.", group="compute",
                                  low=1, high=1024)  # fmt: skip
    memory_budget: float = _option(
        1.0, "--preread_images",
        "GiB of memory for particles that stay loaded. What does not fit is read again at each visit, so pre-reading "
        "everything means a large enough number, such as inf.", group="compute", low=0)  # fmt: skip
    device_memory: float | None = _option(
        None, "(--free_gpu_memory: left to others)",
        "GiB that a session may take on each GPU; None: 85 % of what is free. Where it proves too much, the work is done in "
        "halves.", group="compute", low=0.01, high=1e6)  # fmt: skip
    tf32: bool = _option(
        False, "(none)", "On a GPU, let tensor cores compute the coarse scores, their factors rounded to 10 bits: several "
        "times faster; log-likelihoods change by less than 0.1.", group="compute")  # fmt: skip
    chunk_particles: int = _option(
        100, "--pool", "Particles scored together on the CPU, about: more share rotations, fewer need less memory.",
        group="compute", low=1)  # fmt: skip
    scratch_dir: str | None = _option(None, "--scratch_dir", "Local folder to which particle files are copied when first "
                                      "read.", group="compute")  # fmt: skip
    precision: str = _option("single", "(compile time)", "Floating-point numbers of the heavy part.", group="compute",
                             choices=("single", "double"))  # fmt: skip
    write_every: int = _option(10, "--grad_write_iter", "RELION's files are written every so many mini-batches. Partial "
                               "results are never combined through disc: one process holds them.", group="compute",
                               low=1)  # fmt: skip

    # expert ------------------------------------------------------------------------------------------------------
    seed: int = _option(0, "--random_seed", "Seed of all random numbers.", low=0)
    healpix_order: int = _option(1, "--healpix_order", "First HEALPix order: 1, 2, 3 are 30, 15, 7.5 degrees (half that "
                                 "after oversampling).", low=0, high=4)  # fmt: skip
    max_healpix_order: int = _option(3, "(fixed at 3)", "Auto-sampling stops at this order.", low=0, high=4)
    auto_sampling: bool = _option(True, "--auto_sampling", "Refine angles and offsets every tenth mini-batch once the "
                                  "resolution stalls.")  # fmt: skip
    offset_range: float = _option(6.0, "--offset_range", "First search range of offsets, px.", low=0)
    offset_step: float = _option(2.0, "--offset_step", "First step of offsets, px (half that after oversampling).", low=1e-3)
    perturbation: float = _option(0.5, "--perturb", "Random offset of the grids, as a fraction of the step.", low=0, high=0.5)
    adaptive: bool = _option(True, "(--oversampling 1)", "Score a coarse grid and then the children of what is significant; "
                             "otherwise the fine grid is scored everywhere.")  # fmt: skip
    adaptive_fraction: float = _option(0.999, "--adaptive_fraction", "Share of the posterior that is kept.", low=0.5, high=1)
    max_significant: int = _option(100, "--maxsig", "Most coarse samples per class that are refined.", low=1)
    global_search_every: int | None = _option(
        None, "(none)", "1 searches all orientations at every mini-batch, as RELION does. n > 1 does so every n-th; between, "
        "particles visited before are searched around their last pose. None: 1, or 5 where a full coarse pass costs more than "
        "5 GFLOP per particle, on a GPU 10 (C1 at 15 degrees and finer).", low=1)  # fmt: skip
    local_range: float = _option(3.0, "(none)", "Radius of that neighbourhood, in coarse angular steps.", low=1)
    ini_fraction: float = _option(0.3, "--grad_ini_frac", "Share of mini-batches in the initial phase.", low=0, high=1)
    fin_fraction: float = _option(0.2, "--grad_fin_frac", "Share of mini-batches in the final phase.", low=0, high=1)
    batch_initial: int | None = _option(None, "--grad_ini_subset", "Particles per mini-batch in the initial phase; None: "
                                        "0.5 % of all, 200 to 5000; of one class at most a quarter.",
                                        low=1)  # fmt: skip
    batch_final: int | None = _option(None, "--grad_fin_subset", "Particles per mini-batch in the final phase; None: 10 % "
                                      "of all, 1000 to 50000, or all if fewer.", low=1)  # fmt: skip
    step_initial: float = _option(0.9, "--grad_stepsize (× 1.8)", "Step size at the start.", low=0, high=2)
    step_final: float = _option(0.5, "--grad_stepsize", "Step size at the end.", low=0, high=2)
    step_scheme: str = _option("sigmoid", "--grad_stepsize_scheme", "'sigmoid', or 'constant' (the final value).",
                               choices=("sigmoid", "constant"))  # fmt: skip
    T_scheme: str = _option("sigmoid", "--tau2_fudge_scheme", "'sigmoid': T stays near 1 until the initial phase ends; "
                            "'constant': T acts at once.", choices=("sigmoid", "constant"))  # fmt: skip
    momentum: float = _option(0.9, "(hard-coded)", "Decay λ1 of the first moments.", low=0, high=1)
    second_momentum: float = _option(0.999, "(hard-coded)", "Decay λ2 of the second moment.", low=0, high=1)
    mu: float = _option(0.9, "--mu", "Momentum of noise, priors and populations; 0 when all particles are used.", low=0, high=1)
    sigma_offset: float = _option(10.0, "--offset", "First width of the offset prior, Å.", low=1e-3, high=1e4)
    min_sigma_offset: float = _option(2**0.5, "--min_sigma2_offset (squared)", "Smallest width of it, Å.", low=0, high=1e4)
    min_resolution_shell: int = _option(5, "minres_map", "The resolution is never below this shell.", low=1)
    shell_increment: int = _option(10, "--incr_size", "Shells beyond the resolution that are refined.", low=1)
    start_fraction: float = _option(
        0.07, "(--ini_high, in Å)", "First resolution shell, as a fraction of the box.", low=0, high=0.5
    )
    noise_particles: int = _option(100, "--nr_parts_sigma2noise", "Particles per optics group for the first noise spectrum "
                                   "(RELION takes 10 tilt images).", low=1)  # fmt: skip
    start_particles: int = _option(100, "(one per optics group)", "Randomly turned particles averaged to a start map.", low=1)

    def __new__(cls, *_: Any, **options: Any) -> Settings:
        """Refuses names that no option has, where a dataclass would only raise a TypeError."""
        refuse_unknown(options)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for option in fields(self):
            object.__setattr__(self, option.name, _checked(option, getattr(self, option.name)))
        object.__setattr__(self, "symmetry", parse_symmetry(self.symmetry))
        for name in ("tilt_prior_width", "psi_prior_width", "rot_prior_width"):
            width = getattr(self, name)
            if width is not None and not 0 < width <= 180:
                raise SettingsError(
                    f"{name} is {width}; a prior width is in degrees, greater than 0 and at most 180 "
                    "(None, or -1 on the command line, means no prior)"
                )
        device_numbers(self.device)
        if self.max_healpix_order < self.healpix_order:
            raise SettingsError(
                f"max_healpix_order is {self.max_healpix_order}, below healpix_order {self.healpix_order}; raise it"
            )
        if self.offset_range < self.offset_step and self.offset_range != 0:
            raise SettingsError(
                f"offset_range is {self.offset_range} px, smaller than offset_step {self.offset_step} px; raise the range "
                "or lower the step"
            )
        shifts = 4 / 3 * pi * (self.offset_range / self.offset_step) ** 3
        if shifts > MOST_SHIFTS:
            raise SettingsError(
                f"offset_range is {self.offset_range:g} px in steps of {self.offset_step:g} px (offset_step), some "
                f"{shifts:.2g} shifts; at most {MOST_SHIFTS} are searched, so raise the step or lower the range"
            )

    @property
    def search_symmetry(self) -> str:
        """The group in force: C1 where the symmetry is only to be recorded."""
        return "C1" if self.run_in_c1 else self.symmetry

    @property
    def real(self) -> str:
        """Name of the real dtype in use."""
        return "float32" if self.precision == "single" else "float64"

    def replace(self, **changes: Any) -> Settings:
        """A copy with some options changed and everything checked again."""
        return dataclasses.replace(self, **changes)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as stored in checkpoints."""
        return {option.name: getattr(self, option.name) for option in fields(self)}

    @classmethod
    def help(cls) -> str:
        """All options with default, RELION's flag (in brackets what it has instead of one) and meaning, as text."""
        lines = [f"{o.name} = {o.default!r}   [{o.metadata['flag']}]\n    {o.metadata['doc']}" for o in fields(cls)]
        return "\n".join(lines)


def refuse_unknown(options: Iterable[str]) -> None:
    """Raises SettingsError for a name that no option has, with the one that was probably meant: RELION's, or misspelt."""
    known = {option.name: option.metadata["flag"].lstrip("-") for option in fields(Settings)}
    for name in options:
        if name in known:
            continue
        ours = [own for own, relions in known.items() if relions == name.lstrip("-").replace("-", "_")]
        close = ours or get_close_matches(name, known, 1)
        what = f"RELION's --{name} is {ours[0]} here" if ours else f"did you mean {close[0]}?" if close else ""
        raise SettingsError(f"there is no option {name!r}; {what or 'options are ' + ', '.join(sorted(known))}")


def whole_number(name: str, value: Any) -> int:
    """The value of an argument that counts. Raises SettingsError where it is no whole number, or below 0."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 0:
        raise SettingsError(f"{name} is {value!r}; it must be a whole number, at least 0")
    return int(value)


def _checked(option: dataclasses.Field, value: Any) -> Any:
    """The value in the option's type and range, or a SettingsError that says what is allowed."""
    optional = "None" in str(option.type)
    kind = str(option.type).replace("| None", "").strip()
    if value is None:
        if optional:
            return None
        raise SettingsError(f"{option.name} is None; it needs a value ({option.metadata['doc']})")
    wanted = {"int": "a whole number", "float": "a number", "bool": "True or False", "str": "a word"}[kind]
    try:
        if kind == "bool" and not isinstance(value, bool):
            raise ValueError
        if kind in ("int", "float") and isinstance(value, bool):
            raise ValueError
        if kind == "str" and not isinstance(value, str):
            raise ValueError
        typed = {"int": int, "float": float, "bool": bool, "str": str}[kind](value)
        if kind == "int" and not isinstance(value, int) and typed != float(value):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise SettingsError(f"{option.name} is {value!r}; it must be {wanted}") from None
    low, high, choices = (option.metadata[key] for key in ("low", "high", "choices"))
    if choices and typed not in choices:
        raise SettingsError(f"{option.name} is {value!r}; allowed are {', '.join(map(repr, choices))}")
    if kind in ("int", "float") and not ((low is None or typed >= low) and (high is None or typed <= high)):
        allowed = f"at least {low}" if high is None else f"between {low} and {high}"
        raise SettingsError(f"{option.name} is {value}; it must be {allowed}")
    return typed


def check_mask(settings: Settings, particles: Any) -> None:
    """The mask must fit the box of a particle set.

    Raises
    ------
    SettingsError
        naming diameter, box and the largest diameter that fits.
    """
    extent = particles.box * particles.pixel_size
    if settings.mask_diameter > extent:
        raise SettingsError(
            f"mask_diameter is {settings.mask_diameter:g} Å but the box is {particles.box} px of {particles.pixel_size:g} Å, "
            f"{extent:g} Å in all; use a smaller mask or extract with a larger box"
        )
