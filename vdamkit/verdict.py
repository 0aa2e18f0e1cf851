"""Did it converge, and is the map more than a blob? In plain words, with figures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vdamkit.imaging.fsc import resolution_at, transform_fsc
from vdamkit.imaging.halfball import map_to_fourier
from vdamkit.sampling.euler import euler_to_matrix
from vdamkit.sampling.orientations import angular_step
from vdamkit.sampling.priors import OrientationPrior
from vdamkit.state import State
from vdamkit.vdam.schedule import current_radius
from vdamkit.vdam.start import Particles

LATEST = 5  # mini-batches that are looked at
SETTLED = 1.5  # grid steps that a particle with a settled pose turns by; the perturbed grid alone makes it about 0.8
GHOST = 0.1  # share of particles against the rest from which there may be an upside-down ghost in the map
SPOILT = 0.15  # share from which the map is not good: with a quarter its mean FSC falls from 0.97 to 0.62
BLURRED = 0.75  # a grid step that moves the mask's edge by this share of the resolution leaves a third of such detail there
CERTAIN = 0.25  # mean Pmax below which the map does not tell orientations apart


@dataclass(frozen=True)
class Verdict:
    """The judgement on a run; ``print(verdict)`` is meant for people."""

    good: bool
    figures: dict[str, float]
    sentences: tuple[str, ...]
    advice: tuple[str, ...]

    def __str__(self) -> str:
        head = "The map looks trustworthy." if self.good else "Look twice before you use this map."
        lines = [head, *(f"  · {s}" for s in self.sentences)]
        if self.advice:
            lines += ["What to try:", *(f"  → {a}" for a in self.advice)]
        return "\n".join(lines)


def judge(session, other=None) -> Verdict:
    """See :meth:`vdamkit.Session.verdict`."""
    figures: dict[str, float] = {}
    said: list[str] = []
    advice: list[str] = []
    good = [
        _agreement(session, figures, said, advice),
        _convergence(session, figures, said, advice),
        _sampling(session, figures, said, advice),
        _detail(session, figures, said, advice),
        _visits(session, figures, said, advice),
        _prior(session, figures, said, advice),
        _symmetry(session, said, advice),
    ]
    if other is not None:
        good.append(_second_seed(session, other, figures, said, advice))
    return Verdict(all(good), figures, tuple(said), tuple(advice))


def half_agreement(state: State, k: int, radius: int) -> np.ndarray:
    """FSC `(N//2 + 1,)` of the two pseudo-halves' targets of class `k`: map plus first moment, i.e. where each half alone
    would move the map.

    Poses are shared, so this is a check and no proof. Beyond the radius in use (px) there is nothing to compare.
    """
    reference = map_to_fourier(state.maps[k].astype(np.float64))
    m0, m1 = state.moment1[k].astype(np.complex128)
    return transform_fsc(m0 + reference, m1 + reference, radius)


def _agreement(session, figures: dict, said: list, advice: list) -> bool:
    state = session.state
    k = int(np.argmax(state.class_probability))
    box, px = session.particles.box, session.pixel_size
    if not state.moment1[k].any():
        said.append("No mini-batch has run yet.")
        advice.append("run some mini-batches, then ask again")
        return False
    curve = half_agreement(state, k, current_radius(state.resolution_shell, session.settings, box))
    resolution = box * px / state.resolution_shell
    figures["resolution"] = resolution
    figures["half_resolution"] = resolution_at(curve, 0.5, box, px)
    said.append(
        f"Resolution {resolution:.1f} Å: to there T × the map's power exceeds the noise (a larger T says more and proves "
        f"nothing). The two pseudo-halves' targets agree (FSC 0.5) to {figures['half_resolution']:.1f} Å."
    )
    # the first shells agree in any blob; a quarter of the mask's diameter is detail
    if figures["half_resolution"] > session.settings.mask_diameter / 4:
        advice.append("more mini-batches or particles, or check the CTF: the halves do not agree")
        return False
    return True


def _convergence(session, figures: dict, said: list, advice: list) -> bool:
    """Have orientations settled, and does the map tell them apart?

    Two failed runs may well agree: both end with the average of the particle over all orientations. What gives them away is
    that no pose is much better than the others.
    """
    reports = session.reports()[-LATEST:]
    if len(reports) < LATEST:
        said.append(f"Only {len(reports)} mini-batch(es) on record here; too few to judge convergence.")
        return session.iteration >= session.settings.mini_batches
    figures["angle_change"] = float(np.nanmedian([r.angle_change for r in reports]))
    figures["pmax"] = float(np.mean([r.pmax for r in reports]))
    step = angular_step(reports[-1].healpix_order) / 2
    said.append(
        f"Over the last {len(reports)} mini-batches a particle turned by {figures['angle_change']:.1f}° (median; the grid's "
        f"step is {step:g}°) and its best pose held {100 * figures['pmax']:.0f} % of the posterior."
    )
    settled = not figures["angle_change"] > SETTLED * step
    if not settled:
        advice.append(
            "more mini-batches: orientations still change by more than the grid's step (or the particle has a symmetry that is "
            "not imposed)"
        )
    if figures["pmax"] < CERTAIN:
        said.append("The map cannot tell orientations apart: it may be the average of the particle over all of them.")
        advice.append("a prior on tilt and psi if the picker knows the surface, a smaller mask, or another seed")
    return settled and figures["pmax"] >= CERTAIN


def _sampling(session, figures: dict, said: list, advice: list) -> bool:
    """Has the map seen orientations as fine as it could bear?

    RELION looks at the grid at every tenth mini-batch and leaves it as it is where resolution has just risen, so that a short
    job may end before its grid ever became finer. A grid of 15 degrees to the end costs a job of 30 mini-batches 0.03 of its
    mean FSC.
    """
    settings, reports = session.settings, session.reports()[-LATEST:]
    if session.iteration < settings.mini_batches or len(reports) < LATEST or not settings.auto_sampling:
        return True
    first, step = reports[0], angular_step(reports[0].healpix_order) / 2
    edge = np.radians(step) * settings.mask_diameter / 2
    figures["edge_step"] = float(edge)
    if first.healpix_order < settings.max_healpix_order and edge > BLURRED * figures.get("resolution", np.inf):
        said.append(
            f"At mini-batch {first.iteration} rotations were still scored {step:g}° apart, which moves the mask's edge by "
            f"{edge:.0f} Å: too coarse for the resolution reached."
        )
        advice.append("ten more mini-batches: the grid may become finer at every tenth, where resolution has not just risen")
    return True


def _detail(session, figures: dict, said: list, advice: list) -> bool:
    resolution, diameter = figures.get("resolution", np.inf), session.settings.mask_diameter
    figures["detail"] = diameter / resolution
    if figures["detail"] >= 4:
        blob = "" if figures.get("pmax", 1.0) < CERTAIN else ": more than a blob"
        said.append(f"The map resolves 1/{figures['detail']:.0f} of the mask's diameter{blob}.")
        return True
    said.append(f"The map resolves only 1/{figures['detail']:.1f} of the mask's diameter: it may be a blob.")
    lost = figures.get("pmax", 1.0) < CERTAIN  # then another seed and mask were advised already
    advice.append("more particles" if lost else "another seed, a smaller mask, or more particles")
    return False


def _visits(session, figures: dict, said: list, advice: list) -> bool:
    seen = session.state.poses.class_number > 0
    figures["visited"] = float(seen.mean())
    bad = len(session.state.bad_particles)
    if bad:
        said.append(f"Left out because their files cannot be used: {bad} of {len(seen)} particles.")
    never = int((~seen).sum()) - sum(not seen[i] for i in session.state.bad_particles)
    if never:
        said.append(f"Never drawn: {never} of {len(seen)} particles.")
        advice.append("score_all() (vdamkit run --score-all) gives every particle a pose against the final map")
    return True


def _prior(session, figures: dict, said: list, advice: list) -> bool:
    """Occupancy of the tilt prior, and signs of the upside-down ghost that a tilt prior alone permits."""
    settings, state = session.settings, session.state
    prior = OrientationPrior(settings.rot_prior_width, settings.tilt_prior_width, settings.psi_prior_width)
    source: Particles = session._source
    seen = state.poses.class_number > 0
    if not prior.active or not seen.any():
        return True
    ok = True
    if prior.tilt is not None and not np.isnan(source.angle_priors[seen, 1]).all():
        centre = source.angle_priors[seen, 1]
        away = np.abs(state.poses.angles[seen, 1] - np.where(np.isnan(centre), state.poses.angles[seen, 1], centre))
        figures["tilt_prior_spread"] = float(np.sqrt(np.mean(away**2)))
        said.append(f"Tilt angles lie {figures['tilt_prior_spread']:.1f}° (rms) from their prior of width {prior.tilt:g}°.")
        if figures["tilt_prior_spread"] > 1.8 * prior.tilt:
            ok = False
            advice.append("a wider tilt prior: particles pile up at its edge")
    if prior.tilt is not None and prior.psi is None and not np.isnan(source.angle_priors[seen, 2]).all():
        share = upside_down_share(state.poses.angles[seen], source.angle_priors[seen])
        figures["upside_down"] = share
        if share > GHOST:
            ghost = "a faint upside-down ghost may be" if share < SPOILT else "an upside-down ghost is"
            said.append(
                f"{100 * share:.0f} % of the particles point against the others relative to their picked normal: with a tilt "
                f"prior alone psi is free, so the normal's sign is, and {ghost} in the map."
            )
            advice.append("a psi prior (psi_prior_width=10, --sigma-psi 10), which keeps the sign of the normal")
            ok = ok and share < SPOILT
    return ok


def _symmetry(session, said: list, advice: list) -> bool:
    """Of a run in C1, does the final model that was written have the symmetry that it was given?"""
    settings, (node, matches) = session.settings, session._final_matches
    if settings.run_in_c1 and settings.symmetry == "C1":
        said.append("The run was to be in C1 with symmetry applied later, but no group was given: the final model is in C1.")
        advice.append("symmetry_scores() (vdamkit symmetry-scores) says which groups the map supports")
    if node != session._history.node.number:
        return True
    said += [f"The final model was symmetrised. {match}." for match in matches]
    doubtful = any(match.warning for match in matches)
    if doubtful:
        advice.append("another group, or the map in C1 (run_itNNN_class001.mrc): the map does not have that symmetry")
    return not doubtful


def upside_down_share(angles: np.ndarray, priors: np.ndarray) -> float:
    """Share (0 … 0.5) of particles whose z axis points into the minority hemisphere of the prior's z axis.

    `angles`, `priors` `(n, 3)` degrees; nan priors count as the angle 0 for rot, 90 for tilt, 0 for psi.
    """
    filled = np.where(np.isnan(priors), [0.0, 90.0, 0.0], priors)
    z = euler_to_matrix(angles)[:, :, 2]
    z0 = euler_to_matrix(filled)[:, :, 2]
    up = float(((z * z0).sum(1) > 0).mean())
    return min(up, 1 - up)


def _second_seed(session, other, figures: dict, said: list, advice: list) -> bool:
    from vdamkit.compare import align, resample

    settings, mine, theirs, px = session.settings, session.map, other.map, session.pixel_size
    if (other.pixel_size, len(theirs)) != (px, len(mine)):
        theirs = resample(theirs, other.pixel_size, px, len(mine))
    match = align(mine, theirs, px, radius=settings.mask_diameter / 2, threads=settings.threads)
    figures["second_seed_resolution"] = match.resolution
    said.append(f"The other run's map agrees with this one (FSC 0.5) to {match.resolution:.1f} Å after rigid alignment.")
    if match.resolution > settings.mask_diameter / 4:
        advice.append("a third seed: two runs do not agree, so at least one is wrong")
        return False
    return True
