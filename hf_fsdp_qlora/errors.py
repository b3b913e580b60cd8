"""The one exception for settings that cannot work, below every other module so that all of them can raise it."""


class ConfigError(ValueError):
    """A setting cannot be honoured. The message says what was got, what is needed and what to change."""
