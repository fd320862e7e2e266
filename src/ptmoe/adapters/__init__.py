"""The adapter folder: written, read, checked. It knows encoders, no models."""
