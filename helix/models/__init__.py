"""The dense and the mixture-of-experts transformer, and the whole-weight reference they are held against."""
