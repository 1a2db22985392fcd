"""What each rank does and waits for: its phase, the record of its last collectives, and where ranks part."""
