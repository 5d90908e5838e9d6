"""exportd hands finished export packages to the people allowed to have them."""

__version__ = "0.1.0"
