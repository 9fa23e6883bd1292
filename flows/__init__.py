"""Orchestration: when stages run, what is tried again, which gate opens. What depends on what is in dvc.yaml."""
