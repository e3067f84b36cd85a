"""The one exception that is a user's mistake and not a defect of the program."""


class UserError(Exception):
    """A user's mistake in one sentence: found and expected. The command line prints it and exits with status 2."""
