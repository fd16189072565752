"""What requests hold and answers look like: one file an API."""
