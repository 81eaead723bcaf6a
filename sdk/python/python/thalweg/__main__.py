"""`python -m thalweg`: the `thalweg` binary, with all its commands."""

from ._service import main

main()
