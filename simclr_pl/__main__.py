"""``python -m simclr_pl`` is the command `simclr`."""

from simclr_pl.cli import main

main()
