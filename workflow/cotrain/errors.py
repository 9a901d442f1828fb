"""Errors that a user can mend; the command line prints one sentence, without a traceback."""


class InputError(ValueError):
    """Something the user gave is wrong: says what was found, what was wanted, what to do."""
