"""What the six papers share. Of it, `common/machinery` need not be read to understand a paper."""


class UsageError(Exception):
    """Something the user can put right: one line with the option, its value and what is right."""
