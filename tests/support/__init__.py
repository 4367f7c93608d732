"""What the tests share: networks, an in-process grid, faults, services."""
