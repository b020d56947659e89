"""Looking at a dataset that is there: figures, and every byte checked."""
