"""The one exception that is a user's mistake and not a defect of the program."""


class UserError(Exception):
    """What was found and what was expected, in one sentence; the command line prints it and exits with status 2."""
