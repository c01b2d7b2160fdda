"""Replacements for modules that models import and that may not be installed: the stand-in for mlflow's names,
its check of type hints, and the loader that packages saved here contain. Only model processes load it."""
