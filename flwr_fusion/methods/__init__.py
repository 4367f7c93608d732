"""The fusion methods, each a short composition of the parts of this package.

A method needs no registration: export it in ``flwr_fusion/__init__.py``, and it can be given to
`flwr_fusion.strategy.FusionStrategy`.
"""
