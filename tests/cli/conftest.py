"""The photographs and the recipe of the experiments' tests."""

from ..experiment.conftest import photographs, pictures, recipe

__all__ = ["photographs", "pictures", "recipe"]
