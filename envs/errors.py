"""What this project refuses itself, as against a bug in an environment, which has a traceback."""


class UsageError(SystemExit, ValueError):
    """Bad input, told in one sentence: uncaught, it ends the program with that and status 1."""
