"""Batches, read ahead: what training takes, the part of it that is a rank's, and who reads it."""
