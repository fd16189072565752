"""The torch backend: interprets the same graph on any torch device; the reference in tests."""
