"""The CPU backend: lowers a graph to a plan of native kernel calls and runs whole steps."""
