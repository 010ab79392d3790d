"""Pages about training runs, to be opened in a browser."""

from keras_ebft.reports.pages import report

__all__ = ["report"]
