"""A smaller model that learns from the one that compression began with."""
