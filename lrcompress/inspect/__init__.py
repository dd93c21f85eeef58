"""Look at a network before it is factorized, and check what the forms can represent.

for layer in layers:
    found = look(layer, statistics.get(layer.name), Terms(share=0.5))
    print(found.facts())
"""

from __future__ import annotations

from .layers import ENERGIES, Found, Terms, look
from .spectra import Spectrum

__all__ = ["ENERGIES", "Found", "Spectrum", "Terms", "look"]
