"""Parts of `make bench-recover`: each module has `run(options) -> dict` and `text(found) -> str`."""
