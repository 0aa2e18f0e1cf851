"""Settings: defaults, refusals that say what is allowed, immutability."""

import dataclasses

import numpy as np
import pytest

from vdamkit.errors import SettingsError
from vdamkit.settings import Settings

DEFAULTS = {
    "T": 4.0, "classes": 1, "mask_diameter": 230.0, "symmetry": "C1", "tilt_prior_width": None, "correct_ctf": True,
    "ctf_intact_first_peak": False, "healpix_order": 1, "offset_range": 6.0, "offset_step": 2.0, "perturbation": 0.5,
    "adaptive_fraction": 0.999, "max_significant": 100, "ini_fraction": 0.3, "fin_fraction": 0.2, "step_initial": 0.9,
    "step_final": 0.5, "momentum": 0.9, "second_momentum": 0.999, "mu": 0.9, "sigma_offset": 10.0,
    "min_resolution_shell": 5, "shell_increment": 10, "start_fraction": 0.07, "write_every": 10, "solvent": "mask",
}  # fmt: skip

# option, bad value, what the text must say besides the option and the value
BAD = [
    ("mini_batches", 0, "at least 1"),
    ("mini_batches", 10.5, "whole number"),
    ("mini_batches", "many", "whole number"),
    ("mini_batches", None, "needs a value"),
    ("mini_batches", True, "whole number"),
    ("mini_batches", float("nan"), "whole number"),
    ("mini_batches", float("inf"), "whole number"),
    ("T", -1, "between 0 and 1000"),
    ("T", float("nan"), "between 0 and 1000"),
    ("T", "four", "a number"),
    ("T", [4], "a number"),
    ("classes", 0, "between 1 and 50"),
    ("classes", 51, "between 1 and 50"),
    ("mask_diameter", 0, "at least 1"),
    ("mask_diameter", -230, "at least 1"),
    ("solvent", "flatten", "'mask'"),
    ("solvent", 1, "a word"),
    ("symmetry", "Cs", "I4"),
    ("symmetry", "", "C1"),
    ("symmetry", 6, "a word"),
    ("run_in_c1", 1, "True or False"),
    ("correct_ctf", "yes", "True or False"),
    ("tilt_prior_width", 0, "None"),
    ("tilt_prior_width", -1, "None"),
    ("psi_prior_width", 181, "180"),
    ("rot_prior_width", "wide", "a number"),
    ("threads", 0, "between 1 and 1024"),
    ("memory_budget", -0.1, "at least 0"),
    ("device_memory", float("inf"), "between 0.01 and"),
    ("chunk_particles", 0, "at least 1"),
    ("precision", "half", "'single'"),
    ("seed", -1, "at least 0"),
    ("healpix_order", 5, "between 0 and 4"),
    ("offset_step", 0, "at least"),
    ("perturbation", 0.6, "between 0 and 0.5"),
    ("adaptive_fraction", 1.1, "between 0.5 and 1"),
    ("step_scheme", "linear", "'sigmoid'"),
    ("T_scheme", "none", "'constant'"),
    ("momentum", 1.5, "between 0 and 1"),
    ("start_fraction", 0.6, "between 0 and 0.5"),
    ("batch_initial", 0, "at least 1"),
]


@pytest.mark.parametrize(("name", "value"), DEFAULTS.items())
def test_defaults(name, value):
    assert getattr(Settings(), name) == value


@pytest.mark.parametrize(("name", "value", "says"), BAD)
def test_bad_value_is_refused_with_name_value_and_remedy(name, value, says):
    for make in (lambda: Settings(**{name: value}), lambda: Settings().replace(**{name: value})):
        with pytest.raises(SettingsError) as caught:
            make()
        text = str(caught.value)
        assert name in text
        assert str(value).strip("[]") in text
        assert says in text
        assert "Traceback" not in text


@pytest.mark.parametrize(
    ("changes", "names"),
    [({"healpix_order": 3, "max_healpix_order": 2}, ["max_healpix_order", "healpix_order"]),
     ({"offset_range": 1, "offset_step": 2}, ["offset_range", "offset_step"]),
     ({"offset_range": 40, "offset_step": 0.1}, ["offset_range", "offset_step", "2.7e+08 shifts"])],
)  # fmt: skip
def test_options_that_contradict_each_other(changes, names):
    with pytest.raises(SettingsError) as caught:
        Settings(**changes)
    for name in (*names, *(str(v) for v in changes.values())):
        assert name in str(caught.value)


def test_frozen():
    settings = Settings()
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.T = 2
    assert hash(settings) == hash(Settings())


def test_replace_leaves_the_original():
    settings = Settings(T=3, symmetry="c6")
    other = settings.replace(T=1.5, tilt_prior_width=10)
    assert (settings.T, settings.tilt_prior_width) == (3.0, None)
    assert (other.T, other.tilt_prior_width, other.symmetry) == (1.5, 10.0, "C6")
    assert other.replace(T=3, tilt_prior_width=None) == settings


def test_unknown_option_is_named_with_the_known_ones():
    with pytest.raises(SettingsError) as caught:
        Settings().replace(tau=4)
    for word in ("'tau'", "tilt_prior_width", "mini_batches"):
        assert word in str(caught.value)


def test_values_get_their_types():
    settings = Settings(T=2, classes=np.int64(3), mask_diameter=np.float32(100), mini_batches=50.0)
    assert [type(getattr(settings, n)) for n in ("T", "classes", "mask_diameter", "mini_batches")] == [
        float,
        int,
        float,
        int,
    ]


def test_search_symmetry():
    assert Settings(symmetry="I").search_symmetry == "I2"
    assert Settings(symmetry="C6", run_in_c1=True).search_symmetry == "C1"


def test_dictionary_round_trip():
    settings = Settings(T=2, symmetry="D3", tilt_prior_width=12, threads=2)
    assert Settings(**settings.as_dict()) == settings


def test_every_option_has_flag_and_text():
    for option in dataclasses.fields(Settings):
        assert option.metadata["flag"]
        assert len(option.metadata["doc"]) > 10
    text = Settings.help()
    assert "--tau2_fudge" in text
    assert "mask_diameter = 230.0" in text


@pytest.mark.parametrize(
    ("given", "device"), [("0", "cuda:0"), ("", "cuda:0"), ("0,1", "cuda:0,cuda:1"), ("0:1", "cuda:0,cuda:1")]
)
def test_gpus_by_relions_flag(given, device):
    """--gpu as relion_refine takes it: a number, or several."""
    from vdamkit.cli_options import given_options

    assert given_options({"gpu": given})["device"] == device
