"""Other people's adapter files, both ways: `peft` folders and `lycoris` (kohya) single files.

Both read and write plain tensors and know nothing of the packages themselves; the tests hold them against those. What
a format cannot hold is refused with the reason, or stored as an exact equal where there is one.
"""
