"""Choosing channel maps by alignment: ground costs, transport solvers, sweeps."""
