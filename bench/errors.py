"""The one error that speaks to the user."""


class UserError(Exception):
    """Something the user can mend: one line that says what is wrong and what to do.

    Caught once, in `bench/cli.py`, which prints the line and exits with code 2.
    """
