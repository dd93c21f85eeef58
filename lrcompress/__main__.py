"""`python -m lrcompress` is the command `lrcompress`."""

from .cli import main

main()
