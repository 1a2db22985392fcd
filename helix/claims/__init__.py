"""The claims ledger: every checkable claim of the papers, its verdict and its evidence."""
