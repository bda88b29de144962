"""The harness: runs that pretrain and fine-tune language models."""
