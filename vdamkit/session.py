"""The session: a mutable shell around immutable states. Nothing numerical happens here."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vdamkit import storage
from vdamkit.backend import Backend, get_backend
from vdamkit.backend.device import DeviceLost
from vdamkit.control import Control, alone
from vdamkit.edits import Edits
from vdamkit.errors import SettingsError
from vdamkit.history import History
from vdamkit.io.particles import ParticleSet, open_particles
from vdamkit.io.star_tables import working_folder
from vdamkit.settings import COMPUTING, Settings, check_mask, whole_number
from vdamkit.source import ParticleSource
from vdamkit.state import State, StepReport
from vdamkit.vdam.accuracy import changed_sampling
from vdamkit.vdam.advance import advance
from vdamkit.vdam.start import initial_state
from vdamkit.views import Views

if TYPE_CHECKING:
    from vdamkit.checks import JobCheck

T = TypeVar("T")

ONLY_AT_START = ("start_fraction", "noise_particles", "start_particles")
"""Options of which only state 0 is made."""


class Session(Edits, Views):
    """A de novo initial model that is advanced one mini-batch at a time.

    Parameters
    ----------
    optimisation_set: path of a RELION `optimisation_set.star`; or give `particles` and `tomograms` (and `trajectories`).
    settings: all options of the job; default :class:`Settings`.
    output: folder for RELION's files and the checkpoint; None keeps everything in memory until :meth:`save`.
    overwrite: replace a run that is in that folder, when the first files are written; else such a folder is refused.

    Examples
    --------
    >>> job = Session("Extract/job009/optimisation_set.star", Settings(symmetry="C6", tilt_prior_width=10))  # doctest: +SKIP
    >>> job.run(20); job.change(T=2); job.step(); job.undo()  # doctest: +SKIP

    Raises
    ------
    InputError, SettingsError, OutputError: one sentence with what is wrong, the value, the file and column, and the remedy.
    """

    def __init__(
        self,
        optimisation_set: str | Path | None = None,
        settings: Settings | None = None,
        *,
        particles: str | Path | None = None,
        tomograms: str | Path | None = None,
        trajectories: str | Path | None = None,
        output: str | Path | None = None,
        overwrite: bool = False,
        particle_set: ParticleSet | None = None,
    ):
        self.output = storage.folder_of(output) if output is not None else None
        self._replaces = self.output if overwrite else None
        self._started_in = Path(working_folder())  # where a relative output folder lies, whatever the process's folder is later
        self._folders: dict[Path, str] = {}  # whose files are this session's own, and the mark of its last checkpoint there
        if self.output is not None and not overwrite:
            storage.refuse_other_run(self, self.output)
        self.particles = particle_set or open_particles(
            optimisation_set, particles=particles, tomograms=tomograms, trajectories=trajectories
        )
        settings = settings or Settings()
        if not isinstance(settings, Settings):
            raise SettingsError(f"settings is a {type(settings).__name__}; give vdamkit.Settings(...)")
        check_mask(settings, self.particles)
        self._backend = _backend_for(settings)
        self._source = ParticleSource(self.particles, settings, self._backend)
        self._digest = ""  # of the particles, made when it is first written
        self._pending = settings
        self._history = History()
        self.previous_log: list[dict[str, Any]] = []  # of the runs before a resume
        self._earlier: list[StepReport] = []  # reports read back from it
        self._control = Control()
        self._lock = threading.RLock()  # of the options, which may change while a mini-batch runs in another thread
        self._starting = threading.RLock()  # of state 0; never asked for by who holds the other
        self._writing = threading.RLock()  # of the output folder; asked for after the one of state 0
        self._final_matches: tuple[int | None, list] = (None, [])  # the node last written, and its final model's symmetry
        self._panel: Any = None
        self.listeners: list[Callable[[str, float], None]] = []
        self.followers: list[Callable[[], None]] = []

    # where we are ---------------------------------------------------------------------------------------------------

    @property
    def settings(self) -> Settings:
        """Options that the next mini-batch will use."""
        return self._pending

    @property
    def state(self) -> State:
        """The current state (computing state 0 at the first call)."""
        self._ensure_start()
        return self._history.node.state

    @property
    def report(self) -> StepReport | None:
        """What the last mini-batch found."""
        return self._history.node.report if self._history else None

    @property
    def iteration(self) -> int:
        """Number of mini-batches behind the current state."""
        return self._history.node.iteration if self._history else 0

    @property
    def pixel_size(self) -> float:
        """Å per px of the maps."""
        return self.particles.pixel_size

    def line(self) -> list[int]:
        """Node numbers from the start to the current state."""
        return [node.number for node in self._history.line()]

    # moving ---------------------------------------------------------------------------------------------------------

    def check(self) -> JobCheck:
        """Headers only: what was found, what will run, memory and time, and every problem at once.

        See :func:`vdamkit.checks.check_job`.
        """
        from vdamkit.checks import check_job

        return check_job(self.particles, self._pending)

    @alone
    def step(self) -> StepReport:
        """One mini-batch. On any error or cancellation the state before it stays; nothing is lost.

        Like every edit and move in the history it is refused (SettingsError) while another thread does such a thing. Where
        its files cannot be written (OutputError) the mini-batch stays in memory, and :meth:`save` writes it.
        """
        self._ensure_start()
        with self._control.running():
            (state, report, note), settings = self._computed(self._advance)
        if note:
            self._history.remark(note)
        self._history.append(state, settings, report)
        self._tell()
        if self.output is not None:
            storage.after_step(self)
        return report

    @alone
    def run(self, n: int | None = None, *, progress: bool = False) -> StepReport | None:
        """``n`` times :meth:`step`; by default what is left of the schedule. Returns the last report.

        At the end of the schedule the final model is in the output folder, also where it could not be written before.
        """
        left = whole_number("n", n) if n is not None else max(0, self._pending.mini_batches - self.iteration)
        report = self.report
        if not progress:
            for _ in range(left):
                report = self.step()
        else:
            from vdamkit.progress import watch

            with watch(self, left) as bar:
                for _ in range(left):
                    report = self.step()
                    bar.landed(report)
        if n is None and self.output is not None:
            storage.finish(self)
        return report

    def cancel(self) -> None:
        """Ask a mini-batch or a run in another thread to stop; it raises :class:`Cancelled` at its next tick."""
        self._control.cancel()

    def pause(self) -> None:
        """Ask a running mini-batch (in another thread) to wait after its running chunk; :meth:`unpause` lets it go on.

        What it has computed so far is kept; :meth:`cancel` discards it.
        """
        self._control.pause()

    def unpause(self) -> None:
        """Let a paused mini-batch go on."""
        self._control.unpause()

    @property
    def paused(self) -> bool:
        """Whether a mini-batch is waiting for :meth:`unpause`."""
        return self._control.waiting

    def change(self, **options: Any) -> Settings:
        """Use other options from the next mini-batch on; checked now, recorded in the history.

        Before the first mini-batch in a symmetry that the maps do not have, they are turned onto its axes (with moments and
        poses), if they show them. Raises SettingsError and changes nothing where an option is wrong.
        """
        with self._starting if {"classes", "precision", *ONLY_AT_START} & set(options) else nullcontext(), self._lock:
            old, new = self._pending, self._pending.replace(**options)
            check_mask(new, self.particles)
            self._refuse_in_mid_run(new)
            same = all(getattr(new, name) == getattr(old, name) for name in COMPUTING)
            backend = self._backend if same else _backend_for(new)
            source = self._source.with_settings(new, backend)
            self._pending, self._backend, self._source = new, backend, source
        changed = [k for k in options if getattr(old, k) != getattr(new, k)]
        if self._history and changed:
            self._history.remark(", ".join(f"{k} {getattr(old, k)} → {getattr(new, k)}" for k in changed))
        return new

    def _refuse_in_mid_run(self, new: Settings) -> None:
        if self._history and new.classes != self._pending.classes:
            raise SettingsError(
                f"classes is {new.classes} but this run has {self._pending.classes}; in a notebook split_class, merge_classes "
                "and drop_class change their number, or start a new run"
            )
        if self._history and new.precision != self._pending.precision:
            raise SettingsError("precision cannot change in mid-run; start a new session")
        for name in ONLY_AT_START:
            if self._history and getattr(new, name) != getattr(self._pending, name):
                raise SettingsError(f"{name} only matters for the start, which this run has made; start a new session")

    @alone
    def undo(self, n: int = 1) -> int:
        """Go back `n` mini-batches; the settings in force there come back too. Returns the mini-batch reached."""
        self._ensure_start()
        return self._moved(self._history.undo(whole_number("n", n)))

    @alone
    def redo(self, n: int = 1) -> int:
        """Take back `n` undos. Returns the mini-batch reached."""
        return self._moved(self._history.redo(whole_number("n", n)))

    @alone
    def go_to(self, node: int) -> int:
        """Make a node of the history (a row of :attr:`history`) the current state. Returns its mini-batch."""
        return self._moved(self._history.go_to(node))

    def branch(self, note: str = "", **options: Any) -> Session:
        """An independent session that goes on from here; states are shared, files are not written."""
        self._ensure_start()
        other = object.__new__(Session)
        with self._lock:
            other.__dict__ |= self.__dict__
        other.output, other._replaces, other._folders, other.listeners, other.followers = None, None, {}, [], []
        other._history, other._control = self._history.copy(), Control()
        other._lock, other._starting, other._writing = threading.RLock(), threading.RLock(), threading.RLock()
        other._panel = None
        if note:
            other._history.remark(f"branch: {note}")
        if options:
            other.change(**options)
        return other

    def restart(self, **options: Any) -> Session:
        """An independent session on the same particles that begins anew, with some options changed, such as the seed."""
        settings = self._pending.replace(**options)
        return Session(settings=settings, particle_set=self.particles)

    # disc -----------------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path | None = None, *, final: bool = True, overwrite: bool = False) -> list[Path]:
        """Write RELION's files and the checkpoint to `folder` (default: the session's output).

        Raises OutputError where that folder holds another run, a branch's or its parent's included; `overwrite` replaces it.
        """
        target = storage.folder_of(folder) if folder is not None else storage.output_of(self)
        if target is None:
            raise SettingsError("no folder was given; use session.save('InitialModel/job010')")
        self._ensure_start()
        return storage.save(self, target, final=final, overwrite=overwrite)

    @classmethod
    def resume(
        cls, folder: str | Path, *, optimisation_set: str | Path | None = None, particles: str | Path | None = None,
        tomograms: str | Path | None = None, trajectories: str | Path | None = None, **options: Any,
    ) -> Session:  # fmt: skip
        """Continue from the checkpoint in `folder`: same state, settings and log, bit for bit.

        optimisation_set, particles, tomograms, trajectories: where the run's input lies now, if it was moved.
        options: to be changed, as by :meth:`change`; with ``device="cpu"`` a GPU's run goes on without one. Raises InputError
        where there is no checkpoint, or its particles are not found or are others now.
        """
        files = {"particles": particles, "tomograms": tomograms, "trajectories": trajectories}
        return storage.resume(cls, Path(folder), options, files | {"optimisation_set": optimisation_set})

    def free(self) -> None:
        """Give back the memory of kept particles, of sums, and all that is held on GPUs (each is filled again when needed)."""
        self._source.forget()
        self._backend.release()

    # inside ---------------------------------------------------------------------------------------------------------

    def _ensure_start(self) -> None:
        with self._starting:
            if self._history:
                return

            def start(settings: Settings, source: ParticleSource, backend: Backend) -> State:
                with backend.limits():
                    return initial_state(source, settings, backend)

            asked = self._pending.device
            state, settings = self._computed(start)
            lost = "" if settings.device == asked else f"; {asked} does not answer any more; goes on with device='cpu'"
            self._history.append(state, settings, None, note=f"start{lost}")
            if self.output is not None:
                storage.after_step(self)

    def _advance(self, settings: Settings, source: ParticleSource, backend: Backend) -> tuple[State, StepReport, str]:
        """The next mini-batch, on maps that have the symmetry of these settings; and what was done to give it to them."""
        node, note = self._history.node, ""
        state = node.state
        if settings.search_symmetry != node.in_force.search_symmetry:
            from vdamkit.symmetry.of_session import taken_up

            state, note = taken_up(self, settings)
        state = changed_sampling(state, node.in_force, settings, self.pixel_size)
        return *advance(state, settings, source, backend, self._tick), note

    def _in_group(self, settings: Settings) -> Settings:
        """Settings with the symmetry that the current maps have, where another is still to be taken up."""
        has = self._history.node.in_force
        return settings.replace(symmetry=has.symmetry, run_in_c1=has.run_in_c1)

    def _computed(self, work: Callable[..., T]) -> tuple[T, Settings]:
        """``work(settings, source, backend)`` and those settings; on the CPU where a GPU does not answer on the way."""
        with self._lock:
            settings, source, backend = self._pending, self._source, self._backend
        try:
            return work(settings, source, backend), settings
        except DeviceLost as problem:
            settings, source, backend = self._without_device(str(problem))
            return work(settings, source, backend), settings

    def _without_device(self, problem: str) -> tuple[Settings, ParticleSource, Backend]:
        """What computes when a GPU does not answer any more: the CPU, from the last state on."""
        with self._lock:
            self._pending = self._pending.replace(device="cpu")
            self._backend = _backend_for(self._pending)
            self._source = self._source.with_settings(self._pending, self._backend)
            if self._history:
                self._history.remark(f"{problem}; goes on with device='cpu'")
            return self._pending, self._source, self._backend

    def _tick(self, stage: str, fraction: float) -> None:
        self._say(stage, fraction)
        self._control.check(lambda: self._say("paused", fraction))

    def _say(self, stage: str, fraction: float) -> None:
        for listener in list(self.listeners):
            listener(stage, fraction)

    def _moved(self, elsewhere: bool) -> int:
        """After a move in the history, which may have led nowhere: then what was asked for meanwhile stays."""
        return self._arrive() if elsewhere else self.iteration

    def _arrive(self) -> int:
        """Take over the settings of the node that is current now; what computes stays what it is."""
        if self._history:
            with self._lock:
                now = self._pending
                here = {name: getattr(now, name) for name in COMPUTING}
                self._pending = self._history.node.settings.replace(**here)
                self._source = self._source.with_settings(self._pending, self._backend)
            self._tell()
        return self.iteration

    def _tell(self) -> None:
        """Tell whoever follows the session that it is elsewhere now."""
        for follower in list(self.followers):
            follower()


def _backend_for(settings: Settings) -> Backend:
    return get_backend(*(getattr(settings, name) for name in COMPUTING))
