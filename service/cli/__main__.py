"""`python -m service.cli` is `imago`."""

from service.cli import main

main(prog_name="imago")
