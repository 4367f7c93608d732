"""The fusion methods, each a short composition of the parts of this package."""
