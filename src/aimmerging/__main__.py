"""`python -m aimmerging` is `aimmerging`."""

from aimmerging.cli import main

main()
