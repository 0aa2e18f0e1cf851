"""What a person sees and touches: the control panel, pictures, napari and the inline 3D view."""

from __future__ import annotations

from typing import Any

from vdamkit.errors import SettingsError


def open_panel(session: Any, truth: Any) -> Any:
    """The panel of a session; see :meth:`vdamkit.Session.panel`."""
    try:
        import ipywidgets  # noqa: F401
    except ImportError:
        raise SettingsError("the panel needs ipywidgets; pip install 'vdamkit[notebook]'") from None
    from vdamkit.notebook.panel import Panel

    if session._panel is not None:
        session._panel.close()
    session._panel = Panel(session, truth=truth)
    return session._panel


def open_view(session: Any, view: str, options: dict[str, Any]) -> Any:
    """A 3D view of a session; see :meth:`vdamkit.Session.show`."""
    from vdamkit.notebook.viewer import View

    try:
        return View(session, view=view, **options)
    except (TypeError, ValueError) as mistake:
        raise SettingsError(f"show: {mistake}") from None
