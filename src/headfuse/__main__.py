"""`python -m headfuse` is the command line."""

from headfuse.cli import main

main()
