"""Pretrained models: a Hugging Face model partitioned in place, loaded slice by slice, decoding with a sharded cache."""
