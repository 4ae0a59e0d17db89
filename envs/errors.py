"""What the user got wrong, in one sentence; a bug in an environment keeps its traceback."""


class UsageError(SystemExit, ValueError):
    """Bad input, told in one sentence: uncaught, it ends the program with that and status 1."""
