"""Training: the language model as a LightningModule, its run, curves and report."""
