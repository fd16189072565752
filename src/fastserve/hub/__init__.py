"""Where models come from, and the local registry of those that are here."""
