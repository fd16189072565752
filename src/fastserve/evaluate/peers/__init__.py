"""Engines under measurement. Each file here runs in the interpreter that has its engine, not in ours: it
imports that engine and the standard library, and nothing of ours (but for our own engine).

An engine's module has a class `Engine(job)` with `version` and `generate`; `prepare(job, folder)` where it
needs the model in another form; `embed` where it does encoders. `worker.py` is the script that drives them.
"""
