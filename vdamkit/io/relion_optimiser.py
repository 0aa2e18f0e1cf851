"""RELION's optimiser file, the one that a continued job and the display open first."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import numpy as np

from vdamkit.io.particles import ParticleSet
from vdamkit.io.relion_model import UNKNOWN, FileNames, known
from vdamkit.settings import Settings
from vdamkit.state import State
from vdamkit.vdam import schedule


def optimiser_comments(names: FileNames, command: str) -> tuple[str, str]:
    """The two lines that head optimiser.star: program with version, and command line."""
    try:
        number = version("vdamkit")
    except PackageNotFoundError:
        number = "unknown"
    return f"vdamkit optimiser; version {number}", command or f"--o {(names.folder / 'run').as_posix()}"


def optimiser_block(names: FileNames, state: State, settings: Settings, particles: ParticleSet) -> dict[str, object]:
    """List of optimiser_general, every key that RELION 5 writes. Source: RELION ml_optimiser.cpp:write."""
    paths = particles.paths
    files = {
        "rlnOutputRootName": (names.folder / "run").as_posix(),
        "rlnModelStarFile": names.model.as_posix(),
        "rlnExperimentalDataStarFile": names.data.as_posix(),
        "rlnTomoTomogramsFile": paths.tomograms or "",
        "rlnTomoTrajectoriesFile": paths.trajectories or "",
        "rlnOrientSamplingStarFile": names.sampling.as_posix() if state.iteration > 0 else "None",
    }
    general = {
        "rlnCurrentIteration": state.iteration,
        "rlnNumberOfIterations": settings.mini_batches,
        "rlnDoSplitRandomHalves": 0,
        "rlnJoinHalvesUntilThisResolution": -1.0,
        "rlnAdaptiveOversampleOrder": 1,
        "rlnAdaptiveOversampleFraction": settings.adaptive_fraction,
        "rlnRandomSeed": settings.seed,
        "rlnParticleDiameter": settings.mask_diameter,
        "rlnWidthMaskEdge": 5,
        "rlnDoZeroMask": 1,
        "rlnDoSolventFlattening": int(settings.solvent != "none"),
        "rlnDoSolventFscCorrection": 0,
        **dict.fromkeys(("rlnSolventMaskName", "rlnSolventMask2Name", "rlnBodyStarFile", "rlnTauSpectrumName"), "None"),
        "rlnMaximumCoarseImageSize": -1,
        "rlnHighresLimitExpectation": -1.0,
        "rlnLowresLimitExpectation": -1.0,
        "rlnIncrementImageSize": settings.shell_increment,
        "rlnDoMapEstimation": 1,
        "rlnDoFastSubsetOptimisation": 0,
        "rlnDoExternalReconstruct": 0,
        "rlnDoBlush": 0,
        "rlnBlushNoSpectralTrailing": 0,
    }
    gradient = _gradient_entries(state, settings, particles)
    return files | general | gradient | _progress_entries(state, settings, particles)


def _gradient_entries(state: State, settings: Settings, particles: ParticleSet) -> dict[str, object]:
    """Schedules of the gradient optimisation; rlnSgdSubsetSize -1 where all particles are used."""
    n = len(particles)
    last = state.iteration == settings.mini_batches
    size = schedule.batch_size(state.position(settings), n, settings, last=last)
    ratio = settings.step_initial / settings.step_final if settings.step_final > 0 else 1.0
    return {
        "rlnDoGradientRefine": 1,
        "rlnDoStochasticGradientDescent": 1,
        "rlnGradEmIters": 0,
        "rlnGradHasConverged": 0,
        "rlnGradCurrentStepsize": schedule.step_size(state.position(settings), settings),
        "rlnGradSubsetOrder": 0,
        "rlnGradSuspendFinerSamplingIter": -1,
        "rlnGradSuspendLocalSamplingIter": -1,
        "rlnSgdInitialIterationsFraction": settings.ini_fraction,
        "rlnSgdFinalIterationsFraction": settings.fin_fraction,
        "rlnSgdMinimumResolution": 20.0,
        "rlnSgdInitialResolution": -1.0,
        "rlnSgdFinalResolution": -1.0,
        "rlnSgdInitialSubsetSize": schedule.batch_size(0, n, settings),
        "rlnSgdFinalSubsetSize": schedule.batch_size(max(0, settings.mini_batches - 1), n, settings),
        "rlnSgdMuFactor": settings.mu,
        "rlnSgdSkipAnneal": 0,
        "rlnSgdClassInactivityThreshold": 0.0,
        "rlnSgdSubsetSize": -1 if size >= n else size,
        "rlnSgdWriteEverySubset": settings.write_every,
        "rlnSgdStepsize": settings.step_final,
        "rlnSgdStepsizeScheme": "plain" if settings.step_scheme == "constant" else f"{ratio:g}-step",
        "rlnTau2FudgeScheme": "plain" if settings.T_scheme == "constant" or settings.T <= 1 else "",
        "rlnTau2FudgeArg": settings.T,
    }


def _progress_entries(state: State, settings: Settings, particles: ParticleSet) -> dict[str, object]:
    """Sampling, changes and what is off in this job; change of offsets √(mean |Δo|² / 2), Å, as in RELION."""
    extent = particles.box * particles.pixel_size
    offsets = float(np.sqrt(state.offset_change2 / 2))
    return {
        "rlnMaximumSignificantPoses": settings.max_significant,
        "rlnDoAutoRefine": 0,
        "rlnDoAutoSampling": int(settings.auto_sampling),
        "rlnAutoLocalSearchesHealpixOrder": 4,
        "rlnNumberOfIterWithoutResolutionGain": state.no_gain,
        "rlnBestResolutionThusFar": state.resolution_shell / extent,
        "rlnNumberOfIterWithoutChangingAssignments": 0,
        "rlnDoSkipAlign": 0,
        "rlnDoSkipRotate": 0,
        "rlnOverallAccuracyRotations": known(state.accuracy_rotation),
        "rlnOverallAccuracyTranslationsAngst": known(state.accuracy_offset),
        "rlnChangesOptimalOrientations": UNKNOWN,
        "rlnChangesOptimalOffsets": offsets,
        "rlnChangesOptimalClasses": 0.0,
        "rlnSmallestChangesOrientations": UNKNOWN,
        "rlnSmallestChangesOffsets": offsets,
        "rlnSmallestChangesClasses": 0,
        "rlnLocalSymmetryFile": "None",
        **_HELIX,
        "rlnHasConverged": 0,
        "rlnHasHighFscAtResolLimit": 0,
        "rlnHasLargeSizeIncreaseIterationsAgo": 0,
        "rlnDoCorrectNorm": 0,
        "rlnDoCorrectScale": 0,
        "rlnDoCorrectCtf": int(settings.correct_ctf),
        "rlnDoCenterClasses": 0,
        "rlnDoIgnoreCtfUntilFirstPeak": int(settings.ctf_intact_first_peak),
        "rlnCtfDataArePhaseFlipped": 0,
        "rlnDoOnlyFlipCtfPhases": 0,
        "rlnRefsAreCtfCorrected": 1,
        "rlnFixSigmaNoiseEstimates": 0,
        "rlnFixSigmaOffsetEstimates": 0,
        "rlnMaxNumberOfPooledParticles": settings.chunk_particles,
        **dict.fromkeys(("rlnOffsetRangeX", "rlnOffsetRangeY", "rlnOffsetRangeZ"), -1.0),
    }


_HELIX = {
    "rlnDoHelicalRefine": 0,
    "rlnIgnoreHelicalSymmetry": 0,
    "rlnFourierMask": "None",
    "rlnHelicalTwistInitial": 0.0,
    "rlnHelicalRiseInitial": 0.0,
    "rlnHelicalCentralProportion": 0.3,
    "rlnNrHelicalNStart": 1,
    "rlnHelicalMaskTubeInnerDiameter": -1.0,
    "rlnHelicalMaskTubeOuterDiameter": -1.0,
    "rlnHelicalSymmetryLocalRefinement": 0,
    "rlnHelicalSigmaDistance": -1.0,
    "rlnHelicalKeepTiltPriorFixed": 0,
}
