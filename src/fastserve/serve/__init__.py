"""The HTTP server: an OpenAI-compatible API over models of this process."""
