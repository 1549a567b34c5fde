"""`python -m netdyno.bench` is the command `netdyno`."""

from .cli import main

main()
