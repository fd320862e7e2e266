"""A frozen base and its adapters as one model."""
