"""Names of RELION's output files, and the blocks of its model and sampling files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.spatial import cKDTree

from vdamkit.io.particles import ParticleSet
from vdamkit.io.star_tables import Block
from vdamkit.sampling.euler import euler_to_matrix
from vdamkit.sampling.orientations import angular_step, orientation_grid
from vdamkit.sampling.point_groups import operators
from vdamkit.settings import Settings
from vdamkit.state import State
from vdamkit.vdam import schedule

VERSION_LINE = "version 50001"
"""Comment by which RELION 5 knows that it need not translate an older format."""

UNKNOWN = 999.0  # what RELION writes for an accuracy or a change that was not estimated


@dataclass(frozen=True)
class FileNames:
    """Names of the files of one mini-batch. Source: RELION ml_optimiser.cpp:write, ml_model.cpp:write."""

    folder: Path
    iteration: int
    classes: int

    @property
    def root(self) -> str:
        return f"run_it{self.iteration:03d}"

    def star(self, kind: str) -> Path:
        return self.folder / f"{self.root}_{kind}.star"

    @property
    def data(self) -> Path:
        return self.star("data")

    @property
    def model(self) -> Path:
        return self.star("model")

    @property
    def sampling(self) -> Path:
        return self.star("sampling")

    @property
    def optimiser(self) -> Path:
        return self.star("optimiser")

    def map(self, k: int) -> Path:
        """Map of class `k` (from 0)."""
        return self.folder / f"{self.root}_class{k + 1:03d}.mrc"

    def moment1(self, k: int, half: int) -> Path:
        """First moment of class `k` (from 0): half 0 of all classes are counted first, then half 1."""
        return self.folder / f"{self.root}_1moment{half * self.classes + k + 1:03d}.mrc"

    def moment2(self, k: int) -> Path:
        """Second moment of class `k` (from 0)."""
        return self.folder / f"{self.root}_2moment{k + 1:03d}.mrc"


def fourier_scale(particles: ParticleSet) -> float:
    """RELION's Fourier transforms of a map over ours (which carry 1/N³): N for 2D stacks, 1 for volumes.

    Source: RELION projector.cpp:computeFourierTransformMap (normfft).
    """
    return float(particles.box) if particles.is_stack2d else 1.0


# model.star -------------------------------------------------------------------------------------------


def model_blocks(names: FileNames, state: State, settings: Settings, particles: ParticleSet) -> dict[str, Block]:
    """All blocks of model.star. Source: RELION ml_model.cpp:write."""
    blocks: dict[str, Block] = {"model_general": _model_general(state, settings, particles)}
    blocks["model_classes"] = _model_classes(names, state, settings, particles)
    for k in range(names.classes):
        blocks[f"model_class_{k + 1}"] = _model_class(k, state, settings, particles)
    counts = np.bincount(particles.group_index, minlength=len(particles.group_names))
    blocks["model_groups"] = pd.DataFrame(
        {
            "rlnGroupNumber": np.arange(1, len(counts) + 1),
            "rlnGroupName": list(particles.group_names),
            "rlnGroupNrParticles": counts,
            "rlnGroupScaleCorrection": np.ones(len(counts)),
        }
    )
    for group, sigma2 in enumerate(state.sigma2):
        table = _shells(particles) | {"rlnSigma2Noise": sigma2 / state.grey_scale**2}
        blocks[f"model_optics_group_{group + 1}"] = pd.DataFrame(table)
    for k, probability in enumerate(state.class_probability):
        share = probability * _direction_shares(state, settings.search_symmetry, k)
        blocks[f"model_pdf_orient_class_{k + 1}"] = pd.DataFrame({"rlnOrientationDistribution": share})
    return blocks


def _direction_shares(state: State, symmetry: str, k: int) -> np.ndarray:
    """Which share of a class's particles is seen from each direction of the grid, by their best poses; the same for all
    directions where it has none.

    For the reader: no search takes it as a prior. (RELION's does where no angle has a prior of its own.)
    """
    rot, tilt = orientation_grid(state.healpix_order, symmetry).directions.T
    directions = euler_to_matrix(np.stack([rot, tilt, np.zeros_like(rot)], -1))[:, 2]
    mine = state.poses.class_number == k + 1
    if not mine.any():
        return np.full(len(rot), 1 / len(rot))
    mates = euler_to_matrix(state.poses.angles[mine])[:, 2] @ operators(symmetry)  # (operators, particles, 3)
    distance, nearest = cKDTree(directions).query(mates)
    seen = np.take_along_axis(nearest, distance.argmin(0)[None], 0)[0]
    return np.bincount(seen, minlength=len(rot)) / len(seen)


def _model_general(state: State, settings: Settings, particles: ParticleSet) -> dict[str, object]:
    """List of model_general; resolution in Å, sizes in px, prior widths in degrees (0: no prior)."""
    pmax, log_likelihood = _last_batch(state)
    widths = {
        "rlnSigmaPriorRotAngle": settings.rot_prior_width or 0.0,
        "rlnSigmaPriorTiltAngle": settings.tilt_prior_width or 0.0,
        "rlnSigmaPriorPsiAngle": settings.psi_prior_width or 0.0,
    }
    return {
        "rlnReferenceDimensionality": 3,
        "rlnDataDimensionality": 2 if particles.is_stack2d else 3,
        "rlnOriginalImageSize": particles.box,
        "rlnCurrentResolution": particles.box * particles.pixel_size / state.resolution_shell,
        "rlnCurrentImageSize": 2 * schedule.current_radius(state.resolution_shell, settings, particles.box),
        "rlnPaddingFactor": 1.0,
        "rlnIsHelix": 0,
        "rlnFourierSpaceInterpolator": 1,
        "rlnMinRadiusNnInterpolation": 10,
        "rlnPixelSize": particles.pixel_size,
        "rlnNrClasses": len(state.maps),
        "rlnNrBodies": 1,
        "rlnNrGroups": len(particles.group_names),
        "rlnNrOpticsGroups": len(particles.optics),
        "rlnTau2FudgeFactor": schedule.tau2_fudge(state.position(settings), settings),
        "rlnNormCorrectionAverage": 1.0,
        "rlnSigmaOffsetsAngst": state.sigma_offset,
        "rlnOrientationalPriorMode": int(any(widths.values())),
        **widths,
        "rlnLogLikelihood": log_likelihood,
        "rlnAveragePmax": pmax,
    }


def _last_batch(state: State) -> tuple[float, float]:
    """Mean Pmax and summed log-likelihood of the particles visited last; 0, 0 where none was."""
    poses = state.poses
    last = poses.last_visit.max(initial=0)
    if last == 0:
        return 0.0, 0.0
    visited = poses.last_visit == last
    return float(poses.pmax[visited].mean(dtype=np.float64)), float(poses.log_likelihood[visited].sum())


def _model_classes(names: FileNames, state: State, settings: Settings, particles: ParticleSet) -> pd.DataFrame:
    """Table of model_classes; resolution and offset accuracy in Å, rotation accuracy in degrees."""
    extent = particles.box * particles.pixel_size
    return pd.DataFrame(
        [
            {
                "rlnReferenceImage": names.map(k).as_posix(),
                "rlnGradMoment1": names.moment1(k, 0).as_posix(),
                "rlnGradMoment2": names.moment2(k).as_posix(),
                "rlnClassDistribution": float(state.class_probability[k]),
                "rlnAccuracyRotations": known(state.accuracy_rotation),
                "rlnAccuracyTranslationsAngst": known(state.accuracy_offset),
                "rlnEstimatedResolution": extent / _class_shell(k, state, settings),
                "rlnOverallFourierCompleteness": 1.0,
            }
            for k in range(names.classes)
        ]
    )


def known(value: float) -> float:
    """The value, or what RELION writes where it was not estimated."""
    return UNKNOWN if np.isnan(value) else float(value)


def _class_shell(k: int, state: State, settings: Settings) -> int:
    """Resolution shell of one class; before the first mini-batch, that of the start."""
    curve = state.data_vs_prior[k]
    if not curve.any():
        return state.resolution_shell
    return schedule.resolution_shell(curve, settings.min_resolution_shell, len(curve) - 2)


def _shells(particles: ParticleSet) -> dict[str, np.ndarray]:
    """Shell number and resolution (1/Å), `(N//2 + 1,)` each."""
    index = np.arange(particles.box // 2 + 1)
    return {
        "rlnSpectralIndex": index,
        "rlnResolution": index / (particles.box * particles.pixel_size),
    }


def _model_class(k: int, state: State, settings: Settings, particles: ParticleSet) -> pd.DataFrame:
    """Spectra of one class by shell, powers in RELION's units and the grey values of the data.

    rlnReferenceSigma2 is 1 / (mean weight), which the state holds as T tau2 / data_vs_prior; 0 where unknown.
    Source: RELION backprojector.cpp:updateSSNRarrays.
    """
    shells = _shells(particles)
    tau2 = state.tau2[k] * (fourier_scale(particles) / state.grey_scale) ** 2
    ssnr = state.data_vs_prior[k]
    T = schedule.tau2_fudge(state.position(settings), settings)
    angstrom = np.append(UNKNOWN, 1 / shells["rlnResolution"][1:])
    return pd.DataFrame(
        {
            **shells,
            "rlnAngstromResolution": angstrom,
            "rlnSsnrMap": ssnr,
            "rlnGoldStandardFsc": np.zeros(len(ssnr)),
            "rlnFourierCompleteness": np.ones(len(ssnr)),
            "rlnReferenceSigma2": np.where(ssnr > 0, T * tau2 / np.where(ssnr > 0, ssnr, 1), 0),
            "rlnReferenceTau2": tau2,
        }
    )


# sampling.star ----------------------------------------------------------------------------------------


def sampling_blocks(state: State, settings: Settings, pixel_size: float) -> dict[str, Block]:
    """Blocks of sampling.star; angles in degrees, offsets in Å. Source: RELION healpix_sampling.cpp:write."""
    general = {
        "rlnIs3DSampling": 1,
        "rlnIs3DTranslationalSampling": 1,
        "rlnHealpixOrder": state.healpix_order,
        "rlnSymmetryGroup": settings.search_symmetry,
        "rlnTiltAngleLimit": -91.0,
        "rlnPsiStep": angular_step(state.healpix_order),
        "rlnOffsetRange": state.offset_range,
        "rlnOffsetStep": state.offset_step,
        "rlnHelicalOffsetStep": -1.0,
        "rlnSamplingPerturbInstance": state.perturbation,
        "rlnSamplingPerturbFactor": settings.perturbation,
        "rlnHealpixOrderOriginal": settings.healpix_order,
        "rlnPsiStepOriginal": angular_step(settings.healpix_order),
        "rlnOffsetRangeOriginal": settings.offset_range * pixel_size,
        "rlnOffsetStepOriginal": settings.offset_step * pixel_size,
    }
    grid = orientation_grid(state.healpix_order, settings.search_symmetry)
    directions = pd.DataFrame(grid.directions, columns=["rlnAngleRot", "rlnAngleTilt"])
    return {"sampling_general": general, "sampling_directions": directions}
