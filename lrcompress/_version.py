__version__ = "0.1.0"

#: The day of this version: a device whose clock says less has a wrong clock.
RELEASED = "2026-11-24"
