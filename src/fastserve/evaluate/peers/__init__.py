"""Engines under measurement. Each file here runs in the interpreter that has its engine, not in ours: it
imports that engine and the standard library, and nothing of ours (but for our own engine).

An engine's module has a class `Engine(job)` with `version`, `weights` (the bits that it really keeps, for
readers) and `generate`, `embed` or both; `prepare(job, folder)` where it needs the model in another form.
`worker.py` is the script that drives them.
"""
