"""After the fusion: repair and refinement of the fused network."""
