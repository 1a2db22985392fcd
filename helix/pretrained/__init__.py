"""Pretrained models: a Hugging Face model partitioned in place, loaded in slices, decoding with a sharded cache."""
