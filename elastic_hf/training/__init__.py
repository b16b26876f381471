"""From batches to weights and metrics."""
