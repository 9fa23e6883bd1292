"""The stages, in order: data, tokenizer, pretrain, report. One file each; `python -m pipelines STAGE` runs one."""
