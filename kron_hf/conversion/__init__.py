"""Trained models made Kronecker-sparse with data: `calibrating` does it, and `checks` says before whether it can.

`budget` is what a budget may choose from, `calibration` what comes of it.
"""

from kron_hf.conversion.calibrating import calibrate
from kron_hf.conversion.calibration import Calibration, budget_settings, install_layers
from kron_hf.conversion.checks import check_conversion

__all__ = ["Calibration", "budget_settings", "calibrate", "check_conversion", "install_layers"]
