"""Networks of different depth: which layers correspond, and how depths are balanced."""
