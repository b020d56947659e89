"""Which tokens stand in row g: mixing, order, packing, and the two readers of rows."""
