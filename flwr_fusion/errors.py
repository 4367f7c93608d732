"""The one exception of the library."""


class FusionError(ValueError):
    """A model, client, tensor, group or option that cannot be used, with what to do about it."""
