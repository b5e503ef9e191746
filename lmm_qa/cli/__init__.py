"""The command `lmm-qa`."""
