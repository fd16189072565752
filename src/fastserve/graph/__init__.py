"""The computation as data: nodes, passes, memory plan."""
